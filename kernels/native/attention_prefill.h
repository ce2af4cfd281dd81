// A block of a request's queries against blocks of its keys, as small matrix products.
//
// The rows of a block are its tokens times the query heads that share a key-value head. Keys and values of a tile are
// packed into panels, as weights are, once for all rows; then strips of rows go through scores, softmax and weighted
// values while all of it is in the first-level cache. Where the pages hold bfloat16 or int8 and the processor has dot
// products of bfloat16, queries and weights are rounded to it (int8 is exact in it); otherwise arithmetic is float32.
#pragma once

#include "attention_rows.h"
#include "tiles.h"

namespace distaff {
namespace {

constexpr int64_t kStrip = 4 * Simd::kRows;

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
  const int64_t tiles = (rows + Simd::kRows - 1) / Simd::kRows;
  const auto columns = [&](auto count, int64_t panel) {
    t.w = reinterpret_cast<const uint8_t*>(b + panel * b_stride);
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
      const int64_t height = rows / tiles + (i < rows % tiles);
      t.a = reinterpret_cast<const uint8_t*>(a + row * a_stride);
      t.c = c + row * c_stride + panel * kLanes;
      product_tile<E, Simd::kRows, decltype(count)::kValue>(t, height);
      row += height;
    }
  };
  int64_t panel = 0;
  for (; panel + Simd::kPanels <= panels; panel += Simd::kPanels) columns(Constant<Simd::kPanels>{}, panel);
  for (; panel < panels; ++panel) columns(Constant<1>{}, panel);
}

// Panels of 16 keys, [words][16]; keys past `count` repeat one up to a whole panel.
template <class E, class T>
void pack_keys(const Column<T>& keys, const int64_t* tokens, int64_t count, float* to) {
  const int64_t words = words_of<E>(keys.size);
  for (int64_t first = 0; first < count; first += kLanes) {
    float* panel = to + first * words;
    for (int64_t d = 0; d < words; d += kLanes) {
      Simd::I rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = load_as<E>(keys.of(tokens[first + i]), keys.size, d * kEach<E>);
      Simd::store_transposed(rows, panel + d * kLanes, kLanes);
    }
  }
}

// Panels of 16 of the values' columns, [words of kTile][16]; `count` is a multiple of 16.
template <class E, class T>
void pack_values(const Column<T>& values, const int64_t* tokens, int64_t count, float* to) {
  constexpr int64_t kPanel = kTile / kEach<E> * kLanes;
  for (int64_t i = 0; i < count; i += kEach<E>) {
    float* row = to + i / kEach<E> * kLanes;
    for (int64_t d = 0; d < values.size; d += 64 / sizeof(E)) {
      float* first = row + d / kLanes * kPanel;
      const Simd::I even = load_as<E>(values.of(tokens[i]), values.size, d);
      if constexpr (sizeof(E) == 4) {
        Simd::store_64(first, even);
      } else {
        const Simd::I odd = load_as<E>(values.of(tokens[i + 1]), values.size, d);
        const Simd::I low = Simd::interleave_low(even, odd), high = Simd::interleave_high(even, odd);
        Simd::store_interleaved(first, first + kPanel, Simd::as_floats(low), Simd::as_floats(high));
      }
    }
  }
}

