// From a call to pieces of work for threads; apart from XLA, so that tests can run it with threads of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "cpu.h"
#include "scratch.h"

namespace distaff::attention {

inline const Kernels& kernels_of(CpuLevel level) {
#if defined(__x86_64__)
  if (level >= CpuLevel::kAvx512Bf16) return avx512_bf16::kAttention;
  if (level >= CpuLevel::kAvx512) return avx512::kAttention;
  if (level >= CpuLevel::kAvx2) return avx2::kAttention;
#endif
  (void)level;
  return generic::kAttention;
}

// How a call is cut: pieces, and which of them make up a token together.
struct Plan {
  std::vector<Piece> pieces;
  std::vector<int> first_of_split;  // pieces of one token that must be merged begin here …
  std::vector<int> count_of_split;  // … and are so many
  std::vector<float> partials;
  std::vector<int> order;  // in which threads take the pieces
  int most_queries = 1;  // tokens of the largest prefill piece
  int64_t cost = 0;

  void clear() {
    pieces.clear();
    first_of_split.clear();
    count_of_split.clear();
    most_queries = 1;
    cost = 0;
  }
};

// Costs are about cycles: of reading and computing a key and value of one head in decode, and of one query row by one
// key in a matrix product.
constexpr int64_t kSmallCost = 30'000;  // a call that one thread should do, sooner than wake another
constexpr int64_t kSplitKeys = 256;     // a request's keys are not split finer than this

inline void plan_one_token(const Call& call, int64_t request, int64_t token, int64_t keys_each, Plan& plan) {
  const bool decode = call.groups() <= kDecodeGroups;
  const int64_t position = call.positions[token], begin = call.first_seen(position), keys = position + 1 - begin;
  const int64_t parts = keys < keys_each * 3 / 2 ? 1 : (keys + keys_each - 1) / keys_each;
  const int64_t each = ((keys + parts - 1) / parts + 63) / 64 * 64;
  const int64_t width = call.keys.size + call.values.size;
  const int heads = decode ? call.heads : call.groups();
  for (int head = 0; head < call.heads; head += heads) {
    const size_t first = plan.pieces.size();
    for (int64_t at = begin; at <= position; at += each) {
      const int64_t end = std::min(at + each, position + 1);
      plan.pieces.push_back({request, token, 1, head, heads, at, end, nullptr, (end - at) * heads * width / 8, decode});
    }
    const int made = static_cast<int>(plan.pieces.size() - first);
    if (made > 1) {
      plan.first_of_split.push_back(static_cast<int>(first));
      plan.count_of_split.push_back(made);
    }
  }
}

inline void plan_prompt(const Call& call, int64_t request, int64_t first, int64_t end, int queries, Plan& plan) {
  const int groups = call.groups();
  const int64_t width = call.keys.size + call.values.size;
  for (int64_t token = first; token < end; token += queries) {
    const int count = static_cast<int>(std::min<int64_t>(queries, end - token));
    const int64_t begin = call.first_seen(call.positions[token]), last = call.positions[token + count - 1] + 1;
    plan.most_queries = std::max(plan.most_queries, count);
    for (int head = 0; head < call.heads; head += groups) {
      plan.pieces.push_back({request, token, count, head, groups, begin, last, nullptr,
                             (last - begin) * (count * groups + 8) * width / 32, false});
    }
  }
}

inline void make_plan(const Call& call, int threads, Plan& plan) {
  plan.clear();
  int64_t decode_keys = 0, prompt_tokens = 0;
  for (int64_t r = 0; r < call.requests; ++r) {
    const int64_t count = call.starts[r + 1] - call.starts[r];
    if (count > 1) prompt_tokens += count;
    if (count != 1) continue;
    const int64_t position = call.positions[call.starts[r]];
    decode_keys += position + 1 - call.first_seen(position);
  }
  const int64_t keys_each = threads == 1 ? decode_keys + 1 : std::max(kSplitKeys, decode_keys / (4 * threads));
  // About 192 rows a block amortise packing keys and values; fewer where threads would go without work.
  const int64_t wanted = std::max<int64_t>(1, 192 / call.groups()), share = prompt_tokens * call.kv_heads / (3 * threads);
  const int queries = static_cast<int>(std::min(wanted, std::max<int64_t>({share, 16 / call.groups(), 1})));
  for (int64_t r = 0; r < call.requests; ++r) {
    const int64_t first = call.starts[r], end = call.starts[r + 1];
    if (end - first == 1) plan_one_token(call, r, first, keys_each, plan);
    if (end - first > 1) plan_prompt(call, r, first, end, queries, plan);
  }
  for (const Piece& piece : plan.pieces) plan.cost += piece.cost;
  int64_t floats = 0;
  for (size_t s = 0; s < plan.first_of_split.size(); ++s) {
    const Piece& piece = plan.pieces[plan.first_of_split[s]];
    floats += int64_t{plan.count_of_split[s]} * piece.heads * (2 + call.values.size);
  }
  if (static_cast<int64_t>(plan.partials.size()) < floats) plan.partials.resize(floats);
  float* next = plan.partials.data();
  for (size_t s = 0; s < plan.first_of_split.size(); ++s) {
    for (int i = 0; i < plan.count_of_split[s]; ++i) {
      Piece& piece = plan.pieces[plan.first_of_split[s] + i];
      piece.partial = next;
      next += piece.heads * (2 + call.values.size);
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

  thread_local Plan plan;
  Plan& mine = plan;
  make_plan(call, parallel.count(), mine);
  // The longest first, so that threads end together; parts of a split stay what they are, wherever they come.
  std::vector<int>& order = mine.order;
  order.resize(mine.pieces.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return mine.pieces[a].cost > mine.pieces[b].cost; });
  const int64_t floats = kernels.scratch(call, mine.most_queries);
  in_parallel(mine.cost < kSmallCost, static_cast<int64_t>(order.size()), [&](int64_t i) {
    const Piece& piece = mine.pieces[order[i]];
    thread_local Scratch memory;
    (piece.decode ? kernels.decode : kernels.prefill)(call, piece, memory.get<float>(floats * sizeof(float)));
  });
  for (size_t s = 0; s < mine.first_of_split.size(); ++s) {
    const Piece& piece = mine.pieces[mine.first_of_split[s]];
    kernels.merge(call, piece, piece.partial, mine.count_of_split[s]);
  }
}

}  // namespace distaff::attention
