// One new token of a request against its pages: every key and value is read once, for all query heads that share it.
//
// Pages are read in the order of memory, the keys of a tile of tokens for all heads and then its values, because that is
// what the processor's own prefetching understands. Meanwhile as many lines of what comes next are asked for: the values
// while keys are scored, and the next tile's keys while values are added up. Keys are scored as they lie in the page: a
// dot product per key and head whose lanes are summed for 16 keys together. Values are added up per head in registers.
// Sums are float32, or integers where pages are int8.
#pragma once

#include "attention_rows.h"
#include "tiles.h"

namespace distaff {
namespace {

constexpr int kHeads = 4;             // query heads that share the loading of a key
constexpr int64_t kDecodeTile = 32;  // tokens

// How a query is laid out and multiplied with keys that are kept as T: kLanes words for every kValues values. What
// pack() returns is to be multiplied with the products.
template <class T>
struct FloatKeys {  // in float32
  using Key = Simd::F;
  using Sum = Simd::F;
  static constexpr int64_t kValues = kLanes;
  static float pack(const float* from, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i += kLanes) Simd::store(to + i, load_first(from + i, size - i));
    return 1;
  }
  DISTAFF_INLINE static Sum start() { return Simd::zero(); }
  DISTAFF_INLINE static Key load(const T* from) { return Simd::load(from); }
  DISTAFF_INLINE static Sum add(Sum sum, Key key, const float* q) { return Simd::fma(key, Simd::load(q), sum); }
  DISTAFF_INLINE static Simd::F total(Sum sum) { return sum; }
};

struct Bfloat16Keys {  // with bfloat16 products; the query is rounded
  using Key = Simd::I;
  using Sum = Simd::F;
  static constexpr int64_t kValues = 2 * kLanes;
  static float pack(const float* from, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i += kValues) {
      Simd::store_64(to + i / 2, load_first_words<uint16_t>(from + i, size - i));
    }
    return 1;
  }
  DISTAFF_INLINE static Sum start() { return Simd::zero(); }
  DISTAFF_INLINE static Key load(const uint16_t* from) { return Simd::load_64(from); }
  DISTAFF_INLINE static Sum add(Sum sum, Key key, const float* q) { return Simd::dot_2(sum, key, Simd::load_64(q)); }
  DISTAFF_INLINE static Simd::F total(Sum sum) { return sum; }
};

struct Int8Keys {  // with int16 products; the query is rounded to steps of its largest value, so that no sum overflows
  using Key = Simd::I;
  using Sum = Simd::I;
  static constexpr int64_t kValues = 2 * kLanes;
  static constexpr int32_t kSteps = INT32_MAX / (127 * kMostValues);
  static float pack(const float* from, int64_t size, float* to) {
    Simd::F largest = Simd::zero();
    for (int64_t i = 0; i < size; i += kLanes) largest = Simd::max(largest, Simd::abs(load_first(from + i, size - i)));
    const float step = Simd::largest(largest) / kSteps;
    const Simd::F inverse = Simd::all(step > 0 ? 1 / step : 0.0f);
    auto* words = reinterpret_cast<int16_t*>(to);
    memset(words, 0, round_up(size, kValues) * sizeof *words);
    for (int64_t i = 0; i < size; i += kLanes) {
      int32_t steps[kLanes];
      const Simd::I rounded = Simd::nearest(Simd::mul(load_first(from + i, size - i), inverse));
      Simd::store_64(steps, rounded);
      for (int64_t j = 0; j < kLanes; ++j) words[i + j] = static_cast<int16_t>(steps[j]);
    }
    return step;
  }
  DISTAFF_INLINE static Sum start() { return Simd::int_zero(); }
  DISTAFF_INLINE static Key load(const int8_t* from) { return Simd::load_widened(from); }
  DISTAFF_INLINE static Sum add(Sum sum, Key key, const float* q) {
    return Simd::dot_int16(sum, key, Simd::load_64(q));
  }
  DISTAFF_INLINE static Simd::F total(Sum sum) { return Simd::to_float(sum); }
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
  return round_up(size, Keys<T>::kValues) / Keys<T>::kValues * kLanes;
}

