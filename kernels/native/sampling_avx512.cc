// Sampling for processors with AVX-512 F, BW, DQ and VL.
#if defined(__AVX512F__)
#define DISTAFF_LEVEL avx512
#include "sampling_level.h"
#endif
