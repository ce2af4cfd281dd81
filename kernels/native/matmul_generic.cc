// The kernels of matmul (and of its roofline) for any processor.
#include "simd_generic.h"
// `Simd` comes first.
#include "matmul_kernels.h"
#include "roofline_kernels.h"

namespace distaff {
const MatmulKernels kMatmulGeneric = kMatmul;
const RooflineKernels kRooflineGeneric = kRoofline;
}  // namespace distaff
