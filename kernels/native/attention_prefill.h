// A block of a request's queries against blocks of its keys, as small matrix products.
//
// The rows of a block are its tokens times the query heads that share a key-value head. Keys are packed transposed and
// values as they are, once for all rows; then strips of rows go through scores, softmax and weighted values while all
// of it is in the first-level cache. Where the pages hold bfloat16 and the processor has dot products of it, queries
// and weights are rounded to bfloat16; otherwise arithmetic is float32.
#pragma once

#include "attention_decode.h"
#include "products.h"

namespace distaff::DISTAFF_LEVEL {

constexpr int kStrip = 4 * kTileRows;

// The part of a row that one block of keys is about: columns first .. end - 1 are visible.
static inline void visible(const Call& call, int64_t position, int64_t at, int count, int* first, int* end) {
  *end = larger(smaller(position + 1 - at, int64_t{count}), int64_t{0});
  *first = smaller(larger(call.first_seen(position) - at, int64_t{0}), int64_t{*end});
}

template <class Product, class K, class V>
static void prefill_piece(const Call& call, const Piece& piece, float* scratch) {
  const int groups = piece.heads, rows = piece.count * groups, kv = piece.head / groups;
  const int key_size = call.keys.size, value_size = call.values.size;
  const int depth = Product::words(key_size), stride = round_up(value_size, kLanes);
  float* q = scratch;                                      // [rows][depth] words
  float* keys = q + round_up(rows * depth, 16);            // [depth][kTile] words
  float* values = keys + depth * kTile;                    // [words of kTile][stride]
  float* scores = values + Product::words(kTile) * stride; // [kStrip][kTile]
  float* weights = scores + kStrip * kTile;                // [kStrip][words of kTile]
  float* sums = weights + kStrip * kTile;                  // [rows][stride]
  Running* running = reinterpret_cast<Running*>(sums + rows * stride);
  memset(sums, 0, rows * stride * sizeof *sums);
  for (int row = 0; row < rows; ++row) {
    load_query(call, piece.token + row / groups, piece.head + row % groups, keys);  // not in use yet
    Product::pack_row(keys, key_size, q + row * depth);
    running[row] = Running{};
  }
  const auto key_column =
      Column<K>{static_cast<const K*>(call.keys.data), int64_t{call.kv_heads} * key_size, key_size}.head(kv);
  const auto value_column =
      Column<V>{static_cast<const V*>(call.values.data), int64_t{call.kv_heads} * value_size, value_size}.head(kv);
  for (int64_t at = piece.begin; at < piece.end; at += kTile) {
    const int count = smaller(piece.end - at, int64_t{kTile});
    int64_t tokens[kTile];
    locate(call, piece.request, at, count, tokens);
    pack_keys<Product>(key_column, tokens, count, keys);
    pack_values<Product>(value_column, tokens, count, values, stride);
    for (int top = 0; top < rows; top += kStrip) {
      const int height = smaller(rows - top, kStrip);
      int first, end, columns;
      visible(call, call.positions[piece.token + (top + height - 1) / groups], at, count, &first, &columns);
      if (columns == 0) continue;
      visible(call, call.positions[piece.token + top / groups], at, count, &first, &end);
      if (first == count) continue;
      columns = round_up(columns, kLanes);
      multiply<Product>(height, columns, depth, q + top * depth, depth, keys, kTile, scores, kTile, nullptr);
      float shrink[kStrip];
      for (int i = 0; i < height; ++i) {
        const int row = top + i;
        const int64_t position = call.positions[piece.token + row / groups];
        visible(call, position, at, count, &first, &end);
        const float slope = call.slopes == nullptr ? 0 : call.slopes[piece.head + row % groups];
        auto* to = reinterpret_cast<typename Product::Element*>(weights + i * Product::words(kTile));
        shrink[i] = weigh(call, slope, position - at, first, end, columns, scores + i * kTile, to, running[row]);
      }
      multiply<Product>(height, stride, Product::words(columns), weights, Product::words(kTile), values, stride,
                        sums + top * stride, stride, shrink);
    }
  }
  for (int row = 0; row < rows; ++row) {
    deliver(call, piece, piece.token + row / groups, piece.head + row % groups, running[row], sums + row * stride);
  }
}

static void prefill(const Call& call, const Piece& piece, float* scratch) {
  const bool k32 = call.keys.storage == Storage::kFloat32, v32 = call.values.storage == Storage::kFloat32;
  auto kernel = k32 ? (v32 ? prefill_piece<Floats, float, float> : prefill_piece<Floats, float, uint16_t>)
                    : (v32 ? prefill_piece<Floats, uint16_t, float> : prefill_piece<Floats, uint16_t, uint16_t>);
#if defined(__AVX512BF16__)
  if (!k32 && !v32) kernel = prefill_piece<Pairs, uint16_t, uint16_t>;
#endif
  kernel(call, piece, scratch);
}

static int64_t prefill_scratch(const Call& call, int count) {
  const int64_t rows = int64_t{count} * call.groups(), stride = round_up(call.values.size, kLanes);
  return rows * call.keys.size + 16 + kTile * (call.keys.size + stride + 2 * kStrip) +
         rows * (stride + static_cast<int64_t>(sizeof(Running) / sizeof(float)));
}

}  // namespace distaff::DISTAFF_LEVEL
