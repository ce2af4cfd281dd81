// The code of a matmul that depends on the processor, over whichever `Simd` was included before: rows of activations,
// tiles of products in registers, and what is done to a finished block.
//
// Files that include this are compiled for one processor level and must not use inline functions of the standard
// library: the linker would keep one copy of them for all levels.
#pragma once

#include "matmul.h"
#include "simd_math.h"
#include "tiles.h"
#ifdef DISTAFF_HAS_MATRIX_UNIT
#include "matrix_unit_tiles.h"
#endif

namespace distaff {
namespace {

// --- activations ---

Simd::F load_x(const Matmul& call, int64_t row, int64_t k) {
  const int64_t size = call.weight.rows, count = least(size - k, kLanes);
  if (!call.x_is_bf16) {
    const float* from = static_cast<const float*>(call.x) + row * size + k;
    return count == kLanes ? Simd::load(from) : Simd::load_first(from, count);
  }
  const uint16_t* from = static_cast<const uint16_t*>(call.x) + row * size + k;
  if (count == kLanes) return Simd::load(from);
  uint16_t padded[kLanes] = {};
  __builtin_memcpy(padded, from, count * sizeof *from);
  return Simd::load(padded);
}

// Row `row` of x in float32, normalised if the call says so, with zeros up to prepare_floats().
void normalised_row(const Matmul& call, int64_t row, float* to) {
  const int64_t size = call.weight.rows;
  Simd::F scale = Simd::all(1.0f);
  if (call.norm_weight != nullptr) {
    Simd::F squares = Simd::zero();
    for (int64_t k = 0; k < size; k += kLanes) {
      const Simd::F x = load_x(call, row, k);
      squares = Simd::fma(x, x, squares);
    }
    const float mean = Simd::sum(squares) / static_cast<float>(size);
    scale = Simd::all(1.0f / __builtin_sqrtf(mean + call.norm_epsilon));
  }
  for (int64_t k = 0; k < size; k += kLanes) {
    Simd::F x = load_x(call, row, k);
    if (call.norm_weight != nullptr) {
      const int64_t count = least(size - k, kLanes);
      const float* from = call.norm_weight + k;
      x = Simd::mul(Simd::mul(x, scale), count == kLanes ? Simd::load(from) : Simd::load_first(from, count));
    }
    Simd::store(to + k, x);
  }
  for (int64_t k = (size + kLanes - 1) / kLanes * kLanes; k < prepare_floats(call); k += kLanes) {
    Simd::store(to + k, Simd::zero());
  }
}

// int8 of `count` floats (a multiple of 16) by their largest size; `group` counts groups of all rows.
void quantise(const Matmul& call, const float* from, int64_t count, int64_t group, int8_t* to) {
  Simd::F most = Simd::zero();
  for (int64_t k = 0; k < count; k += kLanes) most = Simd::max(most, Simd::abs(Simd::load(from + k)));
  const float largest = Simd::largest(most), scale = largest / 127.0f;
  const Simd::F inverse = Simd::all(largest > 0 ? 127.0f / largest : 0.0f);
  Simd::I sums = Simd::int_zero();
  for (int64_t k = 0; k < count; k += kLanes) {
    const Simd::I q = Simd::nearest(Simd::mul(Simd::load(from + k), inverse));
    Simd::store_int8(to + k, q);
    sums = Simd::int_add(sums, q);
  }
  const int32_t sum = Simd::int_sum(sums);
  call.activations.scales[group] = scale;
  call.activations.shifts[group] = -call.weight.zero() * sum;
  call.activations.sums[group] = scale * static_cast<float>(sum);
}

void prepare(const Matmul& call, int64_t row, float* scratch) {
  const Activations& to = call.activations;
  uint8_t* values = to.values + row * to.stride;
  const int64_t size = prepare_floats(call);
  float* floats = to.kind == Activations::Kind::kFloat32 ? reinterpret_cast<float*>(values) : scratch;
  normalised_row(call, row, floats);
  if (to.kind == Activations::Kind::kBfloat16) {
    auto* bf16 = reinterpret_cast<uint16_t*>(values);
    for (int64_t k = 0; k < size; k += kLanes) Simd::store(bf16 + k, Simd::load(floats + k));
  } else if (to.kind == Activations::Kind::kInt8) {
    const int64_t groups = call.weight.groups(), count = call.weight.group > 0 ? call.weight.group : size;
    for (int64_t g = 0; g < groups; ++g) {
      quantise(call, floats + g * count, count, row * groups + g, reinterpret_cast<int8_t*>(values) + g * count);
    }
  }
}

// --- tiles of integers ---

// Integer sums over a group, then c += sum * (scale of w) * (scale of x) [+ offset of w * sum of x]. Sums start at
// -zero * (sum of x), since what is stored is q + zero. A column with one scale counts as one group in each tile.
template <bool kInt4, bool kGrouped, int R, int P>
void int_tile(const Tile& t) {
  Simd::F sums[R][P];
  const auto load_sums = [&]() DISTAFF_UNROLLED {
    unrolled<R>([&](auto r) DISTAFF_UNROLLED {
      unrolled<P>([&](auto p) DISTAFF_UNROLLED {
        sums[r][p] = t.first ? Simd::zero() : Simd::load(t.c + r * t.c_stride + p * kLanes);
      });
    });
  };
  if constexpr (kGrouped) load_sums();
  for (int64_t g = 0, done = 0; done < t.steps; ++g, done += t.group_steps) {
    Simd::I acc[R][P];
    unrolled<R>([&](auto r) DISTAFF_UNROLLED {
      const Simd::I shift = Simd::int_all(kGrouped || t.first ? t.a_shifts[r * t.groups + g] : 0);
      unrolled<P>([&](auto p) DISTAFF_UNROLLED { acc[r][p] = shift; });
    });
    // 64 bytes of each panel against 4 bytes of each row.
    const auto dot = [&](const uint8_t* a, const Simd::I(&w)[P]) DISTAFF_UNROLLED {
      unrolled<R>([&](auto r) DISTAFF_UNROLLED {
        const Simd::I x = Simd::repeat_4(a + r * t.a_stride);
        unrolled<P>([&](auto p) DISTAFF_UNROLLED { acc[r][p] = Simd::dot_4(acc[r][p], w[p], x); });
      });
    };
    const int64_t end = least(done + t.group_steps, t.steps);
    for (int64_t s = done; s < end; ++s) {
      fetch_next<P>(t, s);
      const auto load = [&](int p) DISTAFF_UNROLLED { return Simd::load_64(t.w + p * t.w_stride + s * kStepBytes); };
      Simd::I w[P];
      if constexpr (kInt4) {
        unrolled<P>([&](auto p) DISTAFF_UNROLLED { w[p] = Simd::low_nibbles(load(p)); });
        dot(t.a + s * 8, w);
        unrolled<P>([&](auto p) DISTAFF_UNROLLED { w[p] = Simd::high_nibbles(load(p)); });
        dot(t.a + s * 8 + 4, w);
      } else {
        unrolled<P>([&](auto p) DISTAFF_UNROLLED { w[p] = load(p); });
        dot(t.a + s * 4, w);
      }
    }
    if constexpr (!kGrouped) load_sums();  // not before: a tile without groups has no registers for them
    unrolled<P>([&](auto p) DISTAFF_UNROLLED {
      const int64_t scale = kGrouped ? (p * t.groups + g) * kLanes : p * kLanes;
      const Simd::F w_scale = kGrouped ? Simd::load_half(t.group_scales + scale) : Simd::load(t.column_scales + scale);
      unrolled<R>([&](auto r) DISTAFF_UNROLLED {
        const Simd::F scales = Simd::mul(w_scale, Simd::all(t.a_scales[r * t.groups + g]));
        sums[r][p] = Simd::fma(Simd::to_float(acc[r][p]), scales, sums[r][p]);
      });
      if (kGrouped && t.group_offsets != nullptr) {
        const Simd::F offset = Simd::load_half(t.group_offsets + scale);
        unrolled<R>([&](auto r) DISTAFF_UNROLLED {
          sums[r][p] = Simd::fma(offset, Simd::all(t.a_sums[r * t.groups + g]), sums[r][p]);
        });
      }
    });
  }
  unrolled<R>([&](auto r) DISTAFF_UNROLLED {
    unrolled<P>([&](auto p) DISTAFF_UNROLLED { Simd::store(t.c + r * t.c_stride + p * kLanes, sums[r][p]); });
  });
}

using TileFunction = void (*)(const Tile&);

template <int R, int P>
TileFunction tile_of(const Matmul& call) {
  if (call.activations.kind == Activations::Kind::kFloat32) return float_tile<Float32, R, P>;
  if (call.activations.kind == Activations::Kind::kBfloat16) return float_tile<Bfloat16, R, P>;
  if (call.weight.kind == WeightKind::kInt4) return int_tile<true, true, R, P>;
  return call.weight.group > 0 ? int_tile<false, true, R, P> : int_tile<false, false, R, P>;
}

template <int R, int P>
TileFunction tile_of_rows(const Matmul& call, int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return tile_of_rows<R - 1, P>(call, rows);
  }
  return tile_of<R, P>(call);
}

// How many rows the tiles of a call have at most, and the kernel for some of them.
struct TileChoice {
  int64_t rows;
  TileFunction (*of)(const Matmul&, int64_t rows);
};

template <int P>
TileChoice choose_tiles(const Matmul& call) {
#ifdef DISTAFF_HAS_MATRIX_UNIT
  if constexpr (P > 1) {
    if (call.activations.kind == Activations::Kind::kBfloat16) {
      return {MatrixUnit::kRows, [](const Matmul&, int64_t) -> TileFunction { return unit_bf16_tile<P>; }};
    }
    if (call.activations.kind == Activations::Kind::kInt8 && call.weight.group == 0) {
      return {MatrixUnit::kRows, [](const Matmul&, int64_t) -> TileFunction { return unit_int8_tile<P>; }};
    }
  }
#endif
  (void)call;
  return {Simd::kRows, tile_of_rows<Simd::kRows, P>};
}

// --- blocks ---

// Rows of W made float32: steps of the panels at `t`, [panel][row][16].
void widen(const WeightMatrix& weight, const Tile& t, int64_t first_row, int64_t rows, int64_t panels, float* to) {
  const Simd::F zero = Simd::all(static_cast<float>(weight.zero()));
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t k = 0; k < rows; k += weight.step_rows()) {
      const int64_t group = weight.group > 0 ? (p * t.groups + (first_row + k) / weight.group) * kLanes : p * kLanes;
      const Simd::F scale = weight.group > 0 ? Simd::load_half(t.group_scales + group)
                                             : Simd::load(t.column_scales + group);
      const Simd::F offset =
          t.group_offsets == nullptr ? Simd::zero() : Simd::load_half(t.group_offsets + group);
      float* out = to + (p * rows + k) * kLanes;
      const auto four = [&](Simd::I bytes) {
        const auto put = [&](Simd::F q) {
          Simd::store(out, Simd::fma(Simd::sub(q, zero), scale, offset));
          out += kLanes;
        };
        put(Simd::unsigned_byte<0>(bytes));
        put(Simd::unsigned_byte<1>(bytes));
        put(Simd::unsigned_byte<2>(bytes));
        put(Simd::unsigned_byte<3>(bytes));
      };
      const Simd::I bytes = Simd::load_64(t.w + p * t.w_stride + k / weight.step_rows() * kStepBytes);
      if (weight.kind == WeightKind::kInt8) {
        four(bytes);
      } else {
        four(Simd::low_nibbles(bytes));
        four(Simd::high_nibbles(bytes));
      }
    }
  }
}

