// The loops of roofline.h over whichever `Simd` was included before.
#pragma once

#include "roofline.h"

namespace distaff {
namespace {

float read_memory(const uint8_t* from, int64_t bytes) {
  Simd::I sums[4] = {Simd::int_zero(), Simd::int_zero(), Simd::int_zero(), Simd::int_zero()};
  for (int64_t at = 0; at < bytes; at += 256) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] = Simd::int_add(sums[i], Simd::load_64(from + at + 64 * i));
  }
  const Simd::I sum = Simd::int_add(Simd::int_add(sums[0], sums[1]), Simd::int_add(sums[2], sums[3]));
  return Simd::sum(Simd::to_float(sum));
}

// As many sums as the registers hold, and never a load. They start apart, or the compiler would keep only one.
template <typename Sum, typename Start, typename Dot, typename Float>
float multiply_rounds(int64_t rounds, Start start, Dot dot, Float to_float) {
  constexpr int kSums = Simd::kPanels > 1 ? kPeakSteps : 4;
  Sum sums[kSums];
  for (int j = 0; j < kSums; ++j) sums[j] = start(j);
  for (int64_t i = 0; i < rounds * (kPeakSteps / kSums); ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) sums[j] = dot(sums[j]);
  }
  float total = 0;
  for (int j = 0; j < kSums; ++j) total += Simd::sum(to_float(sums[j]));
  return total;
}

float multiply(int32_t kind, int64_t rounds, float value) {
  const auto start = [value](int j) { return Simd::all(value + static_cast<float>(j)); };
  const auto same = [](Simd::F sum) { return sum; };
  if (kind == 0) {
    const Simd::F w = Simd::all(value), x = Simd::all(value / 3);
    return multiply_rounds<Simd::F>(rounds, start, [=](Simd::F sum) { return Simd::fma(w, x, sum); }, same);
  }
  const Simd::I w = Simd::nearest(Simd::all(value)), x = Simd::nearest(Simd::all(value / 3));
  if (kind == 1) {
    return multiply_rounds<Simd::F>(rounds, start, [=](Simd::F sum) { return Simd::dot_2(sum, w, x); }, same);
  }
  return multiply_rounds<Simd::I>(
      rounds, [&](int j) { return Simd::nearest(start(j)); },
      [=](Simd::I sum) { return Simd::dot_4(sum, w, x); }, [](Simd::I sum) { return Simd::to_float(sum); });
}

constexpr RooflineKernels kRoofline{read_memory, multiply};

}  // namespace
}  // namespace distaff