// Asks for tokens of a pool in the order of memory, a few lines at a time: a burst would fill the processor's queue of
// misses and stop it.
class Fetch {
 public:
  Fetch(const Call& call, const Pool& pool, const int32_t* tokens, int64_t count)
      : data_(static_cast<const char*>(pool.data)),
        row_(call.kv_heads * pool.head_bytes()),
        tokens_(tokens),
        last_(tokens + count) {
    next_run();
  }
  // A run's last lines may be past its end; after the last token, its last line again.
  DISTAFF_INLINE void next(int64_t lines) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < lines; ++i) Simd::prefetch_near(at_ + 64 * i);
    at_ += 64 * lines;
    if (at_ >= end_) next_run();
  }
  void rest() {
    while (tokens_ != last_ || at_ + 1 < end_) next(1);
  }

 private:
  __attribute__((noinline)) void next_run() {
    if (tokens_ == last_) {
      at_ = end_ - 1;
      return;
    }
    const int32_t first = *tokens_;
    int32_t count = 1;
    while (++tokens_ != last_ && *tokens_ == first + count) ++count;
    at_ = data_ + first * row_;
    end_ = at_ + count * row_;
    at_ -= reinterpret_cast<uintptr_t>(at_) % 64;
  }

  const char* data_;
  int64_t row_;
  const int32_t *tokens_, *last_;
  const char *at_ = nullptr, *end_ = nullptr;
};

// Lines that are asked for with a head of `size` values.
template <class T>
constexpr int64_t lines_of(int64_t size) {
  return most(1, size * static_cast<int64_t>(sizeof(T)) / 64);
}

// scores[h][i] = q[h] . key i, for G heads and `count` keys, a multiple of 16. kSize is the keys' size, or 0.
template <class T, int G, int kSize>
void score(Column<T> keys, const int32_t* tokens, int64_t count, const float* q, const float* scales, Fetch& ahead,
           float* scores) {
  using K = Keys<T>;
  Fetch fetch = ahead;
  const int64_t size = kSize != 0 ? kSize : keys.size;
  const int64_t stride = query_words<T>(size);
  for (int64_t first = 0; first < count; first += kLanes) {
    Simd::F fours[G][4];
    unrolled<4>([&](auto part) DISTAFF_UNROLLED {
      const T* from[4];
      typename K::Sum sums[G][4];
      unrolled<4>([&](auto i) DISTAFF_UNROLLED {
        from[i] = keys.of(tokens[first + 4 * part + i]);
        fetch.next(lines_of<T>(size));
        unrolled<G>([&](auto h) DISTAFF_UNROLLED { sums[h][i] = K::start(); });
      });
      const auto add = [&](int64_t d, const auto& load) DISTAFF_UNROLLED {
        unrolled<4>([&](auto i) DISTAFF_UNROLLED {
          const typename K::Key key = load(from[i] + d);
          unrolled<G>([&](auto h) DISTAFF_UNROLLED {
            sums[h][i] = K::add(sums[h][i], key, q + h * stride + d / K::kValues * kLanes);
          });
        });
      };
      const auto load = [](const T* at) DISTAFF_UNROLLED { return K::load(at); };
      if constexpr (kSize != 0) {
        unrolled<kSize / K::kValues>([&](auto d) DISTAFF_UNROLLED { add(d * K::kValues, load); });
      } else {
        const int64_t whole = size / K::kValues * K::kValues;
        for (int64_t d = 0; d < whole; d += K::kValues) add(d, load);
        if (whole < size) {
          add(whole, [&](const T* at) {
            T padded[K::kValues] = {};
            memcpy(padded, at, (size - whole) * sizeof(T));
            return K::load(padded);
          });
        }
      }
      unrolled<G>([&](auto h) DISTAFF_UNROLLED {
        const auto& s = sums[h];
        fours[h][part] = Simd::sum_fours(K::total(s[0]), K::total(s[1]), K::total(s[2]), K::total(s[3]));
      });
    });
    unrolled<G>([&](auto h) DISTAFF_UNROLLED {
      const auto& f = fours[h];
      const Simd::F all = Simd::sum_quarters(f[0], f[1], f[2], f[3]);
      Simd::store(scores + h * kDecodeTile + first, Simd::mul(all, Simd::all(scales[h])));
    });
  }
  ahead = fetch;
}

// W vectors of the values of a token from `d` on.
template <bool kWhole, class T, int W>
DISTAFF_INLINE void load_columns(const Column<T>& values, const int32_t* token, int64_t d, Simd::F (&x)[W]) {
  const T* from = values.of(*token) + d;
  unrolled<W>([&](auto w) DISTAFF_UNROLLED {
    x[w] = kWhole ? Simd::load(from + w * kLanes) : load_first(from, values.size - d);
  });
}

// Of two tokens, whose values meet two bfloat16 weights; lanes are in the order that interleaving leaves them in.
template <bool, int W>
DISTAFF_INLINE void load_columns(const Column<uint16_t>& values, const int32_t* tokens, int64_t d, Simd::I (&x)[W]) {
  const uint16_t *even = values.of(tokens[0]) + d, *odd = values.of(tokens[1]) + d;
  unrolled<W / 2>([&](auto w) DISTAFF_UNROLLED {
    const Simd::I a = Simd::load_64(even + w * 2 * kLanes), b = Simd::load_64(odd + w * 2 * kLanes);
    x[2 * w] = Simd::interleave_low(a, b);
    x[2 * w + 1] = Simd::interleave_high(a, b);
  });
}

