// The passes of sampling.h in the vectors of a level.
#pragma once

#include "sampling.h"
#include "simd.h"

namespace distaff::DISTAFF_LEVEL {

using sampling::kBlock;
using sampling::kGroups;

constexpr int kVectors = kGroups / kLanes;  // of a block's groups

// The first n logits, then minus infinity.
static inline F32 load_logits(const float* from, int64_t n) {
  if (n >= kLanes) return load(from);
  F32 result = splat(-kInfinity);
  memcpy(&result, from, n * sizeof *from);
  return result;
}

// Bit i says whether lane i of x is at least `bound`.
static inline uint32_t at_least(F32 x, F32 bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)bound, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)bound, _CMP_GE_OQ));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(x[i] >= bound[i]) << i;
  return bits;
#endif
}

static float largest(const float* logits, int64_t size, float* maxima) {
  F32 best = splat(-kInfinity);
  I32 unordered{};
  for (int64_t block = 0; block * kBlock < size; ++block) {
    F32 groups[kVectors];
    for (int v = 0; v < kVectors; ++v) groups[v] = splat(-kInfinity);
    const int64_t first = block * kBlock, end = smaller(first + kBlock, size);
    for (int64_t i = first; i < end; i += kGroups) {
      for (int v = 0; v < kVectors && i + v * kLanes < end; ++v) {
        const F32 x = load_logits(logits + i + v * kLanes, end - i - v * kLanes);
        unordered |= x != x;
        groups[v] = max(groups[v], x);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store(maxima + block * kGroups + v * kLanes, groups[v]);
      best = max(best, groups[v]);
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    if (unordered[i] != 0) return __builtin_nanf("");
  }
  return highest(best);
}

static void weigh_blocks(const float* logits, int64_t size, float largest, float sharpness, float cut, float* sums) {
  for (int64_t block = 0; block * kBlock < size; ++block) {
    const int64_t first = block * kBlock, end = smaller(first + kBlock, size);
    F32 total{};
    for (int64_t i = first; i < end; i += kLanes) {
      const F32 scaled = (load_logits(logits + i, end - i) - largest) * sharpness;
      total += scaled >= cut ? exp(scaled) : F32{};
    }
    sums[block] = sum(total);
  }
}

static int64_t collect(const float* logits, int64_t size, float largest, float sharpness, float cut, int32_t* indices,
                       float* scaled) {
  int64_t count = 0;
  const F32 bound = splat(cut);
  for (int64_t i = 0; i < size; i += kLanes) {
    const F32 x = (load_logits(logits + i, size - i) - largest) * sharpness;
    uint32_t bits = at_least(x, bound);
    if (size - i < kLanes) bits &= (1u << (size - i)) - 1;
    if (bits == 0) continue;
    float lanes[kLanes];
    store(lanes, x);
    for (; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      indices[count] = static_cast<int32_t>(i + lane);
      scaled[count++] = lanes[lane];
    }
  }
  return count;
}

static void exponentials(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const F32 result = exp(load_logits(from + i, count - i));
    memcpy(to + i, &result, smaller(count - i, int64_t{kLanes}) * sizeof *to);
  }
}

static float mass(const float* scaled, const float* weights, int64_t count, float bound) {
  F32 sums[4]{};  // so that one addition need not wait for the other
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int v = 0; v < 4; ++v) {
      const F32 weight = load(weights + i + v * kLanes);
      sums[v] += load(scaled + i + v * kLanes) >= bound ? weight : F32{};
    }
  }
  float result = sum(sums[0] + sums[1] + sums[2] + sums[3]);
  for (; i < count; ++i) result += scaled[i] >= bound ? weights[i] : 0;
  return result;
}

static int64_t count_above(const float* logits, int64_t size, float shift, float bound) {
  I32 counts{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) counts -= load(logits + i) - shift >= bound;
  int64_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result += counts[lane];
  for (; i < size; ++i) result += logits[i] - shift >= bound;
  return result;
}

const sampling::Kernels kSampling{largest, weigh_blocks, collect, exponentials, mass, count_above};

}  // namespace distaff::DISTAFF_LEVEL
