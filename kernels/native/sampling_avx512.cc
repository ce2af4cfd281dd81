// Sampling for AVX-512.
#if defined(__x86_64__)
#include "simd_avx512.h"
// `Simd` comes first.
#include "sampling_kernels.h"

namespace distaff {
const sampling::Kernels kSamplingAvx512 = kSampling;
}  // namespace distaff
#endif
