// From a call to pieces of work for threads; apart from XLA, so that tests can run it with threads of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "attention.h"
#include "cpu.h"
#include "scratch.h"

namespace distaff::attention {

inline const Kernels& kernels_of(CpuLevel level) {
#if defined(__x86_64__)
  if (level >= CpuLevel::kAvx512Bf16) return kAttentionAvx512Bf16;
  if (level == CpuLevel::kAvx512Vnni) return kAttentionAvx512Vnni;
  if (level == CpuLevel::kAvx512) return kAttentionAvx512;
  if (level == CpuLevel::kAvx2) return kAttentionAvx2;
#endif
  (void)level;
  return kAttentionGeneric;
}

// Pieces of the same tokens and heads, which a merge follows.
struct Split {
  int first, count;
};

// How a call is cut.
struct Plan {
  std::vector<Piece> whole, pieces;  // before and after splitting
  std::vector<Split> splits;
  std::vector<float> partials;
  std::vector<int> sorted, order;  // the pieces by cost, and as threads take them
  int64_t cost = 0;
};

// Costs are about cycles: of reading and computing a key and value of one head in decode, and of one query row by one
// key in a matrix product.
constexpr int64_t kSmallCost = 30'000;  // a call that one thread should do, sooner than wake another
constexpr int64_t kSplitKeys = 256;     // a piece's keys are not split finer than this

// Cuts the tokens of a request into blocks of `queries`, or one new token into nothing smaller.
inline void add_pieces(const Call& call, int64_t request, int64_t queries, std::vector<Piece>& pieces) {
  const int64_t first = call.starts[request], end = call.starts[request + 1];
  const bool decode = end - first == 1 && call.groups() <= kDecodeGroups;
  const int heads = decode ? call.heads : call.groups();
  const int64_t width = call.keys.size + call.values.size;
  for (int64_t token = first; token < end; token += queries) {
    const int count = static_cast<int>(std::min(queries, end - token));
    const int64_t begin = call.first_seen(call.positions[token]), last = call.positions[token + count - 1] + 1;
    const int64_t keys = last - begin, rows = int64_t{count} * heads;
    // A row of a block sees half of the block's own keys; each row and each key is also turned or packed.
    const int64_t cost = decode ? keys * heads * width / 8 : ((keys - count / 2 + 16) * rows + 8 * keys) * width / 32;
    for (int head = 0; head < call.heads; head += heads) {
      pieces.push_back({request, token, count, head, heads, begin, last, decode, cost, nullptr});
    }
  }
}

// Cuts the keys of a piece so that no part costs much more than `most`.
inline void split(const Piece& piece, int64_t most, Plan& plan) {
  const int64_t keys = piece.end - piece.begin;
  const int64_t parts = std::min((piece.cost + most / 2) / most, keys / kSplitKeys);
  if (parts <= 1) return plan.pieces.push_back(piece);
  const int64_t each = ((keys + parts - 1) / parts + 63) / 64 * 64;
  const int first = static_cast<int>(plan.pieces.size());
  for (int64_t at = piece.begin; at < piece.end; at += each) {
    Piece part = piece;
    part.begin = at;
    part.end = std::min(at + each, piece.end);
    part.cost = piece.cost * (part.end - at) / keys;
    plan.pieces.push_back(part);
  }
  plan.splits.push_back({first, static_cast<int>(plan.pieces.size()) - first});
}

inline void make_plan(const Call& call, int threads, Plan& plan) {
  int64_t prompt_tokens = 0;
  for (int64_t r = 0; r < call.requests; ++r) {
    const int64_t count = call.starts[r + 1] - call.starts[r];
    if (count > 1) prompt_tokens += count;
  }
  // About 384 rows a block amortise packing keys and values; fewer where threads would go without work.
  const int64_t wanted = std::max<int64_t>(1, 384 / call.groups()), share = prompt_tokens * call.kv_heads / (3 * threads);
  const int64_t queries = std::min(wanted, std::max<int64_t>({share, 16 / call.groups(), 1}));
  plan.whole.clear();
  for (int64_t r = 0; r < call.requests; ++r) add_pieces(call, r, queries, plan.whole);
  plan.cost = 0;
  for (const Piece& piece : plan.whole) plan.cost += piece.cost;
  plan.pieces.clear();
  plan.splits.clear();
  const int64_t most = threads == 1 ? plan.cost + 1 : plan.cost / (4 * threads) + 1;
  for (const Piece& piece : plan.whole) split(piece, most, plan);

  const auto floats_of = [&](const Piece& piece) { return int64_t{piece.count} * piece.heads * (2 + call.values.size); };
  int64_t floats = 0;
  for (const Split& s : plan.splits) floats += s.count * floats_of(plan.pieces[s.first]);
  if (static_cast<int64_t>(plan.partials.size()) < floats) plan.partials.resize(floats);
  float* next = plan.partials.data();
  for (const Split& s : plan.splits) {
    for (int i = s.first; i < s.first + s.count; ++i) {
      plan.pieces[i].partial = next;
      next += floats_of(plan.pieces[i]);
    }
  }
  // Each thread takes its share in order (parallel.h), so all are dealt the longest first, back and forth,
  // and end together.
  const auto count = static_cast<int>(plan.pieces.size());
  plan.sorted.resize(count);
  std::iota(plan.sorted.begin(), plan.sorted.end(), 0);
  std::stable_sort(plan.sorted.begin(), plan.sorted.end(),
                   [&](int a, int b) { return plan.pieces[a].cost > plan.pieces[b].cost; });
  plan.order.clear();
  for (int thread = 0; thread < threads; ++thread) {
    for (int round = 0; round < count; round += threads) {
      const int i = round + (round / threads % 2 == 0 ? thread : threads - 1 - thread);
      if (i < count) plan.order.push_back(plan.sorted[i]);
    }
  }
}

// Does all of a call. `parallel` has count(), the number of threads, and run(n, work), which calls work(0) … work(n-1).
template <class Parallel>
void attend(const Call& call, const Kernels& kernels, Parallel& parallel) {
  const int64_t live = call.starts[call.requests];
  const auto in_parallel = [&](bool small, int64_t count, auto&& work) {
    if (!small) return parallel.run(count, work);
    for (int64_t i = 0; i < count; ++i) work(i);
  };
  // All rows are written before any is read: a request may attend to what another one writes.
  constexpr int64_t kRows = 32;
  in_parallel(live < 4 * kRows, (live + kRows - 1) / kRows,
              [&](int64_t i) { kernels.write(call, i * kRows, std::min((i + 1) * kRows, live)); });

  thread_local Plan own;
  Plan& plan = own;  // of this thread, for the others as well
  make_plan(call, parallel.count(), plan);
  int64_t floats = 0;
  for (const Piece& piece : plan.pieces) floats = std::max(floats, kernels.scratch(call, piece));
  const auto count = static_cast<int64_t>(plan.order.size());
  in_parallel(plan.cost < kSmallCost, count, [&](int64_t i) {
    thread_local Scratch memory;
    const Piece* next = i + 1 < count ? &plan.pieces[plan.order[i + 1]] : nullptr;
    kernels.attend(call, plan.pieces[plan.order[i]], next, memory.get<float>(floats * sizeof(float)));
  });
  in_parallel(plan.splits.size() < 16, static_cast<int64_t>(plan.splits.size()), [&](int64_t i) {
    kernels.merge(call, plan.pieces[plan.splits[i].first], plan.splits[i].count);
  });
}

}  // namespace distaff::attention
