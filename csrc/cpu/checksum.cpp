#include "cpu/checksum.h"

#include <cstring>

namespace fct::cpu {
namespace {

constexpr uint64_t kP1 = 0x9E3779B185EBCA87ULL;
constexpr uint64_t kP2 = 0xC2B2AE3D27D4EB4FULL;
constexpr uint64_t kP3 = 0x165667B19E3779F9ULL;
constexpr uint64_t kP4 = 0x85EBCA77C2B2AE63ULL;
constexpr uint64_t kP5 = 0x27D4EB2F165667C5ULL;
constexpr size_t kStripe = 32;

uint64_t rotate(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

template <typename T>
T load(const unsigned char* p) {
    T value = 0;
    for (size_t i = 0; i < sizeof(T); ++i) value |= static_cast<T>(p[i]) << (8 * i);  // little endian everywhere
    return value;
}

uint64_t round(uint64_t lane, uint64_t input) { return rotate(lane + input * kP2, 31) * kP1; }

uint64_t merge(uint64_t hash, uint64_t lane) { return (hash ^ round(0, lane)) * kP1 + kP4; }

// The lanes live in registers for a whole run of stripes.
void stripes(uint64_t lane[4], const unsigned char* p, size_t count) {
    uint64_t a = lane[0], b = lane[1], c = lane[2], d = lane[3];
    for (; count; --count, p += kStripe) {
        a = round(a, load<uint64_t>(p));
        b = round(b, load<uint64_t>(p + 8));
        c = round(c, load<uint64_t>(p + 16));
        d = round(d, load<uint64_t>(p + 24));
    }
    lane[0] = a, lane[1] = b, lane[2] = c, lane[3] = d;
}

}  // namespace

Xxh64::Xxh64(uint64_t seed) : seed_(seed), lane_{seed + kP1 + kP2, seed + kP2, seed, seed - kP1} {}

void Xxh64::update(const void* data, size_t bytes) {
    const auto* p = static_cast<const unsigned char*>(data);
    size_t held = static_cast<size_t>(total_ % kStripe);
    total_ += bytes;
    if (held) {
        const size_t take = bytes < kStripe - held ? bytes : kStripe - held;
        std::memcpy(tail_ + held, p, take);
        p += take;
        bytes -= take;
        held += take;
        if (held < kStripe) return;
        stripes(lane_, tail_, 1);
    }
    stripes(lane_, p, bytes / kStripe);
    if (bytes % kStripe) std::memcpy(tail_, p + bytes / kStripe * kStripe, bytes % kStripe);
}

uint64_t Xxh64::digest() const {
    uint64_t hash = seed_ + kP5;
    if (total_ >= kStripe) {
        hash = rotate(lane_[0], 1) + rotate(lane_[1], 7) + rotate(lane_[2], 12) + rotate(lane_[3], 18);
        for (const uint64_t lane : lane_) hash = merge(hash, lane);
    }
    hash += total_;
    const unsigned char* p = tail_;
    size_t left = static_cast<size_t>(total_ % kStripe);
    for (; left >= 8; left -= 8, p += 8) hash = rotate(hash ^ round(0, load<uint64_t>(p)), 27) * kP1 + kP4;
    if (left >= 4) {
        hash = rotate(hash ^ (load<uint32_t>(p) * kP1), 23) * kP2 + kP3;
        left -= 4, p += 4;
    }
    for (; left; --left, ++p) hash = rotate(hash ^ (*p * kP5), 11) * kP1;
    hash = (hash ^ (hash >> 33)) * kP2;
    hash = (hash ^ (hash >> 29)) * kP3;
    return hash ^ (hash >> 32);
}

}  // namespace fct::cpu
