// Paged attention for any processor.
#include "simd_generic.h"
// `Simd` comes first.
#include "attention_kernels.h"

namespace distaff {
const attention::Kernels kAttentionGeneric = kAttention;
}  // namespace distaff
