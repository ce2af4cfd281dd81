// Rows of heads in and out of their storage, the rotary embedding, and one row's online softmax.
//
// A head in an int8 pool is its values, rounded to 127 steps of the largest, and after them the float32 step.
#pragma once

#include "attention.h"
#include "simd_math.h"
#include "tiles.h"

namespace distaff {
namespace {

using attention::Call;
using attention::kMostValues;
using attention::Piece;
using attention::Pool;
using attention::Rows;
using attention::Storage;

constexpr float kLowest = -3.40282346638528859812e+38f;
constexpr float kInfinity = __builtin_inff();

// Whether loops are worth a copy for the usual sizes of heads: where sums stay in registers.
constexpr bool kWide = Simd::kPanels > 1;

// The softmax is taken with powers of two, so scores are in units of log 2.
constexpr float kLog2E = 1.44269504f;

inline float exp2(float x) {
  float lanes[kLanes];
  Simd::store(lanes, exp2(Simd::all(x)));
  return lanes[0];
}

// The first `count` of 16 values, then zeros.
template <class T>
Simd::F load_first(const T* from, int64_t count) {
  if (count >= kLanes) return Simd::load(from);
  T padded[kLanes] = {};
  memcpy(padded, from, count * sizeof(T));
  return Simd::load(padded);
}

// to[i] = map(i, from[i]), 16 at a time.
template <class From, class To, class Map>
DISTAFF_INLINE void transform(const From* from, int64_t count, To* to, const Map& map) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Simd::store(to + i, map(i, Simd::load(from + i)));
  if (i >= count) return;
  To last[kLanes];
  Simd::store(last, map(i, load_first(from + i, count - i)));
  memcpy(to + i, last, (count - i) * sizeof(To));
}

template <class From, class To>
void convert(const From* from, int64_t count, To* to) {
  transform(from, count, to, [](int64_t, Simd::F x) { return x; });
}

// 64 bytes of E from as many values.
template <class E, class T>
DISTAFF_INLINE Simd::I load_words(const T* from) {
  if constexpr (sizeof(E) == sizeof(T)) {
    return Simd::load_64(from);
  } else if constexpr (sizeof(E) == 2) {
    return Simd::to_bfloat16(Simd::load(from), Simd::load(from + kLanes));
  } else {
    const Simd::F values = Simd::load(from);
    Simd::I words;
    memcpy(&words, &values, sizeof words);
    return words;
  }
}

// Likewise from `count` values, and zeros after them.
template <class E, class T>
Simd::I load_first_words(const T* from, int64_t count) {
  T padded[64 / sizeof(E)] = {};
  memcpy(padded, from, least(count, 64 / sizeof(E)) * sizeof(T));
  return load_words<E>(padded);
}

// Floats to int8 in steps of the returned size.
inline float quantise_row(const float* from, int64_t count, int8_t* to) {
  Simd::F largest = Simd::zero();
  for (int64_t i = 0; i < count; i += kLanes) largest = Simd::max(largest, Simd::abs(load_first(from + i, count - i)));
  const float step = Simd::largest(largest) / 127.0f;
  const Simd::F inverse = Simd::all(step > 0 ? 1.0f / step : 0.0f);
  const Simd::F bound = Simd::all(127.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Simd::F steps = Simd::min(Simd::mul(load_first(from + i, count - i), inverse), bound);
    int8_t bytes[kLanes];
    Simd::store_int8(bytes, Simd::nearest(Simd::max(steps, Simd::sub(Simd::zero(), bound))));
    memcpy(to + i, bytes, least(count - i, kLanes));
  }
  return step;
}

// Calls use(row) with rows from value `at` on, as they are stored.
template <class Use>
DISTAFF_INLINE void with_row(Rows rows, int64_t at, const Use& use) {
  if (rows.storage == Storage::kFloat32) return use(static_cast<const float*>(rows.data) + at);
  use(static_cast<const uint16_t*>(rows.data) + at);
}

// Puts a head where the pool keeps that of a slot; load(to) writes it as float32 or bfloat16.
template <class Load>
DISTAFF_INLINE void store_head(const Pool& pool, int64_t head, const Load& load) {
  char* to = static_cast<char*>(pool.data) + head * pool.head_bytes();
  if (pool.storage == Storage::kFloat32) return load(reinterpret_cast<float*>(to));
  if (pool.storage == Storage::kBfloat16) return load(reinterpret_cast<uint16_t*>(to));
  float row[kMostValues];
  load(row);
  const float step = quantise_row(row, pool.size, reinterpret_cast<int8_t*>(to));
  memcpy(to + pool.size, &step, sizeof step);
}

// Turns one head of a token by the angles of its position.
inline void rotate(const Call& call, const float* cos, const float* sin, float* row) {
  const int size = call.rotary_size, half = size / 2, apart = call.interleaved ? 1 : half;
  for (int pair = 0; pair < half; ++pair) {
    const int i = call.interleaved ? 2 * pair : pair, j = i + apart;
    const float a = row[i], b = row[j];
    row[i] = a * cos[i] + b * sin[i];
    row[j] = b * cos[j] + a * sin[j];
  }
}

// Some heads of queries or keys of a token, turned by the angles of its position and scaled, `stride` apart.
template <class To>
DISTAFF_INLINE void load_turned(const Call& call, Rows rows, int64_t token, int64_t head, int64_t heads, float factor,
                                To* to, int64_t stride) {
  const int64_t size = call.keys.size, rotary = call.cosines == nullptr ? 0 : call.rotary_size, half = rotary / 2;
  const float *cos = call.cosines + call.positions[token] * rotary, *sin = call.sines + call.positions[token] * rotary;
  const Simd::F scale = Simd::all(factor);
  const auto scaled = [=](int64_t, Simd::F x) DISTAFF_UNROLLED { return Simd::mul(x, scale); };
  with_row(rows, head * size, [=](const auto* row) DISTAFF_UNROLLED {
    if (rotary != 0 && (call.interleaved || half % kLanes != 0)) {
      for (int64_t h = 0; h < heads; ++h) {
        float turned[kMostValues];
        convert(row + h * size, size, turned);
        rotate(call, cos, sin, turned);
        transform(turned, size, to + h * stride, scaled);
      }
      return;
    }
    for (int64_t i = 0, j = half; i < half; i += kLanes, j += kLanes) {
      const Simd::F cos_i = scaled(i, Simd::load(cos + i)), cos_j = scaled(j, Simd::load(cos + j));
      const Simd::F sin_i = scaled(i, Simd::load(sin + i)), sin_j = scaled(j, Simd::load(sin + j));
      for (int64_t h = 0; h < heads; ++h) {
        const Simd::F a = Simd::load(row + h * size + i), b = Simd::load(row + h * size + j);
        Simd::store(to + h * stride + i, Simd::fma(a, cos_i, Simd::mul(b, sin_i)));
        Simd::store(to + h * stride + j, Simd::fma(b, cos_j, Simd::mul(a, sin_j)));
      }
    }
    for (int64_t h = 0; h < heads && rotary < size; ++h) {
      transform(row + h * size + rotary, size - rotary, to + h * stride + rotary, scaled);
    }
  });
}

// Query heads, whose products with keys are scores.
template <class To>
void load_queries(const Call& call, int64_t token, int64_t head, int64_t heads, To* to, int64_t stride) {
  load_turned(call, call.q, token, token * call.heads + head, heads, call.scale * kLog2E, to, stride);
}

// Asks for the token of a slot.
DISTAFF_INLINE void prefetch_slot(const Call& call, const Pool& pool, int64_t slot) {
  const int64_t bytes = call.kv_heads * pool.head_bytes();
  const char* row = static_cast<const char*>(pool.data) + slot * bytes;
  for (int64_t b = 0; b < bytes; b += 64) Simd::prefetch_near(row + b);
}

void write_rows(const Call& call, int64_t first, int64_t end) {
  for (int64_t token = first; token < end; ++token) {
    prefetch_slot(call, call.keys, call.slots[token]);
    if (call.v.data != nullptr) prefetch_slot(call, call.values, call.slots[token]);
  }
  for (int64_t token = first; token < end; ++token) {
    for (int64_t head = 0; head < call.kv_heads; ++head) {
      const int64_t from = token * call.kv_heads + head, to = int64_t{call.slots[token]} * call.kv_heads + head;
      store_head(call.keys, to, [&](auto* key) { load_turned(call, call.k, token, from, 1, 1, key, 0); });
      if (call.v.data == nullptr) continue;
      with_row(call.v, from * call.values.size, [&](const auto* row) {
        store_head(call.values, to, [&](auto* value) { convert(row, call.values.size, value); });
      });
    }
  }
}

// The keys or values of one head in the pool, by the indices of tokens.
template <class T>
struct Column {
  const char* data;
  int64_t stride;  // bytes from token to token
  int64_t size;

