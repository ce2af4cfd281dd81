// Rows of sampling against plain sorts and sums, at every level of this processor; run under sanitizers.
#include <cmath>
#include <memory>
#include <random>

#include "sampling_rows.h"
#include "threads.h"

namespace {

using namespace distaff;
using namespace distaff::sampling;

std::mt19937 rng(1);

// The probability of each token under the parameters, in double.
std::vector<double> kept(const float* logits, int64_t size, const Parameters& p) {
  const float largest = *std::max_element(logits, logits + size);
  std::vector<float> scaled(size);
  for (int64_t i = 0; i < size; ++i) scaled[i] = (logits[i] - largest) * p.sharpness;
  float border = p.log_min_p;
  std::vector<float> sorted = scaled;
  std::sort(sorted.begin(), sorted.end(), std::greater<float>());
  if (p.top_k > 0) border = std::max(border, sorted[std::min<int64_t>(p.top_k, size) - 1]);
  double total = 0, above = 0;
  for (float s : sorted) total += s >= border ? std::exp(double{s}) : 0;
  for (float s : sorted) {
    if (s < border) break;
    if (above >= p.top_p * total) {
      border = std::nextafter(s, 0.0f);
      break;
    }
    above += std::exp(double{s});
  }
  std::vector<double> result(size);
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += result[i] = scaled[i] >= border ? std::exp(double{scaled[i]}) : 0;
  for (double& x : result) x /= sum;
  return result;
}

void check_row(const Kernels& kernels, int64_t size) {
  std::normal_distribution<float> normal(0, std::uniform_real_distribution<float>(0.1f, 4)(rng));
  // Exactly as large as the row, so that a step outside is found.
  const std::unique_ptr<float[]> logits(new float[size]);
  for (int64_t i = 0; i < size; ++i) logits[i] = normal(rng);
  Row row(kernels, size);
  const int64_t best = std::max_element(logits.get(), logits.get() + size) - logits.get();
  CHECK(row.greedy(logits.get()) == best, "greedy of %d", int(size));
  const float top_ps[] = {1, 0.9f, 0.3f};
  const int top_ks[] = {0, 1, 40, 1000000};
  for (int i = 0; i < 12; ++i) {
    const Parameters p{1.3f, top_ps[i % 3], i % 2 == 0 ? kNone : -3.0f, (static_cast<float>(i) + 0.5f) / 12, top_ks[i % 4]};
    const int32_t token = row.draw(logits.get(), p);
    const std::vector<double> probabilities = kept(logits.get(), size, p);
    double below = 0;
    for (int32_t t = 0; t < token; ++t) below += probabilities[t];
    CHECK(probabilities[token] > 0 && below < p.uniform + 1e-4 && below + probabilities[token] > p.uniform - 1e-4,
          "token %d of %d: %f + %f for %f", token, int(size), below, probabilities[token], double{p.uniform});
  }
  const int64_t top = std::min<int64_t>(5, size);
  float logprob, top_logprobs[5];
  int32_t rank, top_tokens[5];
  row.logprobs(logits.get(), static_cast<int32_t>(best), top, &logprob, &rank, top_logprobs, top_tokens);
  CHECK(rank == 1 && top_tokens[0] == best && top_logprobs[0] == logprob, "log-probabilities of %d", int(size));
  logits[size / 2] = NAN;
  CHECK(row.greedy(logits.get()) == kInvalidToken, "NaN of %d", int(size));
}

}  // namespace

int main() {
  for (int level = 0; level <= static_cast<int>(cpu_level()); ++level) {
    for (int64_t size : {1, 2, 15, 16, 17, 255, 256, 257, 300, 1000, 5000}) {
      check_row(kernels_of(static_cast<CpuLevel>(level)), size);
    }
  }
  std::puts("all rows of sampling are right");
}
