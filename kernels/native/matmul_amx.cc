// The kernels of matmul (and of its roofline) for AVX-512 with VNNI and BF16, and AMX.
#if defined(__x86_64__)
#include "simd_avx512.h"
// `Simd` comes first, then `MatrixUnit`.
#include "matrix_unit_amx.h"
#define DISTAFF_HAS_MATRIX_UNIT
#include "matmul_kernels.h"
#include "roofline_kernels.h"

namespace distaff {
const MatmulKernels kMatmulAmx = kMatmul;
const RooflineKernels kRooflineAmx = kRoofline;
}  // namespace distaff
#endif