  DISTAFF_INLINE Column(const Call& call, const Pool& pool, int64_t head)
      : data(static_cast<const char*>(pool.data) + head * pool.head_bytes()),
        stride(call.kv_heads * pool.head_bytes()),
        size(pool.size) {}
  DISTAFF_INLINE const T* of(int64_t token) const { return reinterpret_cast<const T*>(data + token * stride); }
  // The steps of `count` tokens, for int8.
  void steps(const int32_t* tokens, int64_t count, float* to) const {
    if constexpr (sizeof(T) == 1) {
      for (int64_t i = 0; i < count; ++i) memcpy(to + i, of(tokens[i]) + size, sizeof *to);
    }
  }
};

// Indices in the pool of `count` tokens of a request from `position` on.
inline void locate(const Call& call, int64_t request, int64_t position, int64_t count, int32_t* tokens) {
  const int32_t* pages = call.tables + request * call.pages_per_request + position / call.page_size;
  int64_t offset = position % call.page_size, i = 0;
  while (i < count) {
    const int32_t page = *pages++ * call.page_size;
    for (; offset < call.page_size && i < count; ++offset) tokens[i++] = page + static_cast<int32_t>(offset);
    offset = 0;
  }
}

// A query and what its softmax has seen so far.
struct Row {
  int64_t position;
  float slope;              // of its head
  float highest = kLowest;  // what weights are relative to: a score that was the highest once
  Simd::F total = Simd::zero();  // in any of the lanes
};

// A tile of keys, of which a row sees those from `first` to `end`; `columns` is a multiple of kLanes.
struct Columns {
  int64_t position;  // of the first of these keys
  int64_t first, end, columns;
  const float* key_steps;  // what products are multiplied with, or null
  const float* value_steps;  // what weights are multiplied with, or null
};

inline Row start_row(const Call& call, int64_t token, int64_t head) {
  return {call.positions[token], call.slopes == nullptr ? 0 : call.slopes[head] * kLog2E};
}

// The keys of a piece from position `at` on, of which a row sees all.
inline Columns tile_of(const Piece& piece, int64_t at, int64_t size) {
  const int64_t count = least(piece.end - at, size);
  return {at, 0, count, round_up(count, kLanes), nullptr, nullptr};
}

// Indices of the tokens of a piece, and after them of those that are asked for meanwhile: the first of the next piece.
inline int64_t stream_length(const Piece& piece, int64_t ahead) { return round_up(piece.end - piece.begin, ahead) + 2 * ahead; }

inline void locate_stream(const Call& call, const Piece& piece, const Piece* next, int64_t ahead, int32_t* tokens) {
  int64_t at = piece.end - piece.begin;
  locate(call, piece.request, piece.begin, at, tokens);
  if (next != nullptr && next->head == piece.head && next->heads == piece.heads) {
    const int64_t first = least(next->end - next->begin, ahead);
    locate(call, next->request, next->begin, first, tokens + at);
    at += first;
  }
  for (; at < stream_length(piece, ahead); ++at) tokens[at] = tokens[at - 1];
}

// `count` tokens, and the last one again up to `columns`.
inline void repeat_last(const int32_t* from, int64_t count, int64_t columns, int32_t* to) {
  memcpy(to, from, count * sizeof *to);
  for (int64_t i = count; i < columns; ++i) to[i] = from[count - 1];
}

// Where a piece keeps what in its scratch, in floats from the beginning.
struct Offsets {
  int64_t size = 0;

