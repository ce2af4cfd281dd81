// Sampling for any processor.
#include "simd_generic.h"
// `Simd` comes first.
#include "sampling_kernels.h"

namespace distaff {
const sampling::Kernels kSamplingGeneric = kSampling;
}  // namespace distaff
