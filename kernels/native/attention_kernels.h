// What the file of a level compiles: all kernels of paged attention, and the table that the dispatcher picks.
#pragma once

#include "attention_decode.h"
#include "attention_prefill.h"

namespace distaff {
namespace {

int64_t scratch_floats(const Call& call, int64_t count) { return most(decode_scratch(call), prefill_scratch(call, count)); }

constexpr attention::Kernels kAttention{write_rows, scratch_floats, decode, prefill, merge};

}  // namespace
}  // namespace distaff
