// What one row of logits becomes: its most likely token, a drawn one, or log-probabilities; apart from XLA, for tests.
//
// Truncation needs no sort: tokens that cannot be below the border are collected first (few, as a rule), and the border
// is found among them by selection, in time linear in their number. If they are the whole vocabulary, so be it.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu.h"
#include "sampling.h"

namespace distaff::sampling {

constexpr int32_t kInvalidToken = -1;
constexpr float kNone = -std::numeric_limits<float>::infinity();

inline const Kernels& kernels_of(CpuLevel level) {
#if defined(__x86_64__)
  if (level >= CpuLevel::kAvx512) return kSamplingAvx512;
  if (level >= CpuLevel::kAvx2) return kSamplingAvx2;
#endif
  (void)level;
  return kSamplingGeneric;
}

struct Parameters {
  float sharpness;  // inverse temperature; 0: greedy
  float top_p;      // 1: off
  float log_min_p;  // minus infinity: off
  float uniform;    // in [0, 1)
  int32_t top_k;    // 0: off
};

// One thread's memory for a row of `size` logits at a time.
class Row {
 public:
  Row(const Kernels& kernels, int64_t size)
      : kernels_(kernels),
        size_(size),
        maxima_((size + kBlock - 1) / kBlock * kGroups),
        sums_(maxima_.size() / kGroups),
        scaled_(size),
        weights_(size),
        indices_(size) {}

  // The first of the largest logits; kInvalidToken if there is a NaN or plus infinity, or nothing finite.
  int32_t greedy(const float* logits) {
    read(logits);
    return sound() ? first_largest() : kInvalidToken;
  }

  int32_t draw(const float* logits, const Parameters& p) {
    read(logits);
    if (!sound()) return kInvalidToken;
    if (!(p.sharpness > 0)) return first_largest();
    const bool truncates = p.top_k > 0 || p.top_p < 1;
    return truncates ? draw_truncated(p) : draw_from_blocks(p);
  }

  // Log-probability of `token` and its rank from 1; the `top` largest of all, ties by index.
  void logprobs(const float* logits, int32_t token, int64_t top, float* logprob, int32_t* rank, float* top_logprobs,
                int32_t* top_tokens) {
    read(logits);
    if (!sound()) {
      *logprob = std::numeric_limits<float>::quiet_NaN();
      *rank = 0;
      std::fill_n(top_logprobs, top, *logprob);
      for (int64_t i = 0; i < top; ++i) top_tokens[i] = static_cast<int32_t>(i);
      return;
    }
    const float shift = largest_ + static_cast<float>(std::log(weigh_all(1, kNone)));
    *logprob = logits[token] - shift;
    *rank = static_cast<int32_t>(kernels_.count(logits, size_, shift, *logprob));
    collect(1, cut_of(top, 1));
    order_.resize(count_);
    for (int64_t i = 0; i < count_; ++i) order_[i] = {logits[indices_[i]] - shift, indices_[i]};
    std::partial_sort(order_.begin(), order_.begin() + top, order_.end(), [](const Ranked& a, const Ranked& b) {
      return a.value > b.value || (a.value == b.value && a.token < b.token);
    });
    for (int64_t i = 0; i < top; ++i) {
      top_logprobs[i] = order_[i].value;
      top_tokens[i] = order_[i].token;
    }
  }

 private:
  struct Ranked {
    float value;
    int32_t token;
  };

  void read(const float* logits) {
    logits_ = logits;
    largest_ = kernels_.largest(logits, size_, maxima_.data());
  }

  bool sound() const { return std::isfinite(largest_); }

  float scaled(int64_t token, float sharpness) const { return (logits_[token] - largest_) * sharpness; }

  int32_t first_largest() const {
    // Of the blocks with such a group the first; in it the first such logit.
    const auto group = std::find(maxima_.begin(), maxima_.end(), largest_) - maxima_.begin();
    return static_cast<int32_t>(std::find(logits_ + group / kGroups * kBlock, logits_ + size_, largest_) - logits_);
  }

  // A bound that at least the `count` largest scaled logits reach.
  float cut_of(int64_t count, float sharpness) {
    if (count < 1) return std::numeric_limits<float>::infinity();
    if (count > static_cast<int64_t>(maxima_.size())) return kNone;
    selected_.assign(maxima_.begin(), maxima_.end());
    const auto nth = selected_.begin() + (count - 1);
    std::nth_element(selected_.begin(), nth, selected_.end(), std::greater<float>());
    return (*nth - largest_) * sharpness;
  }

