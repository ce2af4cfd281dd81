// Keys and values of a tile in panels, as weights are (matmul.h), and products with them.
#pragma once

#include "attention_rows.h"
#include "tiles.h"

namespace distaff {
namespace {

constexpr int kTile = 128;  // the most keys of a tile

// E is float, or uint16_t for bfloat16; a word holds so many values of the summed dimension.
template <class E>
constexpr int64_t kEach = 4 / sizeof(E);
// Words for `size` values, up to whole vectors of them.
template <class E>
constexpr int64_t words_of(int64_t size) {
  return round_up(size, 64 / sizeof(E)) / kEach<E>;
}

template <class E, int R, int P>
void product_tile(const Tile& tile, int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return product_tile<E, R - 1, P>(tile, rows);
  }
  float_tile<typename FormatOf<E>::type, R, P, false>(tile);
}

// c[rows][panels * 16] += A B; A is [rows][a_stride] words, B panels of `b_stride` words each; from nothing if `first`.
template <class E>
void multiply_panels(int64_t rows, int64_t panels, int64_t words, const float* a, int64_t a_stride, const float* b,
                     int64_t b_stride, float* c, int64_t c_stride, bool first) {
  Tile t{};
  t.a_stride = a_stride * 4;
  t.w_stride = b_stride * 4;
  t.steps = words;
  t.c_stride = c_stride;
  t.first = first;
  const int64_t tiles = (rows + Simd::kRows - 1) / Simd::kRows, least_height = rows / tiles, higher = rows % tiles;
  const auto columns = [&](auto count, int64_t panel) {
    t.w = reinterpret_cast<const uint8_t*>(b + panel * b_stride);
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
      const int64_t height = least_height + (i < higher);
      t.a = reinterpret_cast<const uint8_t*>(a + row * a_stride);
      t.c = c + row * c_stride + panel * kLanes;
      product_tile<E, Simd::kRows, decltype(count)::kValue>(t, height);
      row += height;
    }
  };
  int64_t panel = 0;
  for (; panel + Simd::kPanels <= panels; panel += Simd::kPanels) columns(Constant<Simd::kPanels>{}, panel);
  if constexpr (Simd::kPanels > 3) {
    if (panels - panel == 3) return columns(Constant<3>{}, panel);
  }
  if constexpr (Simd::kPanels > 2) {
    for (; panel + 2 <= panels; panel += 2) columns(Constant<2>{}, panel);
  }
  for (; panel < panels; ++panel) columns(Constant<1>{}, panel);
}

// Asks for a row of a later tile while this one is packed: a little with every row, since a burst would fill the
// processor's queue of misses and stop it.
template <class T>
DISTAFF_INLINE void prefetch_row(const T* row, int64_t size) {
  const char* from = reinterpret_cast<const char*>(row);
#pragma GCC unroll 4
  for (int64_t b = 0; b < size * static_cast<int64_t>(sizeof(T)); b += 64) Simd::prefetch(from + b);
}

// Calls pack(d, load) for every 64 bytes of rows of kSize values, or `size` if 0, where load(row) loads them from value
// `d` on; zeros after the last.
template <class E, class T, int kSize, class Pack>
DISTAFF_INLINE void each_vector(int64_t size, const Pack& pack) {
  constexpr int64_t kCount = 64 / sizeof(E);
  const auto whole = [&](int64_t d) DISTAFF_UNROLLED {
    pack(d, [d](const T* row) DISTAFF_UNROLLED { return load_words<E>(row + d); });
  };
  if constexpr (kSize != 0) {
    unrolled<kSize / kCount>([&](auto i) DISTAFF_UNROLLED { whole(i * kCount); });
  } else {
    int64_t d = 0;
    for (; d + kCount <= size; d += kCount) whole(d);
    if (d < size) pack(d, [d, size](const T* row) { return load_first_words<E>(row + d, size - d); });
  }
}

// Panels of 16 keys of kSize values, or any if 0, [words][16]; `count` is a multiple of 16. Asks for the keys `ahead`,
// as many.
template <class E, class T, int kSize>
void pack_keys(const Column<T>& keys, const int32_t* tokens, const int32_t* ahead, int64_t count, float* to) {
  const int64_t size = kSize != 0 ? kSize : keys.size, words = words_of<E>(size);
  for (int64_t first = 0; first < count; first += kLanes, to += words * kLanes) {
    const T* from[kLanes];
    unrolled<kLanes>([&](auto i) DISTAFF_UNROLLED {
      prefetch_row(keys.of(ahead[first + i]), size);
      from[i] = keys.of(tokens[first + i]);
    });
    each_vector<E, T, kSize>(size, [&](int64_t d, const auto& load) DISTAFF_UNROLLED {
      Simd::I rows[kLanes];
      unrolled<kLanes>([&](auto i) DISTAFF_UNROLLED { rows[i] = load(from[i]); });
      Simd::store_transposed(rows, to + d / kEach<E> * kLanes, kLanes);
    });
  }
}

// Panels of 16 of the values' columns, [words of kTile][16]; likewise.
template <class E, class T, int kSize>
void pack_values(const Column<T>& values, const int32_t* tokens, const int32_t* ahead, int64_t count, float* to) {
  constexpr int64_t kPanel = kTile / kEach<E> * kLanes;
  const int64_t size = kSize != 0 ? kSize : values.size;
  for (int64_t i = 0; i < count; i += kEach<E>, to += kLanes) {
    const T* from[kEach<E>];
    unrolled<kEach<E>>([&](auto j) DISTAFF_UNROLLED {
      prefetch_row(values.of(ahead[i + j]), size);
      from[j] = values.of(tokens[i + j]);
    });
    each_vector<E, T, kSize>(size, [&](int64_t d, const auto& load) DISTAFF_UNROLLED {
      float* first = to + d / kLanes * kPanel;
      if constexpr (sizeof(E) == 4) {
        Simd::store_64(first, load(from[0]));
      } else {
        const Simd::I even = load(from[0]), odd = load(from[1]);
        const Simd::I low = Simd::interleave_low(even, odd), high = Simd::interleave_high(even, odd);
        Simd::store_interleaved(first, first + kPanel, Simd::as_floats(low), Simd::as_floats(high));
      }
    });
  }
}

// The function for a size of keys or values.
template <class E, class T>
auto key_packer(int64_t size) {
  if constexpr (kWide) {
    if (size == 64) return pack_keys<E, T, 64>;
    if (size == 128) return pack_keys<E, T, 128>;
  }
  return pack_keys<E, T, 0>;
}
template <class E, class T>
auto value_packer(int64_t size) {
  if constexpr (kWide) {
    if (size == 64) return pack_values<E, T, 64>;
    if (size == 128) return pack_values<E, T, 128>;
  }
  return pack_values<E, T, 0>;
}

}  // namespace
}  // namespace distaff
