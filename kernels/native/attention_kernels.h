// What the file of a level compiles: all kernels of paged attention, and the table that the dispatcher picks.
#pragma once

#include "attention_piece.h"

namespace distaff {
namespace {

constexpr attention::Kernels kAttention{write_rows, scratch_floats, attend_piece, merge};

}  // namespace
}  // namespace distaff
