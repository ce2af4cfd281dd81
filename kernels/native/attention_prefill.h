// A block of a request's queries against its keys, as small matrix products.
//
// The rows are a piece's tokens times the query heads that share a key-value head. Keys and values are packed into panels,
// as weights are, once for all rows; then strips of rows go through scores, softmax and weighted values, tile by tile,
// while all of it is in the first-level cache. Where the pages hold bfloat16 or int8 and the processor has dot
// products of bfloat16, queries and weights are rounded to it (int8 is exact in it); otherwise arithmetic is float32.
#pragma once

#include "attention_panels.h"

namespace distaff {
namespace {

// Keys are packed a block of tiles at a time. A strip of rows goes through a whole block while its queries and sums stay
// in the first-level cache and the block in the second.
constexpr int64_t kStrip = 4 * Simd::kRows, kBlock = 4 * kTile;

struct PrefillLayout : Offsets {
  int64_t rows, depth, width;  // and words of a query, floats of a sum; words hold `each` values
  int64_t q, sums, state, keys, values, key_steps, value_steps, scores, weights, tokens;

  PrefillLayout(const Call& call, const Piece& piece, int64_t each)
      : rows(int64_t{piece.count} * piece.heads),
        depth(round_up(call.keys.size, kLanes * each) / each),
        width(round_up(call.values.size, kLanes * each)) {
    q = take(rows * depth);     // [rows][depth]
    sums = take(rows * width);  // [rows][width]
    state = take(rows * static_cast<int64_t>(sizeof(Row) / sizeof(float)));
    keys = take(kBlock * depth);           // [kBlock / 16][depth][16]
    values = take(kBlock / each * width);  // [kBlock / kTile][width / 16][kTile / each][16]
    key_steps = take(kBlock);
    value_steps = take(kBlock);
    scores = take(kStrip * kTile);          // [kStrip][kTile]
    weights = take(kStrip * kTile / each);  // [kStrip][kTile / each]
    tokens = take(stream_length(piece, kTile));
  }
};

// Loads the queries of `height` rows from `top` on, which have seen nothing.
template <class E>
void start_rows(const Call& call, const Piece& piece, const PrefillLayout& layout, int64_t top, int64_t height,
                float* scratch) {
  const int64_t stride = layout.depth * kEach<E>;
  auto* q = reinterpret_cast<E*>(scratch + layout.q);
  auto* state = reinterpret_cast<Row*>(scratch + layout.state);
  if (call.keys.size < stride) memset(q + top * stride, 0, height * stride * sizeof *q);
  for (int64_t row = top, heads; row < top + height; row += heads) {
    const int64_t token = piece.token + row / piece.heads, head = row % piece.heads;
    heads = least(piece.heads - head, top + height - row);
    load_queries(call, token, piece.head + head, heads, q + row * stride, stride);
    for (int64_t i = 0; i < heads; ++i) state[row + i] = start_row(call, token, piece.head + head + i);
  }
  memset(scratch + layout.sums + top * layout.width, 0, height * layout.width * sizeof(float));
}

// Hands on what rows have summed up.
void deliver_rows(const Call& call, const Piece& piece, const PrefillLayout& layout, int64_t top, int64_t height,
                  float* scratch) {
  const auto* state = reinterpret_cast<Row*>(scratch + layout.state);
  for (int64_t row = top; row < top + height; ++row) {
    deliver(call, piece, piece.token + row / piece.heads, piece.head + row % piece.heads, state[row],
            scratch + layout.sums + row * layout.width);
  }
}

// `height` rows from `top` on, which are in the order of their positions, against a packed block.
template <class E>
void attend_rows(const Call& call, const PrefillLayout& layout, const Columns& block, int64_t top, int64_t height,
                 float* scratch) {
  constexpr int64_t kWords = kTile / kEach<E>;
  const int64_t depth = layout.depth, width = layout.width;
  float *scores = scratch + layout.scores, *weights = scratch + layout.weights;
  float* sums = scratch + layout.sums + top * width;
  auto* state = reinterpret_cast<Row*>(scratch + layout.state) + top;
  // The first key of the block that a row sees, and one past the last.
  const auto first_of = [&](int64_t i) { return most(call.first_seen(state[i].position) - block.position, 0); };
  const auto end_of = [&](int64_t i) { return least(state[i].position + 1 - block.position, block.end); };
  const int64_t end = end_of(height - 1);
  const bool plain = call.softcap == 0 && call.slopes == nullptr;
  for (int64_t at = first_of(0) / kTile * kTile; at < end; at += kTile) {
    Columns tile = block;
    tile.position += at;
    tile.columns = round_up(least(end - at, kTile), kLanes);
    if (block.key_steps != nullptr) {
      tile.key_steps += at;
      tile.value_steps += at;
    }
    multiply_panels<E>(height, tile.columns / kLanes, depth, scratch + layout.q + top * depth, depth,
                       scratch + layout.keys + at * depth, depth * kLanes, scores, kTile, true);
    const bool all_see_all = first_of(height - 1) <= at && end_of(0) >= at + kTile;
    for (int64_t i = 0; i < height; ++i) {
      float* mine = scores + i * kTile;
      auto* to = reinterpret_cast<E*>(weights + i * kWords);
      if (plain && all_see_all) {
        add_weights<E, kTile>(tile, state[i], mine, to, sums + i * width, width);
      } else {
        tile.end = most(least(end_of(i) - at, kTile), 0);
        tile.first = least(most(first_of(i) - at, 0), tile.end);
        weigh(call, tile, state[i], mine, to, sums + i * width, width);
      }
    }
    multiply_panels<E>(height, width / kLanes, tile.columns / kEach<E>, weights, kWords,
                       scratch + layout.values + at / kEach<E> * width, kWords * kLanes, sums, width, false);
  }
}

template <class E, class K, class V>
void prefill_as(const Call& call, const Piece& piece, const Piece* next, float* scratch) {
  const PrefillLayout layout(call, piece, kEach<E>);
  const Column<K> keys(call, call.keys, piece.head / piece.heads);
  const Column<V> values(call, call.values, piece.head / piece.heads);
  const auto pack_keys = key_packer<E, K>(keys.size);
  const auto pack_values = value_packer<E, V>(values.size);
  auto* stream = reinterpret_cast<int32_t*>(scratch + layout.tokens);
  locate_stream(call, piece, next, kTile, stream);
  for (int64_t begin = piece.begin; begin < piece.end; begin += kBlock) {
    Columns block = tile_of(piece, begin, kBlock);
    for (int64_t at = 0; at < block.end; at += kTile, stream += kTile) {
      int32_t tokens[kTile];
      const int64_t columns = least(block.columns - at, kTile);
      repeat_last(stream, least(block.end - at, kTile), columns, tokens);
      pack_keys(keys, tokens, stream + kTile, columns, scratch + layout.keys + at * layout.depth);
      pack_values(values, tokens, stream + kTile, columns, scratch + layout.values + at / kEach<E> * layout.width);
      keys.steps(tokens, columns, scratch + layout.key_steps + at);
      values.steps(tokens, columns, scratch + layout.value_steps + at);
    }
    if constexpr (sizeof(K) == 1) {
      block.key_steps = scratch + layout.key_steps;
      block.value_steps = scratch + layout.value_steps;
    }
    for (int64_t top = 0; top < layout.rows; top += kStrip) {
      const int64_t height = least(layout.rows - top, kStrip);
      if (begin == piece.begin) start_rows<E>(call, piece, layout, top, height, scratch);
      attend_rows<E>(call, layout, block, top, height, scratch);
      if (begin + kBlock >= piece.end) deliver_rows(call, piece, layout, top, height, scratch);
    }
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