// Sums of P panels from `panel` on into c, K a piece at a time so that the piece of W stays in the first cache.
template <int P>
void multiply(const Matmul& call, const Block& block, int64_t panel, float* c, int64_t c_stride, float* widened) {
  const WeightMatrix& weight = call.weight;
  const Activations& activations = call.activations;
  const int64_t groups = weight.groups(), scales = panel * groups * kLanes;
  const int64_t step_rows = weight.step_rows(), steps = weight.padded_rows() / step_rows;
  const int64_t piece = call.widens() ? kWidenedRows / step_rows : 24 * 1024 / kStepBytes / P;
  const int64_t rows = block.row_end - block.row_begin;
  const TileChoice choice = choose_tiles<P>(call);
  const int64_t tiles = (rows + choice.rows - 1) / choice.rows;
  for (int64_t step = 0; step < steps; step += piece) {
    Tile t{};
    t.w = weight.values + panel * weight.panel_bytes() + step * kStepBytes;
    t.w_stride = weight.panel_bytes();
    t.steps = least(piece, steps - step);
    const uint8_t* next = t.w + (step + piece < steps ? piece * kStepBytes : P * t.w_stride - step * kStepBytes);
    t.next_step = kStepBytes / tiles;
    t.c_stride = c_stride;
    t.first = step == 0;
    t.a_stride = activations.stride;
    t.groups = groups;
    if (weight.group > 0) {
      t.group_scales = weight.group_scales + scales;
      if (weight.group_offsets != nullptr) t.group_offsets = weight.group_offsets + scales;
    } else if (weight.quantised()) {
      t.column_scales = weight.column_scales + scales;
    }
    int64_t a_step = weight.kind == WeightKind::kInt4 ? 8 : 4;  // bytes of a row that meet a step
    int64_t group = 0;
    if (call.widens()) {
      const int64_t count = t.steps * step_rows;
      widen(weight, t, step * step_rows, count, P, widened);
      t.w = reinterpret_cast<const uint8_t*>(widened);
      t.w_stride = count * kStepBytes;
      t.steps = count;
      next = t.w;  // nothing: to widen takes longer than to read
      t.next_step = 0;
      a_step = step_rows * sizeof(float);
    } else if (weight.group > 0) {
      t.group_steps = weight.group / step_rows;
      group = step / t.group_steps;
      t.group_scales += group * kLanes;
      if (t.group_offsets != nullptr) t.group_offsets += group * kLanes;
    } else {
      t.group_steps = t.steps;
    }
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
      const int64_t count = rows / tiles + (i < rows % tiles);
      const int64_t at = (block.row_begin + row) * groups + group;
      t.rows = count;
      t.a = activations.values + (block.row_begin + row) * activations.stride + step * a_step;
      t.c = c + row * c_stride;
      t.next = next + i * t.steps * t.next_step;
      if (activations.kind == Activations::Kind::kInt8) {
        t.a_scales = activations.scales + at;
        t.a_shifts = activations.shifts + at;
        t.a_sums = activations.sums + at;
      }
      choice.of(call, count)(t);
      row += count;
    }
  }
}

