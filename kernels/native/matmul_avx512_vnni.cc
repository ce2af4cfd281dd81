// The kernels of matmul (and of its roofline) for AVX-512 with VNNI.
#if defined(__x86_64__)
#include "simd_avx512.h"
// `Simd` comes first.
#include "matmul_kernels.h"
#include "roofline_kernels.h"

namespace distaff {
const MatmulKernels kMatmulAvx512Vnni = kMatmul;
const RooflineKernels kRooflineAvx512Vnni = kRoofline;
}  // namespace distaff
#endif
