// The passes of sampling.h over whichever `Simd` was included before.
#pragma once

#include "sampling.h"
#include "simd_math.h"

namespace distaff {
namespace {

using sampling::kBlock;
using sampling::kGroups;

constexpr float kInfinity = __builtin_inff();

// The first n logits, then minus infinity.
Simd::F load_logits(const float* from, int64_t n) {
  return n >= kLanes ? Simd::load(from) : Simd::load_first(from, n, -kInfinity);
}

// (logit - largest) * sharpness
Simd::F load_scaled(const float* from, int64_t n, float largest, float sharpness) {
  return Simd::mul(Simd::sub(load_logits(from, n), Simd::all(largest)), Simd::all(sharpness));
}

float largest(const float* logits, int64_t size, float* maxima) {
  static_assert(kGroups == kLanes);
  Simd::F best = Simd::all(-kInfinity);
  uint32_t unordered = 0;
  for (int64_t block = 0; block * kBlock < size; ++block) {
    Simd::F groups = Simd::all(-kInfinity);
    const int64_t first = block * kBlock, end = least(first + kBlock, size);
    for (int64_t i = first; i < end; i += kLanes) {
      const Simd::F x = load_logits(logits + i, end - i);
      unordered |= Simd::unordered(x);
      groups = Simd::max(groups, x);
    }
    Simd::store(maxima + block * kGroups, groups);
    best = Simd::max(best, groups);
  }
  return unordered != 0 ? __builtin_nanf("") : Simd::largest(best);
}

void weigh_blocks(const float* logits, int64_t size, float largest, float sharpness, float cut, float* sums) {
  for (int64_t block = 0; block * kBlock < size; ++block) {
    const int64_t first = block * kBlock, end = least(first + kBlock, size);
    Simd::F total = Simd::zero();
    for (int64_t i = first; i < end; i += kLanes) {
      const Simd::F scaled = load_scaled(logits + i, end - i, largest, sharpness);
      const uint32_t kept = Simd::at_least(scaled, Simd::all(cut));
      total = Simd::add(total, Simd::choose(kept, exp(scaled), Simd::zero()));
    }
    sums[block] = Simd::sum(total);
  }
}

int64_t collect(const float* logits, int64_t size, float largest, float sharpness, float cut, int32_t* indices,
                float* scaled) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; i += kLanes) {
    const Simd::F x = load_scaled(logits + i, size - i, largest, sharpness);
    uint32_t bits = Simd::at_least(x, Simd::all(cut));
    if (size - i < kLanes) bits &= (1u << (size - i)) - 1;
    if (bits == 0) continue;
    float lanes[kLanes];
    Simd::store(lanes, x);
    for (; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      indices[count] = static_cast<int32_t>(i + lane);
      scaled[count++] = lanes[lane];
    }
  }
  return count;
}

void exponentials(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Simd::F result = exp(load_logits(from + i, count - i));
    if (count - i >= kLanes) {
      Simd::store(to + i, result);
    } else {
      Simd::store_first(to + i, result, count - i);
    }
  }
}

float mass(const float* scaled, const float* weights, int64_t count, float bound) {
  constexpr int kSums = 4;  // so that one addition need not wait for the other
  Simd::F sums[kSums] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
  int64_t i = 0;
  for (; i + kSums * kLanes <= count; i += kSums * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < kSums; ++v) {
      const int64_t at = i + v * kLanes;
      const uint32_t kept = Simd::at_least(Simd::load(scaled + at), Simd::all(bound));
      sums[v] = Simd::add(sums[v], Simd::choose(kept, Simd::load(weights + at), Simd::zero()));
    }
  }
  float result = Simd::sum(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
  for (; i < count; ++i) result += scaled[i] >= bound ? weights[i] : 0;
  return result;
}

int64_t count_above(const float* logits, int64_t size, float shift, float bound) {
  int64_t result = 0, i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    result += __builtin_popcount(Simd::at_least(load_scaled(logits + i, kLanes, shift, 1), Simd::all(bound)));
  }
  for (; i < size; ++i) result += logits[i] - shift >= bound;
  return result;
}

constexpr sampling::Kernels kSampling{largest, weigh_blocks, collect, exponentials, mass, count_above};

}  // namespace
}  // namespace distaff
