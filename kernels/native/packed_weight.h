// Arguments of kernels that read weights, and a packed weight matrix among them: one to three arrays, and numbers that
// say what they hold.
#pragma once

#include <string>

#include "matmul.h"
#include "xla/ffi/api/ffi.h"

namespace distaff {

// The arguments that follow a call's first. Each is an array, or a piece of a buffer of bytes that holds many: `places`
// has a number for each, where the piece begins, or -1 for an array. (A program with few arguments is called faster.)
class Arguments {
 public:
  Arguments(xla::ffi::RemainingArgs arguments, xla::ffi::Span<const int64_t> places)
      : arguments_(arguments), places_(places) {}

  // The data of argument `index`, or null if it is not `bytes` bytes of `dtype`.
  const void* data(size_t index, xla::ffi::DataType dtype, int64_t bytes) const {
    const auto buffer = arguments_.get<xla::ffi::AnyBuffer>(index);
    if (!buffer.has_value() || index >= places_.size()) return nullptr;
    const int64_t place = places_[index], size = static_cast<int64_t>(buffer->size_bytes());
    if (place < 0) return buffer->element_type() == dtype && size == bytes ? buffer->untyped_data() : nullptr;
    const bool fits = buffer->element_type() == xla::ffi::U8 && place % 64 == 0 && bytes <= size && place <= size - bytes;
    return fits ? static_cast<const char*>(buffer->untyped_data()) + place : nullptr;
  }

 private:
  xla::ffi::RemainingArgs arguments_;
  xla::ffi::Span<const int64_t> places_;
};

class PackedWeight {
 public:
  PackedWeight(int64_t rows, int64_t columns, int32_t kind, int32_t group, bool offsets, bool gated)
      : kind_(kind), offsets_(offsets) {
    matrix.kind = static_cast<WeightKind>(kind);
    matrix.rows = rows;
    matrix.columns = columns;
    matrix.group = group;
    const int64_t half = gated ? columns / 2 : columns;
    panels_ = (half + kLanes - 1) / kLanes * (gated ? 2 : 1);
  }

  // How many arguments the weight takes.
  size_t arrays() const { return matrix.quantised() ? (offsets_ ? 3 : 2) : 1; }

  // Reads them from `first` on; returns what is wrong, or nothing.
  std::string read(const Arguments& arguments, size_t first) {
    using xla::ffi::DataType;
    constexpr DataType kValues[] = {DataType::F32, DataType::U16, DataType::U8, DataType::U8};
    if (kind_ < 0 || kind_ > static_cast<int32_t>(WeightKind::kInt4)) return "unknown kind of weight";
    if (matrix.rows < 1 || matrix.columns < 1) return "the weight is empty";
    const int64_t group = matrix.group;
    const bool grouped = group == 32 || group == 64 || group == 128;
    const bool allowed = matrix.kind == WeightKind::kInt8 ? group == 0 || grouped
                                                          : matrix.kind == WeightKind::kInt4 ? grouped : group == 0;
    if (!allowed || (offsets_ && group == 0)) return "such groups or offsets are not supported for this kind of weight";
    if (matrix.kind == WeightKind::kInt8 && group == 0 && matrix.rows > kMostRows) {
      return "int8 weights without groups may have at most " + std::to_string(kMostRows) + " rows";
    }

    std::string error;
    const auto take = [&](size_t index, const char* name, DataType dtype, int64_t bytes) -> const void* {
      const void* data = arguments.data(first + index, dtype, bytes);
      if (data == nullptr) error = std::string("the ") + name + " of the weight must be " + std::to_string(bytes) + " bytes";
      return data;
    };
    matrix.values = static_cast<const uint8_t*>(take(0, "values", kValues[kind_], panels_ * matrix.panel_bytes()));
    const int64_t scales = panels_ * matrix.groups() * kLanes;
    if (matrix.quantised() && group == 0) {
      matrix.column_scales = static_cast<const float*>(take(1, "scales", DataType::F32, scales * 4));
    } else if (matrix.quantised()) {
      matrix.group_scales = static_cast<const uint16_t*>(take(1, "scales", DataType::F16, scales * 2));
      if (offsets_) matrix.group_offsets = static_cast<const uint16_t*>(take(2, "offsets", DataType::F16, scales * 2));
    }
    return error;
  }

  WeightMatrix matrix{};

 private:
  static constexpr int64_t kMostRows = 65536;  // 255 * 127 of each still fit 32 bits

  int32_t kind_;
  bool offsets_;
  int64_t panels_;
};

}  // namespace distaff
