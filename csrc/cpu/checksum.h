// XXH64 (Yann Collet; the format is published in xxHash's doc/xxhash_spec.md): a checksum at memory speed that
// `xxhsum -H64` computes too. It guards against torn, truncated and bit-flipped files, not against an adversary.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fct::cpu {

// Feed any number of pieces to update; digest may be asked at any time and depends on the bytes alone, not on how
// they were cut.
class Xxh64 {
  public:
    explicit Xxh64(uint64_t seed = 0);
    void update(const void* data, size_t bytes);
    uint64_t digest() const;

  private:
    uint64_t seed_;
    uint64_t lane_[4];
    uint64_t total_ = 0;
    unsigned char tail_[32];  // the total_ % 32 bytes that no stripe holds yet
};

}  // namespace fct::cpu
