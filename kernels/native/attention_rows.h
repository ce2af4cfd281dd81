// Rows of heads in and out of their storage, the rotary embedding, and one row's online softmax.
#pragma once

#include "attention.h"
#include "simd.h"

namespace distaff::DISTAFF_LEVEL {

using attention::Call;
using attention::Piece;
using attention::Rows;
using attention::Storage;

// Keys that are scored before their values are read; also the most keys of a prefill block.
constexpr int kTile = 64;

static inline void load_values(Rows rows, int64_t at, int count, float* __restrict to) {
  if (rows.storage == Storage::kFloat32) {
    memcpy(to, static_cast<const float*>(rows.data) + at, count * sizeof *to);
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(rows.data) + at;
  for (int i = 0; i < count; ++i) to[i] = from_bf16(bits[i]);
}

static inline void store_values(void* data, Storage storage, int64_t at, int count, const float* __restrict from) {
  if (storage == Storage::kFloat32) {
    memcpy(static_cast<float*>(data) + at, from, count * sizeof *from);
    return;
  }
  uint16_t* bits = static_cast<uint16_t*>(data) + at;
  for (int i = 0; i < count; ++i) bits[i] = to_bf16(from[i]);
}

// Turns one head of a token by the angles of its position.
static inline void rotate(const Call& call, int64_t position, float* __restrict row) {
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

// A query head, turned and scaled, so that its product with a key is a score.
static inline void load_query(const Call& call, int64_t token, int head, float* to) {
  const int size = call.keys.size;
  load_values(call.q, (token * call.heads + head) * size, size, to);
  if (call.cosines != nullptr) rotate(call, call.positions[token], to);
  for (int i = 0; i < size; ++i) to[i] *= call.scale;
}

static void write_rows(const Call& call, int64_t first, int64_t end) {
  constexpr int kMost = attention::kMostTurned;  // values that are converted at a time
  float row[kMost];
  const auto copy = [&](Rows rows, const attention::Pool& pool, int64_t from, int64_t to) {
    const int64_t count = int64_t{call.kv_heads} * pool.size;
    for (int64_t i = 0; i < count; i += kMost) {
      const int some = smaller(count - i, int64_t{kMost});
      load_values(rows, from * count + i, some, row);
      store_values(pool.data, pool.storage, to * count + i, some, row);
    }
  };
  for (int64_t token = first; token < end; ++token) {
    const int64_t slot = call.slots[token];
    if (call.cosines == nullptr) {
      copy(call.k, call.keys, token, slot);
    } else {
      const int size = call.keys.size;
      for (int head = 0; head < call.kv_heads; ++head) {
        load_values(call.k, (token * call.kv_heads + head) * size, size, row);
        rotate(call, call.positions[token], row);
        store_values(call.keys.data, call.keys.storage, (slot * call.kv_heads + head) * size, size, row);
      }
    }
    if (call.v.data != nullptr) copy(call.v, call.values, token, slot);
  }
}

// Indices in the pool of `count` tokens of a request from `position` on; then the last one up to a multiple of kLanes.
static inline void locate(const Call& call, int64_t request, int64_t position, int count, int64_t* tokens) {
  const int32_t* pages = call.tables + request * call.pages_per_request + position / call.page_size;
  int offset = static_cast<int>(position % call.page_size);
  int i = 0;
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
  F32 total{};
};

static inline void store_weights(float* to, F32 weights) { store(to, weights); }

#if defined(__AVX512BF16__)
static inline void store_weights(uint16_t* to, F32 weights) {
  const __m256bh bits = _mm512_cvtneps_pbh((__m512)weights);
  memcpy(to, &bits, sizeof bits);
}
#endif

// Turns scores of `columns` keys (a multiple of kLanes) into weights, of which only first .. end - 1 are not zero, and
// returns what earlier sums shrink by. `distance` is how far before the query the first of these keys is.
template <class Weight>
static inline float weigh(const Call& call, float slope, int64_t distance, int first, int end, int columns,
                          float* scores, Weight* weights, Running& running) {
  F32 best = splat(running.highest);
  const I32 lanes = lane_numbers();
  const bool partial = first > 0 || end < columns;
  for (int i = 0; i < columns; i += kLanes) {
    F32 s = load(scores + i);
    if (call.softcap != 0) s = call.softcap * tanh(s / call.softcap);
    const I32 column = lanes + i;
    if (slope != 0) s -= slope * (static_cast<float>(distance) - __builtin_convertvector(column, F32));
    if (partial) s = (column >= first) & (column < end) ? s : splat(-kInfinity);
    store(scores + i, s);
    best = max(best, s);
  }
  const float before = running.highest;
  running.highest = highest(best);
  const float shrink = before == running.highest ? 1.0f : exp(before - running.highest);
  running.total *= shrink;
  for (int i = 0; i < columns; i += kLanes) {
    const F32 weight = exp(load(scores + i) - running.highest);
    running.total += weight;
    store_weights(weights + i, weight);
  }
  return shrink;
}

// Writes the output of one head of a token from its weighted sum of values.
static inline void finish(const Call& call, int64_t token, int head, float highest, float total, float* values) {
  float factor = 1;
  if (call.sinks != nullptr) {
    const float sink = call.sinks[head], best = highest > sink ? highest : sink;
    factor = exp(highest - best);
    total = total * factor + exp(sink - best);
  }
  factor = total == 0 ? 0 : factor / total;  // a query that sees no key
  const int size = call.values.size;
  for (int i = 0; i < size; ++i) values[i] *= factor;
  store_values(call.output, call.q.storage, (token * call.heads + head) * size, size, values);
}

// Finishes a head, or leaves what `merge` needs.
static inline void deliver(const Call& call, const Piece& piece, int64_t token, int head, const Running& running,
                           float* values) {
  if (piece.partial == nullptr) return finish(call, token, head, running.highest, sum(running.total), values);
  float* partial = piece.partial + (head - piece.head) * (2 + call.values.size);
  partial[0] = running.highest;
  partial[1] = sum(running.total);
  memcpy(partial + 2, values, call.values.size * sizeof *values);
}

static void merge(const Call& call, const Piece& piece, float* partials, int count) {
  const int size = call.values.size, stride = 2 + size;
  for (int h = 0; h < piece.heads; ++h) {
    float* merged = partials + h * stride;
    for (int i = 1; i < count; ++i) {
      const float* other = partials + (i * piece.heads + h) * stride;
      const float best = merged[0] > other[0] ? merged[0] : other[0];
      const float mine = exp(merged[0] - best), its = exp(other[0] - best);
      for (int d = 1; d < stride; ++d) merged[d] = merged[d] * mine + other[d] * its;
      merged[0] = best;
    }
    finish(call, piece.token, piece.head + h, merged[0], merged[1], merged + 2);
  }
}

}  // namespace distaff::DISTAFF_LEVEL
