// Sixteen lanes in one AVX-512 register. What VNNI and BF16 add is used where the file that includes this is compiled
// for them, and imitated exactly otherwise.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace distaff {
namespace {

struct Simd {
  using F = __m512;   // 16 float32
  using I = __m512i;  // 16 int32, or what else 64 bytes hold

  // The largest tile of a product that stays in registers: rows x panels of 16 columns.
  static constexpr int kRows = 6, kPanels = 4;
  // Whether dot_2 is one instruction.
#ifdef __AVX512BF16__
  static constexpr bool kHasDot2 = true;
#else
  static constexpr bool kHasDot2 = false;
#endif

  static F zero() { return _mm512_setzero_ps(); }
  static F all(float value) { return _mm512_set1_ps(value); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static F load_first(const float* from, int64_t count, float rest = 0) {
    return _mm512_mask_loadu_ps(all(rest), first(count), from);
  }
  static F load(const uint16_t* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(from)), 16));
  }
  static F load(const int8_t* from) {
    return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static F load_half(const uint16_t* from) { return _mm512_cvtph_ps(load_256(from)); }
  static void store(float* to, F a) { _mm512_storeu_ps(to, a); }
  static void store_first(float* to, F a, int64_t count) { _mm512_mask_storeu_ps(to, first(count), a); }
  static void store(uint16_t* to, F a) {
#ifdef __AVX512BF16__
    store_256(to, (__m256i)_mm512_cvtneps_pbh(a));
#else
    const I bits = _mm512_castps_si512(a);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    store_256(to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
  }
  // 32 bfloat16 in the order of memory.
  static I to_bfloat16(F first, F second) {
#ifdef __AVX512BF16__
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
#else
    uint16_t values[32];
    store(values, first);
    store(values + 16, second);
    return load_64(values);
#endif
  }
  static void store_int8(int8_t* to, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a));
  }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
  static F power_of_two(F a) {  // the largest up to a, which is positive
    return _mm512_and_ps(a, _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000)));
  }
  static F with_sign_of(F a, F sign) {
    return _mm512_or_ps(a, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));  // of an `a` that is not negative
  }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float largest(F a) { return _mm512_reduce_max_ps(a); }

  // Of every four lanes, the sums over a, over b, over c and over d.
  static F sum_fours(F a, F b, F c, F d) {
    const auto halves = [](F x, F y) { return add(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)); };
    const __m512d ab = _mm512_castps_pd(halves(a, b)), cd = _mm512_castps_pd(halves(c, d));
    return add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  // The sum of the quarters of a, of b, of c and of d.
  static F sum_quarters(F a, F b, F c, F d) {
    const auto pairs = [](F x, F y) { return add(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD)); };
    return pairs(pairs(a, b), pairs(c, d));
  }
  // Lane i of the result is the sum, or the largest, of all lanes of vectors[i], of 16.
  static F sum_each(const F* vectors) { return each(vectors, add); }
  static F largest_each(const F* vectors) { return each(vectors, max); }
  static F lane_numbers() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  // Bit i says whether lane i of a is at least b's; or not a number.
  static uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static uint32_t unordered(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  // Lanes of a whose bit is set, and `rest` in the others.
  static F choose(uint32_t bits, F a, F rest) { return _mm512_mask_mov_ps(rest, static_cast<__mmask16>(bits), a); }

  static I int_zero() { return _mm512_setzero_si512(); }
  static I int_all(int32_t value) { return _mm512_set1_epi32(value); }
  static I int_add(I a, I b) { return _mm512_add_epi32(a, b); }
  static int32_t int_sum(I a) { return _mm512_reduce_add_epi32(a); }
  static F as_floats(I a) { return _mm512_castsi512_ps(a); }  // the same bits
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I nearest(F a) { return _mm512_cvtps_epi32(a); }  // |a| < 2^22
  static F times_power_of_two(F a, I n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(n, 23)));
  }

  // x - floor(x), from 0 to 1; 0 of minus infinity.
  static F above_floor(F x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  // a 2^floor(x), or something below 2^-126 where that is less, for a from 1 to 2.
  static F times_two_to(F a, F x) { return _mm512_scalef_ps(a, x); }

  // Column j of 16 rows of 16 words becomes row j, `stride` words further.
  static void store_transposed(I* r, float* to, int64_t stride) {
    I t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Each 128-bit lane of r[4 i + j] now has column 4 lane + j of rows 4 i … 4 i + 3.
    const auto put = [&](int j, I a) { _mm512_storeu_si512(to + j * stride, a); };
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const I a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD);
      const I c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
      put(j, _mm512_shuffle_i32x4(a, c, 0x88));
      put(8 + j, _mm512_shuffle_i32x4(a, c, 0xDD));
      put(4 + j, _mm512_shuffle_i32x4(b, d, 0x88));
      put(12 + j, _mm512_shuffle_i32x4(b, d, 0xDD));
    }
  }
  // Words of the 16-bit numbers of a and b in turns: those of the lower and of the upper half of every 16 bytes.
  static I interleave_low(I a, I b) { return _mm512_unpacklo_epi16(a, b); }
  static I interleave_high(I a, I b) { return _mm512_unpackhi_epi16(a, b); }
  // From words in the order of those to 16 and 16 in the order of memory.
  static void store_interleaved(float* first, float* second, F low, F high) {
    const I order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    store(first, _mm512_permutex2var_ps(low, order, high));
    store(second, _mm512_permutex2var_ps(low, _mm512_add_epi32(order, int_all(8)), high));
  }

  static I load_64(const void* from) { return _mm512_loadu_si512(from); }
  static I repeat_4(const void* from) {
    int32_t value;
    __builtin_memcpy(&value, from, 4);
    return _mm512_set1_epi32(value);
  }
  static void store_64(void* to, I a) { _mm512_storeu_si512(to, a); }
  static I flip_signs(I a) { return _mm512_xor_si512(a, _mm512_set1_epi8(-128)); }  // of bytes: int8 + 128
  static I low_nibbles(I a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
  static I high_nibbles(I a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
  template <int kByte>
  static F unsigned_byte(I a) {
    return to_float(_mm512_and_si512(_mm512_srli_epi32(a, 8 * kByte), _mm512_set1_epi32(255)));
  }

  // acc[j] += w[2j] x[2j] + w[2j+1] x[2j+1], bfloat16.
  static F dot_2(F acc, I w, I x) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
#else
    const I high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
    const auto even = [](I a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); };
    const auto odd = [high](I a) { return _mm512_castsi512_ps(_mm512_and_si512(a, high)); };
    return fma(odd(w), odd(x), fma(even(w), even(x), acc));
#endif
  }

  // acc[j] += the sum over four bytes of w (unsigned) * x (signed).
  static I dot_4(I acc, I w, I x) {
#ifdef __AVX512VNNI__
    // Not _mm512_dpbusd_epi32: GCC 12 copies the sums of a large tile to memory and back around it.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
#else
    const I even_w = _mm512_and_si512(w, _mm512_set1_epi16(255));
    const I even_x = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8);
    const I even = _mm512_madd_epi16(even_w, even_x);
    const I odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
    return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
#endif
  }

  // acc[j] += w[2j] x[2j] + w[2j+1] x[2j+1], int16.
  static I dot_int16(I acc, I w, I x) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(acc, w, x);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(w, x));
#endif
  }
  // 32 int8 as int16.
  static I load_widened(const int8_t* from) { return _mm512_cvtepi8_epi16(load_256(from)); }

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
  // One lane for every 16 vectors, joined pair by pair.
  template <typename Join>
  static F each(const F* vectors, Join join) {
    const auto pairs = [join](F a, F b) {  // of the lanes of a, then of b
      const I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      return join(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, _mm512_add_epi32(even, int_all(1)), b));
    };
    F joined[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) joined[i] = pairs(vectors[2 * i], vectors[2 * i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) joined[i] = pairs(joined[2 * i], joined[2 * i + 1]);
    return pairs(pairs(joined[0], joined[1]), pairs(joined[2], joined[3]));
  }
  static __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
  static __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static void store_256(void* to, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a); }
};

}  // namespace
}  // namespace distaff
