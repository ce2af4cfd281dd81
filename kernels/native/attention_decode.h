// One new token of a request against its pages: every key and value is read once, for all query heads that share it.
//
// Keys are scored a tile at a time, as they lie in the page: a dot product per key and head whose lanes are summed for
// 16 keys together. Values are added up per head in registers. Sums are float32, or integers where pages are int8.
#pragma once

#include "attention_rows.h"
#include "tiles.h"

namespace distaff {
namespace {

constexpr int kHeads = 4;  // query heads that share the loading of a key

// How a query is laid out and multiplied with keys that are kept as T. A query is `kHead` words and then `kWords` for
// every `kValues` values.
template <class T>
struct FloatKeys {  // in float32
  using Key = Simd::F;
  using Sum = Simd::F;
  static constexpr int64_t kValues = kLanes, kWords = kLanes, kHead = 0;
  static void pack(const float* from, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i += kLanes) Simd::store(to + i, load_first(from + i, size - i));
  }
  DISTAFF_INLINE static Key load(const T* from) { return Simd::load(from); }
  DISTAFF_INLINE static Sum start(const float*) { return Simd::zero(); }
  DISTAFF_INLINE static Sum add(Sum sum, Key key, const float* q) { return Simd::fma(key, Simd::load(q), sum); }
  DISTAFF_INLINE static Simd::F total(Sum sum, const float*) { return sum; }
};

struct Bfloat16Keys {  // with bfloat16 products; the query is rounded
  using Key = Simd::I;
  using Sum = Simd::F;
  static constexpr int64_t kValues = 2 * kLanes, kWords = kLanes, kHead = 0;
  static void pack(const float* from, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i += kValues) Simd::store_64(to + i / 2, load_as<uint16_t>(from, size, i));
  }
  DISTAFF_INLINE static Key load(const uint16_t* from) { return Simd::load_64(from); }
  DISTAFF_INLINE static Sum start(const float*) { return Simd::zero(); }
  DISTAFF_INLINE static Sum add(Sum sum, Key key, const float* q) { return Simd::dot_2(sum, key, Simd::load_64(q)); }
  DISTAFF_INLINE static Simd::F total(Sum sum, const float*) { return sum; }
};

// With products of bytes: keys as unsigned ones, 128 more than they are, and a query in steps of the largest / 16256 as
// the sum of two signed ones, 128 high + low. Its head is what sums start at, -128 * the query's, and the step.
struct Int8Keys {
  using Key = Simd::I;
  struct Sum {
    Simd::I high, low;
  };
  static constexpr int64_t kValues = 64, kWords = 2 * kLanes, kHead = 3 * kLanes;
  static void pack(const float* from, int64_t size, float* to) {
    Simd::F largest = Simd::zero();
    for (int64_t i = 0; i < size; i += kLanes) largest = Simd::max(largest, Simd::abs(load_first(from + i, size - i)));
    const float step = Simd::largest(largest) / (127 * 128);
    const Simd::F inverse = Simd::all(step > 0 ? 1 / step : 0.0f);
    int8_t* bytes = reinterpret_cast<int8_t*>(to + kHead);
    memset(bytes, 0, round_up(size, kValues) * 2);
    Simd::I highs = Simd::int_zero(), lows = Simd::int_zero();
    for (int64_t i = 0; i < size; i += kLanes) {
      const Simd::F all = Simd::mul(load_first(from + i, size - i), inverse);
      const Simd::I high = Simd::nearest(Simd::mul(all, Simd::all(1.0f / 128)));
      const Simd::I low = Simd::nearest(Simd::fma(Simd::to_float(high), Simd::all(-128.0f), all));
      int8_t* at = bytes + i / kValues * 2 * kValues + i % kValues;
      Simd::store_int8(at, high);
      Simd::store_int8(at + kValues, low);  // at most 64 either way
      highs = Simd::int_add(highs, high);
      lows = Simd::int_add(lows, low);
    }
    int32_t head[kHead] = {-128 * Simd::int_sum(highs)};
    head[kLanes] = -128 * Simd::int_sum(lows);
    memcpy(head + 2 * kLanes, &step, sizeof step);
    memcpy(to, head, sizeof head);
  }
  DISTAFF_INLINE static Key load(const int8_t* from) { return Simd::flip_signs(Simd::load_64(from)); }
  DISTAFF_INLINE static Sum start(const float* q) { return {Simd::load_64(q), Simd::load_64(q + kLanes)}; }
  DISTAFF_INLINE static Sum add(Sum sum, Key key, const float* q) {
    return {Simd::dot_4(sum.high, key, Simd::load_64(q)), Simd::dot_4(sum.low, key, Simd::load_64(q + kLanes))};
  }
  DISTAFF_INLINE static Simd::F total(Sum sum, const float* q) {
    const Simd::F whole = Simd::fma(Simd::to_float(sum.high), Simd::all(128.0f), Simd::to_float(sum.low));
    return Simd::mul(whole, Simd::all(q[2 * kLanes]));
  }
};

