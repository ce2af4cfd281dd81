// Paged attention on random calls against sums in double, at every level of this processor; run under sanitizers.
// Buffers are exactly as large as the call says, so that a step outside of them is found.
#include <cmath>
#include <cstring>
#include <random>

#include "attention_plan.h"
#include "threads.h"

namespace {

using namespace distaff;
using namespace distaff::attention;

std::mt19937 rng(1);

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

float from_bits(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Random values that bfloat16 holds exactly, so that both storages mean the same.
std::vector<float> random_values(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = pick(-127, 127) / 64.0f;
  return values;
}

// The same values, in heads of `size`, as bytes of a storage.
std::vector<char> stored(const std::vector<float>& values, Storage storage, int size = 0) {
  if (storage == Storage::kInt8) {
    std::vector<char> bytes;
    for (size_t head = 0; head < values.size(); head += size) {
      for (int i = 0; i < size; ++i) bytes.push_back(static_cast<char>(values[head + i] * 64));
      const float step = 1.0f / 64;
      bytes.insert(bytes.end(), reinterpret_cast<const char*>(&step), reinterpret_cast<const char*>(&step + 1));
    }
    return bytes;
  }
  std::vector<char> bytes(values.size() * (storage == Storage::kFloat32 ? 4 : 2));
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], sizeof bits);
    const uint16_t high = bits >> 16;
    if (storage == Storage::kFloat32) std::memcpy(&bytes[4 * i], &bits, 4);
    if (storage == Storage::kBfloat16) std::memcpy(&bytes[2 * i], &high, 2);
  }
  return bytes;
}

float value_at(const void* data, Storage storage, int64_t at) {
  if (storage == Storage::kFloat32) return static_cast<const float*>(data)[at];
  return from_bits(static_cast<const uint16_t*>(data)[at]);
}

// A value of a head in a pool.
float pool_value(const Pool& pool, int64_t head, int d) {
  if (pool.storage != Storage::kInt8) return value_at(pool.data, pool.storage, head * pool.size + d);
  const char* at = static_cast<const char*>(pool.data) + head * pool.head_bytes();
  float step;
  std::memcpy(&step, at + pool.size, sizeof step);
  return static_cast<signed char>(at[d]) * step;
}

struct Problem {
  Call call{};
  std::vector<int32_t> positions, slots, starts, tables;
  std::vector<float> slopes, sinks, cosines, sines;
  std::vector<char> q, k, v, keys, values, output;

  // Requests of one new token at most, or of as many as `most_positions` / 3.
  Problem(bool one_each, int most_positions) {
    const bool small = most_positions > 300;  // in all but positions
    const Storage storages[] = {Storage::kFloat32, Storage::kBfloat16, Storage::kInt8};
    const Storage rows = storages[pick(0, 1)], pages = storages[pick(0, 2)];
    call.requests = small ? 1 : pick(1, 6);
    call.kv_heads = small ? 1 : pick(1, 3);
    call.heads = call.kv_heads * pick(1, small ? 2 : pick(0, 3) == 0 ? 11 : 4);
    call.page_size = pick(1, 17);
    call.pages_per_request = pick(3, most_positions / call.page_size + 3);
    const int sizes[] = {1, 3, 16, 31, 33, 64, 72, 128};
    const int key_size = sizes[pick(0, 7)], value_size = sizes[pick(0, 7)];
    const int capacity = static_cast<int>(call.pages_per_request) * call.page_size;
    const int num_pages = 1 + static_cast<int>(call.requests * call.pages_per_request);
    std::vector<int32_t> free_pages;
    for (int p = 1; p < num_pages; ++p) free_pages.push_back(p);
    std::shuffle(free_pages.begin(), free_pages.end(), rng);
    tables = free_pages;
    starts = {0};
    for (int r = 0; r < call.requests; ++r) {
      const int length = one_each ? pick(0, 1) : pick(0, std::min(capacity, most_positions / 3));
      const int context = pick(length, capacity);
      for (int i = context - length; i < context; ++i) {
        positions.push_back(i);
        slots.push_back(tables[r * call.pages_per_request + i / call.page_size] * call.page_size + i % call.page_size);
      }
      starts.push_back(starts.back() + length);
    }
    call.tokens = starts.back();
    call.scale = 1 / std::sqrt(static_cast<float>(key_size));
    call.softcap = pick(0, 2) == 0 ? 5.0f : 0.0f;
    call.window = pick(0, 2) == 0 ? pick(1, capacity) : 0;
    if (pick(0, 2) == 0) call.slopes = (slopes = random_values(call.heads)).data();
    if (pick(0, 2) == 0) call.sinks = (sinks = random_values(call.heads)).data();
    if (key_size > 1 && pick(0, 1) == 0) {
      call.rotary_size = 2 * pick(1, key_size / 2);
      call.interleaved = pick(0, 1) == 0;
      for (int64_t i = 0; i < int64_t{capacity} * call.rotary_size; ++i) {
        // Quarter turns, after which values are still exact.
        const int turn = pick(0, 1);
        cosines.push_back(turn ? 0.0f : 1.0f);
        sines.push_back(turn ? 1.0f : 0.0f);
      }
      call.cosines = cosines.data();
      call.sines = sines.data();
    }
    const int64_t pool = int64_t{num_pages} * call.page_size * call.kv_heads;
    q = stored(random_values(call.tokens * call.heads * key_size), rows);
    k = stored(random_values(call.tokens * call.kv_heads * key_size), rows);
    v = stored(random_values(call.tokens * call.kv_heads * value_size), rows);
    keys = stored(random_values(pool * key_size), pages, key_size);
    values = stored(random_values(pool * value_size), pages, value_size);
    output.resize(call.tokens * call.heads * value_size * (rows == Storage::kFloat32 ? 4 : 2));
    call.positions = positions.data();
    call.slots = slots.data();
    call.starts = starts.data();
    call.tables = tables.data();
    call.q = {q.data(), rows};
    call.k = {k.data(), rows};
    call.v = {v.data(), rows};
    call.keys = {keys.data(), pages, key_size};
    call.values = {values.data(), pages, value_size};
    call.output = output.data();
  }
};

