// The matmul kernels for any processor.
#include "simd_generic.h"
// `Simd` comes first.
#include "matmul_kernels.h"

namespace distaff {
const MatmulKernels kMatmulGeneric = kKernels;
}
