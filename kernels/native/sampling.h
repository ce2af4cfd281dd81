// From logits to tokens: the passes over a row of the vocabulary that sampling is made of.
//
// A row is cut into blocks of kBlock logits. One pass finds the largest logit, whether the row is sound, and the largest
// of each *group* (the logits of a block that fall into the same lane). Groups are disjoint, so the k-th largest of
// their maxima is at most the k-th largest logit: a cut above which lie all of the k largest and not many more.
#pragma once

#include "level.h"

namespace distaff::sampling {

constexpr int kBlock = 256;
constexpr int kGroups = 16;  // of a block

struct Kernels {
  // Fills maxima[blocks][kGroups]; returns the largest logit, or NaN if any is.
  float (*largest)(const float* logits, int64_t size, float* maxima);
  // scaled = (logit - largest) * sharpness; sums[block] of exp(scaled) over scaled >= cut.
  void (*weigh)(const float* logits, int64_t size, float largest, float sharpness, float cut, float* sums);
  // Indices and scaled logits with scaled >= cut, in order; returns how many.
  int64_t (*collect)(const float* logits, int64_t size, float largest, float sharpness, float cut, int32_t* indices,
                     float* scaled);
  // to[i] = exp(from[i]), for from[i] <= 0.
  void (*exponentials)(const float* from, int64_t count, float* to);
  // The sum of weights[i] over scaled[i] >= bound.
  float (*mass)(const float* scaled, const float* weights, int64_t count, float bound);
  // How many logits have logit - shift >= bound.
  int64_t (*count)(const float* logits, int64_t size, float shift, float bound);
};

}  // namespace distaff::sampling

namespace distaff {
extern const sampling::Kernels kSamplingGeneric, kSamplingAvx2, kSamplingAvx512;
}  // namespace distaff
