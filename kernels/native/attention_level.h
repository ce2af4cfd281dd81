// What the file of a level compiles: all kernels of paged attention, and the table that the dispatcher picks.
#pragma once

#include "attention_decode.h"
#include "attention_prefill.h"

namespace distaff::DISTAFF_LEVEL {

static int64_t scratch(const Call& call, int count) {
  return larger(decode_scratch(call), prefill_scratch(call, count));
}

const attention::Kernels kAttention{write_rows, scratch, decode, prefill, merge};

}  // namespace distaff::DISTAFF_LEVEL