template <class T>
struct KeysOf {
  using type = FloatKeys<T>;
};
template <>
struct KeysOf<int8_t> {
  using type = Int8Keys;
};
template <>
struct KeysOf<uint16_t> {
  using type = Choose<Simd::kHasDot2, Bfloat16Keys, FloatKeys<uint16_t>>;
};
template <class T>
using Keys = typename KeysOf<T>::type;

template <class T>
constexpr int64_t query_words(int64_t size) {
  return Keys<T>::kHead + round_up(size, Keys<T>::kValues) / Keys<T>::kValues * Keys<T>::kWords;
}

// Asks for a row of a later tile, so that it is on its way while this one is computed: a little with every key, since a
// burst would fill the processor's queue of misses and stop it. (GCC drops calls of a function that only prefetches.)
template <class T>
DISTAFF_INLINE void prefetch_row(const T* row, int64_t size) {
  const char* from = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < size * static_cast<int64_t>(sizeof(T)); b += 64) Simd::prefetch(from + b);
}

// scores[h][i] = q[h] . key i, for G heads and `count` keys; asks for keys `ahead`, as many. kSize is the keys' size or 0.
template <class T, int G, int kSize>
void score(Column<T> keys, const int64_t* tokens, const int64_t* ahead, int64_t count, const float* q, float* scores) {
  using K = Keys<T>;
  const int64_t size = kSize != 0 ? kSize : keys.size, whole = size / K::kValues * K::kValues;
  const int64_t stride = query_words<T>(size);
  for (int64_t first = 0; first < count; first += kLanes) {
    Simd::F products[G][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const T* key = keys.of(tokens[first + i]);
      prefetch_row(keys.of(ahead[first + i]), size);
      typename K::Sum sums[G];
#pragma GCC unroll 4
      for (int h = 0; h < G; ++h) sums[h] = K::start(q + h * stride);
      const auto add = [&](typename K::Key x, int64_t d) DISTAFF_UNROLLED {
        const float* at = q + K::kHead + d / K::kValues * K::kWords;
#pragma GCC unroll 4
        for (int h = 0; h < G; ++h) sums[h] = K::add(sums[h], x, at + h * stride);
      };
#pragma GCC unroll 8
      for (int64_t d = 0; d < whole; d += K::kValues) add(K::load(key + d), d);
      if (whole < size) {
        T padded[K::kValues] = {};
        memcpy(padded, key + whole, (size - whole) * sizeof(T));
        add(K::load(padded), whole);
      }
#pragma GCC unroll 4
      for (int h = 0; h < G; ++h) products[h][i] = K::total(sums[h], q + h * stride);
    }
#pragma GCC unroll 4
    for (int h = 0; h < G; ++h) Simd::store(scores + h * kTile + first, Simd::sum_each(products[h]));
  }
}

// W vectors of the values of a token from `d` on.
template <bool kWhole, class T, int W>
DISTAFF_INLINE void load_columns(const Column<T>& values, const int64_t* token, int64_t d, Simd::F (&x)[W]) {
  const T* from = values.of(*token) + d;
  unrolled<W>([&](auto w) DISTAFF_UNROLLED {
    x[w] = kWhole ? Simd::load(from + w * kLanes) : load_first(from, values.size - d);
  });
}

// Of two tokens, whose values meet two bfloat16 weights; lanes are in the order that interleaving leaves them in.
template <bool, int W>
DISTAFF_INLINE void load_columns(const Column<uint16_t>& values, const int64_t* tokens, int64_t d, Simd::I (&x)[W]) {
  const uint16_t *even = values.of(tokens[0]) + d, *odd = values.of(tokens[1]) + d;
  unrolled<W / 2>([&](auto w) DISTAFF_UNROLLED {
    const Simd::I a = Simd::load_64(even + w * 2 * kLanes), b = Simd::load_64(odd + w * 2 * kLanes);
    x[2 * w] = Simd::interleave_low(a, b);
    x[2 * w + 1] = Simd::interleave_high(a, b);
  });
}