  int64_t take(int64_t floats) {
    const int64_t at = size;
    size += round_up(floats, kLanes);
    return at;
  }
};

// Scores as options change them.
inline void change_scores(const Call& call, const Columns& keys, const Row& row, float* scores) {
  const Simd::F cap = Simd::all(call.softcap * kLog2E);
  for (int64_t i = 0; i < keys.columns; i += kLanes) {
    Simd::F s = Simd::load(scores + i);
    if (keys.key_steps != nullptr) s = Simd::mul(s, Simd::load(keys.key_steps + i));
    if (call.softcap != 0) s = Simd::mul(tanh(Simd::div(s, cap)), cap);
    if (row.slope != 0) {
      const float distance = static_cast<float>(row.position - keys.position - i);
      s = Simd::sub(s, Simd::mul(Simd::all(row.slope), Simd::sub(Simd::all(distance), Simd::lane_numbers())));
    }
    Simd::store(scores + i, s);
  }
}

// Scores of columns that a row does not see become minus infinity.
DISTAFF_INLINE void hide(const Columns& keys, float* scores) {
  const auto keep = [&](int64_t i) {
    const auto below = [i](int64_t column) { return (1u << most(0, least(column - i, kLanes))) - 1; };
    const Simd::F seen = Simd::choose(below(keys.end) & ~below(keys.first), Simd::load(scores + i), Simd::all(-kInfinity));
    Simd::store(scores + i, seen);
  };
  for (int64_t i = 0; i < keys.first; i += kLanes) keep(i);
  for (int64_t i = keys.end / kLanes * kLanes; i < keys.columns; i += kLanes) keep(i);
}

// Turns scores of kColumns keys, or keys.columns if 0, into weights, and scales what the row has seen before to the new
// highest score; seldom, since weights may be as large as 2^kSlack.
template <class Weight, int kColumns = 0>
DISTAFF_INLINE void add_weights(const Columns& keys, Row& row, const float* scores, Weight* weights, float* sums,
                                int64_t width) {
  constexpr float kSlack = 8;
  const int64_t columns = kColumns != 0 ? kColumns : keys.columns;
  const auto score = [&](int64_t i) DISTAFF_UNROLLED {
    const Simd::F product = Simd::load(scores + i);
    return keys.key_steps == nullptr ? product : Simd::mul(product, Simd::load(keys.key_steps + i));
  };
  Simd::F best = score(0);
#pragma GCC unroll 8
  for (int64_t i = kLanes; i < columns; i += kLanes) best = Simd::max(best, score(i));
  if (Simd::at_least(best, Simd::all(row.highest + kSlack)) != 0) {
    const float highest = Simd::largest(best);
    if (row.highest != kLowest) {
      const Simd::F shrink = exp2(Simd::all(row.highest - highest));
      row.total = Simd::mul(row.total, shrink);
      for (int64_t d = 0; d < width; d += kLanes) Simd::store(sums + d, Simd::mul(Simd::load(sums + d), shrink));
    }
    row.highest = highest;
  }
  const Simd::F highest = Simd::all(row.highest);
  Simd::F total = row.total;
  const auto weight = [&](int64_t i) DISTAFF_UNROLLED {
    const Simd::F x = Simd::sub(score(i), highest);
    const Simd::F power = sizeof(Weight) == 2 ? rough_exp2(x) : exp2(x);
    total = Simd::add(total, power);
    return keys.value_steps == nullptr ? power : Simd::mul(power, Simd::load(keys.value_steps + i));
  };
  int64_t i = 0;
  if constexpr (sizeof(Weight) == 2) {
#pragma GCC unroll 4
    for (; i + 2 * kLanes <= columns; i += 2 * kLanes) {
      const Simd::F first = weight(i), second = weight(i + kLanes);
      Simd::store_64(weights + i, Simd::to_bfloat16(first, second));
    }
  }
  for (; i < columns; i += kLanes) Simd::store(weights + i, weight(i));
  row.total = total;
}

// Likewise for a call's options; only weights of visible columns are not zero.
template <class Weight>
DISTAFF_INLINE void weigh(const Call& call, Columns keys, Row& row, float* scores, Weight* weights, float* sums,
                          int64_t width) {
  const bool hides = keys.first > 0 || keys.end < keys.columns;
  if (call.softcap != 0 || row.slope != 0 || (hides && keys.key_steps != nullptr)) {
    change_scores(call, keys, row, scores);
    keys.key_steps = nullptr;
  }
  if (hides) hide(keys, scores);
  add_weights(keys, row, scores, weights, sums, width);
}

// Writes the output of one head of a token from its weighted sum of values.
inline void finish(const Call& call, int64_t token, int64_t head, float highest, float total,
                   const float* values) {
  float factor = 1;
  if (call.sinks != nullptr) {
    const float sink = call.sinks[head] * kLog2E, best = highest > sink ? highest : sink;
    factor = exp2(highest - best);
    total = total * factor + exp2(sink - best);
  }
  factor = total == 0 ? 0 : factor / total;  // a query that sees no key
  const int64_t size = call.values.size, at = (token * call.heads + head) * size;
  const auto put = [&](auto* to) {
    transform(values, size, to, [&](int64_t, Simd::F x) { return Simd::mul(x, Simd::all(factor)); });
  };
  if (call.q.storage == Storage::kFloat32) return put(static_cast<float*>(call.output) + at);
  put(static_cast<uint16_t*>(call.output) + at);
}

// Finishes a head of a token, or leaves what `merge` needs.
inline void deliver(const Call& call, const Piece& piece, int64_t token, int64_t head, const Row& row,
                    const float* values) {
  if (piece.partial == nullptr) return finish(call, token, head, row.highest, Simd::sum(row.total), values);
  float* partial = piece.partial + ((token - piece.token) * piece.heads + head - piece.head) * (2 + call.values.size);
  partial[0] = row.highest;
  partial[1] = Simd::sum(row.total);
  memcpy(partial + 2, values, call.values.size * sizeof *values);
}

void merge(const Call& call, const Piece& piece, int64_t count) {
  const int64_t stride = 2 + call.values.size, rows = int64_t{piece.count} * piece.heads;
  for (int64_t row = 0; row < rows; ++row) {
    float* merged = piece.partial + row * stride;
    for (int64_t i = 1; i < count; ++i) {
      const float* other = merged + i * rows * stride;
      const float best = merged[0] > other[0] ? merged[0] : other[0];
      const float mine = exp2(merged[0] - best), its = exp2(other[0] - best);
      for (int64_t d = 1; d < stride; ++d) merged[d] = merged[d] * mine + other[d] * its;
      merged[0] = best;
    }
    finish(call, piece.token + row / piece.heads, piece.head + row % piece.heads, merged[0], merged[1], merged + 2);
  }
}

}  // namespace
}  // namespace distaff
