// Sixteen lanes as plain C++ over the compiler's 16-byte vectors, which are registers on every 64-bit processor (NEON,
// SSE2).
#pragma once

#include <cstdint>

namespace distaff {
namespace {

struct Simd {
  using Floats = float __attribute__((vector_size(16)));
  using Ints = int32_t __attribute__((vector_size(16)));
  using Words = uint32_t __attribute__((vector_size(16)));

  struct F {  // 16 float32
    Floats part[4];
  };
  struct I {  // 16 int32, or what else 64 bytes hold
    Ints part[4];
  };

  // The largest tile of a product that stays in registers: rows x panels of 16 columns.
  static constexpr int kRows = 4, kPanels = 1;

  static F zero() { return all(0); }
  static F all(float value) {
    return each([value](int) { return Floats{value, value, value, value}; });
  }
  static F load(const float* from) {
    F a;
    __builtin_memcpy(&a, from, sizeof a);
    return a;
  }
  static F load_first(const float* from, int64_t count) {
    F a = zero();
    __builtin_memcpy(&a, from, count * sizeof(float));
    return a;
  }
  static F load_bf16(const uint16_t* from) {
    return each([from](int i) {
      const uint16_t* a = from + 4 * i;
      return (Floats)(Words{a[0], a[1], a[2], a[3]} << 16);
    });
  }
  static F load_half(const uint16_t* from) {  // finite; without subnormal float32, which XLA's threads take for zero
    return each([from](int i) {
      const uint16_t* a = from + 4 * i;
      const Words bits{a[0], a[1], a[2], a[3]};
      const Words size = bits & 0x7fffu;
      const Floats normal = (Floats)((size << 13) + (112u << 23));
      const Floats subnormal = __builtin_convertvector((Ints)size, Floats) * 0x1p-24f;
      return (Floats)((Words)(size < 0x400u ? subnormal : normal) | (bits & 0x8000u) << 16);
    });
  }
  static void store(float* to, F a) { __builtin_memcpy(to, &a, sizeof a); }
  static void store_first(float* to, F a, int64_t count) { __builtin_memcpy(to, &a, count * sizeof(float)); }
  static void store_bf16(uint16_t* to, F a) {
    for (int i = 0; i < 16; ++i) {
      const Words bits = (Words)a.part[i / 4];
      to[i] = static_cast<uint16_t>((bits[i % 4] + 0x7fff + (bits[i % 4] >> 16 & 1)) >> 16);
    }
  }
  static void store_int8(int8_t* to, I a) {
    for (int i = 0; i < 16; ++i) to[i] = static_cast<int8_t>(a.part[i / 4][i % 4]);
  }

  static F add(F a, F b) {
    return each([&](int i) { return a.part[i] + b.part[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.part[i] - b.part[i]; });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.part[i] * b.part[i]; });
  }
  static F div(F a, F b) {
    return each([&](int i) { return a.part[i] / b.part[i]; });
  }
  static F min(F a, F b) {
    return each([&](int i) { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
  }
  static F max(F a, F b) {
    return each([&](int i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
  }
  static F abs(F a) {
    return each([&](int i) { return (Floats)((Words)a.part[i] & 0x7fffffffu); });
  }
  static F fma(F a, F b, F c) {  // a * b + c
    return each([&](int i) { return a.part[i] * b.part[i] + c.part[i]; });
  }
  static F with_sign_of(F a, F sign) {  // of an `a` that is not negative
    return each([&](int i) { return (Floats)((Words)a.part[i] | ((Words)sign.part[i] & 0x80000000u)); });
  }
  static float sum(F a) {
    const Floats four = a.part[0] + a.part[1] + (a.part[2] + a.part[3]);
    return four[0] + four[1] + (four[2] + four[3]);
  }
  static float largest(F a) {
    float found = a.part[0][0];
    for (int i = 1; i < 16; ++i) found = a.part[i / 4][i % 4] > found ? a.part[i / 4][i % 4] : found;
    return found;
  }

  static I int_zero() { return int_all(0); }
  static I int_all(int32_t value) {
    return each_int([value](int) { return Ints{value, value, value, value}; });
  }
  static I int_add(I a, I b) {
    return each_int([&](int i) { return a.part[i] + b.part[i]; });
  }
  static int32_t int_sum(I a) {
    const Ints four = a.part[0] + a.part[1] + (a.part[2] + a.part[3]);
    return four[0] + four[1] + (four[2] + four[3]);
  }
  static F to_float(I a) {
    return each([&](int i) { return __builtin_convertvector(a.part[i], Floats); });
  }
  static I nearest(F a) {  // |a| < 2^22; adding this number leaves the rounded integer in the low bits
    return each_int([&](int i) { return (Ints)(a.part[i] + 12582912.0f) - (Ints)(Floats{} + 12582912.0f); });
  }
  static F times_power_of_two(F a, I n) {
    return each([&](int i) { return (Floats)((Words)a.part[i] + ((Words)n.part[i] << 23)); });
  }

  static I load_64(const void* from) {
    I a;
    __builtin_memcpy(&a, from, sizeof a);
    return a;
  }
  static I repeat_4(const void* from) {
    int32_t value;
    __builtin_memcpy(&value, from, 4);
    return int_all(value);
  }
  static I low_nibbles(I a) {
    return each_int([&](int i) { return a.part[i] & 0x0f0f0f0f; });
  }
  static I high_nibbles(I a) {
    return each_int([&](int i) { return (a.part[i] >> 4) & 0x0f0f0f0f; });
  }
  template <int kByte>
  static F unsigned_byte(I a) {
    return each([&](int i) { return __builtin_convertvector((a.part[i] >> 8 * kByte) & 255, Floats); });
  }

  // acc[j] += w[2j] x[2j] + w[2j+1] x[2j+1], bfloat16.
  static F dot_2(F acc, I w, I x) {
    return each([&](int i) {
      const Words u = (Words)w.part[i], v = (Words)x.part[i];
      const Floats even = (Floats)(u << 16) * (Floats)(v << 16);
      return acc.part[i] + even + (Floats)(u & 0xffff0000u) * (Floats)(v & 0xffff0000u);
    });
  }

  // acc[j] += the sum over four bytes of w (unsigned) * x (signed).
  static I dot_4(I acc, I w, I x) {
    return each_int([&](int i) {
      const Words u = (Words)w.part[i], s = (Words)x.part[i];
      Ints sum = acc.part[i];
      sum += (Ints)(u & 255u) * ((Ints)(s << 24) >> 24);
      sum += (Ints)(u >> 8 & 255u) * ((Ints)(s << 16) >> 24);
      sum += (Ints)(u >> 16 & 255u) * ((Ints)(s << 8) >> 24);
      return sum + (Ints)(u >> 24) * ((Ints)s >> 24);
    });
  }

  __attribute__((always_inline)) static void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }

 private:
  template <typename Part>
  static F each(Part part) {
    return {{part(0), part(1), part(2), part(3)}};
  }
  template <typename Part>
  static I each_int(Part part) {
    return {{part(0), part(1), part(2), part(3)}};
  }
};

}  // namespace
}  // namespace distaff
