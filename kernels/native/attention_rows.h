// Rows of heads in and out of their storage, the rotary embedding, and one row's online softmax.
//
// A head in an int8 pool is its values, rounded to 127 steps of the largest, and after them the float32 step.
#pragma once

#include "attention.h"
#include "simd_math.h"

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

template <class From, class To>
void convert(const From* from, int64_t count, To* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Simd::store(to + i, Simd::load(from + i));
  if (i == count) return;
  To last[kLanes];
  Simd::store(last, load_first(from + i, count - i));
  memcpy(to + i, last, (count - i) * sizeof(To));
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

inline void load_row(Rows rows, int64_t at, int64_t count, float* to) {
  if (rows.storage == Storage::kFloat32) return convert(static_cast<const float*>(rows.data) + at, count, to);
  convert(static_cast<const uint16_t*>(rows.data) + at, count, to);
}

// Puts a head where the pool keeps that of a slot.
inline void store_head(const Pool& pool, int64_t head, const float* from) {
  char* to = static_cast<char*>(pool.data) + head * pool.head_bytes();
  if (pool.storage == Storage::kFloat32) return convert(from, pool.size, reinterpret_cast<float*>(to));
  if (pool.storage == Storage::kBfloat16) return convert(from, pool.size, reinterpret_cast<uint16_t*>(to));
  const float step = quantise_row(from, pool.size, reinterpret_cast<int8_t*>(to));
  memcpy(to + pool.size, &step, sizeof step);
}

// Turns one head of a token by the angles of its position.
inline void rotate(const Call& call, int64_t position, float* __restrict row) {
  const int size = call.rotary_size, half = size / 2;
  const float* __restrict cos = call.cosines + position * size;
  const float* __restrict sin = call.sines + position * size;
  if (call.interleaved) {
    for (int i = 0; i < size; i += 2) {
      const float a = row[i], b = row[i + 1];
      row[i] = a * cos[i] + b * sin[i];
      row[i + 1] = b * cos[i + 1] + a * sin[i + 1];
    }
    return;
  }
  for (int i = 0; i < half; ++i) {
    const float a = row[i], b = row[i + half];
    row[i] = a * cos[i] + b * sin[i];
    row[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// A query head, turned and scaled, so that its product with a key is a score; zeros up to a multiple of 16.
inline void load_query(const Call& call, int64_t token, int64_t head, float* to) {
  const int64_t size = call.keys.size;
  load_row(call.q, (token * call.heads + head) * size, size, to);
  if (call.cosines != nullptr) rotate(call, call.positions[token], to);
  const Simd::F scale = Simd::all(call.scale * kLog2E);
  for (int64_t i = 0; i < size; i += kLanes) Simd::store(to + i, Simd::mul(load_first(to + i, size - i), scale));
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
  float row[kMostValues];
  for (int64_t token = first; token < end; ++token) {
    for (int64_t head = 0; head < call.kv_heads; ++head) {
      const int64_t from = token * call.kv_heads + head, to = int64_t{call.slots[token]} * call.kv_heads + head;
      load_row(call.k, from * call.keys.size, call.keys.size, row);
      if (call.cosines != nullptr) rotate(call, call.positions[token], row);
      store_head(call.keys, to, row);
      if (call.v.data == nullptr) continue;
      load_row(call.v, from * call.values.size, call.values.size, row);
      store_head(call.values, to, row);
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

// Scores as options and visibility change them; returns the highest of every lane.
inline Simd::F change_scores(const Call& call, const Columns& keys, const Row& row, float* scores) {
  Simd::F best = Simd::all(kLowest);
  const Simd::F cap = Simd::all(call.softcap * kLog2E);
  for (int64_t i = 0; i < keys.columns; i += kLanes) {
    Simd::F s = Simd::load(scores + i);
    if (keys.key_steps != nullptr) s = Simd::mul(s, Simd::load(keys.key_steps + i));
    if (call.softcap != 0) s = Simd::mul(tanh(Simd::div(s, cap)), cap);
    if (row.slope != 0) {
      const float distance = static_cast<float>(row.position - keys.position - i);
      s = Simd::sub(s, Simd::mul(Simd::all(row.slope), Simd::sub(Simd::all(distance), Simd::lane_numbers())));
    }
    const auto below = [i](int64_t column) { return (1u << most(0, least(column - i, kLanes))) - 1; };
    s = Simd::choose(below(keys.end) & ~below(keys.first), s, Simd::all(-kInfinity));
    Simd::store(scores + i, s);
    best = Simd::max(best, s);
  }
  return best;
}

// Turns scores into weights, of which only those of visible columns are not zero, and scales what the row has seen
// before to the new highest score; seldom, since weights may be as large as 2^kSlack.
template <class Weight>
DISTAFF_INLINE void weigh(const Call& call, const Columns& keys, Row& row, float* scores, Weight* weights, float* sums,
                          int64_t width) {
  constexpr float kSlack = 8;
  Simd::F best = Simd::load(scores);
  if (keys.first > 0 || keys.end < keys.columns || keys.key_steps != nullptr || call.softcap != 0 || row.slope != 0) {
    best = change_scores(call, keys, row, scores);
  } else {
    for (int64_t i = kLanes; i < keys.columns; i += kLanes) best = Simd::max(best, Simd::load(scores + i));
  }
  if (Simd::at_least(best, Simd::all(row.highest + kSlack)) != 0) {
    const float highest = Simd::largest(best);
    const Simd::F shrink = Simd::all(exp2(row.highest - highest));
    row.highest = highest;
    row.total = Simd::mul(row.total, shrink);
    for (int64_t d = 0; d < width; d += kLanes) Simd::store(sums + d, Simd::mul(Simd::load(sums + d), shrink));
  }
  const Simd::F highest = Simd::all(row.highest);
  Simd::F total = row.total;
  for (int64_t i = 0; i < keys.columns; i += kLanes) {
    Simd::F weight = exp2(Simd::sub(Simd::load(scores + i), highest));
    total = Simd::add(total, weight);
    if (keys.value_steps != nullptr) weight = Simd::mul(weight, Simd::load(keys.value_steps + i));
    Simd::store(weights + i, weight);
  }
  row.total = total;
}

// Writes the output of one head of a token from its weighted sum of values.
inline void finish(const Call& call, int64_t token, int64_t head, float highest, float total, float* values) {
  float factor = 1;
  if (call.sinks != nullptr) {
    const float sink = call.sinks[head] * kLog2E, best = highest > sink ? highest : sink;
    factor = exp2(highest - best);
    total = total * factor + exp2(sink - best);
  }
  factor = total == 0 ? 0 : factor / total;  // a query that sees no key
  const int64_t size = call.values.size, at = (token * call.heads + head) * size;
  for (int64_t i = 0; i < size; ++i) values[i] *= factor;
  if (call.q.storage == Storage::kFloat32) return convert(values, size, static_cast<float*>(call.output) + at);
  convert(values, size, static_cast<uint16_t*>(call.output) + at);
}

// Finishes a head of a token, or leaves what `merge` needs.
inline void deliver(const Call& call, const Piece& piece, int64_t token, int64_t head, const Row& row,
                    float* values) {
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
