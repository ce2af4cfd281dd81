// The kernels of matmul (and of its roofline) for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "simd_avx2.h"
// `Simd` comes first.
#include "matmul_kernels.h"
#include "roofline_kernels.h"

namespace distaff {
const MatmulKernels kMatmulAvx2 = kMatmul;
const RooflineKernels kRooflineAvx2 = kRoofline;
}  // namespace distaff
#endif
