// Random matmuls in every format, at every level of this processor, against plain loops in double.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "matmul_driver.h"
#include "parallel.h"
#include "roofline_driver.h"
#include "std_pool.h"
#include "threads.h"

namespace distaff {

extern const MatmulKernels kMatmulMatrixUnit;
extern const RooflineKernels kRooflineMatrixUnit;

namespace {

using Random = std::mt19937;

float uniform(Random& random) { return std::uniform_real_distribution<float>(-1, 1)(random); }
int64_t below(Random& random, int64_t end) { return std::uniform_int_distribution<int64_t>(0, end - 1)(random); }

// Float16 bits of 2^-4 and of 2^-3 with a sign, so that scales are exact.
uint16_t random_half(Random& random) {
  return static_cast<uint16_t>((below(random, 2) ? 0x2c00 : 0x3000) | below(random, 2) << 15);
}
float from_half(uint16_t bits) { return ((bits & 0x7fff) == 0x2c00 ? 0.0625f : 0.125f) * (bits >> 15 ? -1.0f : 1.0f); }

float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// A random call and the arrays that it points to, none larger than it has to be.
struct RandomCall {
  Matmul call{};
  std::vector<float> float_values, column_scales, x, norm_weight, bias, residual, out;
  std::vector<uint16_t> bf16_values, scales, offsets, bf16_x;
  std::vector<uint8_t> bytes;

  explicit RandomCall(Random& random) {
    const auto floats = [&](std::vector<float>& to, int64_t count) {
      to.resize(count);
      for (float& value : to) value = uniform(random);
      return to.data();
    };
    WeightMatrix& w = call.weight;
    w.kind = static_cast<WeightKind>(below(random, 4));
    if (w.kind == WeightKind::kInt4) w.group = 32 << below(random, 3);
    if (w.kind == WeightKind::kInt8 && below(random, 2)) w.group = 32 << below(random, 3);
    w.rows = 1 + below(random, 500);
    call.gated = below(random, 2);
    w.columns = (1 + below(random, 90)) * (call.gated ? 2 : 1);
    call.m = below(random, 8) ? 1 + below(random, 14) : 1 + below(random, 150);
    call.activation = static_cast<Activation>(below(random, 5));

    const int64_t count = call.panels() * w.panel_bytes(), scale_count = call.panels() * w.groups() * kLanes;
    if (w.kind == WeightKind::kFloat32) {
      w.values = reinterpret_cast<const uint8_t*>(floats(float_values, count / 4));
    } else if (w.kind == WeightKind::kBfloat16) {
      bf16_values.resize(count / 2);
      for (auto& bits : bf16_values) bits = static_cast<uint16_t>(0x3e00 + below(random, 256));
      w.values = reinterpret_cast<const uint8_t*>(bf16_values.data());
    } else {
      bytes.resize(count);
      for (auto& byte : bytes) byte = static_cast<uint8_t>(below(random, 256));
      w.values = bytes.data();
    }
    if (w.group > 0) {
      for (int64_t i = 0; i < scale_count; ++i) scales.push_back(random_half(random));
      w.group_scales = scales.data();
      if (below(random, 2)) {
        for (int64_t i = 0; i < scale_count; ++i) offsets.push_back(random_half(random));
        w.group_offsets = offsets.data();
      }
    } else if (w.quantised()) {
      w.column_scales = floats(column_scales, scale_count);
    }
    using Kind = Activations::Kind;
    if (w.quantised()) {
      call.x_as = below(random, 3) ? Kind::kInt8 : Kind::kFloat32;
      if (w.kind == WeightKind::kInt8 && w.group == 0 && below(random, 2)) call.x_group = kXGroup;
    } else {
      call.x_as = w.kind == WeightKind::kFloat32 ? Kind::kFloat32 : Kind::kBfloat16;
    }
    call.x = floats(x, call.m * w.rows);
    call.x_is_bf16 = below(random, 2);
    if (call.x_is_bf16) {
      for (float& value : x) {
        bf16_x.push_back(static_cast<uint16_t>(0x3f00 + below(random, 256)));
        value = from_bf16(bf16_x.back());
      }
      call.x = bf16_x.data();
    }
    if (below(random, 2)) call.norm_weight = floats(norm_weight, w.rows);
    call.norm_epsilon = 1e-5f;
    if (below(random, 2)) call.bias = floats(bias, call.gated ? call.panels() * kLanes : w.columns);
    if (below(random, 2)) call.residual = floats(residual, call.m * call.out_columns());
    out.resize(call.m * call.out_columns());
    call.parts[0] = {out.data(), 0, call.out_columns()};
    call.part_count = 1;
  }

  double weight(int64_t k, int64_t column) const {
    const WeightMatrix& w = call.weight;
    const int64_t panel = column / kLanes, lane = column % kLanes, step = w.step_rows();
    const uint8_t* at = w.values + panel * w.panel_bytes() + k / step * kStepBytes + lane * 4;
    if (w.kind == WeightKind::kFloat32) return *reinterpret_cast<const float*>(at);
    if (w.kind == WeightKind::kBfloat16) return from_bf16(reinterpret_cast<const uint16_t*>(at)[k % 2]);
    const int byte = at[k % 4], stored = w.kind == WeightKind::kInt8 ? byte : k % 8 < 4 ? byte % 16 : byte / 16;
    const int64_t scale = (panel * w.groups() + (w.group > 0 ? k / w.group : 0)) * kLanes + lane;
    const double size = w.group > 0 ? from_half(scales[scale]) : column_scales[scale];
    return size * (stored - w.zero()) + (w.group_offsets != nullptr ? from_half(offsets[scale]) : 0.0);
  }

