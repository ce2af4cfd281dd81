// A product of activations with a packed weight matrix, and all that is computed in the same pass over memory:
//
//   out = activation(normalise(x) W + bias) + residual
//
// W [K, N] lies in panels of 16 columns. In a panel K runs outside and the columns inside, so that 64 bytes (a *step*)
// meet 4 bytes of a row of x:
//
//   float32   [panel][K][16]            1 row of W a step
//   bfloat16  [panel][K/2][16][2]       2 rows
//   int8      [panel][K/4][16][4]       4 rows, as unsigned bytes q + 128
//   int4      [panel][K/8][16][4]       8 rows, the first four in the low nibbles
//
// These are the orders that dot-product instructions and AMX tiles read. Quantised weights are scale * (q - zero) +
// offset, with a scale for every column, or (float16) for every column and group of rows of W.
#pragma once

#include "level.h"

namespace distaff {

enum class WeightKind : int32_t { kFloat32, kBfloat16, kInt8, kInt4 };
enum class Activation : int32_t { kNone, kSilu, kGeluTanh, kGelu, kRelu };

struct WeightMatrix {
  WeightKind kind;
  int64_t rows, columns;  // K and N, without padding
  int64_t group;          // rows of W that share a scale; 0: all
  const uint8_t* values;
  const float* column_scales;     // [panels, 16], if quantised with group 0
  const uint16_t* group_scales;   // float16 [panels, groups, 16], if quantised with a group
  const uint16_t* group_offsets;  // likewise, or null

  DISTAFF_INLINE bool quantised() const { return kind == WeightKind::kInt8 || kind == WeightKind::kInt4; }
  DISTAFF_INLINE int64_t step_rows() const { return int64_t{1} << static_cast<int>(kind); }
  DISTAFF_INLINE int64_t padded_rows() const {
    const int64_t unit = group > 0 ? group : step_rows();
    return (rows + unit - 1) / unit * unit;
  }
  DISTAFF_INLINE int64_t groups() const { return group > 0 ? padded_rows() / group : 1; }
  DISTAFF_INLINE int64_t panel_bytes() const { return padded_rows() / step_rows() * kStepBytes; }
  // What is stored for the integer 0.
  DISTAFF_INLINE int32_t zero() const { return kind == WeightKind::kInt8 ? 128 : group_offsets == nullptr ? 8 : 0; }
};

// Some rows of x as the micro-kernels read them: normalised, in the dtype of the product, padded with zeros.
struct Activations {
  enum class Kind { kFloat32, kBfloat16, kInt8 };
  uint8_t* values;
  int64_t stride;  // bytes from row to row
  // For int8, [rows, groups] each: the scale, what integer sums of products begin at (-zero times the sum of the
  // integers), and scale times that sum.
  float* scales;
  int32_t* shifts;
  float* sums;
  // With groups of x alone [rows, groups], while `scales` is [rows]; see Matmul::x_group.
  float* origins;
};

// Where some of the columns of a result go: those of panels from `first_panel` on, `columns` of them.
struct Part {
  float* out;  // [M, columns]
  int64_t first_panel, columns;
};

constexpr int kMostParts = 8;

struct Matmul {
  int64_t m;
  WeightMatrix weight;
  const void* x;  // [M, K], float32 or bfloat16
  bool x_is_bf16;
  Activations::Kind x_as;  // what is multiplied
  // If x is made int8 for a weight without groups: how many numbers of a row share a step, which is the row's divided by
  // a power of two; 0: all. Then integer sums begin at the bits of an `origin`, a float32 whose last place is one over
  // that power. So the bits that they end at are a float32, too: the origin plus the sum in steps of the row. It takes
  // additions alone to add it to those of other groups, and processors have more units for these than for products.
  int64_t x_group;
  const float* norm_weight;  // [K], or null: no RMS norm
  float norm_epsilon;
  const float* bias;  // null, or [N], in the order of the packed columns
  Activation activation;
  // Panels alternate between gate and up columns, and the result is activation(gate) * up.
  bool gated;
  const float* residual;  // [M, out_columns], or null
  // The result [M, out_columns]; of several matrices side by side, each padded to whole panels, a part for each.
  Part parts[kMostParts];
  int part_count;

  DISTAFF_INLINE int64_t out_columns() const { return gated ? weight.columns / 2 : weight.columns; }
  DISTAFF_INLINE int64_t panels() const { return (out_columns() + kLanes - 1) / kLanes * (gated ? 2 : 1); }
  // In how many groups a row of x is made int8.
  DISTAFF_INLINE int64_t x_groups() const {
    return x_group > 0 ? (weight.padded_rows() + x_group - 1) / x_group : weight.groups();
  }
  // Whether quantised weights are made float32 again, instead of x int8.
  DISTAFF_INLINE bool widens() const { return weight.quantised() && x_as == Activations::Kind::kFloat32; }
};

// A part of the result: rows of x and panels of W (from an even one to an even one if gated).
struct Block {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

// What is compiled once for each processor level.
struct MatmulKernels {
  // How many panels are computed together.
  int64_t (*tile_panels)(const Matmul&);
  // Makes the rows of a block ready, the first of a thread's blocks of them; `scratch` holds prepare_floats().
  void (*prepare)(const Matmul&, const Block&, const Activations&, float* scratch);
  // Computes a block of the result from its rows of x; `scratch` holds block_floats() and is 64-byte aligned.
  void (*block)(const Matmul&, const Activations&, const Block&, float* scratch);
};

extern const MatmulKernels kMatmulGeneric, kMatmulAvx2, kMatmulAvx512, kMatmulAvx512Vnni, kMatmulAvx512Bf16,
    kMatmulAmx;

constexpr int64_t kMostTilePanels = 4;
constexpr int64_t kWidenedRows = 128;  // of W, made float32 at a time
constexpr int64_t kXGroup = 32;        // the x_group that there is

DISTAFF_INLINE int64_t prepare_floats(const Matmul& call) { return round_up(call.weight.padded_rows(), 2 * kLanes); }
DISTAFF_INLINE int64_t block_floats(const Matmul& call, int64_t rows) {
  return (rows + (call.widens() ? kWidenedRows : 0)) * kMostTilePanels * kLanes;
}

}  // namespace distaff
