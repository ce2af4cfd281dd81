// Tiles of products on a matrix unit: bfloat16, and int8 with a scale for every column. Steps of weights that do not
// fill a register are left to vectors, as are few rows and weights with groups.
#pragma once

#include "tiles.h"

namespace distaff {
namespace {

constexpr int64_t kUnitSteps = 16;  // of the weights that a register holds

// Adds all of a tile's steps that fill registers into registers 0 to P - 1; returns how many those are.
template <int P, typename Dot>
DISTAFF_INLINE int64_t add_whole_steps(const Tile& t, Dot dot) {
  int64_t step = 0;
  NextPanels<P> next(t);
  for (; step + kUnitSteps <= t.steps; step += kUnitSteps) {
    for (int64_t i = 0; i < kUnitSteps; ++i) next.step();
    MatrixUnit::load<4>(t.a + step * 4, t.a_stride);
    unrolled<P>([&](auto p) DISTAFF_UNROLLED {
      MatrixUnit::load<5 + p % 3>(t.w + p * t.w_stride + step * kStepBytes, kStepBytes);
      dot(p, Constant<5 + p % 3>{});
    });
  }
  return step;
}

template <int P>
void unit_bf16_tile(const Tile& t) {
  static_assert(P <= 4);
  const int64_t c_bytes = t.c_stride * static_cast<int64_t>(sizeof(float));
  MatrixUnit::configure(t.rows);
  if (!t.first) unrolled<P>([&](auto p) DISTAFF_UNROLLED { MatrixUnit::load<p>(t.c + p * kLanes, c_bytes); });
  const int64_t done = add_whole_steps<P>(t, [](auto p, auto b) { MatrixUnit::dot_bf16<p, 4, b>(); });
  unrolled<P>([&](auto p) DISTAFF_UNROLLED { MatrixUnit::store<p>(t.c + p * kLanes, c_bytes); });
  MatrixUnit::release();
  if (done == t.steps) return;
  for (int64_t row = 0; row < t.rows; ++row) {
    Tile rest = t;
    rest.a += row * t.a_stride + done * 4;
    rest.w += done * kStepBytes;
    rest.steps -= done;
    rest.c += row * t.c_stride;
    rest.first = false;
    float_tile<Bfloat16, 1, P, false>(rest);
  }
}

template <int P>
void unit_int8_tile(const Tile& t) {
  alignas(64) int32_t sums[MatrixUnit::kRows * P * kLanes];
  MatrixUnit::configure(t.rows);
  const int64_t done = add_whole_steps<P>(t, [](auto p, auto b) { MatrixUnit::dot_int8<p, 4, b>(); });
  unrolled<P>([&](auto p) DISTAFF_UNROLLED { MatrixUnit::store<p>(sums + p * kLanes, P * kStepBytes); });
  MatrixUnit::release();
  for (int64_t row = 0; row < t.rows; ++row) {
    const Simd::I shift = Simd::int_all(t.first ? t.a_shifts[row] : 0);
    for (int64_t p = 0; p < P; ++p) {
      Simd::I sum = Simd::int_add(Simd::load_64(sums + (row * P + p) * kLanes), shift);
      for (int64_t s = done; s < t.steps; ++s) {
        sum = Simd::dot_4(sum, Simd::load_64(t.w + p * t.w_stride + s * kStepBytes),
                          Simd::repeat_4(t.a + row * t.a_stride + s * 4));
      }
      float* c = t.c + row * t.c_stride + p * kLanes;
      const Simd::F scales = Simd::mul(Simd::load(t.column_scales + p * kLanes), Simd::all(t.a_scales[row]));
      Simd::store(c, Simd::fma(Simd::to_float(sum), scales, t.first ? Simd::zero() : Simd::load(c)));
    }
  }
}

}  // namespace
}  // namespace distaff