  // Row `row` of x, normalised, and how far from it may be what is multiplied.
  std::vector<double> input(int64_t row, std::vector<double>& error) const {
    const int64_t size = call.weight.rows;
    std::vector<double> values(x.begin() + row * size, x.begin() + (row + 1) * size);
    if (call.norm_weight != nullptr) {
      double squares = 0;
      for (const double value : values) squares += value * value;
      const double scale = 1 / std::sqrt(squares / static_cast<double>(size) + 1e-5);
      for (int64_t k = 0; k < size; ++k) values[k] *= scale * norm_weight[k];
    }
    error.assign(size, 0);
    const auto largest = [&](int64_t begin, int64_t end) {
      double most = 0;
      for (int64_t k = begin; k < std::min(size, end); ++k) most = std::max(most, std::abs(values[k]));
      return most;
    };
    const int64_t group = call.weight.group > 0 ? call.weight.group : call.x_group > 0 ? call.x_group : size;
    for (int64_t k = 0; k < size; ++k) {
      const double most = largest(k / group * group, (k / group + 1) * group);
      using Kind = Activations::Kind;
      // In powers of two a step may be twice as long, and is never shorter than a part of the row's.
      if (call.x_as == Kind::kInt8) error[k] = call.x_group > 0 ? most / 126 + largest(0, size) * 1e-6 : most / 253;
      if (call.x_as == Kind::kBfloat16) error[k] = std::abs(values[k]) / 255;
      error[k] += std::abs(values[k]) * 2e-5;  // float32 all along
    }
    return values;
  }

  // How many results are wrong.
  int wrong() const {
    int found = 0;
    std::vector<double> error;
    for (int64_t row = 0; row < call.m; ++row) {
      const std::vector<double> values = input(row, error);
      for (int64_t column = 0; column < call.out_columns(); ++column) {
        double sums[2], errors[2];
        for (int half = 0; half < (call.gated ? 2 : 1); ++half) {
          const int64_t packed = call.gated ? column / kLanes * 2 * kLanes + half * kLanes + column % kLanes : column;
          sums[half] = call.bias != nullptr ? bias[packed] : 0;
          errors[half] = 1e-5 * (1 + std::abs(sums[half]));
          for (int64_t k = 0; k < call.weight.rows; ++k) {
            sums[half] += values[k] * weight(k, packed);
            errors[half] += error[k] * std::abs(weight(k, packed));
          }
        }
        double value = activated(sums[0]), bound = 1.13 * errors[0] + 1e-6 * std::abs(sums[0]);
        if (call.gated) {
          bound = bound * (std::abs(sums[1]) + errors[1]) + std::abs(value) * errors[1];
          value *= sums[1];
        }
        const int64_t at = row * call.out_columns() + column;
        if (call.residual != nullptr) value += residual[at];
        found += !(std::abs(out[at] - value) <= bound + 1e-5 * std::abs(value));
      }
    }
    return found;
  }

  double activated(double x) const {
    const double inner = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
    switch (call.activation) {
      case Activation::kSilu:
        return x / (1 + std::exp(-x));
      case Activation::kGeluTanh:
        return x * (1 + std::tanh(inner)) / 2;
      case Activation::kGelu:
        return x * std::erfc(-x / std::sqrt(2.0)) / 2;
      case Activation::kRelu:
        return std::max(x, 0.0);
      case Activation::kNone:
        break;
    }
    return x;
  }
};

// The peaks' loops do as many products as they are asked for, and the reading loop reads all.
void check_roofline(const RooflineKernels& kernels) {
  const int32_t words[] = {0x40000000, 0x40004000, 0x02020202};  // 2 in float32, bfloat16, int8
  for (int kind = 0; kind < 3; ++kind) {
    for (const int rounds : {1, 63, 64, 200}) {
      const float found = kernels.multiply(kind, rounds, words[kind]) - kernels.multiply(kind, 0, words[kind]);
      const float wanted = static_cast<float>(rounds * kPeakSteps * kLanes * 2 * 2 << kind);
      CHECK(found == wanted, "%d rounds of kind %d add %f, not %f", rounds, kind, found, wanted);
    }
  }
  std::vector<int32_t> numbers(3 * 64);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<int32_t>(i * i);
  const float sum = kernels.read(reinterpret_cast<const uint8_t*>(numbers.data()), 4 * numbers.size());
  CHECK(sum == std::accumulate(numbers.begin(), numbers.end(), 0), "read %f", sum);
}

}  // namespace
}  // namespace distaff

int main() {
  using namespace distaff;
  check_roofline(kRooflineMatrixUnit);
  for (int level = 0; level <= static_cast<int>(cpu_level()); ++level) {
    check_roofline(roofline_kernels(static_cast<CpuLevel>(level)));
  }
  StdPool pool(3);
  BasicThreads threads(pool.handle());
  int calls = 0;
  std::vector<const MatmulKernels*> all{&kMatmulMatrixUnit};
  for (int level = 0; level <= static_cast<int>(cpu_level()); ++level) {
    all.push_back(&matmul_kernels(static_cast<CpuLevel>(level)));
  }
  for (size_t level = 0; level < all.size(); ++level) {
    Random random(static_cast<int>(level));
    for (int i = 0; i < 80; ++i, ++calls) {
      RandomCall random_call(random);
      matmul(random_call.call, *all[level], threads);
      const int wrong = random_call.wrong();
      CHECK(wrong == 0, "kernels %zu, call %d: %d of %zu numbers", level, i, wrong, random_call.out.size());
    }
  }
  std::printf("%d calls of matmul are right\n", calls);
}
