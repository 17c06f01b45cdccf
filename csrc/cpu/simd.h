// Sixteen lanes, whatever the processor: the only place where instruction sets differ.
//
// F is 16 floats, I is 16 int32, Q is 64 bytes: for each of 16 lanes, four unsigned codes. Every operation gives the
// same bits on every instruction set, so kernels written with them do too. A file that includes this is compiled once
// for each instruction set, with OCTAVO_ISA naming the namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define OCTAVO_INLINE inline __attribute__((always_inline))

namespace octavo {

// Half precision without hardware help (formats.cpp).
float float_of_half(uint16_t half);
uint16_t half_of_float(float value);

}  // namespace octavo

namespace octavo::OCTAVO_ISA {

constexpr int kLanes = 16;
constexpr int kFour = 4;  // vectors whose lanes are summed, or compared, at once

// Calls body(0), body(1), ... body(N - 1) with the index as a constant, so that an array it indexes can live in
// registers.
template <std::size_t N, class Body>
OCTAVO_INLINE void unroll(const Body& body) {
  [&]<std::size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
    (body(std::integral_constant<std::size_t, I>{}), ...);
  }(std::make_index_sequence<N>{});
}
#define OCTAVO_EACH(index) [&](auto index) __attribute__((always_inline))

#if defined(__AVX2__)
OCTAVO_INLINE float sum_of_eight(__m256 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
OCTAVO_INLINE float highest_of_eight(__m256 a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
// result[i]: what op makes of all lanes of a[i].
template <class Op>
OCTAVO_INLINE void across_four(const __m256i* a, const Op& op, int32_t* result) {
  const __m256i ab = op(_mm256_unpacklo_epi32(a[0], a[1]), _mm256_unpackhi_epi32(a[0], a[1]));
  const __m256i cd = op(_mm256_unpacklo_epi32(a[2], a[3]), _mm256_unpackhi_epi32(a[2], a[3]));
  const __m256i abcd = op(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  const __m256i all = op(abcd, _mm256_permute2x128_si256(abcd, abcd, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(result), _mm256_castsi256_si128(all));
}
// The same of floats.
template <class Op>
OCTAVO_INLINE void across_four(const __m256* a, const Op& op, float* result) {
  const __m256i bits[kFour] = {_mm256_castps_si256(a[0]), _mm256_castps_si256(a[1]), _mm256_castps_si256(a[2]),
                               _mm256_castps_si256(a[3])};
  const auto of_bits = [&](__m256i x, __m256i y) __attribute__((always_inline)) {
    return _mm256_castps_si256(op(_mm256_castsi256_ps(x), _mm256_castsi256_ps(y)));
  };
  int32_t found[kFour];
  across_four(bits, of_bits, found);
  std::memcpy(result, found, sizeof found);
}
#endif

#if defined(__AVX512F__)

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};
struct Q {
  __m512i v;
};

OCTAVO_INLINE F zero() { return {_mm512_setzero_ps()}; }
OCTAVO_INLINE F set1(float x) { return {_mm512_set1_ps(x)}; }
OCTAVO_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
OCTAVO_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
OCTAVO_INLINE __m256 upper_half(__m512 a) { return _mm512_extractf32x8_ps(a, 1); }
OCTAVO_INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
OCTAVO_INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
OCTAVO_INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
OCTAVO_INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
OCTAVO_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
OCTAVO_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
OCTAVO_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
OCTAVO_INLINE F abs(F a) { return {_mm512_abs_ps(a.v)}; }
OCTAVO_INLINE F round(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a where x < y, else b.
OCTAVO_INLINE F select_less(F x, F y, F a, F b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)};
}
OCTAVO_INLINE I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest, ties to even
OCTAVO_INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
OCTAVO_INLINE I set1i(int32_t x) { return {_mm512_set1_epi32(x)}; }
OCTAVO_INLINE I addi(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
OCTAVO_INLINE I subi(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
OCTAVO_INLINE I maxi(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
// Sum of the lanes by a fixed tree: lane i with lane i + 8, then + 4, + 2, + 1.
OCTAVO_INLINE float sum_of(F a) { return sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(a.v), upper_half(a.v))); }
OCTAVO_INLINE float highest_of(F a) {  // none may be NaN
  return highest_of_eight(_mm256_max_ps(_mm512_castps512_ps256(a.v), upper_half(a.v)));
}
OCTAVO_INLINE void sum_of_four(const I* a, int32_t* sums) {
  __m256i halves[kFour];
  for (int i = 0; i < kFour; ++i) {
    halves[i] = _mm256_add_epi32(_mm512_castsi512_si256(a[i].v), _mm512_extracti64x4_epi64(a[i].v, 1));
  }
  across_four(halves, [](__m256i x, __m256i y) { return _mm256_add_epi32(x, y); }, sums);
}
// Of four vectors at once, by another tree: lane i with lane i + 8, then + 2, + 1, + 4.
OCTAVO_INLINE void sum_of_four(const F* a, float* sums) {
  __m256 halves[kFour];
  for (int i = 0; i < kFour; ++i) halves[i] = _mm256_add_ps(_mm512_castps512_ps256(a[i].v), upper_half(a[i].v));
  across_four(halves, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); }, sums);
}
OCTAVO_INLINE void highest_of_four(const F* a, float* tops) {  // none may be NaN
  __m256 halves[kFour];
  for (int i = 0; i < kFour; ++i) halves[i] = _mm256_max_ps(_mm512_castps512_ps256(a[i].v), upper_half(a[i].v));
  across_four(halves, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); }, tops);
}
OCTAVO_INLINE void highest_of_four(const I* a, int32_t* tops) {
  __m256i halves[kFour];
  for (int i = 0; i < kFour; ++i) {
    halves[i] = _mm256_max_epi32(_mm512_castsi512_si256(a[i].v), _mm512_extracti64x4_epi64(a[i].v, 1));
  }
  across_four(halves, [](__m256i x, __m256i y) { return _mm256_max_epi32(x, y); }, tops);
}
OCTAVO_INLINE I shift_left(I a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
OCTAVO_INLINE F as_float(I a) { return {_mm512_castsi512_ps(a.v)}; }
OCTAVO_INLINE I as_int(F a) { return {_mm512_castps_si512(a.v)}; }
OCTAVO_INLINE void store_bytes(int8_t* p, I a) {  // lanes must fit int8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
OCTAVO_INLINE F load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
OCTAVO_INLINE void store_half(uint16_t* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
OCTAVO_INLINE F load_bfloat(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
OCTAVO_INLINE F load_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
OCTAVO_INLINE F load_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
OCTAVO_INLINE Q load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
OCTAVO_INLINE void store_codes(uint8_t* p, Q a) { _mm512_storeu_si512(p, a.v); }
// (a >> n) & mask, in every byte; n is at most 7 and mask clears what crosses from the neighbour.
OCTAVO_INLINE Q shift_mask(Q a, int n, uint8_t mask) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, n), _mm512_set1_epi8(static_cast<char>(mask)))};
}
OCTAVO_INLINE Q shift_left_mask(Q a, int n, uint8_t mask) {
  return {_mm512_and_si512(_mm512_slli_epi16(a.v, n), _mm512_set1_epi8(static_cast<char>(mask)))};
}
OCTAVO_INLINE Q orq(Q a, Q b) { return {_mm512_or_si512(a.v, b.v)}; }

