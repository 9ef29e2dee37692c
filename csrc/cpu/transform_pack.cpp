// Weights in the kernels' layout: made once for each h and precision, before any row is seen.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/convert.h"
#include "cpu/transform.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fct::cpu {
namespace {

constexpr int64_t kLine = 64;
// Activations read and written by a block's widest layer. Measured: from 2 to 12 tiles the speed differs by 3 %; many
// spare the weights' way from L3 or memory, few keep the activations in L2.
constexpr int64_t kBlockBytes = 2 << 20;
constexpr int64_t kMaxInt8Inputs = 66311;  // 255 * 127 * 66311 < 2^31

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Values of one 32-bit operand, and of one chunk of 64 bytes.
int64_t per_unit(Precision p) { return p == Precision::fp32 ? 1 : p == Precision::int8 ? 4 : 2; }
int64_t per_chunk(Precision p) { return 16 * per_unit(p); }
bool is_integer(Precision p) { return p == Precision::int8 || p == Precision::int16; }
Store store_of(Precision p) { return static_cast<Store>(p); }

std::vector<int64_t> straight(int64_t d) {
    std::vector<int64_t> slots(static_cast<size_t>(d));
    for (int64_t k = 0; k < d; ++k) slots[static_cast<size_t>(k)] = k;
    return slots;
}

// Throws where a sum of the layer's products could leave int32.
void check_sums(const LayerSpec& spec) {
    if (spec.precision == Precision::int8 && spec.d_in > kMaxInt8Inputs)
        throw std::invalid_argument("int8: expected at most " + std::to_string(kMaxInt8Inputs) +
                                    " inputs a layer, whose products fit int32, got " + std::to_string(spec.d_in));
    if (spec.precision != Precision::int16) return;
    const int16_t* weight = static_cast<const int16_t*>(spec.weight);
    for (int64_t n = 0; n < spec.d_out; ++n) {
        int64_t sum = 0;
        for (int64_t k = 0; k < spec.d_in; ++k) sum += std::abs(static_cast<int64_t>(weight[n * spec.d_in + k]));
        if (sum * kMostInt16 > std::numeric_limits<int32_t>::max())
            throw std::invalid_argument("int16: expected weights whose products fit int32, got an output whose " +
                                        std::to_string(spec.d_in) + " weights add up to " + std::to_string(sum));
    }
}

}  // namespace

Kernels kernels_of(Isa isa) {
    Kernels kernels;
    add_portable_kernels(kernels);
#if defined(__x86_64__)
    if (isa >= Isa::avx2) add_avx2_kernels(kernels);
    if (isa >= Isa::avx512) add_avx512_kernels(kernels);
    if (isa >= Isa::avx512_vnni) add_avx512_vnni_kernels(kernels);
    if (isa >= Isa::avx512_bf16) add_avx512_bf16_kernels(kernels);
#else
    (void)isa;
#endif
    return kernels;
}

Block::Block(size_t bytes) : bytes_(bytes) {
    constexpr int64_t kHuge = int64_t{2} << 20;
    const bool huge = static_cast<int64_t>(bytes) >= kHuge / 4;
    const int64_t align = huge ? kHuge : kLine;
    const size_t whole = static_cast<size_t>(round_up(std::max(static_cast<int64_t>(bytes), align), align));
    void* p = std::aligned_alloc(static_cast<size_t>(align), whole);
    if (p == nullptr) throw std::bad_alloc();
#ifdef __linux__
    if (huge) madvise(p, whole, MADV_HUGEPAGE);  // advice: refused is fine
#endif
    std::memset(p, 0, bytes);
    data_.reset(static_cast<uint8_t*>(p));
}

void Block::Free::operator()(uint8_t* p) const { std::free(p); }

// input_slots[k]: the column of the input tile that holds input k.
void PackedTransform::pack_weights(Packed& layer, const LayerSpec& spec,
                                   const std::vector<int64_t>& input_slots) const {
    const int64_t unit = per_unit(spec.precision), size = 4 / unit;
    for (int64_t n = 0; n < spec.d_out; ++n) {
        uint8_t* panel = layer.weights.data() + n / kernels_.cols * layer.panel_bytes + n % kernels_.cols * 4;
        for (int64_t k = 0; k < spec.d_in; ++k) {
            const int64_t slot = input_slots[static_cast<size_t>(k)];
            uint8_t* to = panel + slot / unit * kernels_.cols * 4 + slot % unit * size;
            const int64_t from = n * spec.d_in + k;
            if (spec.precision == Precision::bf16) {
                const uint16_t w = to_bf16(static_cast<const float*>(spec.weight)[from]);
                std::memcpy(to, &w, 2);
            } else {
                std::memcpy(to, static_cast<const uint8_t*>(spec.weight) + from * size, static_cast<size_t>(size));
            }
        }
    }
}

