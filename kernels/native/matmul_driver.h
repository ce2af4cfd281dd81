// How a matmul is cut into blocks of the result, computed in any order. A thread makes rows of x ready when it comes to
// their first block: to do that twice costs less than to wait for another thread. `Pool` is a Threads, or has the same
// `run` and `count`.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <numeric>

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

// Blocks of a result: `height` rows of x times some panels.
class Blocks {
 public:
  // `tile_panels` are computed together.
  Blocks(const Matmul& call, int64_t tile_panels, int64_t threads)
      : m_(call.m), unit_(std::max<int64_t>(std::gcd(call.panels(), tile_panels), call.gated ? 2 : 1)) {
    // Few enough rows to stay in the second cache, and enough that each thread may read all of W for its own.
    constexpr int64_t kFewestRows = 64, kMostRows = 128, kMostPanels = 8;
    const int64_t rows = std::clamp((m_ + threads - 1) / threads, kFewestRows, kMostRows);
    down_ = (m_ + rows - 1) / rows;
    height_ = (m_ + down_ - 1) / down_;
    units_ = call.panels() / unit_;
    width_ = kMostPanels / unit_;
    shares_ = down_ > 1 ? 1 : threads;
    const int64_t share = (units_ + shares_ - 1) / shares_;
    wide_ = std::max<int64_t>(0, (share - 1) / width_);
    across_ = down_ > 1 ? wide_ + 1 : wide_ + std::bit_width(static_cast<uint64_t>(width_));
  }

  int64_t count() const { return down_ * shares_ * across_; }
  int64_t height() const { return height_; }

  // Blocks that share rows follow each other. Some may be empty.
  Block at(int64_t i) const {
    const int64_t row = i / across_ / shares_ * height_, share = i / across_ % shares_;
    const int64_t begin = units_ * share / shares_, size = units_ * (share + 1) / shares_ - begin;
    const auto panel = [&](int64_t j) { return (begin + cut(size, j)) * unit_; };
    return {row, std::min(row + height_, m_), panel(i % across_), panel(i % across_ + 1)};
  }

 private:
  // Where block j of a share of so many units begins: they are even if there are many; otherwise the last is halved
  // again and again, so that threads end together.
  int64_t cut(int64_t size, int64_t j) const {
    if (down_ > 1) return size * j / across_;
    if (j < wide_) return std::max<int64_t>(0, size - width_) * j / wide_;
    return size - std::min(size, width_ >> (j - wide_));
  }

  int64_t m_, unit_, units_, width_, shares_, wide_, down_, height_, across_;
};

// Rows of x that a thread has made ready for its blocks, and what it computes in.
class Workspace {
 public:
  // That of this thread. A function, so that each makes (and frees) its own when it first comes here.
  static Workspace& of_thread() {
    thread_local Workspace workspace;
    return workspace;
  }

  static int64_t next_call() {
    static std::atomic<int64_t> calls{0};
    return calls.fetch_add(1, std::memory_order_relaxed);
  }

  // The rows of a block of the call with that number, made ready unless they are.
  const Activations& rows(const Matmul& call, int64_t number, const Block& block, const MatmulKernels& kernels) {
    if (number == number_ && block.row_begin == first_row_) return activations_;
    using Kind = Activations::Kind;
    const int64_t element = call.x_as == Kind::kInt8 ? 1 : call.x_as == Kind::kBfloat16 ? 2 : 4;
    const int64_t rows = block.row_end - block.row_begin;
    const int64_t groups = call.x_as == Kind::kInt8 ? rows * call.x_groups() : 0;
    Activations& to = activations_;
    to.stride = round_up(prepare_floats(call) * element, 64) + 64;  // not a power of two: rows share few cache sets
    to.values = rows_.get<uint8_t>(rows * to.stride + 4 * groups * sizeof(float));
    to.scales = reinterpret_cast<float*>(to.values + rows * to.stride);
    to.sums = to.scales + groups;
    to.origins = to.sums + groups;
    to.shifts = reinterpret_cast<int32_t*>(to.origins + groups);
    kernels.prepare(call, block, to, floats(prepare_floats(call)));
    number_ = number;
    first_row_ = block.row_begin;
    return to;
  }

  float* floats(int64_t count) { return floats_.get<float>(count * sizeof(float)); }

 private:
  Scratch rows_, floats_;
  Activations activations_{};
  int64_t number_ = -1, first_row_ = 0;
};

// Computes call.parts.
template <typename Pool>
void matmul(const Matmul& call, const MatmulKernels& kernels, Pool& pool) {
  const int64_t number = Workspace::next_call();
  const Blocks blocks(call, kernels.tile_panels(call), pool.count());
  pool.run(blocks.count(), [&](int64_t i) {
    const Block block = blocks.at(i);
    if (block.panel_begin == block.panel_end) return;
    Workspace& workspace = Workspace::of_thread();
    const Activations& rows = workspace.rows(call, number, block, kernels);
    kernels.block(call, rows, block, workspace.floats(block_floats(call, blocks.height())));
  });
}

}  // namespace distaff