// sums[h][d ...] = sums[h][d ...] * shrink[h] + the weighted values of `count` tokens, for W vectors of G heads.
template <class T, class Weight, int G, int W, bool kWhole>
DISTAFF_INLINE void add_columns(const Column<T>& values, const int64_t* tokens, const int64_t* ahead, int64_t count,
                                const Weight* weights, const float* shrink, int64_t d, float* sums, int64_t stride) {
  constexpr int64_t kTokens = 4 / sizeof(Weight);
  using Format = typename FormatOf<Weight>::type;
  Simd::F s[G][W];
  unrolled<G>([&](auto h) DISTAFF_UNROLLED {
    unrolled<W>([&](auto w) DISTAFF_UNROLLED {
      s[h][w] = Simd::mul(Simd::load(sums + h * stride + d + w * kLanes), Simd::all(shrink[h]));
    });
  });
  for (int64_t i = 0; i < count; i += kTokens) {
    for (int64_t j = 0; j < kTokens; ++j) prefetch_row(values.of(ahead[i + j]) + d, W * kLanes);
    typename Format::W x[W];
    load_columns<kWhole>(values, tokens + i, d, x);
    unrolled<G>([&](auto h) DISTAFF_UNROLLED {
      const typename Format::W weight = Format::repeat(reinterpret_cast<const uint8_t*>(weights + h * kTile + i));
      unrolled<W>([&](auto w) DISTAFF_UNROLLED { s[h][w] = Format::dot(s[h][w], x[w], weight); });
    });
  }
  unrolled<G>([&](auto h) DISTAFF_UNROLLED {
    unrolled<W>([&](auto w) DISTAFF_UNROLLED { Simd::store(sums + h * stride + d + w * kLanes, s[h][w]); });
  });
}

template <class T, class Weight, int G>
void add_values(Column<T> values, const int64_t* tokens, const int64_t* ahead, int64_t count, const Weight* weights,
                const float* shrink, float* sums) {
  constexpr int kLeast = 4 / sizeof(Weight), kMost = Simd::kPanels > kLeast ? Simd::kPanels : kLeast;
  const int64_t stride = round_up(values.size, kLanes);
  int64_t d = 0;
  for (; d + kMost * kLanes <= values.size; d += kMost * kLanes) {
    add_columns<T, Weight, G, kMost, true>(values, tokens, ahead, count, weights, shrink, d, sums, stride);
  }
  for (; d + kLeast * kLanes <= values.size; d += kLeast * kLanes) {
    add_columns<T, Weight, G, kLeast, true>(values, tokens, ahead, count, weights, shrink, d, sums, stride);
  }
  if constexpr (kLeast == 1) {
    if (d < values.size) {
      add_columns<T, Weight, G, 1, false>(values, tokens, ahead, count, weights, shrink, d, sums, stride);
    }
  }
}

// The kernels for up to kHeads heads that share keys.
template <class K, class V, class Weight>
struct Shared {
  void (*score)(Column<K>, const int64_t*, const int64_t*, int64_t, const float*, float*);
  void (*add_values)(Column<V>, const int64_t*, const int64_t*, int64_t, const Weight*, const float*, float*);

  template <int G>
  static Shared of_heads(int64_t size) {
    return {size == 64 ? distaff::score<K, G, 64> : size == 128 ? distaff::score<K, G, 128> : distaff::score<K, G, 0>,
            distaff::add_values<V, Weight, G>};
  }
  static Shared of(int64_t heads, int64_t size) {
    return heads == 1 ? of_heads<1>(size) : heads == 2 ? of_heads<2>(size) : heads == 3 ? of_heads<3>(size)
                                                                                     : of_heads<4>(size);
  }
};

