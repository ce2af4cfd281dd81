// What the files that are compiled once for each processor level share.
//
// They must not use inline functions of the standard library: the linker would keep one copy of each for all levels,
// maybe one with AVX-512 in it. Everything else in them has no name outside of the file.
#pragma once

#include <cstdint>
#include <cstring>

// Inline functions of headers that files for different levels share: no copy may be left for the linker to choose.
#define DISTAFF_INLINE __attribute__((always_inline)) inline

namespace distaff {

constexpr int64_t kLanes = 16;      // of a vector, and columns in a panel of weights
constexpr int64_t kStepBytes = 64;  // of a panel

DISTAFF_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
DISTAFF_INLINE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
DISTAFF_INLINE constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace distaff
