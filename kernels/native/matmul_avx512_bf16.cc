// The kernels of matmul (and of its roofline) for AVX-512 with VNNI and BF16.
#if defined(__x86_64__)
#include "simd_avx512.h"
// `Simd` comes first.
#include "matmul_kernels.h"
#include "roofline_kernels.h"

namespace distaff {
const MatmulKernels kMatmulAvx512Bf16 = kMatmul;
const RooflineKernels kRooflineAvx512Bf16 = kRoofline;
}  // namespace distaff
#endif
