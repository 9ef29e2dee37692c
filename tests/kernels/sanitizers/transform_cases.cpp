// The transformation's kernels without Python: odd shapes, every level and precision, threads, against plain double
// loops; inputs and outputs end at a guard page. Built with sanitizers by run.sh, and for AArch64 by ../aarch64/run.sh.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/transform.h"
#include "guarded.h"

using namespace fct::cpu;

namespace {

struct Layer {
    int64_t d_in, d_out;
    bool relu;
    std::vector<float> weight, bias;
};

std::mt19937 rng(0);

float normal() {
    static std::normal_distribution<float> d;
    return d(rng);
}

std::vector<Layer> chain(const std::vector<int64_t>& widths, bool last_relu) {
    std::vector<Layer> layers;
    for (size_t i = 0; i + 1 < widths.size(); ++i) {
        Layer layer{widths[i], widths[i + 1], last_relu || i + 2 < widths.size(), {}, {}};
        for (int64_t k = 0; k < layer.d_in * layer.d_out; ++k)
            layer.weight.push_back(normal() * std::sqrt(2.0f / static_cast<float>(layer.d_in)));
        for (int64_t k = 0; k < layer.d_out; ++k) layer.bias.push_back(normal() * 0.1f);
        layers.push_back(std::move(layer));
    }
    return layers;
}

std::vector<double> reference(const std::vector<Layer>& layers, std::vector<double> x) {
    for (const Layer& layer : layers) {
        std::vector<double> y(static_cast<size_t>(layer.d_out));
        for (int64_t n = 0; n < layer.d_out; ++n) {
            double sum = layer.bias[static_cast<size_t>(n)];
            for (int64_t k = 0; k < layer.d_in; ++k)
                sum += x[static_cast<size_t>(k)] * layer.weight[static_cast<size_t>(n * layer.d_in + k)];
            y[static_cast<size_t>(n)] = layer.relu && sum < 0 ? 0 : sum;
        }
        x = std::move(y);
    }
    return x;
}

// int8 with one range for all channels, wide enough for what comes.
struct Quantised {
    std::vector<int8_t> weight;
    std::vector<float> scale, bias, mul, add;
};

Quantised quantise(const Layer& layer, bool behind_relu) {
    Quantised q;
    const float mul = behind_relu ? 255.0f / 8 : 255.0f / 10, add = behind_relu ? 0.0f : 127.5f;
    q.mul.assign(static_cast<size_t>(layer.d_in), mul);
    q.add.assign(static_cast<size_t>(layer.d_in), add);
    for (int64_t n = 0; n < layer.d_out; ++n) {
        float top = 1e-30f;
        for (int64_t k = 0; k < layer.d_in; ++k)
            top = std::fmax(top, std::fabs(layer.weight[static_cast<size_t>(n * layer.d_in + k)]));
        const float scale = top / 127 / mul;
        double zero = 0;
        for (int64_t k = 0; k < layer.d_in; ++k) {
            const float w = layer.weight[static_cast<size_t>(n * layer.d_in + k)];
            q.weight.push_back(static_cast<int8_t>(std::lround(w / mul / scale)));
            zero += static_cast<double>(q.weight.back()) * scale * add;
        }
        q.scale.push_back(scale);
        q.bias.push_back(static_cast<float>(layer.bias[static_cast<size_t>(n)] - zero));
    }
    return q;
}

int failures = 0;

void check(bool ok, const char* what, Isa isa, int precision, int64_t n) {
    if (ok) return;
    ++failures;
    std::printf("FAILED: %s (%s, precision %d, %lld rows)\n", what, isa_name(isa), precision,
                static_cast<long long>(n));
}

void run_case(const std::vector<int64_t>& a, const std::vector<int64_t>& b, std::vector<int64_t> m, Isa isa,
              Precision precision) {
    m.insert(m.begin(), a.back() + b.back());
    const std::vector<Layer> chains[3] = {chain(a, true), chain(b, true), chain(m, false)};
    std::vector<std::vector<Quantised>> quantised(3);
    std::vector<LayerSpec> specs[3];
    for (size_t c = 0; c < 3; ++c) {
        for (size_t i = 0; i < chains[c].size(); ++i) quantised[c].push_back(quantise(chains[c][i], c == 2 || i > 0));
        for (size_t i = 0; i < chains[c].size(); ++i) {
            const Layer& l = chains[c][i];
            const Quantised& q = quantised[c][i];
            if (precision == Precision::int8) {
                specs[c].push_back({q.weight.data(), q.scale.data(), q.bias.data(), q.mul.data(), q.add.data(), l.d_in,
                                    l.d_out, l.relu, precision});
            } else {
                specs[c].push_back(
                    {l.weight.data(), nullptr, l.bias.data(), nullptr, nullptr, l.d_in, l.d_out, l.relu, precision});
            }
        }
    }
    const PackedTransform packed(specs[0], specs[1], specs[2], false, isa);
    const double allowed = precision == Precision::fp32 ? 1e-5 : precision == Precision::bf16 ? 3e-2 : 2e-1;
    std::vector<float> first;
    for (const int64_t n : {int64_t{130}, int64_t{29}, int64_t{15}, int64_t{7}, int64_t{3}, int64_t{1}}) {
        const int64_t d_a = a.front(), d_b = b.front(), d = m.back();
        const Guarded<float> old(static_cast<size_t>(n * d_a)), side(static_cast<size_t>(n * d_b)),
            out(static_cast<size_t>(n * d));
        std::mt19937 rows(1);
        std::normal_distribution<float> value;
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t k = 0; k < d_a; ++k) old.data[i * d_a + k] = value(rows);
            for (int64_t k = 0; k < d_b; ++k) side.data[i * d_b + k] = value(rows);
        }
        for (const int threads : {1, 2, 3}) {
            std::memset(out.data, 0x7f, static_cast<size_t>(n * d) * 4);
            packed.run({old.data, DType::f32, d_a, d_a, nullptr, 0, 0},
                       {side.data, DType::f32, d_b, d_b, nullptr, 0, 0}, {out.data, DType::f32, d, d, nullptr, 0, 0}, n,
                       threads, {});
            if (first.empty()) first.assign(out.data, out.data + n * d);
            check(std::memcmp(first.data(), out.data, static_cast<size_t>(n * d) * 4) == 0,
                  "bits depend on threads or batch", isa, static_cast<int>(precision), n);
        }
        double wrong = 0, all = 0;
        for (int64_t i = 0; i < n && i < 30; ++i) {
            std::vector<double> x = reference(chains[0], {old.data + i * d_a, old.data + (i + 1) * d_a});
            const std::vector<double> y = reference(chains[1], {side.data + i * d_b, side.data + (i + 1) * d_b});
            x.insert(x.end(), y.begin(), y.end());
            const std::vector<double> want = reference(chains[2], x);
            for (int64_t k = 0; k < d; ++k) {
                const double off = out.data[i * d + k] - want[static_cast<size_t>(k)];
                wrong += off * off;
                all += want[static_cast<size_t>(k)] * want[static_cast<size_t>(k)];
            }
        }
        check(std::sqrt(wrong / all) < allowed, "far from the reference", isa, static_cast<int>(precision), n);
    }
}

