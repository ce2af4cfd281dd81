// A block of a request's queries against its keys, as small matrix products.
//
// The rows of a block are its tokens times the query heads that share a key-value head. Keys and values of a tile are
// packed into panels, as weights are, once for all rows; then strips of rows go through scores, softmax and weighted
// values while all of it is in the first-level cache. Where the pages hold bfloat16 or int8 and the processor has dot
// products of bfloat16, queries and weights are rounded to it (int8 is exact in it); otherwise arithmetic is float32.
#pragma once

#include "attention_panels.h"

namespace distaff {
namespace {

constexpr int64_t kStrip = 4 * Simd::kRows;

struct PrefillLayout : Offsets {
  int64_t rows, depth, width;  // and words of a query, floats of a sum; words hold `each` values
  int64_t q, sums, state, keys, values, scores, weights, tokens;

  PrefillLayout(const Call& call, const Piece& piece, int64_t each)
      : rows(int64_t{piece.count} * piece.heads),
        depth(round_up(call.keys.size, kLanes * each) / each),
        width(round_up(call.values.size, kLanes * each)) {
    q = take(rows * depth);                 // [rows][depth]
    sums = take(rows * width);              // [rows][width]
    state = take(rows * static_cast<int64_t>(sizeof(Row) / sizeof(float)));
    keys = take(kTile * depth);             // [kTile / 16][depth][16]
    values = take(kTile / each * width);    // [width / 16][kTile / each][16]
    scores = take(kStrip * kTile);          // [kStrip][kTile]
    weights = take(kStrip * kTile / each);  // [kStrip][kTile / each]
    tokens = take(stream_length(piece, kTile));
  }
};

// A packed tile of keys and values against the rows of a piece.
template <class E>
void attend_tile(const Call& call, const PrefillLayout& layout, Columns tile, float* scratch) {
  constexpr int64_t kWords = kTile / kEach<E>;
  const int64_t depth = layout.depth, width = layout.width, count = tile.end;
  float *scores = scratch + layout.scores, *weights = scratch + layout.weights, *sums = scratch + layout.sums;
  auto* state = reinterpret_cast<Row*>(scratch + layout.state);
  // The first visible column of a row, and one past the last.
  const auto first_of = [&](int64_t row) { return most(call.first_seen(state[row].position) - tile.position, 0); };
  const auto end_of = [&](int64_t row) { return most(least(state[row].position + 1 - tile.position, count), 0); };
  for (int64_t top = 0; top < layout.rows; top += kStrip) {
    const int64_t height = least(layout.rows - top, kStrip);
    tile.columns = round_up(end_of(top + height - 1), kLanes);
    if (tile.columns == 0 || first_of(top) >= count) continue;
    multiply_panels<E>(height, tile.columns / kLanes, depth, scratch + layout.q + top * depth, depth,
                       scratch + layout.keys, depth * kLanes, scores, kTile, true);
    for (int64_t i = 0; i < height; ++i) {
      tile.end = end_of(top + i);
      tile.first = least(first_of(top + i), tile.end);
      weigh(call, tile, state[top + i], scores + i * kTile, reinterpret_cast<E*>(weights + i * kWords),
            sums + (top + i) * width, width);
    }
    multiply_panels<E>(height, width / kLanes, tile.columns / kEach<E>, weights, kWords, scratch + layout.values,
                       kWords * kLanes, sums + top * width, width, false);
  }
}

template <class E, class K, class V>
void prefill_as(const Call& call, const Piece& piece, const Piece* next, float* scratch) {
  const PrefillLayout layout(call, piece, kEach<E>);
  const int64_t groups = piece.heads;
  const Column<K> keys(call, call.keys, piece.head / groups);
  const Column<V> values(call, call.values, piece.head / groups);
  const auto pack_keys = key_packer<E, K>(keys.size);
  const auto pack_values = value_packer<E, V>(values.size);
  float *q = scratch + layout.q, *sums = scratch + layout.sums;
  auto* state = reinterpret_cast<Row*>(scratch + layout.state);
  auto* stream = reinterpret_cast<int32_t*>(scratch + layout.tokens);
  locate_stream(call, piece, next, kTile, stream);
  memset(sums, 0, layout.rows * layout.width * sizeof *sums);
  for (int64_t row = 0; row < layout.rows; ++row) {
    const int64_t token = piece.token + row / groups, head = piece.head + row % groups;
    float loaded[kMostValues];
    load_query(call, token, head, loaded);
    each_vector<E, float, 0>(keys.size, [&](int64_t d, const auto& load) {
      Simd::store_64(q + row * layout.depth + d / kEach<E>, load(loaded));
    });
    state[row] = start_row(call, token, head);
  }
  for (int64_t at = piece.begin; at < piece.end; at += kTile, stream += kTile) {
    Columns tile = tile_of(piece, at, kTile);
    int32_t tokens[kTile];
    float key_steps[kTile], value_steps[kTile];
    repeat_last(stream, tile.end, tile.columns, tokens);
    pack_keys(keys, tokens, stream + kTile, tile.columns, scratch + layout.keys);
    pack_values(values, tokens, stream + kTile, tile.columns, scratch + layout.values);
    if constexpr (sizeof(K) == 1) {
      keys.steps(tokens, tile.columns, key_steps);
      values.steps(tokens, tile.columns, value_steps);
      tile.key_steps = key_steps;
      tile.value_steps = value_steps;
    }
    attend_tile<E>(call, layout, tile, scratch);
  }
  for (int64_t row = 0; row < layout.rows; ++row) {
    deliver(call, piece, piece.token + row / groups, piece.head + row % groups, state[row], sums + row * layout.width);
  }
}

void prefill(const Call& call, const Piece& piece, const Piece* next, float* scratch) {
  const bool k32 = call.keys.storage == Storage::kFloat32, v32 = call.values.storage == Storage::kFloat32;
  auto kernel = k32 ? (v32 ? prefill_as<float, float, float> : prefill_as<float, float, uint16_t>)
                    : (v32 ? prefill_as<float, uint16_t, float> : prefill_as<Narrow, uint16_t, uint16_t>);
  if (call.keys.storage == Storage::kInt8) kernel = prefill_as<Narrow, int8_t, int8_t>;
  kernel(call, piece, next, scratch);
}

}  // namespace
}  // namespace distaff
