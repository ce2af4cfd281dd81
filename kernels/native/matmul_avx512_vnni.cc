// The matmul kernels for AVX-512 with VNNI.
#if defined(__x86_64__)
#include "simd_avx512.h"
// `Simd` comes first.
#include "matmul_kernels.h"

namespace distaff {
const MatmulKernels kMatmulAvx512Vnni = kKernels;
}
#endif
