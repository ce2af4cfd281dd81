// Vectors of float32 as wide as the level that a file is compiled for, through the vector extensions of GCC and Clang.
//
// A kernel written with them is compiled once a level, in a file of its own that CMake gives that level's instruction
// sets and that defines DISTAFF_LEVEL, the namespace all of it lives in. Such a file must not use inline functions of
// the standard library: the linker would keep one copy of each for all processors, maybe one with AVX-512 in it.
#pragma once

#ifndef DISTAFF_LEVEL
#error "define DISTAFF_LEVEL, the namespace of the level, before including this file"
#endif

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace distaff::DISTAFF_LEVEL {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using F32 = float __attribute__((vector_size(kLanes * 4)));
using I32 = int32_t __attribute__((vector_size(kLanes * 4)));
using U32 = uint32_t __attribute__((vector_size(kLanes * 4)));
using U16 = uint16_t __attribute__((vector_size(kLanes * 2)));

constexpr float kLowest = -3.40282346638528859812e+38f;
constexpr float kInfinity = __builtin_inff();

static inline int smaller(int a, int b) { return a < b ? a : b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

static inline F32 splat(float x) { return x - F32{}; }
static inline I32 splat(int32_t x) { return x - I32{}; }

static inline I32 lane_numbers() {
  I32 result;
  for (int i = 0; i < kLanes; ++i) result[i] = i;
  return result;
}

static inline F32 load(const float* from) {
  F32 result;
  memcpy(&result, from, sizeof result);
  return result;
}

static inline void store(float* to, F32 value) { memcpy(to, &value, sizeof value); }

// Each of the numbers as 32 bits.
static inline U32 widen(U16 numbers) {
#if defined(__AVX512F__)
  return (U32)_mm512_cvtepu16_epi32((__m256i)numbers);
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu16_epi32((__m128i)numbers);
#else
  return __builtin_convertvector(numbers, U32);
#endif
}

// bfloat16 is kept as its bits.
static inline F32 load(const uint16_t* from) {
  U16 bits;
  memcpy(&bits, from, sizeof bits);
  return (F32)(widen(bits) << 16);
}

// The first n values, then zeros.
static inline F32 load_first(const float* from, int n) {
  F32 result{};
  memcpy(&result, from, n * sizeof *from);
  return result;
}

static inline F32 load_first(const uint16_t* from, int n) {
  U16 bits{};
  memcpy(&bits, from, n * sizeof *from);
  return (F32)(widen(bits) << 16);
}

static inline F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// a[0] + a[1], a[2] + a[3], … , b[0] + b[1], …: half as many sums of pairs of lanes for each of two vectors.
static inline F32 add_pairs(F32 a, F32 b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// Lane i of n = kLanes vectors' result is the sum of all lanes of vectors[i].
template <int n = kLanes>
static inline F32 sum_each(const F32* vectors) {
  if constexpr (n == 1) {
    return vectors[0];
  } else {
    F32 halved[n / 2];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) halved[i] = add_pairs(vectors[2 * i], vectors[2 * i + 1]);
    return sum_each<n / 2>(halved);
  }
}

static inline float sum(F32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float result = 0;
  for (int i = 0; i < kLanes; ++i) result += v[i];
  return result;
#endif
}

static inline float highest(F32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float result = v[0];
  for (int i = 1; i < kLanes; ++i) result = v[i] > result ? v[i] : result;
  return result;
#endif
}

// e^x for x up to 88, within 2 units in the last place (Cephes' polynomial); 0 below -87, as for minus infinity.
static inline F32 exp(F32 x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded number in the low bits
  const F32 shifted = x * 1.44269504088896341f + kRound;
  const F32 n = shifted - kRound;
  const F32 f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  F32 p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  const F32 result = (F32)((I32)p + ((I32)shifted << 23));
  return x < -87.0f ? F32{} : result;
}

static inline float exp(float x) { return exp(splat(x))[0]; }

// tanh(x) = 1 - 2 / (e^2x + 1), as good as exact next to scores of the size that a softcap has.
static inline F32 tanh(F32 x) {
  const F32 bounded = max(splat(-20.0f), -max(splat(-20.0f), -x));
  return 1.0f - 2.0f / (exp(bounded * 2.0f) + 1.0f);
}

// The bits of the bfloat16 nearest to x, ties to even; NaN stays NaN.
static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? uint16_t((bits >> 16) | 0x40u) : uint16_t(rounded);
}

static inline float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float result;
  memcpy(&result, &wide, sizeof result);
  return result;
}

}  // namespace distaff::DISTAFF_LEVEL
