// Small matrix products whose operands fit the first two cache levels, in float32 or with bfloat16 dot products.
//
// Operands are arrays of 32-bit words along the summed dimension: a float32 each, or two bfloat16 (the second one zero
// if the dimension is odd). A is [rows][words]; B is [words][columns], columns a multiple of kLanes; C is float32.
#pragma once

#include "attention_decode.h"

namespace distaff::DISTAFF_LEVEL {

constexpr int kTileRows = 6;

struct Floats {
  using Element = float;
  static constexpr int words(int n) { return n; }
  static inline F32 broadcast(const float* word) { return splat(*word); }
  static inline F32 add(F32 sum, F32 a, F32 b) { return sum + a * b; }
  static inline void pack_row(const float* from, int count, float* to) { memcpy(to, from, count * sizeof *to); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Element = uint16_t;
  static constexpr int words(int n) { return (n + 1) / 2; }
  static inline F32 broadcast(const float* word) {
    int32_t bits;
    memcpy(&bits, word, sizeof bits);
    return (F32)_mm512_set1_epi32(bits);
  }
  static inline F32 add(F32 sum, F32 a, F32 b) {
    return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static inline void pack_row(const float* from, int count, float* to) {
    uint16_t* bits = reinterpret_cast<uint16_t*>(to);
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) store_weights(bits + i, load(from + i));
    for (; i < count; ++i) bits[i] = to_bf16(from[i]);
    if (count % 2 != 0) bits[count] = 0;
  }
};
#endif

// R rows by W vectors of C: A B, or C * shrink (a number a row) + A B.
template <class Product, int R, int W>
static void product_tile(int words, const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride,
                         const float* shrink) {
  F32 sums[R][W];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      sums[r][w] = shrink == nullptr ? F32{} : load(c + r * c_stride + w * kLanes) * shrink[r];
    }
  }
  for (int k = 0; k < words; ++k) {
    F32 x[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) x[w] = load(b + k * b_stride + w * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const F32 y = Product::broadcast(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sums[r][w] = Product::add(sums[r][w], y, x[w]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(c + r * c_stride + w * kLanes, sums[r][w]);
  }
}

template <class Product, int W>
static void product_columns(int rows, int words, const float* a, int a_stride, const float* b, int b_stride, float* c,
                            int c_stride, const float* shrink) {
  for (int r = 0; r < rows; r += kTileRows) {
    const int left = rows - r;
    const auto tile = left == 1   ? product_tile<Product, 1, W>
                      : left == 2 ? product_tile<Product, 2, W>
                      : left == 3 ? product_tile<Product, 3, W>
                      : left == 4 ? product_tile<Product, 4, W>
                      : left == 5 ? product_tile<Product, 5, W>
                                  : product_tile<Product, 6, W>;
    tile(words, a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride,
         shrink == nullptr ? nullptr : shrink + r);
  }
}

// C[rows][columns] = A B, or C * shrink + A B.
template <class Product>
static void multiply(int rows, int columns, int words, const float* a, int a_stride, const float* b, int b_stride,
                     float* c, int c_stride, const float* shrink) {
  int at = 0;
  for (; at + kWide * kLanes <= columns; at += kWide * kLanes) {
    product_columns<Product, kWide>(rows, words, a, a_stride, b + at, b_stride, c + at, c_stride, shrink);
  }
  for (; kWide > 2 && at + 2 * kLanes <= columns; at += 2 * kLanes) {
    product_columns<Product, 2>(rows, words, a, a_stride, b + at, b_stride, c + at, c_stride, shrink);
  }
  for (; at < columns; at += kLanes) {
    product_columns<Product, 1>(rows, words, a, a_stride, b + at, b_stride, c + at, c_stride, shrink);
  }
}

#if defined(__AVX512F__)
// Transposes 16 by 16 words.
static inline void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Each 128-bit lane of r[4 i + j] now has column 4 lane + j of rows 4 i … 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xDD);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#endif

// Word k of a key.
template <class Product, class T>
static inline float key_word(const T* key, int size, int k) {
  if constexpr (sizeof(typename Product::Element) == 4) {
    if constexpr (sizeof(T) == 2) return from_bf16(key[k]);
    return key[k];
  } else {
    const uint16_t pair[2] = {key[2 * k], 2 * k + 1 < size ? key[2 * k + 1] : uint16_t{0}};
    float word;
    memcpy(&word, pair, sizeof word);
    return word;
  }
}

// B[words][kTile] of the transposed keys; columns past `count` repeat a key up to a multiple of kLanes.
template <class Product, class T>
static void pack_keys(Column<T> keys, const int64_t* tokens, int count, float* to) {
  const int depth = Product::words(keys.size);
  for (int first = 0; first < count; first += kLanes) {
    int d = 0;
#if defined(__AVX512F__)
    constexpr int kEach = 4 / sizeof(typename Product::Element);  // values of a word
    for (; (d + 16) * kEach <= keys.size; d += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const T* key = keys.of(tokens[first + i]) + d * kEach;
        r[i] = kEach == 1 ? (__m512i)load(key) : _mm512_loadu_si512(key);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (d + i) * kTile + first, r[i]);
    }
#endif
    if (d == depth) continue;
    for (int i = 0; i < kLanes; ++i) {
      const T* key = keys.of(tokens[first + i]);
      for (int k = d; k < depth; ++k) {
        to[k * kTile + first + i] = key_word<Product>(key, keys.size, k);
      }
    }
  }
}

// B[words of kTile][stride] of the values; columns past their size, and the second half of a last odd word, are zero.
template <class Product, class T>
static void pack_values(Column<T> values, const int64_t* tokens, int count, float* to, int stride) {
  const int whole = values.size / kLanes * kLanes, rest = values.size - whole;
  const int rows = round_up(count, kLanes);
  if constexpr (sizeof(typename Product::Element) == 2) {
    const auto half = [](const T* from, int n) {
      U16 bits{};
      memcpy(&bits, from, n * sizeof *from);
      return widen(bits);
    };
    for (int i = 0; i < rows; i += 2) {
      const T *even = values.of(tokens[i]), *odd = values.of(tokens[i + 1]);
      for (int d = 0; d < values.size; d += kLanes) {
        const int n = d < whole ? kLanes : rest;
        const U32 a = i < count ? half(even + d, n) : U32{}, b = i + 1 < count ? half(odd + d, n) : U32{};
        store(to + i / 2 * stride + d, (F32)(a | b << 16));
      }
    }
  } else {
    for (int i = 0; i < rows; ++i) {
      const T* value = values.of(tokens[i]);
      for (int d = 0; d < values.size; d += kLanes) {
        const F32 x = d < whole ? load(value + d) : load_first(value + d, rest);
        store(to + i * stride + d, i < count ? x : F32{});
      }
    }
  }
}

}  // namespace distaff::DISTAFF_LEVEL