void PackedTransform::find_bands(Packed& layer) const {
    const int64_t chunk_bytes = kernels_.cols * 4 * 16;
    const auto zero = [&](int64_t panel, int64_t chunk) {
        const uint8_t* p = layer.weights.data() + panel * layer.panel_bytes + chunk * chunk_bytes;
        return std::all_of(p, p + chunk_bytes, [](uint8_t byte) { return byte == 0; });
    };
    for (int64_t first = 0; first < layer.panels; first += kMostPanels) {
        const int64_t last = std::min(layer.panels, first + kMostPanels);
        Band band = {layer.chunks, 0};
        for (int64_t p = first; p < last; ++p) {
            int64_t begin = 0, end = layer.chunks;
            while (begin < end && zero(p, begin)) ++begin;
            while (end > begin && zero(p, end - 1)) --end;
            if (begin < end) band = {std::min(band.begin, begin), std::max(band.end, end)};
        }
        layer.bands.push_back(band.begin < band.end ? band : Band{0, 1});  // the bias is written all the same
    }
}

// next: the layer that reads the output, its inputs from next_offset on; null where floats are wanted.
PackedTransform::Packed PackedTransform::pack_layer(const LayerSpec& spec, const std::vector<int64_t>& input_slots,
                                                    const LayerSpec* next, int64_t next_offset, Store store,
                                                    int64_t first_column) {
    check_sums(spec);
    const int64_t chunk = per_chunk(spec.precision);
    const int64_t out_chunk = store == Store::f32 ? 16 : store == Store::bf16 ? 32 : 64;
    const int64_t columns = round_up(spec.d_out, std::max<int64_t>(kernels_.cols, out_chunk));
    Packed layer;
    layer.chunks = (input_slots.back() + chunk) / chunk;
    layer.panels = columns / kernels_.cols;
    layer.panel_bytes = layer.chunks * 16 * kernels_.cols * 4;
    layer.first_column = first_column;
    layer.weights = Block(static_cast<size_t>(layer.panels * layer.panel_bytes));
    weight_bytes_ += layer.panels * layer.panel_bytes;
    pack_weights(layer, spec, input_slots);
    find_bands(layer);
    // v = sum * scale + bias, and for a next layer in int8 at once its input v * mul + add: relu(v) * mul equals
    // relu(v * mul), since mul > 0, and a layer behind a ReLU has add = 0.
    layer.scale.assign(static_cast<size_t>(columns), 1.0f);
    layer.bias.assign(static_cast<size_t>(columns), 0.0f);
    for (int64_t n = 0; n < spec.d_out; ++n) {
        const double scale = spec.scale ? spec.scale[n] : 1.0;
        const double mul = store == Store::u8 ? next->in_mul[next_offset + n] : 1.0;
        const double add = store == Store::u8 ? next->in_add[next_offset + n] : 0.0;
        layer.scale[static_cast<size_t>(n)] = static_cast<float>(scale * mul);
        layer.bias[static_cast<size_t>(n)] = static_cast<float>(spec.bias[n] * mul + add);
    }
    layer.lowest = spec.relu || store == Store::u8 ? 0.0f : -std::numeric_limits<float>::infinity();
    layer.tile = kernels_.tile[static_cast<int>(spec.precision)][static_cast<int>(store)];
    layer.wide = kernels_.wide[static_cast<int>(spec.precision)][static_cast<int>(store)];
    return layer;
}

// One chain of layers; `after` reads the last one's output, its inputs from after_offset on, in a tile that keeps them
// from after_column on.
void PackedTransform::pack_chain(std::vector<Packed>& chain, const std::vector<LayerSpec>& specs, int64_t in_bytes,
                                 std::vector<int64_t> slots, const LayerSpec* after, int64_t after_offset,
                                 int64_t after_column) {
    for (size_t i = 0; i < specs.size(); ++i) {
        const bool last = i + 1 == specs.size();
        const LayerSpec* next = last ? after : &specs[i + 1];
        if (next != nullptr && next->precision == Precision::int16)
            throw std::invalid_argument("int16: expected in layers that read rows alone, got one behind a layer");
        const Store store = next ? store_of(next->precision) : Store::f32;
        chain.push_back(pack_layer(specs[i], slots, next, last ? after_offset : 0, store, last ? after_column : 0));
        if (i == 0) chain.back().in_bytes = in_bytes;
        if (!last || after == nullptr) {
            const int64_t out_chunk = store == Store::f32 ? 16 : store == Store::bf16 ? 32 : 64;
            const int64_t columns = chain.back().panels * kernels_.cols;
            tile_bytes_ = std::max(tile_bytes_, round_up(columns, out_chunk) / out_chunk * kernels_.rows * kLine);
        }
        slots = straight(specs[i].d_out);
    }
}

