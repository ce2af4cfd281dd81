// One new token of a request against its pages: every key and value is read once, for all query heads that share it.
//
// Pages are bfloat16 or float32 and arithmetic is float32 throughout. Keys are scored a tile at a time, as they lie in
// the page: a dot product per key and head whose lanes are summed for kLanes keys together.
#pragma once

#include "attention_rows.h"

namespace distaff::DISTAFF_LEVEL {

constexpr int kWide = kLanes == 16 ? 4 : 2;  // vectors of values that are summed in registers at a time
constexpr int kHeads = 4;                    // query heads that share the loading of a key

// The keys or values of one head in the pool, and how far the next token's are.
template <class T>
struct Column {
  const T* data;
  int64_t stride;
  int size;

  const T* of(int64_t token) const { return data + token * stride; }
};

// scores[h][i] = q[h] . key i, for G heads and `count` keys.
template <class K, int G>
static void score(Column<K> keys, const int64_t* tokens, int count, const float* q, int q_stride, float* scores) {
  const int whole = keys.size / kLanes * kLanes, rest = keys.size - whole;
  for (int first = 0; first < count; first += kLanes) {
    F32 products[G][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const K* key = keys.of(tokens[first + i]);
      F32 sums[G]{};
      for (int d = 0; d < whole; d += kLanes) {
        const F32 x = load(key + d);
#pragma GCC unroll 4
        for (int h = 0; h < G; ++h) sums[h] += x * load(q + h * q_stride + d);
      }
      if (rest != 0) {
        const F32 x = load_first(key + whole, rest);
#pragma GCC unroll 4
        for (int h = 0; h < G; ++h) sums[h] += x * load(q + h * q_stride + whole);
      }
#pragma GCC unroll 4
      for (int h = 0; h < G; ++h) products[h][i] = sums[h];
    }
#pragma GCC unroll 4
    for (int h = 0; h < G; ++h) store(scores + h * kTile + first, sum_each(products[h]));
  }
}

// sums[h][d ...] = sums[h][d ...] * shrink[h] + the weighted values of `count` tokens, for W vectors of G heads.
template <class V, int G, int W, bool kWhole>
static inline void add_values(Column<V> values, const int64_t* tokens, int count, const float* weights,
                              const float* shrink, int d, float* sums, int stride) {
  F32 s[G][W];
#pragma GCC unroll 4
  for (int h = 0; h < G; ++h) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) s[h][w] = load(sums + h * stride + d + w * kLanes) * shrink[h];
  }
  for (int i = 0; i < count; ++i) {
    const V* value = values.of(tokens[i]) + d;
    F32 x[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) x[w] = kWhole ? load(value + w * kLanes) : load_first(value, values.size - d);
#pragma GCC unroll 4
    for (int h = 0; h < G; ++h) {
      const F32 weight = splat(weights[h * kTile + i]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) s[h][w] += weight * x[w];
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < G; ++h) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(sums + h * stride + d + w * kLanes, s[h][w]);
  }
}

// What one tile of a request's tokens is for each key-value head.
struct Tile {
  const int64_t* tokens;
  int count;
  int64_t distance;  // how far before the query its first key is
};

template <class K, class V, int G>
static void attend(const Call& call, const Tile& tile, Column<K> keys, Column<V> values, const float* slopes,
                   const float* q, int q_stride, Running* running, float* sums, int stride) {
  alignas(64) float scores[G * kTile];
  float shrink[G];
  score<K, G>(keys, tile.tokens, tile.count, q, q_stride, scores);
  for (int h = 0; h < G; ++h) {
    float* mine = scores + h * kTile;
    shrink[h] = weigh(call, slopes == nullptr ? 0 : slopes[h], tile.distance, 0, tile.count,
                      round_up(tile.count, kLanes), mine, mine, running[h]);
  }
  int d = 0;
  for (; d + kWide * kLanes <= values.size; d += kWide * kLanes) {
    add_values<V, G, kWide, true>(values, tile.tokens, tile.count, scores, shrink, d, sums, stride);
  }
  for (; d + kLanes <= values.size; d += kLanes) {
    add_values<V, G, 1, true>(values, tile.tokens, tile.count, scores, shrink, d, sums, stride);
  }
  if (d < values.size) add_values<V, G, 1, false>(values, tile.tokens, tile.count, scores, shrink, d, sums, stride);
}

