// Paged attention for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "simd_avx2.h"
// `Simd` comes first.
#include "attention_kernels.h"

namespace distaff {
const attention::Kernels kAttentionAvx2 = kAttention;
}  // namespace distaff
#endif
