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
  static constexpr bool kHasDot2 = false;  // whether dot_2 is one instruction

  static F zero() { return all(0); }
  static F all(float value) {
    return each([value](int) { return Floats{value, value, value, value}; });
  }
  static F load(const float* from) {
    F a;
    __builtin_memcpy(&a, from, sizeof a);
    return a;
  }
  static F load_first(const float* from, int64_t count, float rest = 0) {
    F a = all(rest);
    __builtin_memcpy(&a, from, count * sizeof(float));
    return a;
  }
  static F load(const uint16_t* from) {
    return each([from](int i) {
      const uint16_t* a = from + 4 * i;
      return (Floats)(Words{a[0], a[1], a[2], a[3]} << 16);
    });
  }
  static F load(const int8_t* from) {
    return each([from](int i) {
      const int8_t* a = from + 4 * i;
      return __builtin_convertvector((Ints{a[0], a[1], a[2], a[3]}), Floats);
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
  static void store(uint16_t* to, F a) {
    for (int i = 0; i < 16; ++i) {
      const Words bits = (Words)a.part[i / 4];
      to[i] = static_cast<uint16_t>((bits[i % 4] + 0x7fff + (bits[i % 4] >> 16 & 1)) >> 16);
    }
  }
  // 32 bfloat16 in the order of memory.
  static I to_bfloat16(F first, F second) {
    uint16_t values[32];
    store(values, first);
    store(values + 16, second);
    return load_64(values);
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
  static F power_of_two(F a) {  // the largest up to a, which is positive
    return each([&](int i) { return (Floats)((Words)a.part[i] & 0x7f800000u); });
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

  // Of every four lanes, the sums over a, over b, over c and over d.
  static F sum_fours(F a, F b, F c, F d) {
    const auto sum = [](Floats x) { return x[0] + x[2] + (x[1] + x[3]); };
    return each([&](int i) { return Floats{sum(a.part[i]), sum(b.part[i]), sum(c.part[i]), sum(d.part[i])}; });
  }
  // The sum of the quarters of a, of b, of c and of d.
  static F sum_quarters(F a, F b, F c, F d) {
    const auto sum = [](const F& x) { return x.part[0] + x.part[1] + (x.part[2] + x.part[3]); };
    return {{sum(a), sum(b), sum(c), sum(d)}};
  }
  // Lane i of the result is the sum of all lanes of vectors[i], of 16.
  static F sum_each(const F* vectors) {
    F a;
    for (int i = 0; i < 16; ++i) a.part[i / 4][i % 4] = sum(vectors[i]);
    return a;
  }
  static F largest_each(const F* vectors) {  // likewise
    F a;
    for (int i = 0; i < 16; ++i) a.part[i / 4][i % 4] = largest(vectors[i]);
    return a;
  }
  static F lane_numbers() {
    return each([](int i) { return Floats{0, 1, 2, 3} + static_cast<float>(4 * i); });
  }
  // Bit i says whether lane i of a is at least b's; or not a number.
  static uint32_t at_least(F a, F b) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= uint32_t{a.part[i / 4][i % 4] >= b.part[i / 4][i % 4]} << i;
    return bits;
  }
  static uint32_t unordered(F a) { return ~at_least(a, a) & 0xffffu; }
  // Lanes of a whose bit is set, and `rest` in the others.
  static F choose(uint32_t bits, F a, F rest) {
    return each([&](int i) {
      const Words bit = Words{1, 2, 4, 8} << (4 * i);
      return (bits & bit) != 0 ? a.part[i] : rest.part[i];
    });
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
  static F as_floats(I a) {  // the same bits
    return each([&](int i) { return (Floats)a.part[i]; });
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

  // x - floor(x), from 0 to 1; 0 of minus infinity.
  static F above_floor(F x) {
    x = max(x, all(-127.0f));
    return sub(x, to_float(floor(x)));
  }
  // a 2^floor(x), or something below 2^-126 where that is less, for a from 1 to 2.
  static F times_two_to(F a, F x) {
    const I n = floor(max(x, all(-127.0f)));
    return each([&](int i) { return a.part[i] * (Floats)((n.part[i] + 127) << 23); });
  }

  // Column j of 16 rows of 16 words becomes row j, `stride` words further.
  static void store_transposed(I* rows, float* to, int64_t stride) {
    for (int j = 0; j < 16; ++j) {
      for (int i = 0; i < 16; ++i) __builtin_memcpy(to + j * stride + i, &rows[i].part[j / 4][j % 4], sizeof(float));
    }
  }
  // Words of the 16-bit numbers of a and b in turns: those of the lower and of the upper half of every 16 bytes.
  static I interleave_low(I a, I b) {
    return each_int([&](int i) { return in_turns(a.part[i], b.part[i], 0); });
  }
  static I interleave_high(I a, I b) {
    return each_int([&](int i) { return in_turns(a.part[i], b.part[i], 2); });
  }
  // From words in the order of those to 16 and 16 in the order of memory.
  static void store_interleaved(float* first, float* second, F low, F high) {
    for (int i = 0; i < 4; ++i) {
      float* to = (i < 2 ? first : second) + i % 2 * 8;
      __builtin_memcpy(to, &low.part[i], sizeof(Floats));
      __builtin_memcpy(to + 4, &high.part[i], sizeof(Floats));
    }
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
  static void store_64(void* to, I a) { __builtin_memcpy(to, &a, sizeof a); }
  static I flip_signs(I a) {  // of bytes: int8 + 128
    return each_int([&](int i) { return (Ints)((Words)a.part[i] ^ 0x80808080u); });
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

  // acc[j] += w[2j] x[2j] + w[2j+1] x[2j+1], int16.
  static I dot_int16(I acc, I w, I x) {
    return each_int([&](int i) {
      const Ints u = w.part[i], v = x.part[i];
      return acc.part[i] + (u << 16 >> 16) * (v << 16 >> 16) + (u >> 16) * (v >> 16);
    });
  }
  // 32 int8 as int16.
  static I load_widened(const int8_t* from) {
    int16_t values[32];
    for (int i = 0; i < 32; ++i) values[i] = from[i];
    return load_64(values);
  }

  __attribute__((always_inline)) static void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }
  __attribute__((always_inline)) static void prefetch_once(const void* from) { __builtin_prefetch(from, 0, 0); }
  __attribute__((always_inline)) static void prefetch_near(const void* from) { __builtin_prefetch(from, 0, 3); }

 private:
  static I floor(F x) {
    return each_int([&](int i) {
      const Ints n = __builtin_convertvector(x.part[i], Ints);
      return n + (Ints)(__builtin_convertvector(n, Floats) > x.part[i]);  // a comparison is 0 or -1
    });
  }
  static Ints in_turns(Ints a, Ints b, int first) {
    const auto word = [&](int i) {
      const uint32_t x = static_cast<uint32_t>(a[first + i / 2]), y = static_cast<uint32_t>(b[first + i / 2]);
      return static_cast<int32_t>(i % 2 == 0 ? (x & 0xffffu) | y << 16 : x >> 16 | (y & 0xffff0000u));
    };
    return Ints{word(0), word(1), word(2), word(3)};
  }
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