// sums[h][d ...] += the weighted values of `count` tokens, for W vectors of G heads.
template <class T, class Weight, int G, int W, bool kWhole>
DISTAFF_INLINE void add_columns(const Column<T>& values, const int32_t* tokens, int64_t count, const Weight* weights,
                                int64_t d, Fetch& ahead, float* sums, int64_t stride) {
  constexpr int64_t kTokens = 4 / sizeof(Weight);
  using Format = typename FormatOf<Weight>::type;
  Fetch fetch = ahead;
  Simd::F s[G][W];
  unrolled<G>([&](auto h) DISTAFF_UNROLLED {
    unrolled<W>([&](auto w) DISTAFF_UNROLLED { s[h][w] = Simd::load(sums + h * stride + d + w * kLanes); });
  });
  for (int64_t i = 0; i < count; i += kTokens) {
    fetch.next(kTokens * lines_of<T>(W * kLanes));
    typename Format::W x[W];
    load_columns<kWhole>(values, tokens + i, d, x);
    unrolled<G>([&](auto h) DISTAFF_UNROLLED {
      const auto weight = Format::repeat(reinterpret_cast<const uint8_t*>(weights + h * kDecodeTile + i));
      unrolled<W>([&](auto w) DISTAFF_UNROLLED { s[h][w] = Format::dot(s[h][w], x[w], weight); });
    });
  }
  unrolled<G>([&](auto h) DISTAFF_UNROLLED {
    unrolled<W>([&](auto w) DISTAFF_UNROLLED { Simd::store(sums + h * stride + d + w * kLanes, s[h][w]); });
  });
  ahead = fetch;
}

template <class T, class Weight, int G>
void add_values(Column<T> values, const int32_t* tokens, int64_t count, const Weight* weights, Fetch& ahead,
                float* sums) {
  constexpr int kLeast = 4 / sizeof(Weight), kMost = Simd::kPanels > kLeast ? Simd::kPanels : kLeast;
  const int64_t stride = round_up(values.size, kLanes);
  int64_t d = 0;
  for (; d + kMost * kLanes <= values.size; d += kMost * kLanes) {
    add_columns<T, Weight, G, kMost, true>(values, tokens, count, weights, d, ahead, sums, stride);
  }
  for (; d + kLeast * kLanes <= values.size; d += kLeast * kLanes) {
    add_columns<T, Weight, G, kLeast, true>(values, tokens, count, weights, d, ahead, sums, stride);
  }
  if constexpr (kLeast == 1) {
    if (d < values.size) add_columns<T, Weight, G, 1, false>(values, tokens, count, weights, d, ahead, sums, stride);
  }
}

// The kernels for up to kHeads heads that share keys.
template <class K, class V, class Weight>
struct Shared {
  void (*score)(Column<K>, const int32_t*, int64_t, const float*, const float*, Fetch&, float*);
  void (*add_values)(Column<V>, const int32_t*, int64_t, const Weight*, Fetch&, float*);

  template <int G>
  static Shared of_heads(int64_t size) {
    if constexpr (kWide) {
      if (size == 64) return {distaff::score<K, G, 64>, distaff::add_values<V, Weight, G>};
      if (size == 128) return {distaff::score<K, G, 128>, distaff::add_values<V, Weight, G>};
    }
    return {distaff::score<K, G, 0>, distaff::add_values<V, Weight, G>};
  }
  static Shared of(int64_t heads, int64_t size) {
    return heads == 1 ? of_heads<1>(size) : heads == 2 ? of_heads<2>(size) : heads == 3 ? of_heads<3>(size)
                                                                                     : of_heads<4>(size);
  }
};

struct DecodeLayout : Offsets {
  int64_t words, width;  // floats of a query and of a sum
  int64_t q, scales, sums, rows, scores, weights, tokens;

  DecodeLayout(const Call& call, const Piece& piece)
      : words(most(query_words<float>(call.keys.size), query_words<int8_t>(call.keys.size))),
        width(round_up(call.values.size, kLanes)) {
    q = take(call.heads * words);
    scales = take(call.heads);
    sums = take(call.heads * width);
    rows = take(call.heads * static_cast<int64_t>(sizeof(Row) / sizeof(float)));
    scores = take(call.heads * kDecodeTile);
    weights = take(call.heads * kDecodeTile);
    tokens = take(stream_length(piece, kDecodeTile));
  }
};