template <class K, class V>
static void attend_heads(int heads, const Call& call, const Tile& tile, Column<K> keys, Column<V> values,
                         const float* slopes, const float* q, int q_stride, Running* running, float* sums, int stride) {
  for (int h = 0; h < heads; h += kHeads) {
    const auto kernel = heads - h == 1   ? attend<K, V, 1>
                        : heads - h == 2 ? attend<K, V, 2>
                        : heads - h == 3 ? attend<K, V, 3>
                                         : attend<K, V, 4>;
    kernel(call, tile, keys, values, slopes == nullptr ? nullptr : slopes + h, q + h * q_stride, q_stride, running + h,
           sums + h * stride, stride);
  }
}

// Asks for the rows of the next tile, so that they are on their way while this one is computed.
template <class T>
static inline void prefetch(Column<T> column, const int64_t* tokens, int count) {
  const int bytes = column.size * sizeof(T);
  for (int i = 0; i < count; ++i) {
    const char* row = reinterpret_cast<const char*>(column.of(tokens[i]));
    for (int b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
  }
}

template <class K, class V>
static void decode_piece(const Call& call, const Piece& piece, float* scratch) {
  const int key_size = call.keys.size, value_size = call.values.size, groups = call.groups();
  const int q_stride = round_up(key_size, kLanes), stride = round_up(value_size, kLanes);
  float* q = scratch;
  float* sums = q + call.heads * q_stride;
  Running* running = reinterpret_cast<Running*>(sums + call.heads * stride);
  memset(scratch, 0, call.heads * (q_stride + stride) * sizeof *scratch);
  for (int head = 0; head < call.heads; ++head) {
    load_query(call, piece.token, head, q + head * q_stride);
    running[head] = Running{};
  }
  const auto keys = [&](int kv) {
    return Column<K>{static_cast<const K*>(call.keys.data) + kv * key_size, int64_t{call.kv_heads} * key_size, key_size};
  };
  const auto values = [&](int kv) {
    return Column<V>{static_cast<const V*>(call.values.data) + kv * value_size, int64_t{call.kv_heads} * value_size,
                     value_size};
  };
  int64_t tokens[2][kTile];
  int count = smaller(piece.end - piece.begin, int64_t{kTile});
  locate(call, piece.request, piece.begin, count, tokens[0]);
  int now = 0;
  for (int64_t at = piece.begin; at < piece.end; at += kTile, now ^= 1) {
    const int next = larger(smaller(piece.end - at - kTile, int64_t{kTile}), int64_t{0});
    if (next > 0) locate(call, piece.request, at + kTile, next, tokens[now ^ 1]);
    const Tile tile{tokens[now], count, call.positions[piece.token] - at};
    for (int kv = 0; kv < call.kv_heads; ++kv) {
      prefetch(keys(kv), tokens[now ^ 1], next);
      prefetch(values(kv), tokens[now ^ 1], next);
      const int head = kv * groups;
      attend_heads(groups, call, tile, keys(kv), values(kv), call.slopes == nullptr ? nullptr : call.slopes + head,
                   q + head * q_stride, q_stride, running + head, sums + head * stride, stride);
    }
    count = next;
  }
  for (int head = 0; head < call.heads; ++head) {
    deliver(call, piece, piece.token, head, running[head], sums + head * stride);
  }
}

static void decode(const Call& call, const Piece& piece, float* scratch) {
  const bool k32 = call.keys.storage == Storage::kFloat32, v32 = call.values.storage == Storage::kFloat32;
  const auto kernel = k32 ? (v32 ? decode_piece<float, float> : decode_piece<float, uint16_t>)
                          : (v32 ? decode_piece<uint16_t, float> : decode_piece<uint16_t, uint16_t>);
  kernel(call, piece, scratch);
}

static int64_t decode_scratch(const Call& call) {
  return int64_t{call.heads} * (round_up(call.keys.size, kLanes) + round_up(call.values.size, kLanes) +
                                static_cast<int>(sizeof(Running) / sizeof(float)));
}

}  // namespace distaff::DISTAFF_LEVEL