// 16-bit rows in and out at odd addresses: the same bits as at even ones.
void run_misaligned(Isa isa, DType dtype) {
    const std::vector<Layer> chains[3] = {chain({19, 11}, true), chain({7, 5}, true), chain({16, 21}, false)};
    std::vector<LayerSpec> specs[3];
    for (size_t c = 0; c < 3; ++c)
        for (const Layer& l : chains[c])
            specs[c].push_back({l.weight.data(), nullptr, l.bias.data(), nullptr, nullptr, l.d_in, l.d_out, l.relu,
                                Precision::fp32});
    const PackedTransform packed(specs[0], specs[1], specs[2], false, isa);
    constexpr int64_t n = 17, d[3] = {19, 7, 21};
    const Guarded<uint8_t> even[3] = {Guarded<uint8_t>(2 * n * d[0]), Guarded<uint8_t>(2 * n * d[1]),
                                      Guarded<uint8_t>(2 * n * d[2])};
    const Guarded<uint8_t> odd[3] = {Guarded<uint8_t>(2 * n * d[0] + 1), Guarded<uint8_t>(2 * n * d[1] + 1),
                                     Guarded<uint8_t>(2 * n * d[2] + 1)};
    for (size_t i = 0; i < 2; ++i) {
        for (int64_t k = 0; k < n * d[i]; ++k) {
            const uint16_t value = static_cast<uint16_t>(0x3800u + rng() % 0x0800u);  // finite in both dtypes
            std::memcpy(even[i].data + 2 * k, &value, 2);
        }
        std::memcpy(odd[i].data, even[i].data, static_cast<size_t>(2 * n * d[i]));
    }
    const auto run = [&](const Guarded<uint8_t>(&rows)[3]) {
        const auto view = [&](size_t i) { return RowsView{rows[i].data, dtype, d[i], d[i], nullptr, 0, 0}; };
        packed.run(view(0), view(1), view(2), n, 2, {});
    };
    run(even);
    run(odd);
    check(std::memcmp(even[2].data, odd[2].data, static_cast<size_t>(2 * n * d[2])) == 0, "bits depend on alignment",
          isa, 0, n);
}

}  // namespace

int main() {
    int cases = 0;
    for (int level = 0; level <= static_cast<int>(detected_isa()); ++level)
        for (const DType dtype : {DType::f16, DType::bf16}) {
            run_misaligned(static_cast<Isa>(level), dtype);
            ++cases;
        }
    for (int level = 0; level <= static_cast<int>(detected_isa()); ++level)
        for (int p = 0; p < kPrecisions; ++p) {
            const Isa isa = static_cast<Isa>(level);
            const Precision precision = static_cast<Precision>(p);
            run_case({7, 13, 11}, {3, 5}, {17, 9}, isa, precision);
            run_case({16, 33, 64}, {31, 40, 20}, {65, 70, 32}, isa, precision);
            run_case({1, 2}, {2, 1}, {10}, isa, precision);
            run_case({20, 300}, {20, 300}, {300, 15}, isa, precision);
            cases += 4;
        }
    std::printf("%d cases, %d failures\n", cases, failures);
    return failures == 0 ? 0 : 1;
}
