// The dtypes of rows: their order is the code by which Python names them, and Python reads names and bytes from here.
#pragma once

namespace fct {

struct DTypeFacts {
    const char* name;
    int bytes;
};

inline constexpr DTypeFacts kDTypes[] = {{"float32", 4}, {"float16", 2}, {"bfloat16", 2}, {"int8", 1}};
enum DTypeCode : int { kFloat32, kFloat16, kBFloat16, kInt8, kDTypeCount };
static_assert(sizeof(kDTypes) / sizeof(kDTypes[0]) == kDTypeCount, "a code for every dtype");
static_assert(kDTypes[kFloat32].bytes == 4 && kDTypes[kFloat16].bytes == 2 && kDTypes[kBFloat16].bytes == 2 &&
                  kDTypes[kInt8].bytes == 1,
              "codes and sizes in one order");

}  // namespace fct
