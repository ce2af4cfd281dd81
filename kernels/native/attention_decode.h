// One new token of a request against its pages: every key and value is read once, for all query heads that share it.
//
// Pages are bfloat16 or float32 and sums are float32. Keys are scored a tile at a time, as they lie in
// the page: a dot product per key and head whose lanes are summed for kLanes keys together.
#pragma once

#include "attention_rows.h"

namespace distaff::DISTAFF_LEVEL {

constexpr int kWide = kLanes == 16 ? 4 : 2;  // vectors of values that are summed in registers at a time
constexpr int kHeads = 4;                    // query heads that share the loading of a key

// The keys or values of one head (as made, of the first) in the pool, and how far the next token's are.
template <class T>
struct Column {
  const T* data;
  int64_t stride;
  int size;

  const T* of(int64_t token) const { return data + token * stride; }
  Column head(int h) const { return {data + h * size, stride, size}; }
};

// How a query is laid out and multiplied with keys that are kept as T: in float32.
template <class T>
struct Dots {
  static constexpr int kValues = kLanes;  // of a key at a time
  static constexpr int words(int size) { return round_up(size, kLanes); }
  static inline void pack(const float* from, int size, float* to) {
    memset(to, 0, words(size) * sizeof *to);
    memcpy(to, from, size * sizeof *from);
  }
  static inline F32 key(const T* from) { return load(from); }
  static inline F32 key(const T* from, int first) { return load_first(from, first); }
  static inline F32 add(F32 sum, F32 key, const float* q) { return sum + key * load(q); }
};

#if defined(__AVX512BF16__)
// With the processor's bfloat16 products: a query is the sum of two bfloat16, which has 16 bits of its 24.
template <>
struct Dots<uint16_t> {
  static constexpr int kValues = 2 * kLanes;
  static constexpr int words(int size) { return round_up(size, kValues); }
  static inline void pack(const float* from, int size, float* to) {
    memset(to, 0, words(size) * sizeof *to);
    uint16_t* bits = reinterpret_cast<uint16_t*>(to);
    for (int i = 0; i < size; ++i) {
      uint16_t* high = bits + i / kValues * 2 * kValues + i % kValues;
      high[0] = to_bf16(from[i]);
      high[kValues] = to_bf16(from[i] - from_bf16(high[0]));
    }
  }
  static inline F32 key(const uint16_t* from) { return (F32)_mm512_loadu_si512(from); }
  static inline F32 key(const uint16_t* from, int first) {
    F32 result{};
    memcpy(&result, from, first * sizeof *from);
    return result;
  }
  static inline F32 add(F32 sum, F32 key, const float* q) {
    const __m512 part = _mm512_dpbf16_ps((__m512)sum, (__m512bh)load(q), (__m512bh)key);
    return (F32)_mm512_dpbf16_ps(part, (__m512bh)load(q + kLanes), (__m512bh)key);
  }
};
#endif

// Asks for a row of a later tile, so that it is on its way while this one is computed: a little with every key, since a
// burst would fill the processor's queue of misses and stop it.
template <class T>
static inline void prefetch(const T* row, int size) {
  const char* from = reinterpret_cast<const char*>(row);
  for (int b = 0; b < size * static_cast<int>(sizeof(T)); b += 64) __builtin_prefetch(from + b, 0, 2);
}

// scores[h][i] = q[h] . key i, for G heads and `count` keys; asks for keys `ahead`, as many. kSize is the keys' size or 0.
template <class K, int G, int kSize>
static void score(Column<K> keys, const int64_t* tokens, const int64_t* ahead, int count, const float* q,
                  float* scores) {
  constexpr int kValues = Dots<K>::kValues;
  const int size = kSize != 0 ? kSize : keys.size;
  const int whole = size / kValues * kValues, stride = Dots<K>::words(size);
  constexpr int kWords = Dots<K>::words(kValues);
  for (int first = 0; first < count; first += kLanes) {
    F32 products[G][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const K* key = keys.of(tokens[first + i]);
      prefetch(keys.of(ahead[first + i]), size);
      F32 sums[G]{};
#pragma GCC unroll 8
      for (int d = 0; d < whole; d += kValues) {
        const F32 x = Dots<K>::key(key + d);
#pragma GCC unroll 4
        for (int h = 0; h < G; ++h) sums[h] = Dots<K>::add(sums[h], x, q + h * stride + d / kValues * kWords);
      }
      if (whole < size) {
        const F32 x = Dots<K>::key(key + whole, size - whole);
#pragma GCC unroll 4
        for (int h = 0; h < G; ++h) sums[h] = Dots<K>::add(sums[h], x, q + h * stride + whole / kValues * kWords);
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
static inline void add_columns(Column<V> values, const int64_t* tokens, const int64_t* ahead, int count,
                               const float* weights, const float* shrink, int d, float* sums, int stride) {
  F32 s[G][W];
#pragma GCC unroll 4
  for (int h = 0; h < G; ++h) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) s[h][w] = load(sums + h * stride + d + w * kLanes) * shrink[h];
  }
  for (int i = 0; i < count; ++i) {
    const V* value = values.of(tokens[i]) + d;
    prefetch(values.of(ahead[i]) + d, W * kLanes);
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

template <class V, int G>
static void add_values(Column<V> values, const int64_t* tokens, const int64_t* ahead, int count, const float* weights,
                       const float* shrink, float* sums) {
  const int stride = round_up(values.size, kLanes);
  int d = 0;
  for (; d + kWide * kLanes <= values.size; d += kWide * kLanes) {
    add_columns<V, G, kWide, true>(values, tokens, ahead, count, weights, shrink, d, sums, stride);
  }
  for (; d + kLanes <= values.size; d += kLanes) {
    add_columns<V, G, 1, true>(values, tokens, ahead, count, weights, shrink, d, sums, stride);
  }
  if (d < values.size) add_columns<V, G, 1, false>(values, tokens, ahead, count, weights, shrink, d, sums, stride);
}

template <class K, int G>
static auto score_kernel(int size) {
  return size == 64 ? score<K, G, 64> : size == 128 ? score<K, G, 128> : score<K, G, 0>;
}

// The kernels for up to kHeads heads that share keys.
template <class K, class V>
struct Shared {
  decltype(&score<K, 1, 0>) score;
  decltype(&add_values<V, 1>) add_values;

  Shared(int heads, int size)
      : score(heads == 1   ? score_kernel<K, 1>(size)
              : heads == 2 ? score_kernel<K, 2>(size)
              : heads == 3 ? score_kernel<K, 3>(size)
                           : score_kernel<K, 4>(size)),
        add_values(heads == 1   ? distaff::DISTAFF_LEVEL::add_values<V, 1>
                   : heads == 2 ? distaff::DISTAFF_LEVEL::add_values<V, 2>
                   : heads == 3 ? distaff::DISTAFF_LEVEL::add_values<V, 3>
                                : distaff::DISTAFF_LEVEL::add_values<V, 4>) {}
};

template <class K, class V>
static void decode_piece(const Call& call, const Piece& piece, float* scratch) {
  const int key_size = call.keys.size, value_size = call.values.size, groups = call.groups();
  const int words = Dots<K>::words(key_size), stride = round_up(value_size, kLanes);
  float* q = scratch;
  float* sums = q + call.heads * words;
  float* loaded = sums + call.heads * stride;
  Running* running = reinterpret_cast<Running*>(loaded + round_up(key_size, kLanes));
  memset(sums, 0, call.heads * stride * sizeof *sums);
  for (int head = 0; head < call.heads; ++head) {
    load_query(call, piece.token, head, loaded);
    Dots<K>::pack(loaded, key_size, q + head * words);
    running[head] = Running{};
  }
  const Column<K> keys{static_cast<const K*>(call.keys.data), int64_t{call.kv_heads} * key_size, key_size};
  const Column<V> values{static_cast<const V*>(call.values.data), int64_t{call.kv_heads} * value_size, value_size};
  const Shared<K, V> full(kHeads, key_size), last((groups - 1) % kHeads + 1, key_size);
  const int64_t position = call.positions[piece.token];
  int64_t tokens[2][kTile];
  int count = smaller(piece.end - piece.begin, int64_t{kTile});
  locate(call, piece.request, piece.begin, count, tokens[0]);
  int now = 0;
  for (int64_t at = piece.begin; at < piece.end; at += kTile, now ^= 1) {
    const int next = larger(smaller(piece.end - at - kTile, int64_t{kTile}), int64_t{0});
    if (next > 0) locate(call, piece.request, at + kTile, next, tokens[now ^ 1]);
    // The last tiles may be short; what is asked for in vain there is in the cache.
    for (int i = round_up(next, kLanes); i < round_up(count, kLanes); ++i) tokens[now ^ 1][i] = tokens[now][i];
    for (int head = 0; head < call.heads;) {
      const int kv = head / groups, heads = smaller(groups - head % groups, kHeads);
      const Shared<K, V>& kernels = heads == kHeads ? full : last;
      alignas(64) float scores[kHeads * kTile];
      float shrink[kHeads];
      kernels.score(keys.head(kv), tokens[now], tokens[now ^ 1], count, q + head * words, scores);
      for (int h = 0; h < heads; ++h) {
        const float slope = call.slopes == nullptr ? 0 : call.slopes[head + h];
        float* mine = scores + h * kTile;
        shrink[h] = weigh(call, slope, position - at, 0, count, round_up(count, kLanes), mine, mine, running[head + h]);
      }
      kernels.add_values(values.head(kv), tokens[now], tokens[now ^ 1], count, scores, shrink, sums + head * stride);
      head += heads;
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
  return int64_t{call.heads} * (Dots<uint16_t>::words(call.keys.size) + round_up(call.values.size, kLanes) +
                                static_cast<int>(sizeof(Running) / sizeof(float))) +
         round_up(call.keys.size, kLanes);
}

}  // namespace distaff::DISTAFF_LEVEL
