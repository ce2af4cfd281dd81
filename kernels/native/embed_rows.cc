// The FFI target distaff_embed_rows: columns of a packed weight, that is rows of the transposed matrix, in float32. A
// model whose embedding is tied to its head keeps one array for both.
#include <algorithm>
#include <string>

#include "packed_weight.h"
#include "parallel.h"
#include "registry.h"
#include "timing.h"

namespace distaff {

namespace ffi = xla::ffi;

namespace {

float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

float from_half(uint16_t bits) {  // finite; without subnormal float32, which XLA's threads take for zero
  const uint32_t size = bits & 0x7fffu, wide = (size << 13) + (112u << 23);
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  if (size < 0x400u) value = static_cast<float>(size) * 0x1p-24f;
  return bits & 0x8000u ? -value : value;
}

void copy_column(const WeightMatrix& weight, int64_t column, float* to) {
  const int64_t panel = column / kLanes, lane = column % kLanes, step = weight.step_rows();
  const uint8_t* values = weight.values + panel * weight.panel_bytes();
  const auto at = [&](int64_t k) { return values + k / step * kStepBytes + lane * 4; };  // 4 bytes, a step's
  if (!weight.quantised()) {
    for (int64_t k = 0; k < weight.rows; ++k) {
      uint16_t bits;
      if (weight.kind == WeightKind::kFloat32) {
        __builtin_memcpy(to + k, at(k), sizeof(float));
      } else {
        __builtin_memcpy(&bits, at(k) + k % 2 * 2, sizeof bits);
        to[k] = from_bf16(bits);
      }
    }
    return;
  }
  const int64_t group = weight.group > 0 ? weight.group : weight.rows;
  for (int64_t g = 0; g < weight.groups(); ++g) {
    const int64_t scales = (panel * weight.groups() + g) * kLanes + lane;
    const float scale = weight.group > 0 ? from_half(weight.group_scales[scales]) : weight.column_scales[scales];
    const float offset = weight.group_offsets == nullptr ? 0.0f : from_half(weight.group_offsets[scales]);
    const int64_t end = std::min(weight.rows, (g + 1) * group);
    for (int64_t k = g * group; k < end; ++k) {
      const uint8_t byte = at(k)[k % 4];
      const int32_t stored = weight.kind == WeightKind::kInt8 ? byte : k % 8 < 4 ? byte & 15 : byte >> 4;
      to[k] = static_cast<float>(stored - weight.zero()) * scale + offset;
    }
  }
}

Timer timer("embed_rows");

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer tokens, ffi::RemainingArgs arguments,
               ffi::Result<ffi::AnyBuffer> out, int64_t rows, int64_t columns, int32_t kind, int32_t group,
               bool offsets, ffi::Span<const int64_t> places) {
  const Timed timed(timer);
  const auto refuse = [](const std::string& message) {
    return ffi::Error::InvalidArgument("distaff_embed_rows: " + message);
  };
  PackedWeight weight(rows, columns, kind, group, offsets, /*gated=*/false);
  if (auto message = weight.read(Arguments(arguments, places), 0); !message.empty()) return refuse(message);
  const int64_t count = static_cast<int64_t>(tokens.element_count());
  if (tokens.element_type() != ffi::S32) return refuse("tokens must be int32");
  if (out->element_type() != ffi::F32 || static_cast<int64_t>(out->element_count()) != count * rows) {
    return refuse("the result must be float32 [T, " + std::to_string(rows) + "]");
  }
  const auto* ids = static_cast<const int32_t*>(tokens.untyped_data());
  auto* to = static_cast<float*>(out->untyped_data());
  constexpr int64_t kTokensAtOnce = 8;
  Threads(pool).run((count + kTokensAtOnce - 1) / kTokensAtOnce, [&](int64_t i) {
    const int64_t end = std::min(count, (i + 1) * kTokensAtOnce);
    for (int64_t t = i * kTokensAtOnce; t < end; ++t) {
      copy_column(weight.matrix, std::clamp<int64_t>(ids[t], 0, columns - 1), to + t * rows);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(distaff_embed_rows, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("rows")
                                  .Attr<int64_t>("columns")
                                  .Attr<int32_t>("kind")
                                  .Attr<int32_t>("group")
                                  .Attr<bool>("offsets")
                                  .Attr<ffi::Span<const int64_t>>("places"));
DISTAFF_REGISTER(distaff_embed_rows);

}  // namespace distaff