template <class K, class V, class Weight>
void decode_piece(const Call& call, const Piece& piece, float* scratch) {
  const int64_t key_size = call.keys.size, groups = call.groups(), words = query_words<K>(key_size);
  const int64_t stride = round_up(call.values.size, kLanes);
  float* q = scratch;
  float* sums = q + call.heads * words;
  float* loaded = sums + call.heads * stride;
  Running* running = reinterpret_cast<Running*>(loaded + round_up(key_size, kLanes));
  memset(sums, 0, call.heads * stride * sizeof *sums);
  for (int64_t head = 0; head < call.heads; ++head) {
    load_query(call, piece.token, head, loaded);
    Keys<K>::pack(loaded, key_size, q + head * words);
    running[head] = Running{};
  }
  using Kernels = Shared<K, V, Weight>;
  const Kernels full = Kernels::of(kHeads, key_size), last = Kernels::of((groups - 1) % kHeads + 1, key_size);
  const int64_t position = call.positions[piece.token];
  int64_t tokens[2][kTile];
  int64_t count = least(piece.end - piece.begin, kTile);
  locate(call, piece.request, piece.begin, count, tokens[0]);
  int now = 0;
  for (int64_t at = piece.begin; at < piece.end; at += kTile, now ^= 1) {
    const int64_t next = most(least(piece.end - at - kTile, kTile), 0), columns = round_up(count, kLanes);
    if (next > 0) locate(call, piece.request, at + kTile, next, tokens[now ^ 1]);
    // The last tiles may be short; what is asked for in vain there is in the cache.
    for (int64_t i = round_up(next, kLanes); i < columns; ++i) tokens[now ^ 1][i] = tokens[now][i];
    for (int64_t head = 0; head < call.heads;) {
      const int64_t heads = least(groups - head % groups, kHeads);
      const Kernels& kernels = heads == kHeads ? full : last;
      const Column<K> keys(call, call.keys, head / groups);
      const Column<V> values(call, call.values, head / groups);
      alignas(64) float scores[kHeads * kTile];
      alignas(64) Weight weights[kHeads * kTile];
      float key_steps[kTile], value_steps[kTile], shrink[kHeads];
      Columns seen{0, count, columns, position - at, nullptr, nullptr};
      if constexpr (sizeof(K) == 1) {
        keys.steps(tokens[now], columns, key_steps);
        values.steps(tokens[now], columns, value_steps);
        seen.key_steps = key_steps;
        seen.value_steps = value_steps;
      }
      kernels.score(keys, tokens[now], tokens[now ^ 1], count, q + head * words, scores);
      for (int64_t h = 0; h < heads; ++h) {
        const float slope = call.slopes == nullptr ? 0 : call.slopes[head + h];
        shrink[h] = weigh(call, slope, seen, scores + h * kTile, weights + h * kTile, running[head + h]);
      }
      kernels.add_values(values, tokens[now], tokens[now ^ 1], columns, weights, shrink, sums + head * stride);
      head += heads;
    }
    count = next;
  }
  for (int64_t head = 0; head < call.heads; ++head) {
    float* mine = sums + head * stride;
    if constexpr (sizeof(Weight) == 2) {
      for (int64_t d = 0; d < stride; d += 2 * kLanes) {
        Simd::store_interleaved(mine + d, mine + d + kLanes, Simd::load(mine + d), Simd::load(mine + d + kLanes));
      }
    }
    deliver(call, piece, piece.token, head, running[head], mine);
  }
}

void decode(const Call& call, const Piece& piece, float* scratch) {
  const bool k32 = call.keys.storage == Storage::kFloat32, v32 = call.values.storage == Storage::kFloat32;
  auto kernel = k32 ? (v32 ? decode_piece<float, float, float> : decode_piece<float, uint16_t, float>)
                    : (v32 ? decode_piece<uint16_t, float, float> : decode_piece<uint16_t, uint16_t, float>);
  if (!k32 && !v32 && call.values.size % (2 * kLanes) == 0) kernel = decode_piece<uint16_t, uint16_t, Narrow>;
  if (call.keys.storage == Storage::kInt8) kernel = decode_piece<int8_t, int8_t, float>;
  kernel(call, piece, scratch);
}

int64_t decode_scratch(const Call& call) {
  const int64_t words = most(query_words<float>(call.keys.size), query_words<int8_t>(call.keys.size));
  return call.heads * (words + round_up(call.values.size, kLanes) + static_cast<int64_t>(sizeof(Running) / sizeof(float))) +
         round_up(call.keys.size, kLanes);
}

}  // namespace
}  // namespace distaff
