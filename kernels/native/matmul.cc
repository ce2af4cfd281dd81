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

// The next argument as float32 with `count` elements.
class FloatArguments {
 public:
  explicit FloatArguments(ffi::RemainingArgs arguments, size_t first) : arguments_(arguments), next_(first) {}

  const float* take(const char* name, int64_t count) {
    const auto buffer = arguments_.get<ffi::AnyBuffer>(next_++);
    if (!buffer.has_value()) {
      error = std::string("distaff_matmul: no argument for ") + name;
    } else if (buffer->element_type() != ffi::F32 || static_cast<int64_t>(buffer->element_count()) != count) {
      error = std::string("distaff_matmul: ") + name + " must be " + std::to_string(count) + " float32";
    } else {
      return static_cast<const float*>(buffer->untyped_data());
    }
    return nullptr;
  }

  int32_t take_int() {
    const auto buffer = arguments_.get<ffi::AnyBuffer>(next_++);
    if (buffer.has_value() && buffer->element_type() == ffi::S32 && buffer->element_count() == 1) {
      return *static_cast<const int32_t*>(buffer->untyped_data());
    }
    error = "distaff_matmul: live must be one int32";
    return 0;
  }

  std::string error;

 private:
  ffi::RemainingArgs arguments_;
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
               float epsilon, int32_t activation, bool gated, bool int8_activations) {
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

  PackedWeight weight(rows, columns, kind, group, offsets, gated);
  if (auto message = weight.read(arguments, 0); !message.empty()) return refuse(message);
  call.weight = weight.matrix;
  if (call.weight.quantised()) {
    call.x_as = int8_activations ? Activations::Kind::kInt8 : Activations::Kind::kFloat32;
  } else {
    const bool is_float32 = call.weight.kind == WeightKind::kFloat32;
    call.x_as = is_float32 ? Activations::Kind::kFloat32 : Activations::Kind::kBfloat16;
  }

  FloatArguments floats(arguments, weight.arrays());
  if (operands & kNormWeight) call.norm_weight = floats.take("norm_weight", rows);
  if (operands & kBias) call.bias = floats.take("bias", gated ? call.panels() * kLanes : columns);
  if (operands & kResidual) call.residual = floats.take("residual", call.m * call.out_columns());
  int64_t live = call.m;
  if (operands & kLive) live = std::clamp<int64_t>(floats.take_int(), 0, call.m);
  if (!floats.error.empty()) return ffi::Error::InvalidArgument(floats.error);
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
                                  .Attr<bool>("int8_activations"));
DISTAFF_REGISTER(distaff_matmul);

}  // namespace distaff
