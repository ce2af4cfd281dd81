// Rows of activations as the tiles of a matmul read them, over whichever `Simd` was included before.
#pragma once

#include "matmul.h"

namespace distaff {
namespace {

Simd::F load_some(const float* from, int64_t count) {
  return count == kLanes ? Simd::load(from) : Simd::load_first(from, count);
}

Simd::F load_some(const uint16_t* from, int64_t count) {
  if (count == kLanes) return Simd::load(from);
  uint16_t padded[kLanes] = {};
  __builtin_memcpy(padded, from, count * sizeof *from);
  return Simd::load(padded);
}

// 1 / sqrt(mean of squares + epsilon).
template <typename X>
float norm_scale(const X* x, int64_t size, float epsilon) {
  constexpr int kChains = 4;  // one sum would wait for itself
  Simd::F squares[kChains];
  for (Simd::F& sum : squares) sum = Simd::zero();
  int64_t k = 0;
  for (; k + kChains * kLanes <= size; k += kChains * kLanes) {
    unrolled<kChains>([&](auto i) DISTAFF_UNROLLED {
      const Simd::F a = Simd::load(x + k + i * kLanes);
      squares[i] = Simd::fma(a, a, squares[i]);
    });
  }
  for (; k < size; k += kLanes) {
    const Simd::F a = load_some(x + k, least(size - k, kLanes));
    squares[0] = Simd::fma(a, a, squares[0]);
  }
  const Simd::F sum = Simd::add(Simd::add(squares[0], squares[1]), Simd::add(squares[2], squares[3]));
  return 1.0f / __builtin_sqrtf(Simd::sum(sum) / static_cast<float>(size) + epsilon);
}

// to[k] = change(x[k], k) for k < size, and zero from there to `padded`. Meanwhile the row after the next comes near.
template <typename X, typename To, typename Change>
void map_row(const X* x, int64_t size, int64_t padded, To* to, Change change) {
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    Simd::prefetch(x + 2 * size + k);
    Simd::store(to + k, change(Simd::load(x + k), k, kLanes));
  }
  if (k < size) Simd::store(to + k, change(load_some(x + k, size - k), k, size - k));
  for (k = round_up(size, kLanes); k < padded; k += kLanes) Simd::store(to + k, Simd::zero());
}

// Row `row` of x, normalised if the call says so, with zeros up to prepare_floats().
template <typename X, typename To>
void normalised_row_of(const Matmul& call, int64_t row, To* to) {
  const int64_t size = call.weight.rows, padded = prepare_floats(call);
  const X* x = static_cast<const X*>(call.x) + row * size;
  if (call.norm_weight == nullptr) {
    map_row(x, size, padded, to, [](Simd::F a, int64_t, int64_t) { return a; });
  } else {
    const Simd::F scale = Simd::all(norm_scale(x, size, call.norm_epsilon));
    map_row(x, size, padded, to, [scale, weight = call.norm_weight](Simd::F a, int64_t k, int64_t count) {
      return Simd::mul(Simd::mul(a, scale), load_some(weight + k, count));
    });
  }
}

template <typename To>
void normalised_row(const Matmul& call, int64_t row, To* to) {
  if (call.x_is_bf16) {
    normalised_row_of<uint16_t>(call, row, to);
  } else {
    normalised_row_of<float>(call, row, to);
  }
}

// int8 of `groups` (at most 16) times `size` floats (a multiple of 32), each group by its largest; `to`, scales, sums and
// shifts are those of the first.
void quantise(const float* from, int64_t groups, int64_t size, int32_t zero, int8_t* to, float* scales, float* sums,
              int32_t* shifts) {
  Simd::F each[kLanes];
  for (int64_t g = groups; g < kLanes; ++g) each[g] = Simd::zero();
  const auto size_at = [from](int64_t k) { return Simd::abs(Simd::load(from + k)); };
  for (int64_t g = 0, k = 0; g < groups; ++g) {
    Simd::F largest = Simd::zero();
    for (const int64_t end = k + size; k < end; k += 2 * kLanes) {
      largest = Simd::max(largest, Simd::max(size_at(k), size_at(k + kLanes)));
    }
    each[g] = largest;
  }
  const Simd::F largest = Simd::largest_each(each), most = Simd::all(127.0f), scale = Simd::div(largest, most);
  alignas(64) float inverses[kLanes], counts[kLanes];
  Simd::store(inverses, Simd::div(most, Simd::max(largest, Simd::all(1e-36f))));  // of zeros only, anything finite
  for (int64_t g = 0, k = 0; g < groups; ++g) {
    const Simd::F inverse = Simd::all(inverses[g]);
    Simd::I sum = Simd::int_zero();
    for (const int64_t end = k + size; k < end; k += 2 * kLanes) {
      const Simd::I a = Simd::nearest(Simd::mul(Simd::load(from + k), inverse));
      const Simd::I b = Simd::nearest(Simd::mul(Simd::load(from + k + kLanes), inverse));
      Simd::store_int8(to + k, a);
      Simd::store_int8(to + k + kLanes, b);
      sum = Simd::int_add(sum, Simd::int_add(a, b));
    }
    each[g] = Simd::to_float(sum);  // whole numbers below 2^24
  }
  const Simd::F count = Simd::sum_each(each);
  Simd::store(counts, count);
  Simd::store_first(scales, scale, groups);
  Simd::store_first(sums, Simd::mul(scale, count), groups);
  for (int64_t g = 0; g < groups; ++g) shifts[g] = -zero * static_cast<int32_t>(counts[g]);
}

// int8 of `groups` times kXGroup floats, each group in steps of `scale` divided by a power of two, as Matmul::x_group
// says.
void quantise_in_powers(const float* from, int64_t groups, int32_t zero, int8_t* to, float* scale, int32_t* shifts,
                        float* origins) {
  static_assert(kXGroup == 2 * kLanes);
  const auto size_at = [from](int64_t k) { return Simd::abs(Simd::load(from + k)); };
  Simd::F each[kLanes], row = Simd::zero();
  for (int64_t first = 0; first < groups; first += kLanes) {
    const int64_t count = least(groups - first, kLanes);
    for (int64_t g = 0; g < kLanes; ++g) {
      const int64_t k = (first + g) * kXGroup;
      each[g] = g < count ? Simd::max(size_at(k), size_at(k + kLanes)) : Simd::zero();
    }
    const Simd::F largest = Simd::largest_each(each);
    row = Simd::max(row, largest);
    Simd::store_first(origins + first, largest, count);
  }
  const float least_size = 1e-30f, largest = Simd::largest(Simd::max(row, Simd::all(least_size)));
  *scale = largest / 127;
  for (int64_t first = 0; first < groups; first += kLanes) {
    const int64_t count = least(groups - first, kLanes);
    const Simd::F sizes = Simd::max(Simd::load_first(origins + first, count), Simd::all(least_size));
    const Simd::F power = Simd::power_of_two(Simd::min(Simd::div(Simd::all(largest), sizes), Simd::all(0x1p20f)));
    const Simd::F origin = Simd::div(Simd::all(0x1.8p23f), power);
    alignas(64) float inverses[kLanes], counts[kLanes];
    alignas(64) int32_t bits[kLanes];
    Simd::store(inverses, Simd::mul(Simd::all(127 / largest), power));
    Simd::store_first(origins + first, origin, count);
    __builtin_memcpy(bits, &origin, sizeof bits);
    for (int64_t g = 0; g < count; ++g) {
      const int64_t k = (first + g) * kXGroup;
      const Simd::F inverse = Simd::all(inverses[g]);
      const Simd::I a = Simd::nearest(Simd::mul(Simd::load(from + k), inverse));
      const Simd::I b = Simd::nearest(Simd::mul(Simd::load(from + k + kLanes), inverse));
      Simd::store_int8(to + k, a);
      Simd::store_int8(to + k + kLanes, b);
      each[g] = Simd::to_float(Simd::int_add(a, b));
    }
    Simd::store(counts, Simd::sum_each(each));
    for (int64_t g = 0; g < count; ++g) shifts[first + g] = bits[g] - zero * static_cast<int32_t>(counts[g]);
  }
}

// A part of what the tiles of a block will read first, so that it comes while rows are made ready: the beginnings of two
// panels.
void fetch_first_panels(const Matmul& call, const Block& block, int64_t part, int64_t parts) {
  constexpr int64_t kMostLines = 288;
  const int64_t bytes = call.weight.panel_bytes(), lines = least(bytes / kStepBytes, kMostLines);
  const uint8_t* panel = call.weight.values + block.panel_begin * bytes;
  for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line) {
    Simd::prefetch(panel + line * kStepBytes);
    Simd::prefetch(panel + bytes + line * kStepBytes);
  }
}

