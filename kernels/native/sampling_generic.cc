// Sampling for processors with plain C++.
#define DISTAFF_LEVEL generic
#include "sampling_level.h"
