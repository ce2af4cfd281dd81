// What the file of a level compiles: all kernels of paged attention, and the table that the dispatcher picks.
#pragma once

#include "attention_decode.h"
#include "attention_prefill.h"

namespace distaff {
namespace {

int64_t scratch_floats(const Call& call, const Piece& piece) {
  return piece.decode ? DecodeLayout(call, piece).size : PrefillLayout(call, piece, 1).size;
}

void attend_piece(const Call& call, const Piece& piece, const Piece* next, float* scratch) {
  (piece.decode ? decode : prefill)(call, piece, next, scratch);
}

constexpr attention::Kernels kAttention{write_rows, scratch_floats, attend_piece, merge};

}  // namespace
}  // namespace distaff