#elif defined(__AVX2__)

struct F {
  __m256 lo, hi;
};
struct I {
  __m256i lo, hi;
};
struct Q {
  __m256i lo, hi;
};

OCTAVO_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
OCTAVO_INLINE F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
OCTAVO_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OCTAVO_INLINE void store(float* p, F a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
OCTAVO_INLINE F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
OCTAVO_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
OCTAVO_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
OCTAVO_INLINE F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
OCTAVO_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
OCTAVO_INLINE F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
OCTAVO_INLINE F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
OCTAVO_INLINE F abs(F a) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
OCTAVO_INLINE F round(F a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
OCTAVO_INLINE F select_less(F x, F y, F a, F b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, y.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, y.hi, _CMP_LT_OQ))};
}
OCTAVO_INLINE I to_int(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
OCTAVO_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
OCTAVO_INLINE I set1i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
OCTAVO_INLINE I addi(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
OCTAVO_INLINE I subi(I a, I b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
OCTAVO_INLINE I maxi(I a, I b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
OCTAVO_INLINE float sum_of(F a) { return sum_of_eight(_mm256_add_ps(a.lo, a.hi)); }
OCTAVO_INLINE float highest_of(F a) { return highest_of_eight(_mm256_max_ps(a.lo, a.hi)); }
OCTAVO_INLINE void sum_of_four(const F* a, float* sums) {
  __m256 halves[kFour];
  for (int i = 0; i < kFour; ++i) halves[i] = _mm256_add_ps(a[i].lo, a[i].hi);
  across_four(halves, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); }, sums);
}
OCTAVO_INLINE void highest_of_four(const F* a, float* tops) {
  __m256 halves[kFour];
  for (int i = 0; i < kFour; ++i) halves[i] = _mm256_max_ps(a[i].lo, a[i].hi);
  across_four(halves, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); }, tops);
}
OCTAVO_INLINE void sum_of_four(const I* a, int32_t* sums) {
  __m256i halves[kFour];
  for (int i = 0; i < kFour; ++i) halves[i] = _mm256_add_epi32(a[i].lo, a[i].hi);
  across_four(halves, [](__m256i x, __m256i y) { return _mm256_add_epi32(x, y); }, sums);
}
OCTAVO_INLINE void highest_of_four(const I* a, int32_t* tops) {
  __m256i halves[kFour];
  for (int i = 0; i < kFour; ++i) halves[i] = _mm256_max_epi32(a[i].lo, a[i].hi);
  across_four(halves, [](__m256i x, __m256i y) { return _mm256_max_epi32(x, y); }, tops);
}
OCTAVO_INLINE I shift_left(I a, int n) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
OCTAVO_INLINE F as_float(I a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
OCTAVO_INLINE I as_int(F a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
OCTAVO_INLINE void store_bytes(int8_t* p, I a) {
  const __m256i words = _mm256_packs_epi32(a.lo, a.hi);  // lo 0-3, hi 0-3 | lo 4-7, hi 4-7
  const __m256i bytes = _mm256_packs_epi16(words, words);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, order)));
}
OCTAVO_INLINE F load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
OCTAVO_INLINE void store_half(uint16_t* p, F a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, kNearest));
}
OCTAVO_INLINE __m256 half_of_bfloat(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
OCTAVO_INLINE F load_bfloat(const uint16_t* p) { return {half_of_bfloat(p), half_of_bfloat(p + 8)}; }
OCTAVO_INLINE F load_u8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
OCTAVO_INLINE F load_i8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
OCTAVO_INLINE Q load_codes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
OCTAVO_INLINE void store_codes(uint8_t* p, Q a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), a.hi);
}
OCTAVO_INLINE Q shift_mask(Q a, int n, uint8_t mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return {_mm256_and_si256(_mm256_srli_epi16(a.lo, n), m), _mm256_and_si256(_mm256_srli_epi16(a.hi, n), m)};
}
OCTAVO_INLINE Q shift_left_mask(Q a, int n, uint8_t mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return {_mm256_and_si256(_mm256_slli_epi16(a.lo, n), m), _mm256_and_si256(_mm256_slli_epi16(a.hi, n), m)};
}
OCTAVO_INLINE Q orq(Q a, Q b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }

