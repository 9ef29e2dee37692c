// What Python and the kernels call by a number: the place in these tables is the code. Both sides take names and codes
// from here, Python through the extension (src/fct/native_codes.py).
#pragma once

namespace fct {

constexpr bool same_name(const char* a, const char* b) {
    for (; *a != '\0' && *a == *b; ++a, ++b) {
    }
    return *a == *b;
}

template <class T, int kCount>
constexpr int count_of(const T (&)[kCount]) {
    return kCount;
}

// ---- dtypes of rows ----
struct DTypeFacts {
    const char* name;
    int bytes;
};

inline constexpr DTypeFacts kDTypes[] = {{"float32", 4}, {"float16", 2}, {"bfloat16", 2}, {"int8", 1}};
enum DTypeCode : int { kFloat32, kFloat16, kBFloat16, kInt8, kDTypeCount };
static_assert(count_of(kDTypes) == kDTypeCount, "a code for every dtype");
static_assert(kDTypes[kFloat32].bytes == 4 && kDTypes[kFloat16].bytes == 2 && kDTypes[kBFloat16].bytes == 2 &&
                  kDTypes[kInt8].bytes == 1,
              "codes and sizes in one order");

// ---- metrics of a search ----
inline constexpr const char* kMetrics[] = {"l2", "ip", "cosine"};
enum MetricCode : int { kMetricL2, kMetricIP, kMetricCosine, kMetricCount };
static_assert(count_of(kMetrics) == kMetricCount, "a code for every metric");
static_assert(same_name(kMetrics[kMetricL2], "l2") && same_name(kMetrics[kMetricIP], "ip") &&
                  same_name(kMetrics[kMetricCosine], "cosine"),
              "codes and names in one order");

// ---- precisions of a layer on the CPU ----
inline constexpr const char* kPrecisionNames[] = {"fp32", "bf16", "int8", "int16"};
enum PrecisionCode : int { kFp32, kBf16, kInt8Layer, kInt16Layer, kPrecisionCount };
static_assert(count_of(kPrecisionNames) == kPrecisionCount, "a code for every precision");
static_assert(same_name(kPrecisionNames[kFp32], "fp32") && same_name(kPrecisionNames[kBf16], "bf16") &&
                  same_name(kPrecisionNames[kInt8Layer], "int8") && same_name(kPrecisionNames[kInt16Layer], "int16"),
              "codes and names in one order");

// ---- kinds of a gallery's shadow on a GPU ----
inline constexpr const char* kShadowKinds[] = {"bf16", "int8"};
enum ShadowCode : int { kBf16Shadow, kInt8Shadow, kShadowCount };
static_assert(count_of(kShadowKinds) == kShadowCount, "a code for every kind");
static_assert(same_name(kShadowKinds[kBf16Shadow], "bf16") && same_name(kShadowKinds[kInt8Shadow], "int8"),
              "codes and names in one order");

}  // namespace fct
