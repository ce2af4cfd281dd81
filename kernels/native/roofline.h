// What this processor can do at most, for benchmarks to compare with: reading memory, and multiplying in registers.
#pragma once

#include <cstdint>

namespace distaff {

// Compiled once for each processor level.
struct RooflineKernels {
  // Reads `bytes` (a multiple of 256) and returns a number that depends on them.
  float (*read)(const uint8_t* from, int64_t bytes);
  // Multiplies and adds `rounds` times what kPeakSteps steps of weights would take, in float32, bfloat16 or int8 (the
  // WeightKind's number). All factors are the numbers in `word`; returns a sum of all products, and a bit more.
  float (*multiply)(int32_t kind, int64_t rounds, int32_t word);
};

constexpr int64_t kPeakSteps = 16;

extern const RooflineKernels kRooflineGeneric, kRooflineAvx2, kRooflineAvx512, kRooflineAvx512Vnni,
    kRooflineAvx512Bf16, kRooflineAmx;

}  // namespace distaff