  // The first count_ of indices_ and scaled_ become the tokens from `cut` on, in order.
  void collect(float sharpness, float cut) {
    count_ = kernels_.collect(logits_, size_, largest_, sharpness, cut, indices_.data(), scaled_.data());
  }

  // The largest bound that collected tokens of altogether `wanted` weight reach, by bisection; at least the cut's.
  float nucleus(float wanted) const {
    // No scaled logit is above 0, so the bits of its absolute value order the tokens from likely to unlikely.
    const auto bound = [](int64_t depth) { return -std::bit_cast<float>(static_cast<uint32_t>(depth)); };
    int64_t low = -1, high = std::bit_cast<uint32_t>(std::numeric_limits<float>::infinity());
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (kernels_.mass(scaled_.data(), weights_.data(), count_, bound(middle)) >= wanted ? high : low) = middle;
    }
    return bound(high);
  }

  // Keeps those of the collected tokens that reach `threshold`.
  void drop_below(float threshold) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; ++i) {
      if (scaled_[i] < threshold) continue;
      indices_[kept] = indices_[i];
      scaled_[kept++] = scaled_[i];
    }
    count_ = kept;
  }

  double weigh_collected() {
    kernels_.exponentials(scaled_.data(), count_, weights_.data());
    return std::accumulate(weights_.begin(), weights_.begin() + count_, 0.0);
  }

  double weigh_all(float sharpness, float cut) {
    kernels_.weigh(logits_, size_, largest_, sharpness, cut, sums_.data());
    return std::accumulate(sums_.begin(), sums_.end(), 0.0);
  }

  int32_t draw_truncated(const Parameters& p) {
    double total = 0;
    if (p.top_k > 0) {
      collect(p.sharpness, std::max(cut_of(p.top_k, p.sharpness), p.log_min_p));
      if (p.top_k < count_) {
        selected_.assign(scaled_.begin(), scaled_.begin() + count_);
        const auto nth = selected_.begin() + (p.top_k - 1);
        std::nth_element(selected_.begin(), nth, selected_.end(), std::greater<float>());
        drop_below(*nth);
      }
      total = weigh_collected();
    } else {
      total = weigh_all(p.sharpness, p.log_min_p);
      // All tokens less likely than this one together have less than what top-p leaves out. (The half is for rounding.)
      const double rest = (1.0 - p.top_p) * total / static_cast<double>(size_) / 2;
      collect(p.sharpness, std::max(static_cast<float>(std::log(rest)), p.log_min_p));
      weigh_collected();
    }
    if (p.top_p < 1) {
      drop_below(nucleus(p.top_p * static_cast<float>(total)));
      total = weigh_collected();
    }
    const double target = double{p.uniform} * total;
    double below = 0;
    int32_t token = indices_[0];
    for (int64_t i = 0; i < count_; ++i) {
      if (weights_[i] <= 0) continue;
      token = indices_[i];  // rounding may leave the last
      below += weights_[i];
      if (below > target) break;
    }
    return token;
  }

  // Two levels: a block of tokens by its sum, then a token of it.
  int32_t draw_from_blocks(const Parameters& p) {
    const double target = double{p.uniform} * weigh_all(p.sharpness, p.log_min_p);
    size_t block = 0;
    double below = 0, before = 0;
    for (size_t i = 0; i < sums_.size(); ++i) {
      if (sums_[i] <= 0) continue;
      block = i;
      before = below;
      below += sums_[i];
      if (below > target) break;
    }
    const int64_t first = static_cast<int64_t>(block) * kBlock, end = std::min(first + kBlock, size_);
    float inner[kBlock], weights[kBlock];
    for (int64_t i = first; i < end; ++i) inner[i - first] = scaled(i, p.sharpness);
    kernels_.exponentials(inner, end - first, weights);
    int64_t token = first;
    for (int64_t i = first; i < end; ++i) {
      if (inner[i - first] < p.log_min_p || weights[i - first] <= 0) continue;
      token = i;
      before += weights[i - first];
      if (before > target) break;
    }
    return static_cast<int32_t>(token);
  }

  const Kernels& kernels_;
  int64_t size_;
  const float* logits_ = nullptr;
  float largest_ = 0;
  int64_t count_ = 0;
  std::vector<float> maxima_, sums_, scaled_, weights_, selected_;
  std::vector<int32_t> indices_;
  std::vector<Ranked> order_;
};

}  // namespace distaff::sampling