void PackedTransform::pack_input_layout(const NetworkSpec& spec) {
    const LayerSpec &old = spec.old.front(), &side = spec.side.front();
    const auto same = [&](const LayerSpec& other, const float* mul, const float* add, int64_t offset, int64_t count) {
        if (other.precision != old.precision)
            throw std::invalid_argument("layers: expected one precision for all that read the rows");
        for (int64_t k = 0; is_integer(old.precision) && k < count; ++k)
            if (other.in_mul[offset + k] != mul[k] || other.in_add[offset + k] != add[k])
                throw std::invalid_argument("layers: expected the rows quantised one way for all that read them");
    };
    same(side, side.in_mul, side.in_add, 0, 0);
    if (spec.side_is_old) same(side, old.in_mul, old.in_add, 0, side.d_in);
    for (const LayerSpec& skip : spec.skip) {
        same(skip, old.in_mul, old.in_add, 0, old.d_in);
        if (!spec.side_is_old) same(skip, side.in_mul, side.in_add, old.d_in, side.d_in);
    }
    const int64_t chunk = per_chunk(old.precision);
    input_.store = store_of(old.precision);
    input_.old_padded = round_up(old.d_in, chunk);
    input_.side_padded = spec.side_is_old ? 0 : round_up(side.d_in, chunk);
    const int64_t columns = input_.old_padded + input_.side_padded;
    input_bytes_ = columns / chunk * kernels_.rows * kLine;
    input_.scale.assign(static_cast<size_t>(columns), 0.0f);
    input_.bias.assign(static_cast<size_t>(columns), 0.0f);
    if (!is_integer(old.precision)) return;
    std::copy(old.in_mul, old.in_mul + old.d_in, input_.scale.begin());
    std::copy(old.in_add, old.in_add + old.d_in, input_.bias.begin());
    if (spec.side_is_old) return;
    std::copy(side.in_mul, side.in_mul + side.d_in, input_.scale.begin() + input_.old_padded);
    std::copy(side.in_add, side.in_add + side.d_in, input_.bias.begin() + input_.old_padded);
}

PackedTransform::PackedTransform(const NetworkSpec& spec, Isa isa)
    : kernels_(kernels_of(isa)), side_is_old_(spec.side_is_old), length_(spec.length) {
    if (spec.old.empty() || spec.side.empty() || spec.mixer.empty() || spec.skip.size() > 1)
        throw std::invalid_argument("layers: expected at least one per chain, at most one skip");
    pack_input_layout(spec);
    const LayerSpec& join = spec.mixer.front();
    const int64_t d_old = spec.old.front().d_in, d_side = spec.side.front().d_in;
    const int64_t d_a = spec.old.back().d_out, d_b = spec.side.back().d_out;
    const int64_t step = std::max<int64_t>(kernels_.cols, per_chunk(join.precision));
    const int64_t offset = round_up(d_a, step);
    const int64_t side_bytes =
        side_is_old_ ? 0 : input_.old_padded / per_chunk(spec.old.front().precision) * kernels_.rows * kLine;
    pack_chain(old_, spec.old, 0, straight(d_old), &join, 0, 0);
    pack_chain(side_, spec.side, side_bytes, straight(d_side), &join, d_a, offset);
    joined_bytes_ = (offset + round_up(d_b, step)) / per_chunk(join.precision) * kernels_.rows * kLine;
    std::vector<int64_t> slots = straight(d_a);
    for (int64_t k = 0; k < d_b; ++k) slots.push_back(offset + k);
    pack_chain(mixer_, spec.mixer, 0, slots, nullptr, 0, 0);
    d_new_ = spec.mixer.back().d_out;
    if (!spec.skip.empty()) {
        slots = straight(d_old);
        for (int64_t k = 0; !side_is_old_ && k < d_side; ++k) slots.push_back(input_.old_padded + k);
        pack_chain(skip_, spec.skip, 0, slots, nullptr, 0, 0);
        skip_bytes_ = skip_[0].panels * kernels_.cols / 16 * kernels_.rows * kLine;
        mixer_.back().adds = true;
    }
    const int64_t widest = std::max({2 * tile_bytes_, input_bytes_ + joined_bytes_, joined_bytes_ + tile_bytes_});
    block_tiles_ = std::min(kMaxBlockTiles, std::max<int64_t>(1, kBlockBytes / widest));
    set_strides();
}

void PackedTransform::set_strides() {
    const auto chain = [&](std::vector<Packed>& layers, int64_t in, int64_t out) {
        for (Packed& layer : layers) layer.in_stride = layer.out_stride = tile_bytes_;
        layers.front().in_stride = in;
        layers.back().out_stride = out;
    };
    chain(old_, input_bytes_, joined_bytes_);
    chain(side_, input_bytes_, joined_bytes_);
    chain(mixer_, joined_bytes_, tile_bytes_);
    if (!skip_.empty()) chain(skip_, input_bytes_, skip_bytes_);
}

std::vector<const PackedTransform::Packed*> PackedTransform::layers() const {
    std::vector<const Packed*> all;
    for (const std::vector<Packed>* chain : {&old_, &side_, &mixer_, &skip_})
        for (const Packed& layer : *chain) all.push_back(&layer);
    return all;
}

}  // namespace fct::cpu
