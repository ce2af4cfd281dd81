// Sixteen lanes in two AVX2 registers; FMA and F16C as well.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace distaff {
namespace {

struct Simd {
  struct F {  // 16 float32
    __m256 low, high;
  };
  struct I {  // 16 int32, or what else 64 bytes hold
    __m256i low, high;
  };

  // The largest tile of a product that stays in registers: rows x panels of 16 columns.
  static constexpr int kRows = 6, kPanels = 1;
  static constexpr bool kHasDot2 = false;  // whether dot_2 is one instruction

  static F zero() { return all(0); }
  static F all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static F load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static F load_first(const float* from, int64_t count, float rest = 0) {
    float padded[16];
    store(padded, all(rest));
    __builtin_memcpy(padded, from, count * sizeof(float));
    return load(padded);
  }
  static F load(const uint16_t* from) { return {bf16(from), bf16(from + 8)}; }
  static F load(const int8_t* from) {
    const __m128i bytes = load_128(from);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  static F load_half(const uint16_t* from) {
    return {_mm256_cvtph_ps(load_128(from)), _mm256_cvtph_ps(load_128(from + 8))};
  }
  static void store(float* to, F a) {
    _mm256_storeu_ps(to, a.low);
    _mm256_storeu_ps(to + 8, a.high);
  }
  static void store_first(float* to, F a, int64_t count) {
    float padded[16];
    store(padded, a);
    __builtin_memcpy(to, padded, count * sizeof(float));
  }
  static void store(uint16_t* to, F a) {
    const __m256i packed = _mm256_packus_epi32(rounded(a.low), rounded(a.high));  // packs within halves
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0b11011000));
  }
  // 32 bfloat16 in the order of memory.
  static I to_bfloat16(F first, F second) {
    uint16_t values[32];
    store(values, first);
    store(values + 16, second);
    return load_64(values);
  }
  static void store_int8(int8_t* to, I a) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0b11011000);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  }

  static F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
  static F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
  static F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  static F abs(F a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
  }
  static F fma(F a, F b, F c) {  // a * b + c
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static F power_of_two(F a) {  // the largest up to a, which is positive
    const __m256 exponent = _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000));
    return {_mm256_and_ps(a.low, exponent), _mm256_and_ps(a.high, exponent)};
  }
  static F with_sign_of(F a, F sign) {  // of an `a` that is not negative
    const __m256 mask = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(a.low, _mm256_and_ps(sign.low, mask)), _mm256_or_ps(a.high, _mm256_and_ps(sign.high, mask))};
  }
  static float sum(F a) {
    const __m256 both = _mm256_add_ps(a.low, a.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  static float largest(F a) {
    const __m256 both = _mm256_max_ps(a.low, a.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }

  // Of every four lanes, the sums over a, over b, over c and over d.
  static F sum_fours(F a, F b, F c, F d) {
    const auto sum = [](__m256 w, __m256 x, __m256 y, __m256 z) {
      return _mm256_hadd_ps(_mm256_hadd_ps(w, x), _mm256_hadd_ps(y, z));
    };
    return {sum(a.low, b.low, c.low, d.low), sum(a.high, b.high, c.high, d.high)};
  }
  // The sum of the quarters of a, of b, of c and of d.
  static F sum_quarters(F a, F b, F c, F d) {
    const auto pair = [](F x, F y) {
      const __m256 p = _mm256_add_ps(x.low, x.high), q = _mm256_add_ps(y.low, y.high);
      return _mm256_add_ps(_mm256_permute2f128_ps(p, q, 0x20), _mm256_permute2f128_ps(p, q, 0x31));
    };
    return {pair(a, b), pair(c, d)};
  }
  // Lane i of the result is the sum of all lanes of vectors[i], of 16.
  static F sum_each(const F* vectors) {
    const auto eight = [](const F* v) {
      const auto four = [v](int i) {
        const auto both = [v](int j) { return _mm256_add_ps(v[j].low, v[j].high); };
        return _mm256_hadd_ps(_mm256_hadd_ps(both(i), both(i + 1)), _mm256_hadd_ps(both(i + 2), both(i + 3)));
      };
      const __m256 a = four(0), b = four(4);
      return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    };
    return {eight(vectors), eight(vectors + 8)};
  }
  static F largest_each(const F* vectors) {  // likewise
    float all[16];
    for (int i = 0; i < 16; ++i) all[i] = largest(vectors[i]);
    return load(all);
  }
  static F lane_numbers() {
    return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15)};
  }
  // Bit i says whether lane i of a is at least b's; or not a number.
  static uint32_t at_least(F a, F b) {
    return bits(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ));
  }
  static uint32_t unordered(F a) {
    return bits(_mm256_cmp_ps(a.low, a.low, _CMP_UNORD_Q), _mm256_cmp_ps(a.high, a.high, _CMP_UNORD_Q));
  }
  // Lanes of a whose bit is set, and `rest` in the others.
  static F choose(uint32_t bits, F a, F rest) {
    const auto half = [bits](__m256 x, __m256 other, __m256i bit) {
      const __m256i mask = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(bits)), bit), bit);
      return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(mask));
    };
    const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return {half(a.low, rest.low, low), half(a.high, rest.high, _mm256_slli_epi32(low, 8))};
  }

  static I int_zero() { return int_all(0); }
  static I int_all(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
  static I int_add(I a, I b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
  static int32_t int_sum(I a) {
    const __m256i both = _mm256_add_epi32(a.low, a.high);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0b01001110));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0b10110001)));
  }
  static F as_floats(I a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }  // the same bits
  static F to_float(I a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
  static I nearest(F a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }  // |a| < 2^22
  static F times_power_of_two(F a, I n) {
    const auto scale = [](__m256 x, __m256i by) {
      return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(by, 23)));
    };
    return {scale(a.low, n.low), scale(a.high, n.high)};
  }

  // x - floor(x), from 0 to 1; 0 of minus infinity.
  static F above_floor(F x) {
    x = max(x, all(-127.0f));
    return {_mm256_sub_ps(x.low, _mm256_floor_ps(x.low)), _mm256_sub_ps(x.high, _mm256_floor_ps(x.high))};
  }
  // a 2^floor(x), or something below 2^-126 where that is less, for a from 1 to 2.
  static F times_two_to(F a, F x) {
    x = max(x, all(-127.0f));
    const auto power = [](__m256 of) {
      const __m256i n = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(of)), _mm256_set1_epi32(127));
      return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
    };
    return {_mm256_mul_ps(a.low, power(x.low)), _mm256_mul_ps(a.high, power(x.high))};
  }

  // Column j of 16 rows of 16 words becomes row j, `stride` words further.
  static void store_transposed(I* rows, float* to, int64_t stride) {
    float words[16 * 16];
    for (int i = 0; i < 16; ++i) store_64(words + 16 * i, rows[i]);
    for (int j = 0; j < 16; ++j) {
      for (int i = 0; i < 16; ++i) to[j * stride + i] = words[16 * i + j];
    }
  }
  // Words of the 16-bit numbers of a and b in turns: those of the lower and of the upper half of every 16 bytes.
  static I interleave_low(I a, I b) {
    return {_mm256_unpacklo_epi16(a.low, b.low), _mm256_unpacklo_epi16(a.high, b.high)};
  }
  static I interleave_high(I a, I b) {
    return {_mm256_unpackhi_epi16(a.low, b.low), _mm256_unpackhi_epi16(a.high, b.high)};
  }
  // From words in the order of those to 16 and 16 in the order of memory.
  static void store_interleaved(float* first, float* second, F low, F high) {
    const auto put = [](float* to, __m256 a, __m256 b) {
      _mm256_storeu_ps(to, _mm256_permute2f128_ps(a, b, 0x20));
      _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(a, b, 0x31));
    };
    put(first, low.low, high.low);
    put(second, low.high, high.high);
  }

  static I load_64(const void* from) {
    const auto* halves = static_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  static I repeat_4(const void* from) {
    int32_t value;
    __builtin_memcpy(&value, from, 4);
    return int_all(value);
  }
  static void store_64(void* to, I a) {
    auto* halves = static_cast<__m256i*>(to);
    _mm256_storeu_si256(halves, a.low);
    _mm256_storeu_si256(halves + 1, a.high);
  }
  static I flip_signs(I a) {  // of bytes: int8 + 128
    const __m256i sign = _mm256_set1_epi8(-128);
    return {_mm256_xor_si256(a.low, sign), _mm256_xor_si256(a.high, sign)};
  }
  static I low_nibbles(I a) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(a.low, mask), _mm256_and_si256(a.high, mask)};
  }
  static I high_nibbles(I a) { return low_nibbles({_mm256_srli_epi16(a.low, 4), _mm256_srli_epi16(a.high, 4)}); }
  template <int kByte>
  static F unsigned_byte(I a) {
    const __m256i mask = _mm256_set1_epi32(255);
    return to_float({_mm256_and_si256(_mm256_srli_epi32(a.low, 8 * kByte), mask),
                     _mm256_and_si256(_mm256_srli_epi32(a.high, 8 * kByte), mask)});
  }

  // acc[j] += w[2j] x[2j] + w[2j+1] x[2j+1], bfloat16.
  static F dot_2(F acc, I w, I x) { return fma(odd(w), odd(x), fma(even(w), even(x), acc)); }

  // acc[j] += the sum over four bytes of w (unsigned) * x (signed); in 16 bits, where nothing saturates.
  static I dot_4(I acc, I w, I x) {
    const auto dot = [](__m256i sum, __m256i u, __m256i s) {
      const __m256i even_s = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8);
      const __m256i evens = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)), even_s);
      const __m256i odds = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
      return _mm256_add_epi32(sum, _mm256_add_epi32(evens, odds));
    };
    return {dot(acc.low, w.low, x.low), dot(acc.high, w.high, x.high)};
  }

  // acc[j] += w[2j] x[2j] + w[2j+1] x[2j+1], int16.
  static I dot_int16(I acc, I w, I x) {
    return {_mm256_add_epi32(acc.low, _mm256_madd_epi16(w.low, x.low)),
            _mm256_add_epi32(acc.high, _mm256_madd_epi16(w.high, x.high))};
  }
  // 32 int8 as int16.
  static I load_widened(const int8_t* from) {
    return {_mm256_cvtepi8_epi16(load_128(from)), _mm256_cvtepi8_epi16(load_128(from + 16))};
  }

  // Into the second cache; from anywhere. (GCC drops calls of a function that only prefetches.)
  __attribute__((always_inline)) static void prefetch(const void* from) {
    _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1);
  }
  // What is read for a while and never again; it leaves what else is in the second cache.
  __attribute__((always_inline)) static void prefetch_once(const void* from) {
    _mm_prefetch(static_cast<const char*>(from), _MM_HINT_NTA);
  }
  // Into the first cache.
  __attribute__((always_inline)) static void prefetch_near(const void* from) {
    _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0);
  }

 private:
  static uint32_t bits(__m256 low, __m256 high) {
    return static_cast<uint32_t>(_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8);
  }
  static __m128i load_128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  static __m256 bf16(const uint16_t* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(from)), 16));
  }
  static __m256i rounded(__m256 a) {  // to bfloat16, nearest or even
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff))), 16);
  }
  static F even(I a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(a.low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a.high, 16))};
  }
  static F odd(I a) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(a.low, mask)), _mm256_castsi256_ps(_mm256_and_si256(a.high, mask))};
  }
};

}  // namespace
}  // namespace distaff
