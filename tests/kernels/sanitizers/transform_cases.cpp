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

// One range for all channels, wide enough for what comes; the weights in int8, or in int16 (wide).
struct Quantised {
    std::vector<int8_t> weight;
    std::vector<int16_t> wide;
    std::vector<float> scale, bias, mul, add;
    LayerSpec spec(const Layer& l) const {
        const void* w = wide.empty() ? static_cast<const void*>(weight.data()) : wide.data();
        return {w,          scale.data(), bias.data(),
                mul.data(), add.data(),   l.d_in,
                l.d_out,    l.relu,       wide.empty() ? Precision::int8 : Precision::int16};
    }
};

LayerSpec plain(const Layer& l, Precision precision) {
    return {l.weight.data(), nullptr, l.bias.data(), nullptr, nullptr, l.d_in, l.d_out, l.relu, precision};
}

Quantised quantise_wide(const Layer& layer) {
    Quantised q;
    const float mul = static_cast<float>(kMostInt16) / 6, add = 11.0f;
    q.mul.assign(static_cast<size_t>(layer.d_in), mul);
    q.add.assign(static_cast<size_t>(layer.d_in), add);
    for (int64_t n = 0; n < layer.d_out; ++n) {
        const float* w = layer.weight.data() + n * layer.d_in;
        float sum = 1e-30f, top = 1e-30f;
        for (int64_t k = 0; k < layer.d_in; ++k) {
            sum += std::fabs(w[k]);
            top = std::fmax(top, std::fabs(w[k]));
        }
        const float room = 2147483647.0f / static_cast<float>(kMostInt16) - static_cast<float>(layer.d_in);
        const float step = std::fmax(sum / room, top / 32767);
        double zero = 0;
        for (int64_t k = 0; k < layer.d_in; ++k) {
            q.wide.push_back(static_cast<int16_t>(std::lround(w[k] / step)));
            zero += static_cast<double>(q.wide.back()) * step / mul * add;
        }
        q.scale.push_back(step / mul);
        q.bias.push_back(static_cast<float>(layer.bias[static_cast<size_t>(n)] - zero));
    }
    return q;
}

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

// Two branches and a mixer, and with `more` a skip, a length, or the old rows in the side-information's place.
struct Extra {
    bool skip = false, side_is_old = false;
    float length = 0.0f;
};

struct Network {
    std::vector<Layer> chains[4];  // old, side, mixer, skip
    std::vector<Quantised> quantised[4];
    NetworkSpec spec;

    Network(const std::vector<int64_t>& a, const std::vector<int64_t>& b, const std::vector<int64_t>& m,
            Precision precision, const Extra& more)
        : chains{chain(a, true), chain(b, true), chain(m, false), {}} {
        if (more.skip) chains[3] = chain({a.front() + (more.side_is_old ? 0 : b.front()), m.back()}, false);
        std::vector<LayerSpec>* const specs[4] = {&spec.old, &spec.side, &spec.mixer, &spec.skip};
        for (size_t c = 0; c < 4; ++c) {
            for (size_t i = 0; i < chains[c].size(); ++i) {
                const bool on_rows = c != 2 && i == 0;
                quantised[c].push_back(on_rows && precision == Precision::int16 ? quantise_wide(chains[c][i])
                                                                                : quantise(chains[c][i], !on_rows));
            }
            for (size_t i = 0; i < chains[c].size(); ++i) {
                const bool integer = precision == Precision::int8 || precision == Precision::int16;
                specs[c]->push_back(integer ? quantised[c][i].spec(chains[c][i]) : plain(chains[c][i], precision));
            }
        }
        spec.side_is_old = more.side_is_old;
        spec.length = more.length;
    }

    std::vector<double> output(const float* old, const float* side) const {
        std::vector<double> x(old, old + chains[0][0].d_in), y(side, side + chains[1][0].d_in), rows = x;
        if (!spec.side_is_old) rows.insert(rows.end(), y.begin(), y.end());
        x = reference(chains[0], x);
        y = reference(chains[1], y);
        x.insert(x.end(), y.begin(), y.end());
        x = reference(chains[2], x);
        double squares = 0;
        const std::vector<double> added =
            chains[3].empty() ? std::vector<double>(x.size()) : reference(chains[3], rows);
        for (size_t k = 0; k < x.size(); ++k) {
            x[k] += added[k];
            squares += x[k] * x[k];
        }
        if (spec.length != 0.0f)
            for (double& v : x) v *= static_cast<double>(spec.length) / std::sqrt(squares);
        return x;
    }
};

void run_case(const std::vector<int64_t>& a, const std::vector<int64_t>& b, std::vector<int64_t> m, Isa isa,
              Precision precision, const Extra& more = {}) {
    m.insert(m.begin(), a.back() + b.back());
    const Network h(a, b, m, precision, more);
    const PackedTransform packed(h.spec, isa);
    const double allowed = precision == Precision::fp32 ? 1e-5 : precision == Precision::bf16 ? 3e-2 : 2e-1;
    std::vector<float> first;
    for (const int64_t n : {int64_t{130}, int64_t{29}, int64_t{15}, int64_t{7}, int64_t{3}, int64_t{1}}) {
        const int64_t d_a = a.front(), d_b = b.front(), d = m.back();
        const Guarded<float> old(static_cast<size_t>(n * d_a)), other(static_cast<size_t>(n * d_b)),
            out(static_cast<size_t>(n * d));
        std::mt19937 rows(1);
        std::normal_distribution<float> value;
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t k = 0; k < d_a; ++k) old.data[i * d_a + k] = value(rows);
            for (int64_t k = 0; k < d_b; ++k) other.data[i * d_b + k] = value(rows);
        }
        float* const side = more.side_is_old ? old.data : other.data;
        for (const int threads : {1, 2, 3}) {
            std::memset(out.data, 0x7f, static_cast<size_t>(n * d) * 4);
            packed.run({old.data, DType::f32, d_a, d_a, nullptr, 0, 0}, {side, DType::f32, d_b, d_b, nullptr, 0, 0},
                       {out.data, DType::f32, d, d, nullptr, 0, 0}, n, threads, {});
            if (first.empty()) first.assign(out.data, out.data + n * d);
            check(std::memcmp(first.data(), out.data, static_cast<size_t>(n * d) * 4) == 0,
                  "bits depend on threads or batch", isa, static_cast<int>(precision), n);
        }
        double wrong = 0, all = 0;
        for (int64_t i = 0; i < n && i < 30; ++i) {
            const std::vector<double> want = h.output(old.data + i * d_a, side + i * d_b);
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
    const Network h({19, 11}, {7, 5}, {16, 21}, Precision::fp32, {});
    const PackedTransform packed(h.spec, isa);
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
            run_case({37, 33}, {70, 33}, {65, 21}, isa, precision, {true, false, 0.0f});
            run_case({37, 20}, {70, 33}, {17}, isa, precision, {true, false, 0.9f});
            run_case({40, 33}, {40, 20}, {65, 70}, isa, precision, {true, true, 1.0f});
            run_case({40, 33, 10}, {40, 20}, {65, 9}, isa, precision, {false, true, 0.5f});
            cases += 8;
        }
    std::printf("%d cases, %d failures\n", cases, failures);
    return failures == 0 ? 0 : 1;
}
