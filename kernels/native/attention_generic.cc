// Paged attention for processors with plain C++.
#define DISTAFF_LEVEL generic
#include "attention_level.h"
