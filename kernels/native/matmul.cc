// The FFI target distaff_matmul: checks shapes and dtypes, and runs the kernels of this processor. The layout of the
// weights and the order of operations are in matmul.h; the Python side is kernels/matmul/cpu.py.
#include <algorithm>
#include <string>

#include "matmul_driver.h"
#include "packed_weight.h"
#include "parallel.h"
#include "registry.h"
#include "timing.h"

namespace distaff {

namespace ffi = xla::ffi;

namespace {

// Bits of the attribute `operands`: which optional ones follow x and the weight's arrays, in this order.
enum Operand : int32_t { kNormWeight = 1, kBias = 2, kResidual = 4, kLive = 8 };

Timer timer("matmul");

// Takes arguments one after the other; `error` is about the last that did not fit.
class NextArguments {
 public:
  NextArguments(const Arguments& arguments, size_t first) : arguments_(arguments), next_(first) {}

  const float* floats(const char* name, int64_t count) {
    const void* data = arguments_.data(next_++, ffi::F32, count * sizeof(float));
    if (data == nullptr) error = std::string(name) + " must be " + std::to_string(count) + " float32";
    return static_cast<const float*>(data);
  }

  int32_t integer(const char* name) {
    const void* data = arguments_.data(next_++, ffi::S32, sizeof(int32_t));
    if (data == nullptr) error = std::string(name) + " must be one int32";
    return data == nullptr ? 0 : *static_cast<const int32_t*>(data);
  }

  std::string error;

 private:
  const Arguments& arguments_;
  size_t next_;
};

// One result is [M, out_columns]; several are those of matrices side by side.
std::string take_results(ffi::RemainingRets results, Matmul& call) {
  call.part_count = static_cast<int>(results.size());
  if (call.part_count < 1 || call.part_count > kMostParts) return "1 to 8 results";
  int64_t panel = 0;
  for (int i = 0; i < call.part_count; ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!result.has_value()) return "a result is missing";
    const auto sizes = (*result)->dimensions();
    if ((*result)->element_type() != ffi::F32 || sizes.size() != 2 || sizes[0] != call.m) {
      return "results in float32 [M, _]";
    }
    call.parts[i] = {static_cast<float*>((*result)->untyped_data()), panel, sizes[1]};
    panel += (sizes[1] + kLanes - 1) / kLanes;
  }
  const int64_t columns = call.part_count > 1 ? panel * kLanes : call.parts[0].columns;
  return columns == call.out_columns() ? "" : "results with " + std::to_string(call.out_columns()) + " columns";
}

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs arguments, ffi::RemainingRets results,
               int64_t rows, int64_t columns, int32_t kind, int32_t group, bool offsets, int32_t operands,
               float epsilon, int32_t activation, bool gated, bool int8_activations, int64_t x_group,
               ffi::Span<const int64_t> places) {
  const Timed timed(timer);
  Matmul call{};
  const auto refuse = [](const std::string& message) {
    return ffi::Error::InvalidArgument("distaff_matmul: " + message);
  };
  if (x.dimensions().size() != 2 || x.dimensions()[1] != rows) {
    return refuse("x must be [M, " + std::to_string(rows) + "]");
  }
  if (x.element_type() != ffi::F32 && x.element_type() != ffi::BF16) return refuse("x must be float32 or bfloat16");
  if (activation < 0 || activation > static_cast<int32_t>(Activation::kRelu)) return refuse("unknown activation");
  if (gated && columns % 2 != 0) return refuse("gated columns must be even");
  call.m = x.dimensions()[0];
  call.x = x.untyped_data();
  call.x_is_bf16 = x.element_type() == ffi::BF16;
  call.activation = static_cast<Activation>(activation);
  call.gated = gated;
  call.norm_epsilon = epsilon;

  const Arguments others(arguments, places);
  PackedWeight weight(rows, columns, kind, group, offsets, gated);
  if (auto message = weight.read(others, 0); !message.empty()) return refuse(message);
  call.weight = weight.matrix;
  const bool may_group_x = call.weight.kind == WeightKind::kInt8 && call.weight.group == 0 && x_group == kXGroup;
  if (x_group != 0 && !may_group_x) return refuse("such groups of x are not supported for this kind of weight");
  call.x_group = x_group;
  if (call.weight.quantised()) {
    call.x_as = int8_activations ? Activations::Kind::kInt8 : Activations::Kind::kFloat32;
  } else {
    const bool is_float32 = call.weight.kind == WeightKind::kFloat32;
    call.x_as = is_float32 ? Activations::Kind::kFloat32 : Activations::Kind::kBfloat16;
  }

  NextArguments next(others, weight.arrays());
  if (operands & kNormWeight) call.norm_weight = next.floats("norm_weight", rows);
  if (operands & kBias) call.bias = next.floats("bias", gated ? call.panels() * kLanes : columns);
  if (operands & kResidual) call.residual = next.floats("residual", call.m * call.out_columns());
  int64_t live = call.m;
  if (operands & kLive) live = std::clamp<int64_t>(next.integer("live"), 0, call.m);
  if (!next.error.empty()) return refuse(next.error);
  if (auto wanted = take_results(results, call); !wanted.empty()) return refuse("there must be " + wanted);
  if (live == 0) return ffi::Error::Success();
  call.m = live;  // what comes after is padding, and nobody looks at its results

  static const MatmulKernels& kernels = matmul_kernels(cpu_level());
  Threads threads(pool);
  matmul(call, kernels, threads);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(distaff_matmul, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("rows")
                                  .Attr<int64_t>("columns")
                                  .Attr<int32_t>("kind")
                                  .Attr<int32_t>("group")
                                  .Attr<bool>("offsets")
                                  .Attr<int32_t>("operands")
                                  .Attr<float>("epsilon")
                                  .Attr<int32_t>("activation")
                                  .Attr<bool>("gated")
                                  .Attr<bool>("int8_activations")
                                  .Attr<int64_t>("x_group")
                                  .Attr<ffi::Span<const int64_t>>("places"));
DISTAFF_REGISTER(distaff_matmul);

}  // namespace distaff
