// Some of a request's queries against its keys, as small matrix products.
//
// The rows of a piece are its tokens times the query heads that share a key-value head. Keys and values of a tile are
// packed into panels once for all rows; then strips of rows go through scores, softmax and weighted values while all of
// it is in the first-level cache. Where the pages hold bfloat16 or int8 and the processor has dot products of bfloat16,
// queries and weights are rounded to it (int8 is exact in it); otherwise arithmetic is float32.
#pragma once

#include "attention_panels.h"

namespace distaff {
namespace {

constexpr int64_t kStrip = 4 * Simd::kRows;  // rows
constexpr int64_t kAhead = kTile;            // how many tokens before their use keys and values are asked for

// Where a piece keeps what in its scratch, in floats from the beginning; words hold `each` values.
struct Layout {
  int64_t rows, depth, width;  // rows of each key-value head, words of a query, floats of a sum
  int64_t q, sums, state, keys, values, scores, weights, tokens, size = 0;

  Layout(const Call& call, const Piece& piece, int64_t each)
      : rows(piece.count * call.groups()),
        depth(round_up(call.keys.size, kLanes * each) / each),
        width(round_up(call.values.size, kLanes * each)) {
    const int64_t all = int64_t{piece.count} * piece.heads;
    q = take(all * depth);      // [all][depth]
    sums = take(all * width);   // [all][width]
    state = take(all * static_cast<int64_t>(sizeof(Row) / sizeof(float)));
    keys = take(kTile * depth);                // [kTile / 16][depth][16]
    values = take(kTile / each * width);       // [width / 16][kTile / each][16]
    scores = take(kStrip * kTile);             // [kStrip][kTile]
    weights = take(kStrip * kTile / each);     // [kStrip][kTile / each]
    tokens = take(piece.end - piece.begin + kAhead + kLanes);
  }

 private:
  int64_t take(int64_t floats) {
    const int64_t at = size;
    size += round_up(floats, kLanes);
    return at;
  }
};

// Indices of the tokens of a piece, and after them of those that are asked for meanwhile: the first of the next piece.
inline void locate_stream(const Call& call, const Piece& piece, const Piece* next, int32_t* tokens) {
  const int64_t count = piece.end - piece.begin;
  locate(call, piece.request, piece.begin, count, tokens);
  int64_t at = count;
  if (next != nullptr && next->head == piece.head && next->heads == piece.heads) {
    const int64_t first = least(next->end - next->begin, kAhead);
    locate(call, next->request, next->begin, first, tokens + at);
    at += first;
  }
  for (; at < count + kAhead + kLanes; ++at) tokens[at] = tokens[at - 1];
}

// One key-value head of a tile, packed, against the rows of a piece.
template <class E>
void attend_tile(const Call& call, const Layout& layout, Columns tile, float* scratch, int64_t kv, Row* state) {
  constexpr int64_t kWords = kTile / kEach<E>;
  const int64_t depth = layout.depth, width = layout.width, count = tile.end;
  const float* q = scratch + layout.q + kv * layout.rows * depth;
  float* sums = scratch + layout.sums + kv * layout.rows * width;
  float *scores = scratch + layout.scores, *weights = scratch + layout.weights;
  // The first visible column of a row, and one past the last.
  const auto first_of = [&](int64_t row) { return most(call.first_seen(state[row].position) - tile.position, 0); };
  const auto end_of = [&](int64_t row) { return most(least(state[row].position + 1 - tile.position, count), 0); };
  for (int64_t top = 0; top < layout.rows; top += kStrip) {
    const int64_t height = least(layout.rows - top, kStrip);
    tile.columns = round_up(end_of(top + height - 1), kLanes);
    if (tile.columns == 0 || first_of(top) >= count) continue;
    multiply_panels<E>(height, tile.columns / kLanes, depth, q + top * depth, depth, scratch + layout.keys,
                       depth * kLanes, scores, kTile, true);
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
void attend_as(const Call& call, const Piece& piece, const Piece* next, float* scratch) {
  const Layout layout(call, piece, kEach<E>);
  const int64_t groups = call.groups(), rows = layout.rows, all = int64_t{piece.count} * piece.heads;
  float *q = scratch + layout.q, *sums = scratch + layout.sums;
  Row* state = reinterpret_cast<Row*>(scratch + layout.state);
  int32_t* stream = reinterpret_cast<int32_t*>(scratch + layout.tokens);
  const auto token_of = [&](int64_t row) { return piece.token + row % rows / groups; };
  const auto head_of = [&](int64_t row) { return piece.head + row / rows * groups + row % groups; };
  locate_stream(call, piece, next, stream);
  memset(sums, 0, all * layout.width * sizeof *sums);
  for (int64_t row = 0; row < all; ++row) {
    alignas(64) float loaded[kMostValues];
    load_query(call, token_of(row), head_of(row), loaded);
    each_vector<E, float>(call.keys.size, [&](int64_t d, const auto& load) {
      Simd::store_64(q + row * layout.depth + d / kEach<E>, load(loaded));
    });
    state[row] = Row{call.positions[token_of(row)], call.slopes == nullptr ? 0 : call.slopes[head_of(row)] * kLog2E};
  }
  for (int64_t at = piece.begin; at < piece.end; at += kTile, stream += kTile) {
    const int64_t count = least(piece.end - at, kTile), columns = round_up(count, kLanes);
    int32_t tokens[kTile];  // the last one repeats up to a whole panel
    for (int64_t i = 0; i < columns; ++i) tokens[i] = stream[least(i, count - 1)];
    for (int64_t kv = 0; kv < piece.heads / groups; ++kv) {
      const Column<K> keys(call, call.keys, piece.head / groups + kv);
      const Column<V> values(call, call.values, piece.head / groups + kv);
      float key_steps[kTile], value_steps[kTile];
      Columns tile{at, 0, count, columns, nullptr, nullptr};
      pack_keys<E>(keys, tokens, stream + kAhead, columns, scratch + layout.keys);
      pack_values<E>(values, tokens, stream + kAhead, columns, scratch + layout.values);
      if constexpr (sizeof(K) == 1) {
        keys.steps(tokens, columns, key_steps);
        values.steps(tokens, columns, value_steps);
        tile.key_steps = key_steps;
        tile.value_steps = value_steps;
      }
      attend_tile<E>(call, layout, tile, scratch, kv, state + kv * rows);
    }
  }
  for (int64_t row = 0; row < all; ++row) {
    deliver(call, piece, token_of(row), head_of(row), state[row], sums + row * layout.width);
  }
}

void attend_piece(const Call& call, const Piece& piece, const Piece* next, float* scratch) {
  const bool k32 = call.keys.storage == Storage::kFloat32, v32 = call.values.storage == Storage::kFloat32;
  auto kernel = k32 ? (v32 ? attend_as<float, float, float> : attend_as<float, float, uint16_t>)
                    : (v32 ? attend_as<float, uint16_t, float> : attend_as<Narrow, uint16_t, uint16_t>);
  if (call.keys.storage == Storage::kInt8) kernel = attend_as<Narrow, int8_t, int8_t>;
  kernel(call, piece, next, scratch);
}

int64_t scratch_floats(const Call& call, const Piece& piece) { return Layout(call, piece, 1).size; }

}  // namespace
}  // namespace distaff
