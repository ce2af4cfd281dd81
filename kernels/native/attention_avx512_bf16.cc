// Paged attention for processors with AVX-512 with BF16.
#if defined(__AVX512BF16__)
#define DISTAFF_LEVEL avx512_bf16
#include "attention_level.h"
#endif
