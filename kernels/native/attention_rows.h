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

// Keys that are scored before their values are read; also the most keys of a prefill block.
constexpr int kTile = 64;

inline float exp(float x) {
  float lanes[kLanes];
  Simd::store(lanes, exp(Simd::all(x)));
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

// 64 bytes of E with the values of a row from `at` on; zeros past its `size`.
template <class E, class T>
Simd::I load_as(const T* row, int64_t size, int64_t at) {
  constexpr int64_t kCount = 64 / sizeof(E);
  if (at + kCount > size) {
    T padded[kCount] = {};
    memcpy(padded, row + at, (size - at) * sizeof(T));
    return load_as<E>(padded, kCount, 0);
  }
  if constexpr (sizeof(E) == sizeof(T)) return Simd::load_64(row + at);
  E values[kCount];
  for (int64_t i = 0; i < kCount; i += kLanes) Simd::store(values + i, Simd::load(row + at + i));
  return Simd::load_64(values);
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
  const Simd::F scale = Simd::all(call.scale);
  for (int64_t i = 0; i < size; i += kLanes) Simd::store(to + i, Simd::mul(load_first(to + i, size - i), scale));
}

void write_rows(const Call& call, int64_t first, int64_t end) {
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
  const T* data;
  int64_t stride;  // from token to token
  int64_t size;

  DISTAFF_INLINE Column(const Call& call, const Pool& pool, int64_t head)
      : data(static_cast<const T*>(pool.data) + head * pool.head_bytes() / static_cast<int64_t>(sizeof(T))),
        stride(call.kv_heads * pool.head_bytes() / static_cast<int64_t>(sizeof(T))),
        size(pool.size) {}
  DISTAFF_INLINE const T* of(int64_t token) const { return data + token * stride; }
  // The steps of `count` tokens, for int8.
  void steps(const int64_t* tokens, int64_t count, float* to) const {
    if constexpr (sizeof(T) == 1) {
      for (int64_t i = 0; i < count; ++i) memcpy(to + i, of(tokens[i]) + size, sizeof *to);
    }
  }
};

// Indices in the pool of `count` tokens of a request from `position` on; then the last one up to a multiple of kLanes.
inline void locate(const Call& call, int64_t request, int64_t position, int64_t count, int64_t* tokens) {
  const int32_t* pages = call.tables + request * call.pages_per_request + position / call.page_size;
  int64_t offset = position % call.page_size, i = 0;
  while (i < count) {
    const int64_t page = int64_t{*pages++} * call.page_size;
    for (; offset < call.page_size && i < count; ++offset) tokens[i++] = page + offset;
    offset = 0;
  }
  for (; i % kLanes != 0; ++i) tokens[i] = tokens[count - 1];
}

// What a query's softmax has seen so far.
struct Running {
  float highest = kLowest;
  Simd::F total = Simd::zero();  // in any of the lanes
};

// The columns of a tile of keys: those from `first` to `end` are visible, `columns` is a multiple of kLanes.
struct Columns {
  int64_t first, end, columns;
  int64_t distance;  // how far before the query the first of these keys is
  const float* key_steps;  // what products are multiplied with, or null
  const float* value_steps;  // what weights are multiplied with, or null
};

// Turns scores into weights, of which only those of visible columns are not zero, and returns what earlier sums shrink
// by.
template <class Weight>
float weigh(const Call& call, float slope, const Columns& keys, float* scores, Weight* weights, Running& running) {
  Simd::F best = Simd::all(running.highest);
  const bool partial = keys.first > 0 || keys.end < keys.columns;
  const bool changes = partial || keys.key_steps != nullptr || call.softcap != 0 || slope != 0;
  for (int64_t i = 0; i < keys.columns; i += kLanes) {
    Simd::F s = Simd::load(scores + i);
    if (keys.key_steps != nullptr) s = Simd::mul(s, Simd::load(keys.key_steps + i));
    if (call.softcap != 0) s = Simd::mul(tanh(Simd::div(s, Simd::all(call.softcap))), Simd::all(call.softcap));
    if (slope != 0) {
      const Simd::F distance = Simd::sub(Simd::all(static_cast<float>(keys.distance - i)), Simd::lane_numbers());
      s = Simd::sub(s, Simd::mul(Simd::all(slope), distance));
    }
    if (partial) {
      const auto below = [i](int64_t column) { return (1u << most(0, least(column - i, kLanes))) - 1; };
      s = Simd::choose(below(keys.end) & ~below(keys.first), s, Simd::all(-kInfinity));
    }
    if (changes) Simd::store(scores + i, s);
    best = Simd::max(best, s);
  }
  const float before = running.highest;
  running.highest = Simd::largest(best);
  const float shrink = before == running.highest ? 1.0f : exp(before - running.highest);
  const Simd::F highest = Simd::all(running.highest);
  Simd::F total = Simd::mul(running.total, Simd::all(shrink));
  for (int64_t i = 0; i < keys.columns; i += kLanes) {
    Simd::F weight = exp(Simd::sub(Simd::load(scores + i), highest));
    total = Simd::add(total, weight);
    if (keys.value_steps != nullptr) weight = Simd::mul(weight, Simd::load(keys.value_steps + i));
    Simd::store(weights + i, weight);
  }
  running.total = total;
  return shrink;
}

// Writes the output of one head of a token from its weighted sum of values.
inline void finish(const Call& call, int64_t token, int64_t head, float highest, float total, float* values) {
  float factor = 1;
  if (call.sinks != nullptr) {
    const float sink = call.sinks[head], best = highest > sink ? highest : sink;
    factor = exp(highest - best);
    total = total * factor + exp(sink - best);
  }
  factor = total == 0 ? 0 : factor / total;  // a query that sees no key
  const int64_t size = call.values.size, at = (token * call.heads + head) * size;
  for (int64_t i = 0; i < size; ++i) values[i] *= factor;
  if (call.q.storage == Storage::kFloat32) return convert(values, size, static_cast<float*>(call.output) + at);
  convert(values, size, static_cast<uint16_t*>(call.output) + at);
}

// Finishes a head of a token, or leaves what `merge` needs.
inline void deliver(const Call& call, const Piece& piece, int64_t token, int64_t head, const Running& running,
                    float* values) {
  if (piece.partial == nullptr) return finish(call, token, head, running.highest, Simd::sum(running.total), values);
  float* partial = piece.partial + ((token - piece.token) * piece.heads + head - piece.head) * (2 + call.values.size);
  partial[0] = running.highest;
  partial[1] = Simd::sum(running.total);
  memcpy(partial + 2, values, call.values.size * sizeof *values);
}

void merge(const Call& call, const Piece& piece, int64_t count) {
  const int64_t stride = 2 + call.values.size, rows = int64_t{piece.count} * piece.heads;
  for (int64_t row = 0; row < rows; ++row) {
    float* merged = piece.partial + row * stride;
    for (int64_t i = 1; i < count; ++i) {
      const float* other = merged + i * rows * stride;
      const float best = merged[0] > other[0] ? merged[0] : other[0];
      const float mine = exp(merged[0] - best), its = exp(other[0] - best);
      for (int64_t d = 1; d < stride; ++d) merged[d] = merged[d] * mine + other[d] * its;
      merged[0] = best;
    }
    finish(call, piece.token + row / piece.heads, piece.head + row % piece.heads, merged[0], merged[1], merged + 2);
  }
}

}  // namespace
}  // namespace distaff