template <class K, class V, class Weight>
void decode_as(const Call& call, const Piece& piece, const Piece* next, float* scratch) {
  const DecodeLayout layout(call, piece);
  const int64_t groups = call.groups(), words = query_words<K>(call.keys.size), width = layout.width;
  float *q = scratch + layout.q, *scales = scratch + layout.scales, *sums = scratch + layout.sums;
  float* scores = scratch + layout.scores;
  auto* rows = reinterpret_cast<Row*>(scratch + layout.rows);
  auto* weights = reinterpret_cast<Weight*>(scratch + layout.weights);
  auto* stream = reinterpret_cast<int32_t*>(scratch + layout.tokens);
  locate_stream(call, piece, next, kDecodeTile, stream);
  memset(sums, 0, call.heads * width * sizeof *sums);
  for (int64_t head = 0; head < call.heads; ++head) {
    float loaded[kMostValues];
    load_queries(call, piece.token, head, 1, loaded, 0);
    scales[head] = Keys<K>::pack(loaded, call.keys.size, q + head * words);
    rows[head] = start_row(call, piece.token, head);
  }
  constexpr bool kSteps = sizeof(K) == 1;  // which lie beside values, and are read before them
  using Kernels = Shared<K, V, Weight>;
  const Kernels full = Kernels::of(kHeads, call.keys.size), rest = Kernels::of((groups - 1) % kHeads + 1, call.keys.size);
  // Calls body(head, kernels) for every few heads that share keys.
  const auto each_few = [&](const auto& body) {
    for (int64_t head = 0; head < call.heads;) {
      const int64_t heads = least(groups - head % groups, kHeads);
      body(head, heads == kHeads ? full : rest);
      head += heads;
    }
  };
  for (int64_t at = piece.begin; at < piece.end; at += kDecodeTile, stream += kDecodeTile) {
    Columns tile = tile_of(piece, at, kDecodeTile);
    int32_t tokens[kDecodeTile];
    repeat_last(stream, tile.end, tile.columns, tokens);
    const int32_t* following = stream + tile.end;
    Fetch first = kSteps ? Fetch(call, call.keys, following, kDecodeTile) : Fetch(call, call.values, stream, tile.end);
    each_few([&](int64_t head, const Kernels& kernels) {
      const Column<K> keys(call, call.keys, head / groups);
      kernels.score(keys, tokens, tile.columns, q + head * words, scales + head, first,
                    scores + head * kDecodeTile);
    });
    first.rest();
    Fetch second(call, kSteps ? call.values : call.keys, following, kDecodeTile);
    for (int64_t head = 0; head < call.heads; ++head) {
      float key_steps[kDecodeTile], value_steps[kDecodeTile];
      if constexpr (kSteps) {
        tile.key_steps = key_steps;
        tile.value_steps = value_steps;
        if (head % groups == 0) {
          Column<K>(call, call.keys, head / groups).steps(tokens, tile.columns, key_steps);
          Column<V>(call, call.values, head / groups).steps(tokens, tile.columns, value_steps);
        }
      }
      weigh(call, tile, rows[head], scores + head * kDecodeTile, weights + head * kDecodeTile, sums + head * width, width);
    }
    each_few([&](int64_t head, const Kernels& kernels) {
      const Column<V> values(call, call.values, head / groups);
      kernels.add_values(values, tokens, tile.columns, weights + head * kDecodeTile, second,
                         sums + head * width);
    });
    second.rest();
  }
  for (int64_t head = 0; head < call.heads; ++head) {
    float* mine = sums + head * width;
    if constexpr (sizeof(Weight) == 2) {
      for (int64_t d = 0; d < width; d += 2 * kLanes) {
        Simd::store_interleaved(mine + d, mine + d + kLanes, Simd::load(mine + d), Simd::load(mine + d + kLanes));
      }
    }
    deliver(call, piece, piece.token, head, rows[head], mine);
  }
}

void decode(const Call& call, const Piece& piece, const Piece* next, float* scratch) {
  const bool k32 = call.keys.storage == Storage::kFloat32, v32 = call.values.storage == Storage::kFloat32;
  auto kernel = k32 ? (v32 ? decode_as<float, float, float> : decode_as<float, uint16_t, float>)
                    : (v32 ? decode_as<uint16_t, float, float> : decode_as<uint16_t, uint16_t, float>);
  if (!k32 && !v32 && call.values.size % (2 * kLanes) == 0) kernel = decode_as<uint16_t, uint16_t, Narrow>;
  if (call.keys.storage == Storage::kInt8) kernel = decode_as<int8_t, int8_t, float>;
  kernel(call, piece, next, scratch);
}

}  // namespace
}  // namespace distaff
