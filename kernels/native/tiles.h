// Tiles of products in registers, over whichever `Simd` was included before.
//
// A tile is R rows of activations times P panels of weights (matmul.h says how panels lie in memory).
#pragma once

#include "level.h"

namespace distaff {
namespace {

// What a micro-kernel works on: some rows of activations, some panels, some steps of both.
struct Tile {
  int64_t rows;
  const uint8_t* a;
  int64_t a_stride;  // bytes from row to row
  const uint8_t* w;
  int64_t w_stride;  // bytes from panel to panel
  int64_t steps;
  // What will be read after these panels, of which each tile of rows fetches a part into the second cache: a step of
  // each panel every so many steps.
  const uint8_t* next;
  int64_t fetch_every;
  bool once;  // no other rows will read it
  float* c;  // the sums so far, [rows][panels * 16]
  int64_t c_stride;
  bool first;  // there are no sums so far

  // For quantised weights, from the first group of the tile on.
  int64_t group_steps;
  const float* a_scales;
  const int32_t* a_shifts;
  const float* a_sums;
  const float* a_origins;
  int64_t groups;  // from row to row of these, and from panel to panel of scales of groups, in units of 16
  const float* column_scales;
  const uint16_t* group_scales;
  const uint16_t* group_offsets;
};

struct Float32 {
  using W = Simd::F;
  static W load(const uint8_t* from) { return Simd::load(reinterpret_cast<const float*>(from)); }
  static W repeat(const uint8_t* from) { return Simd::all(*reinterpret_cast<const float*>(from)); }
  static Simd::F dot(Simd::F acc, W w, W x) { return Simd::fma(w, x, acc); }
};

struct Bfloat16 {
  using W = Simd::I;
  static W load(const uint8_t* from) { return Simd::load_64(from); }
  static W repeat(const uint8_t* from) { return Simd::repeat_4(from); }
  static Simd::F dot(Simd::F acc, W w, W x) { return Simd::dot_2(acc, w, x); }
};

// How products of words of E are added up; bfloat16 is kept as its bits.
template <typename E>
struct FormatOf {
  using type = Float32;
};
template <>
struct FormatOf<uint16_t> {
  using type = Bfloat16;
};

template <bool kFirst, typename A, typename B>
struct ChooseType {
  using type = A;
};
template <typename A, typename B>
struct ChooseType<false, A, B> {
  using type = B;
};
template <bool kFirst, typename A, typename B>
using Choose = typename ChooseType<kFirst, A, B>::type;

// What products of bfloat16 are made of: of themselves if the processor can, else of float32.
using Narrow = Choose<Simd::kHasDot2, uint16_t, float>;

// A loop over a tile, unrolled before anything else is done to it, so that sums in arrays become registers.
template <int kIndex>
struct Constant {
  static constexpr int kValue = kIndex;
  DISTAFF_INLINE constexpr operator int() const { return kIndex; }
};
template <int kEnd, int kBegin = 0, typename Body>
DISTAFF_INLINE void unrolled(const Body& body) {
  if constexpr (kBegin < kEnd) {
    body(Constant<kBegin>{});
    unrolled<kEnd, kBegin + 1>(body);
  }
}
#define DISTAFF_UNROLLED __attribute__((always_inline))

// Fetches what a tile of P panels says, each line once: every request takes a place in a queue.
template <int P>
class NextPanels {
 public:
  DISTAFF_INLINE explicit NextPanels(const Tile& t) : next_(t.next), stride_(t.w_stride), every_(t.fetch_every), once_(t.once) {}

  DISTAFF_INLINE void step() {
    // One panel alone is read by few rows, faster than memory delivers; the processor itself sees what comes next.
    if constexpr (P > 1) {
      if (--left_ > 0) return;
      left_ = every_;
      unrolled<P>([&](auto p) DISTAFF_UNROLLED {
        once_ ? Simd::prefetch_once(next_ + p * stride_) : Simd::prefetch(next_ + p * stride_);
      });
      next_ += kStepBytes;
    }
  }

 private:
  const uint8_t* next_;
  int64_t stride_, every_, left_ = 0;
  bool once_;
};

template <typename Format, int R, int P, bool kFetches = true>
void float_tile(const Tile& t) {
  Simd::F acc[R][P];
  unrolled<R>([&](auto r) DISTAFF_UNROLLED {
    unrolled<P>([&](auto p) DISTAFF_UNROLLED {
      acc[r][p] = t.first ? Simd::zero() : Simd::load(t.c + r * t.c_stride + p * kLanes);
    });
  });
  NextPanels<P> next(t);
  for (int64_t s = 0; s < t.steps; ++s) {
    if constexpr (kFetches) next.step();
    typename Format::W w[P];
    unrolled<P>([&](auto p) DISTAFF_UNROLLED { w[p] = Format::load(t.w + p * t.w_stride + s * kStepBytes); });
    unrolled<R>([&](auto r) DISTAFF_UNROLLED {
      const typename Format::W x = Format::repeat(t.a + r * t.a_stride + s * 4);
      unrolled<P>([&](auto p) DISTAFF_UNROLLED { acc[r][p] = Format::dot(acc[r][p], w[p], x); });
    });
  }
  unrolled<R>([&](auto r) DISTAFF_UNROLLED {
    unrolled<P>([&](auto p) DISTAFF_UNROLLED { Simd::store(t.c + r * t.c_stride + p * kLanes, acc[r][p]); });
  });
}

}  // namespace
}  // namespace distaff