Simd::F activate(Activation activation, Simd::F x) {
  switch (activation) {
    case Activation::kSilu:
      return silu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kGelu:
      return gelu(x);
    case Activation::kRelu:
      return Simd::max(x, Simd::zero());
    case Activation::kNone:
      break;
  }
  return x;
}

// Bias, activation, gate and residual of a block whose sums are in c, into the result.
void finish(const Matmul& call, const Block& block, const float* c) {
  const int64_t width = call.gated ? 2 : 1;
  const Part* const end = call.parts + call.part_count - 1;
  const auto some = [](const float* from, int64_t count) {
    return count == kLanes ? Simd::load(from) : Simd::load_first(from, count);
  };
  for (int64_t row = block.row_begin; row < block.row_end; ++row) {
    const Part* part = call.parts;
    for (int64_t panel = block.panel_begin; panel < block.panel_end; panel += width) {
      while (part < end && panel >= part[1].first_panel) ++part;
      const int64_t column = (panel - part->first_panel) / width * kLanes;
      const int64_t count = least(part->columns - column, kLanes);
      Simd::F value = Simd::load(c), up = Simd::zero();
      if (call.gated) up = Simd::load(c + kLanes);
      c += width * kLanes;
      if (call.bias != nullptr) {
        const float* bias = call.bias + panel * kLanes;
        value = Simd::add(value, call.gated ? Simd::load(bias) : some(bias, count));
        if (call.gated) up = Simd::add(up, Simd::load(bias + kLanes));
      }
      value = activate(call.activation, value);
      if (call.gated) value = Simd::mul(value, up);
      const int64_t at = row * part->columns + column;
      if (call.residual != nullptr) value = Simd::add(value, some(call.residual + at, count));
      if (count == kLanes) {
        Simd::store(part->out + at, value);
      } else {
        Simd::store_first(part->out + at, value, count);
      }
    }
  }
}

void compute_block(const Matmul& call, const Block& block, float* scratch) {
  const int64_t rows = block.row_end - block.row_begin, width = (block.panel_end - block.panel_begin) * kLanes;
  float* widened = scratch + rows * width;
  int64_t panel = block.panel_begin;
  const auto at = [&] { return scratch + (panel - block.panel_begin) * kLanes; };
  const auto several = [&](auto panels) {
    for (; panel + panels <= block.panel_end; panel += panels) {
      multiply<decltype(panels)::kValue>(call, block, panel, at(), width, widened);
    }
  };
  if (rows > 3) {  // with fewer, one panel after the other is read faster
    // Tiles with groups keep two sums for every number.
    const bool grouped = call.weight.group > 0 && !call.widens();
    if (grouped) several(Constant<(Simd::kPanels + 1) / 2>{});
    if (!grouped) several(Constant<Simd::kPanels>{});
  }
  for (; panel < block.panel_end; ++panel) multiply<1>(call, block, panel, at(), width, widened);
  finish(call, block, scratch);
}

constexpr MatmulKernels kMatmul{prepare, compute_block};

}  // namespace
}  // namespace distaff
