// The loops of roofline.h over whichever `Simd` (and `MatrixUnit`) was included before.
#pragma once

#include "roofline.h"
#include "tiles.h"

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

DISTAFF_INLINE float lane_sum(Simd::F sum) { return Simd::sum(sum); }
DISTAFF_INLINE float lane_sum(Simd::I sum) { return Simd::sum(Simd::to_float(sum)); }

// As many sums as the registers hold, and never a load. They start apart, or the compiler would keep only one.
template <typename Sum, typename Start, typename Dot>
float multiply_rounds(int64_t rounds, Start start, Dot dot) {
  constexpr int kSums = Simd::kPanels > 1 ? kPeakSteps : 4;
  Sum sums[kSums];
  for (int j = 0; j < kSums; ++j) sums[j] = start(j);
  for (int64_t i = 0; i < rounds * (kPeakSteps / kSums); ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) sums[j] = dot(sums[j]);
  }
  float total = 0;
  for (int j = 0; j < kSums; ++j) total += lane_sum(sums[j]);
  return total;
}

#ifdef DISTAFF_HAS_MATRIX_UNIT
constexpr int kUnitSums = 4;  // tile registers for sums; a product is waited for as long as three others take
constexpr int64_t kUnitRounds = kUnitSums * MatrixUnit::kRows * kLanes / kPeakSteps;  // in one product for each

// The same on the matrix unit, for a multiple of kUnitRounds.
template <typename Load, typename Dot>
float multiply_unit_rounds(int64_t rounds, int32_t word, Load load, Dot dot) {
  alignas(64) int32_t tile[MatrixUnit::kRows * kLanes];
  for (int32_t& each : tile) each = word;
  MatrixUnit::configure(MatrixUnit::kRows);
  MatrixUnit::load<4>(tile, kStepBytes);
  MatrixUnit::load<5>(tile, kStepBytes);
  for (int64_t i = 0; i < rounds / kUnitRounds; ++i) {
    unrolled<kUnitSums>([&](auto sum) DISTAFF_UNROLLED { dot(sum); });
  }
  float total = 0;
  unrolled<kUnitSums>([&](auto sum) DISTAFF_UNROLLED {
    MatrixUnit::store<sum>(tile, kStepBytes);
    for (int row = 0; row < MatrixUnit::kRows; ++row) total += lane_sum(load(tile + row * kLanes));
  });
  MatrixUnit::release();
  return total;
}
#endif

float multiply_words(int32_t kind, int64_t rounds, int32_t word) {
  const Simd::I w = Simd::int_all(word);
  const auto start = [](int j) { return Simd::all(static_cast<float>(j)); };
  float total = 0;
#ifdef DISTAFF_HAS_MATRIX_UNIT
  const int64_t rest = kind == 0 ? rounds : rounds % kUnitRounds;
  if (kind == 1) {
    total = multiply_unit_rounds(
        rounds - rest, word, [](const int32_t* at) { return Simd::as_floats(Simd::load_64(at)); },
        [](auto sum) { MatrixUnit::dot_bf16<sum, 4, 5>(); });
  } else if (kind == 2) {
    total = multiply_unit_rounds(
        rounds - rest, word, [](const int32_t* at) { return Simd::load_64(at); },
        [](auto sum) { MatrixUnit::dot_int8<sum, 4, 5>(); });
  }
  rounds = rest;
#endif
  if (kind == 0) {
    const Simd::F x = Simd::as_floats(w);
    return multiply_rounds<Simd::F>(rounds, start, [=](Simd::F sum) { return Simd::fma(x, x, sum); });
  }
  if (kind == 1) {
    return total + multiply_rounds<Simd::F>(rounds, start, [=](Simd::F sum) { return Simd::dot_2(sum, w, w); });
  }
  return total + multiply_rounds<Simd::I>(
                     rounds, [&](int j) { return Simd::nearest(start(j)); },
                     [=](Simd::I sum) { return Simd::dot_4(sum, w, w); });
}

constexpr RooflineKernels kRoofline{read_memory, multiply_words};

}  // namespace
}  // namespace distaff
