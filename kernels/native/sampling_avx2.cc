// Sampling for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "simd_avx2.h"
// `Simd` comes first.
#include "sampling_kernels.h"

namespace distaff {
const sampling::Kernels kSamplingAvx2 = kSampling;
}  // namespace distaff
#endif
