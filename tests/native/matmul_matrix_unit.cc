// The kernels of matmul (and of its roofline) on a matrix unit made of plain C++, so that processors without one can test
// how they use it.
#include "simd_generic.h"
// `Simd` comes first, then `MatrixUnit`.
#include "level.h"

namespace distaff {
namespace {

struct MatrixUnit {
  static constexpr int kRows = 16;

  static void configure(int64_t rows) {
    for (Register& r : registers) r = {};
    for (int i = 0; i < 8; ++i) registers[i].rows = i < 5 ? rows : 16;
  }
  static void release() {
    for (Register& r : registers) r.rows = 0;
  }
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    Register& r = registers[kTile];
    for (int64_t i = 0; i < r.rows; ++i) memcpy(r.bytes[i], static_cast<const char*>(from) + i * stride, 64);
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    const Register& r = registers[kTile];
    for (int64_t i = 0; i < r.rows; ++i) memcpy(static_cast<char*>(to) + i * stride, r.bytes[i], 64);
  }
  template <int kSum, int kA, int kB>
  static void dot_bf16() {
    each_word<float, uint16_t, uint16_t, kSum, kA, kB>([](float sum, const uint16_t* a, const uint16_t* b) {
      for (int i = 0; i < 2; ++i) sum += wide(a[i]) * wide(b[i]);
      return sum;
    });
  }
  template <int kSum, int kA, int kB>
  static void dot_int8() {
    each_word<int32_t, int8_t, uint8_t, kSum, kA, kB>([](int32_t sum, const int8_t* a, const uint8_t* b) {
      for (int i = 0; i < 4; ++i) sum += a[i] * b[i];
      return sum;
    });
  }

 private:
  struct Register {
    int64_t rows;
    char bytes[16][64];
  };
  static inline thread_local Register registers[8];

  static float wide(uint16_t bits) {
    const uint32_t word = uint32_t{bits} << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
  }

  // sum[m][n] = dot(sum[m][n], word k of a[m], word n of b[k]) for every k.
  template <typename Sum, typename A, typename B, int kSum, int kA, int kB, typename Dot>
  static void each_word(Dot dot) {
    Register &c = registers[kSum], &a = registers[kA], &b = registers[kB];
    for (int64_t m = 0; m < c.rows; ++m) {
      for (int64_t n = 0; n < 16; ++n) {
        Sum sum;
        memcpy(&sum, c.bytes[m] + 4 * n, 4);
        for (int64_t k = 0; k < b.rows; ++k) {
          A x[4 / sizeof(A)];
          B y[4 / sizeof(B)];
          memcpy(x, a.bytes[m] + 4 * k, 4);
          memcpy(y, b.bytes[k] + 4 * n, 4);
          sum = dot(sum, x, y);
        }
        memcpy(c.bytes[m] + 4 * n, &sum, 4);
      }
    }
  }
};

}  // namespace
}  // namespace distaff

#define DISTAFF_HAS_MATRIX_UNIT
#include "matmul_kernels.h"
#include "roofline_kernels.h"

namespace distaff {
extern const MatmulKernels kMatmulMatrixUnit;
extern const RooflineKernels kRooflineMatrixUnit;
const MatmulKernels kMatmulMatrixUnit = kMatmul;
const RooflineKernels kRooflineMatrixUnit = kRoofline;
}  // namespace distaff
