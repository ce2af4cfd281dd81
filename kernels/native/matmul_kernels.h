// The code of a matmul that depends on the processor, over whichever `Simd` was included before: tiles of products in
// registers, and what is done to a finished tile.
//
// Files that include this are compiled for one processor level and must not use inline functions of the standard
// library: the linker would keep one copy of them for all levels.
#pragma once

#include "matmul.h"
#include "simd_math.h"
#include "tiles.h"
// `unrolled` comes first.
#include "matmul_activations.h"
#ifdef DISTAFF_HAS_MATRIX_UNIT
#include "matrix_unit_tiles.h"
#endif

namespace distaff {
namespace {

// --- tiles of integers ---

// What shares a scale: whole columns and rows of x; groups of both; whole columns, and groups of x in powers of two of
// their row's scale.
enum class Scales { kWhole, kGroups, kPowers };

// Integer sums over a group, then c += sum * (scale of w) * (scale of x) [+ offset of w * sum of x]. Sums start at
// -zero * (sum of x), since what is stored is q + zero. A column with one scale counts as one group in each tile.
template <bool kInt4, Scales kScales, int R, int P>
void int_tile(const Tile& t) {
  constexpr bool kGrouped = kScales == Scales::kGroups, kPowers = kScales == Scales::kPowers;
  Simd::F sums[R][P];
  const auto load_sums = [&]() DISTAFF_UNROLLED {
    unrolled<R>([&](auto r) DISTAFF_UNROLLED {
      unrolled<P>([&](auto p) DISTAFF_UNROLLED {
        sums[r][p] = t.first ? Simd::zero() : Simd::load(t.c + r * t.c_stride + p * kLanes);
      });
    });
  };
  if constexpr (kGrouped) load_sums();
  Simd::F row_sums[R][P];  // in steps of the rows
  if constexpr (kPowers) {
    unrolled<R>([&](auto r) DISTAFF_UNROLLED {
      unrolled<P>([&](auto p) DISTAFF_UNROLLED { row_sums[r][p] = Simd::zero(); });
    });
  }
  // In place of NextPanels, whose branch costs 4 bits a quarter: a part of a line with every step.
  const int64_t next_step = (kStepBytes + t.fetch_every - 1) / t.fetch_every;
  for (int64_t g = 0, done = 0; done < t.steps; ++g, done += t.group_steps) {
    Simd::I acc[R][P];
    unrolled<R>([&](auto r) DISTAFF_UNROLLED {
      const Simd::I shift = Simd::int_all(kGrouped || kPowers || t.first ? t.a_shifts[r * t.groups + g] : 0);
      unrolled<P>([&](auto p) DISTAFF_UNROLLED { acc[r][p] = shift; });
    });
    // 64 bytes of each panel against 4 bytes of each row.
    const auto dot = [&](const uint8_t* a, const Simd::I(&w)[P]) DISTAFF_UNROLLED {
      unrolled<R>([&](auto r) DISTAFF_UNROLLED {
        const Simd::I x = Simd::repeat_4(a + r * t.a_stride);
        unrolled<P>([&](auto p) DISTAFF_UNROLLED { acc[r][p] = Simd::dot_4(acc[r][p], w[p], x); });
      });
    };
    const auto step = [&](int64_t s) DISTAFF_UNROLLED {
      if constexpr (P > 1) {
        unrolled<P>([&](auto p) DISTAFF_UNROLLED { Simd::prefetch(t.next + p * t.w_stride + s * next_step); });
      }
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
    };
    const int64_t end = least(done + t.group_steps, t.steps);
    constexpr int kSteps = kXGroup / 4;
    if (kPowers && end - done == kSteps) {
      unrolled<kSteps>([&](auto s) DISTAFF_UNROLLED { step(done + s); });
    } else {
      for (int64_t s = done; s < end; ++s) step(s);
    }
    if constexpr (kPowers) {
      unrolled<R>([&](auto r) DISTAFF_UNROLLED {
        const Simd::F origin = Simd::all(t.a_origins[r * t.groups + g]);
        unrolled<P>([&](auto p) DISTAFF_UNROLLED {
          row_sums[r][p] = Simd::add(row_sums[r][p], Simd::sub(Simd::as_floats(acc[r][p]), origin));
        });
      });
    } else {
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
  }
  if constexpr (kPowers) {
    load_sums();
    unrolled<P>([&](auto p) DISTAFF_UNROLLED {
      const Simd::F w_scale = Simd::load(t.column_scales + p * kLanes);
      unrolled<R>([&](auto r) DISTAFF_UNROLLED {
        sums[r][p] = Simd::fma(row_sums[r][p], Simd::mul(w_scale, Simd::all(t.a_scales[r])), sums[r][p]);
      });
    });
  }
  unrolled<R>([&](auto r) DISTAFF_UNROLLED {
    unrolled<P>([&](auto p) DISTAFF_UNROLLED { Simd::store(t.c + r * t.c_stride + p * kLanes, sums[r][p]); });
  });
}

using TileFunction = void (*)(const Tile&);

struct FloatTiles {
  template <int R, int P>
  static TileFunction of(const Matmul& call) {
    return call.x_as == Activations::Kind::kFloat32 ? float_tile<Float32, R, P> : float_tile<Bfloat16, R, P>;
  }
};

struct IntTiles {
  template <int R, int P>
  static TileFunction of(const Matmul& call) {
    if (call.weight.kind == WeightKind::kInt4) return int_tile<true, Scales::kGroups, R, P>;
    if (call.x_group > 0) return int_tile<false, Scales::kPowers, R, P>;
    return call.weight.group > 0 ? int_tile<false, Scales::kGroups, R, P> : int_tile<false, Scales::kWhole, R, P>;
  }
};

template <typename Tiles, int R, int P>
TileFunction tile_of_rows(const Matmul& call, int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return tile_of_rows<Tiles, R - 1, P>(call, rows);
  }
  return Tiles::template of<R, P>(call);
}

// How many rows the tiles of a call have at most, and the kernel for some of them.
struct TileChoice {
  int64_t rows;
  TileFunction (*of)(const Matmul&, int64_t rows);
};

template <int P>
TileChoice choose_tiles(const Matmul& call) {
  const bool is_int8 = call.x_as == Activations::Kind::kInt8;
#ifdef DISTAFF_HAS_MATRIX_UNIT
  if constexpr (P > 1) {
    if (call.x_as == Activations::Kind::kBfloat16) {
      return {MatrixUnit::kRows, [](const Matmul&, int64_t) -> TileFunction { return unit_bf16_tile<P>; }};
    }
    if (is_int8 && call.weight.group == 0 && call.x_group == 0) {
      return {MatrixUnit::kRows, [](const Matmul&, int64_t) -> TileFunction { return unit_int8_tile<P>; }};
    }
  }
#endif
  if (is_int8) return {Simd::kRows, tile_of_rows<IntTiles, Simd::kRows, P>};
  constexpr int kRows = P == 2 ? Simd::kRows * Simd::kPanels / P : Simd::kRows;
  return {kRows, tile_of_rows<FloatTiles, kRows, P>};
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

// Panels whose columns of the result are computed together, and their sums, [rows][panels][16].
struct Sums {
  int64_t panel, panels;
  float* values;
};

// What happens to the sums of some rows: bias, activation, gate and residual, into the result.
template <typename Activate>
void finish(const Matmul& call, int64_t first_row, int64_t rows, const Sums& sums, Activate activate) {
  const int64_t width = call.gated ? 2 : 1;
  const Part *part = call.parts, *const last = part + call.part_count - 1;
  for (int64_t p = 0; p < sums.panels; p += width) {
    const int64_t panel = sums.panel + p;
    while (part < last && panel >= part[1].first_panel) ++part;
    const int64_t column = (panel - part->first_panel) / width * kLanes;
    const int64_t count = least(part->columns - column, kLanes);
    Simd::F bias = Simd::zero(), up_bias = Simd::zero();
    if (call.bias != nullptr) {
      bias = load_some(call.bias + panel * kLanes, call.gated ? kLanes : count);
      if (call.gated) up_bias = Simd::load(call.bias + (panel + 1) * kLanes);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float* c = sums.values + (r * sums.panels + p) * kLanes;
      Simd::F value = activate(Simd::add(Simd::load(c), bias));
      if (call.gated) value = Simd::mul(value, Simd::add(Simd::load(c + kLanes), up_bias));
      const int64_t at = (first_row + r) * part->columns + column;
      if (call.residual != nullptr) value = Simd::add(value, load_some(call.residual + at, count));
      if (count == kLanes) {
        Simd::store(part->out + at, value);
      } else {
        Simd::store_first(part->out + at, value, count);
      }
    }
  }
}

void finish(const Matmul& call, int64_t first_row, int64_t rows, const Sums& sums) {
  switch (call.activation) {
    case Activation::kSilu:
      return finish(call, first_row, rows, sums, [](Simd::F x) { return silu(x); });
    case Activation::kGeluTanh:
      return finish(call, first_row, rows, sums, [](Simd::F x) { return gelu_tanh(x); });
    case Activation::kGelu:
      return finish(call, first_row, rows, sums, [](Simd::F x) { return gelu(x); });
    case Activation::kRelu:
      return finish(call, first_row, rows, sums, [](Simd::F x) { return Simd::max(x, Simd::zero()); });
    case Activation::kNone:
      return finish(call, first_row, rows, sums, [](Simd::F x) { return x; });
  }
}

// How many steps of some panels all rows pass before the next ones. With few rows these are few, so that memory does not
// wait long for the first rows; sums of integers cost more to put away, and with many rows memory has time.
int64_t piece_steps(const Matmul& call, int64_t rows, int64_t panels) {
  const WeightMatrix& weight = call.weight;
  const int64_t most_bytes = (rows > 64 ? 256 : rows > 16 ? 40 : 24) * 1024;
  const int64_t pieces = (panels * weight.panel_bytes() + most_bytes - 1) / most_bytes;
  const int64_t steps = weight.padded_rows() / weight.step_rows();
  return round_up((steps + pieces - 1) / pieces, most(1, most(weight.group, call.x_group) / weight.step_rows()));
}

// Products of a block's rows and P panels from `panel` on into their sums, and, with the last of the sums' panels, into
// the result. K is taken a piece at a time, so that the piece of W stays in a cache while all rows pass.
template <int P>
void multiply(const Matmul& call, const Activations& x, const Block& block, int64_t panel, const Sums& sums,
              float* widened) {
  const WeightMatrix& weight = call.weight;
  const int64_t groups = call.x_groups(), scales = panel * weight.groups() * kLanes;
  const int64_t step_rows = weight.step_rows(), steps = weight.padded_rows() / step_rows;
  const int64_t rows = block.row_end - block.row_begin;
  const int64_t piece = call.widens() ? kWidenedRows / step_rows : piece_steps(call, rows, P);
  const bool completes = panel + P == sums.panel + sums.panels;
  const TileChoice choice = choose_tiles<P>(call);
  const int64_t tiles = (rows + choice.rows - 1) / choice.rows;
  for (int64_t step = 0; step < steps; step += piece) {
    Tile t{};
    t.w = weight.values + panel * weight.panel_bytes() + step * kStepBytes;
    t.w_stride = weight.panel_bytes();
    t.steps = least(piece, steps - step);
    const uint8_t* next = t.w + (step + piece < steps ? piece * kStepBytes : P * t.w_stride - step * kStepBytes);
    t.fetch_every = tiles;
    t.once = call.m == rows;
    t.c_stride = sums.panels * kLanes;
    t.first = step == 0;
    t.a_stride = x.stride;
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
      t.fetch_every = t.steps + 1;  // hardly: to widen takes longer than to read
      a_step = step_rows * sizeof(float);
    } else if (weight.group > 0) {
      t.group_steps = weight.group / step_rows;
      group = step / t.group_steps;
      t.group_scales += group * kLanes;
      if (t.group_offsets != nullptr) t.group_offsets += group * kLanes;
    } else if (call.x_group > 0) {
      t.group_steps = call.x_group / step_rows;
      group = step / t.group_steps;
    } else {
      t.group_steps = t.steps;
    }
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
      const int64_t count = rows / tiles + (i < rows % tiles);
      t.rows = count;
      t.a = x.values + row * x.stride + step * a_step;
      t.c = sums.values + row * t.c_stride + (panel - sums.panel) * kLanes;
      t.next = next + i * ((t.steps + tiles - 1) / tiles) * kStepBytes;
      if (call.x_as == Activations::Kind::kInt8) {
        const int64_t at = row * groups + group;
        t.a_scales = x.scales + (call.x_group > 0 ? row : at);
        t.a_shifts = x.shifts + at;
        t.a_sums = x.sums + at;
        t.a_origins = x.origins + at;
      }
      choice.of(call, count)(t);
      // At once, while the sums are near, so that memory takes results all along.
      if (completes && step + piece >= steps) {
        finish(call, block.row_begin + row, count, {sums.panel, sums.panels, sums.values + row * t.c_stride});
      }
      row += count;
    }
  }
}

// How many panels tiles of a call take at once.
int64_t tile_panels(const Matmul& call) {
  if (call.m <= 3 || Simd::kPanels < 4) return 1;  // with few rows, one panel after the other is read faster
#ifdef DISTAFF_HAS_MATRIX_UNIT
  if (call.x_as == Activations::Kind::kBfloat16) return 4;
#endif
  // Those of floats are high in place of wide, so that panels stay near; those of integers with groups keep two sums
  // for every number.
  return call.x_as == Activations::Kind::kInt8 && call.weight.group == 0 && call.x_group == 0 ? 4 : 2;
}

void compute_block(const Matmul& call, const Activations& x, const Block& block, float* scratch) {
  float* widened = scratch + (block.row_end - block.row_begin) * kMostTilePanels * kLanes;
  int64_t panel = block.panel_begin;
  const auto take = [&](auto count) {
    constexpr int kCount = decltype(count)::kValue;
    const int64_t together = most(kCount, call.gated ? 2 : 1);
    for (; panel + together <= block.panel_end; panel += together) {
      const Sums sums{panel, together, scratch};
      for (int64_t p = 0; p < together; p += kCount) multiply<kCount>(call, x, block, panel + p, sums, widened);
    }
  };
  if constexpr (Simd::kPanels >= 4) {
    const int64_t panels = tile_panels(call);
    if (panels == 4) take(Constant<4>{});
    if (panels >= 2) take(Constant<2>{});
  }
  take(Constant<1>{});
}

constexpr MatmulKernels kMatmul{tile_panels, prepare, compute_block};

}  // namespace
}  // namespace distaff