#else  // portable C++

struct F {
  float v[kLanes];
};
struct I {
  int32_t v[kLanes];
};
struct Q {
  uint8_t v[4 * kLanes];
};

template <class V, class Op>
OCTAVO_INLINE V lanes(Op op) {
  V result;
  for (int i = 0; i < kLanes; ++i) result.v[i] = op(i);
  return result;
}

OCTAVO_INLINE F set1(float x) {
  return lanes<F>([&](int) { return x; });
}
OCTAVO_INLINE F zero() { return set1(0.0f); }
OCTAVO_INLINE F load(const float* p) {
  F a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
}
OCTAVO_INLINE void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
OCTAVO_INLINE F add(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] + b.v[i]; });
}
OCTAVO_INLINE F sub(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] - b.v[i]; });
}
OCTAVO_INLINE F mul(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] * b.v[i]; });
}
OCTAVO_INLINE F div(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] / b.v[i]; });
}
OCTAVO_INLINE F fma(F a, F b, F c) {
  return lanes<F>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
// max and min as the processors' instructions: the second operand if either is NaN.
OCTAVO_INLINE F max(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
OCTAVO_INLINE F min(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
OCTAVO_INLINE F abs(F a) {
  return lanes<F>([&](int i) { return std::fabs(a.v[i]); });
}
OCTAVO_INLINE F round(F a) {
  return lanes<F>([&](int i) { return std::nearbyintf(a.v[i]); });
}
OCTAVO_INLINE F select_less(F x, F y, F a, F b) {
  return lanes<F>([&](int i) { return x.v[i] < y.v[i] ? a.v[i] : b.v[i]; });
}
OCTAVO_INLINE int32_t int_of(float x) {  // as the processors' instruction: out of range and NaN give the lowest int32
  return x >= -2147483648.0f && x < 2147483648.0f ? static_cast<int32_t>(std::nearbyintf(x)) : INT32_MIN;
}
OCTAVO_INLINE I to_int(F a) {
  return lanes<I>([&](int i) { return int_of(a.v[i]); });
}
OCTAVO_INLINE F to_float(I a) {
  return lanes<F>([&](int i) { return static_cast<float>(a.v[i]); });
}
OCTAVO_INLINE I set1i(int32_t x) {
  return lanes<I>([&](int) { return x; });
}
OCTAVO_INLINE I addi(I a, I b) {
  return lanes<I>(
      [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); });
}
OCTAVO_INLINE I subi(I a, I b) {
  return lanes<I>(
      [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i])); });
}
OCTAVO_INLINE I maxi(I a, I b) {
  return lanes<I>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
OCTAVO_INLINE float sum_of(F a) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  }
  return a.v[0];
}
OCTAVO_INLINE float highest_of(F a) {
  float best = a.v[0];
  for (float v : a.v) best = v > best ? v : best;
  return best;
}
OCTAVO_INLINE void sum_of_four(const F* a, float* sums) {
  for (int i = 0; i < kFour; ++i) {
    float half[kLanes / 2];
    for (int lane = 0; lane < kLanes / 2; ++lane) half[lane] = a[i].v[lane] + a[i].v[lane + kLanes / 2];
    const float lower = (half[0] + half[2]) + (half[1] + half[3]);
    const float upper = (half[4] + half[6]) + (half[5] + half[7]);
    sums[i] = lower + upper;
  }
}
OCTAVO_INLINE void highest_of_four(const F* a, float* tops) {
  for (int i = 0; i < kFour; ++i) tops[i] = highest_of(a[i]);
}
OCTAVO_INLINE void sum_of_four(const I* a, int32_t* sums) {  // of lanes that do not overflow
  for (int i = 0; i < kFour; ++i) {
    sums[i] = 0;
    for (int32_t v : a[i].v) sums[i] += v;
  }
}
OCTAVO_INLINE void highest_of_four(const I* a, int32_t* tops) {
  for (int i = 0; i < kFour; ++i) {
    tops[i] = a[i].v[0];
    for (int32_t v : a[i].v) tops[i] = v > tops[i] ? v : tops[i];
  }
}
OCTAVO_INLINE I shift_left(I a, int n) {
  return lanes<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << n); });
}
OCTAVO_INLINE F as_float(I a) {
  F b;
  std::memcpy(b.v, a.v, sizeof b.v);
  return b;
}
OCTAVO_INLINE I as_int(F a) {
  I b;
  std::memcpy(b.v, a.v, sizeof b.v);
  return b;
}
OCTAVO_INLINE void store_bytes(int8_t* p, I a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
OCTAVO_INLINE F load_half(const uint16_t* p) {
  return lanes<F>([&](int i) { return float_of_half(p[i]); });
}
OCTAVO_INLINE void store_half(uint16_t* p, F a) {
  for (int i = 0; i < kLanes; ++i) p[i] = half_of_float(a.v[i]);
}
OCTAVO_INLINE F load_bfloat(const uint16_t* p) {
  return as_float(lanes<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16); }));
}
OCTAVO_INLINE F load_u8(const uint8_t* p) {
  return lanes<F>([&](int i) { return static_cast<float>(p[i]); });
}
OCTAVO_INLINE F load_i8(const int8_t* p) {
  return lanes<F>([&](int i) { return static_cast<float>(p[i]); });
}
OCTAVO_INLINE Q load_codes(const uint8_t* p) {
  Q a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
}
OCTAVO_INLINE void store_codes(uint8_t* p, Q a) { std::memcpy(p, a.v, sizeof a.v); }
OCTAVO_INLINE Q shift_mask(Q a, int n, uint8_t mask) {
  for (uint8_t& byte : a.v) byte = static_cast<uint8_t>((byte >> n) & mask);
  return a;
}
OCTAVO_INLINE Q shift_left_mask(Q a, int n, uint8_t mask) {
  for (uint8_t& byte : a.v) byte = static_cast<uint8_t>((byte << n) & mask);
  return a;
}
OCTAVO_INLINE Q orq(Q a, Q b) {
  for (int i = 0; i < 4 * kLanes; ++i) a.v[i] |= b.v[i];
  return a;
}

#endif

OCTAVO_INLINE float float_of_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace octavo::OCTAVO_ISA