int64_t pool_row(const Call& call, int64_t request, int64_t position, int head) {
  const int64_t page = call.tables[request * call.pages_per_request + position / call.page_size];
  return (page * call.page_size + position % call.page_size) * call.kv_heads + head;
}

// A query or new key, turned.
double turned(const Call& call, const Rows& rows, int64_t token, int heads, int head, int d) {
  const int size = call.keys.size, half = call.rotary_size / 2;
  const int64_t row = (token * heads + head) * size;
  const double x = value_at(rows.data, rows.storage, row + d);
  if (d >= call.rotary_size) return x;
  const int partner = call.interleaved ? d ^ 1 : (d + half) % call.rotary_size;
  const int64_t angle = call.positions[token] * int64_t{call.rotary_size} + d;
  return x * call.cosines[angle] + value_at(rows.data, rows.storage, row + partner) * call.sines[angle];
}

void check(const Problem& problem, double bound) {
  const Call& call = problem.call;
  const int size = call.keys.size, width = call.values.size;
  const float rounding = call.keys.storage == Storage::kInt8 ? 0.008f : 0;  // half a step of 127 / 64 / 127
  for (int64_t r = 0; r < call.requests; ++r) {
    for (int64_t token = call.starts[r]; token < call.starts[r + 1]; ++token) {
      const int64_t position = call.positions[token];
      for (int kv = 0; kv < call.kv_heads; ++kv) {
        const int64_t row = pool_row(call, r, position, kv);
        for (int d = 0; d < size; ++d) {
          CHECK(std::abs(pool_value(call.keys, row, d) - turned(call, call.k, token, call.kv_heads, kv, d)) <= rounding,
                "key %d of token %d", d, int(token));
        }
        for (int d = 0; d < width; ++d) {
          const float wanted = value_at(call.v.data, call.v.storage, (token * call.kv_heads + kv) * width + d);
          CHECK(std::abs(pool_value(call.values, row, d) - wanted) <= rounding, "value %d of token %d", d, int(token));
        }
      }
      for (int head = 0; head < call.heads; ++head) {
        double total = call.sinks == nullptr ? 0 : std::exp(double{call.sinks[head]});
        std::vector<double> sums(width);
        for (int64_t j = call.first_seen(position); j <= position; ++j) {
          const int64_t row = pool_row(call, r, j, head / call.groups());
          double score = 0;
          for (int d = 0; d < size; ++d) {
            score += turned(call, call.q, token, call.heads, head, d) * pool_value(call.keys, row, d);
          }
          score *= call.scale;
          if (call.softcap != 0) score = call.softcap * std::tanh(score / call.softcap);
          if (call.slopes != nullptr) score -= call.slopes[head] * static_cast<double>(position - j);
          const double weight = std::exp(score);
          total += weight;
          for (int d = 0; d < width; ++d) sums[d] += weight * pool_value(call.values, row, d);
        }
        for (int d = 0; d < width; ++d) {
          const double got = value_at(call.output, call.q.storage, (token * call.heads + head) * width + d);
          CHECK(std::abs(got - sums[d] / total) < bound, "output %d of head %d of token %d is %f, not %f", d, head,
                int(token), got, sums[d] / total);
        }
      }
    }
  }
}

}  // namespace

int main() {
  int calls = 0;
  for (int round = 0; round < 18; ++round) {
    for (int level = 0; level <= static_cast<int>(cpu_level()); ++level) {
      // The long ones have more keys than are packed at a time.
      Problem problem(round % 3 == 0, round % 9 == 8 ? 1400 : 300);
      for (float& slope : problem.slopes) slope = std::abs(slope) / 8;
      TestThreads threads{pick(1, 4)};
      attend(problem.call, kernels_of(static_cast<CpuLevel>(level)), threads);
      const bool exact = problem.call.keys.storage == Storage::kFloat32 && problem.call.q.storage == Storage::kFloat32;
      check(problem, exact ? 1e-4 : 0.05);
      ++calls;
    }
  }
  std::printf("%d calls of paged attention are right\n", calls);
}