template <class E, class K, class V>
void prefill_piece(const Call& call, const Piece& piece, float* scratch) {
  const int64_t groups = piece.heads, rows = piece.count * groups, kv = piece.head / groups;
  const int64_t depth = words_of<E>(call.keys.size), width = round_up(call.values.size, kLanes);
  constexpr int64_t kWords = kTile / kEach<E>;
  float* q = scratch;                                        // [rows][depth] words
  float* keys = q + rows * depth;                            // [kTile / 16][depth][16] words
  float* values = keys + depth * kTile;                      // [columns / 16][kWords][16] words
  float* scores = values + round_up(width, 2 * kLanes) * kWords;  // [kStrip][kTile]
  float* weights = scores + kStrip * kTile;                  // [kStrip][kWords] words
  float* sums = weights + kStrip * kTile;                    // [rows][width]
  Running* running = reinterpret_cast<Running*>(sums + rows * width);
  memset(sums, 0, rows * width * sizeof *sums);
  for (int64_t row = 0; row < rows; ++row) {
    load_query(call, piece.token + row / groups, piece.head + row % groups, keys);  // not in use yet
    for (int64_t d = 0; d < depth; d += kLanes) {
      Simd::store_64(q + row * depth + d, load_as<E>(keys, call.keys.size, d * kEach<E>));
    }
    running[row] = Running{};
  }
  const Column<K> key_column(call, call.keys, kv);
  const Column<V> value_column(call, call.values, kv);
  const auto position_of = [&](int64_t row) { return int64_t{call.positions[piece.token + row / groups]}; };
  for (int64_t at = piece.begin; at < piece.end; at += kTile) {
    const int64_t count = least(piece.end - at, kTile);
    // The first visible column of a row, and one past the last.
    const auto first_of = [&](int64_t row) { return most(call.first_seen(position_of(row)) - at, 0); };
    const auto end_of = [&](int64_t row) { return most(least(position_of(row) + 1 - at, count), 0); };
    int64_t tokens[kTile];
    float key_steps[kTile], value_steps[kTile];
    locate(call, piece.request, at, count, tokens);
    pack_keys<E>(key_column, tokens, count, keys);
    pack_values<E>(value_column, tokens, round_up(count, kLanes), values);
    key_column.steps(tokens, round_up(count, kLanes), key_steps);
    value_column.steps(tokens, round_up(count, kLanes), value_steps);
    for (int64_t top = 0; top < rows; top += kStrip) {
      const int64_t height = least(rows - top, kStrip), columns = round_up(end_of(top + height - 1), kLanes);
      if (columns == 0 || first_of(top) >= count) continue;
      multiply_panels<E>(height, columns / kLanes, depth, q + top * depth, depth, keys, depth * kLanes, scores, kTile,
                         true);
      for (int64_t i = 0; i < height; ++i) {
        const int64_t row = top + i, end = end_of(row);
        Columns seen{least(first_of(row), end), end, columns, position_of(row) - at, nullptr, nullptr};
        if constexpr (sizeof(K) == 1) {
          seen.key_steps = key_steps;
          seen.value_steps = value_steps;
        }
        const float slope = call.slopes == nullptr ? 0 : call.slopes[piece.head + row % groups];
        auto* to = reinterpret_cast<E*>(weights + i * kWords);
        const float shrink = weigh(call, slope, seen, scores + i * kTile, to, running[row]);
        if (shrink == 1) continue;
        float* mine = sums + row * width;
        for (int64_t d = 0; d < width; d += kLanes) {
          Simd::store(mine + d, Simd::mul(Simd::load(mine + d), Simd::all(shrink)));
        }
      }
      multiply_panels<E>(height, width / kLanes, columns / kEach<E>, weights, kWords, values, kWords * kLanes,
                         sums + top * width, width, false);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    deliver(call, piece, piece.token + row / groups, piece.head + row % groups, running[row], sums + row * width);
  }
}

void prefill(const Call& call, const Piece& piece, float* scratch) {
  const bool k32 = call.keys.storage == Storage::kFloat32, v32 = call.values.storage == Storage::kFloat32;
  auto kernel = k32 ? (v32 ? prefill_piece<float, float, float> : prefill_piece<float, float, uint16_t>)
                    : (v32 ? prefill_piece<float, uint16_t, float> : prefill_piece<Narrow, uint16_t, uint16_t>);
  if (call.keys.storage == Storage::kInt8) kernel = prefill_piece<Narrow, int8_t, int8_t>;
  kernel(call, piece, scratch);
}

int64_t prefill_scratch(const Call& call, int64_t count) {
  const int64_t rows = count * call.groups(), depth = words_of<float>(call.keys.size);
  const int64_t width = round_up(call.values.size, 2 * kLanes);
  return rows * depth + kTile * (depth + width + 2 * kStrip) +
         rows * (width + static_cast<int64_t>(sizeof(Running) / sizeof(float)));
}

}  // namespace
}  // namespace distaff
