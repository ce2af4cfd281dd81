// How a matmul is cut into pieces of work: first every row of x is made ready once, then blocks of the result are
// computed in any order. `Pool` is a Threads, or has the same `run`.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu.h"
#include "matmul.h"
#include "scratch.h"

namespace distaff {

inline const MatmulKernels& matmul_kernels(CpuLevel level) {
#if defined(__x86_64__)
  if (level >= CpuLevel::kAmx) return kMatmulAmx;
  if (level == CpuLevel::kAvx512Bf16) return kMatmulAvx512Bf16;
  if (level == CpuLevel::kAvx512Vnni) return kMatmulAvx512Vnni;
  if (level == CpuLevel::kAvx512) return kMatmulAvx512;
  if (level == CpuLevel::kAvx2) return kMatmulAvx2;
#endif
  (void)level;
  return kMatmulGeneric;
}

// What a thread computes in. A function, so that each thread makes (and frees) its own when it first comes here.
inline Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

// Blocks of a result: `height` rows of x times `width` panels.
struct Blocks {
  int64_t height, width, down, across;

  explicit Blocks(const Matmul& call) {
    constexpr int64_t kMostRows = 128, kMostPanels = 8, kLeastBytes = 16 * 1024, kTileRows = 12;
    down = (call.m + kMostRows - 1) / kMostRows;
    height = (call.m + down - 1) / down;
    if (down > 1) height = (height + kTileRows - 1) / kTileRows * kTileRows;  // few tiles that are not full
    down = (call.m + height - 1) / height;
    // Large enough to be worth a turn at the shared counter, small enough that threads end together.
    width = std::clamp<int64_t>(kLeastBytes / call.weight.panel_bytes(), 1, kMostPanels);
    if (call.m > 3) width = width > 4 ? 8 : 4;
    if (call.gated) width = (width + 1) / 2 * 2;
    across = (call.panels() + width - 1) / width;
  }

  // Blocks that share panels follow each other.
  Block at(int64_t i, const Matmul& call) const {
    const int64_t row = i % down * height, panel = i / down * width;
    return {row, std::min(row + height, call.m), panel, std::min(panel + width, call.panels())};
  }
};

// Computes call.parts; fills in call.activations but for its kind.
template <typename Pool>
void matmul(Matmul& call, const MatmulKernels& kernels, Pool& pool) {
  thread_local Scratch shared;  // of the calling thread, read by the others
  constexpr int64_t kRowsAtOnce = 8;

  Activations& to = call.activations;
  const int64_t element = to.kind == Activations::Kind::kInt8 ? 1 : to.kind == Activations::Kind::kBfloat16 ? 2 : 4;
  to.stride = (prepare_floats(call) * element + 63) / 64 * 64 + 64;  // not a power of two: rows share few cache sets
  const int64_t groups = to.kind == Activations::Kind::kInt8 ? call.m * call.weight.groups() : 0;
  to.values = shared.get<uint8_t>(call.m * to.stride + 3 * groups * sizeof(float));
  to.scales = reinterpret_cast<float*>(to.values + call.m * to.stride);
  to.sums = to.scales + groups;
  to.shifts = reinterpret_cast<int32_t*>(to.sums + groups);

  pool.run((call.m + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t i) {
    float* scratch = thread_scratch().get<float>(prepare_floats(call) * sizeof(float));
    const int64_t end = std::min(call.m, (i + 1) * kRowsAtOnce);
    for (int64_t row = i * kRowsAtOnce; row < end; ++row) kernels.prepare(call, row, scratch);
  });
  const Blocks blocks(call);
  pool.run(blocks.down * blocks.across, [&](int64_t i) {
    const Block block = blocks.at(i, call);
    float* scratch = thread_scratch().get<float>(block_floats(call, blocks.height, blocks.width) * sizeof(float));
    kernels.block(call, block, scratch);
  });
}

}  // namespace distaff
