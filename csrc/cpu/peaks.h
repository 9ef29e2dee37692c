// What this machine can do at most, measured: arithmetic on registers alone, and reads of memory.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/transform_tiles.h"

namespace fct::cpu {

// Operations a second (a multiply-add counts two) of the level's multiply-add for the precision, on registers alone,
// over about `seconds` on `threads` threads.
double peak_ops(Precision precision, Isa isa, int threads, double seconds);

// Reads every byte once with the widest loads there are; returns a sum, which nobody needs.
uint64_t read_all(const uint8_t* data, int64_t bytes);

// Bytes a second of reading `bytes` bytes again and again, each thread its own part, over about `seconds`.
double read_bandwidth(int64_t bytes, int threads, double seconds);

}  // namespace fct::cpu
