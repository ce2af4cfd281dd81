// Paged attention for AVX-512 with VNNI.
#if defined(__x86_64__)
#include "simd_avx512.h"
// `Simd` comes first.
#include "attention_kernels.h"

namespace distaff {
const attention::Kernels kAttentionAvx512Vnni = kAttention;
}  // namespace distaff
#endif