void prepare(const Matmul& call, const Block& block, const Activations& to, float* scratch) {
  const int64_t groups = call.weight.groups(), rows = block.row_end - block.row_begin;
  const int64_t size = call.weight.group > 0 ? call.weight.group : prepare_floats(call);
  for (int64_t at = 0; at < rows; ++at) {
    const int64_t row = block.row_begin + at;
    if (rows > 3) fetch_first_panels(call, block, at, rows);
    uint8_t* values = to.values + at * to.stride;
    if (call.x_as == Activations::Kind::kFloat32) {
      normalised_row(call, row, reinterpret_cast<float*>(values));
    } else if (call.x_as == Activations::Kind::kBfloat16) {
      normalised_row(call, row, reinterpret_cast<uint16_t*>(values));
    } else {
      normalised_row(call, row, scratch);
      if (call.x_group > 0) {
        const int64_t first = at * call.x_groups();
        quantise_in_powers(scratch, call.x_groups(), call.weight.zero(), reinterpret_cast<int8_t*>(values),
                           to.scales + at, to.shifts + first, to.origins + first);
        continue;
      }
      for (int64_t g = 0; g < groups; g += kLanes) {
        const int64_t first = at * groups + g;
        quantise(scratch + g * size, least(groups - g, kLanes), size, call.weight.zero(),
                 reinterpret_cast<int8_t*>(values) + g * size, to.scales + first, to.sums + first, to.shifts + first);
      }
    }
  }
}

}  // namespace
}  // namespace distaff
