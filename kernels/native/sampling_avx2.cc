// Sampling for processors with AVX2 with FMA.
#if defined(__AVX2__)
#define DISTAFF_LEVEL avx2
#include "sampling_level.h"
#endif
