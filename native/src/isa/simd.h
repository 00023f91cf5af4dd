// Sixteen floats at a time, on whatever the instruction set offers. Part of a kernel file: kernels_*.cpp defines
// HEADRACE_ISA and includes what lies in isa/. Nothing in isa/ may use templates or inline functions of the standard
// library: the linker could give the portable code an instance compiled for AVX-512.
//
// fma() rounds once where the machine has FMA, twice in the portable build: bits may differ between instruction sets,
// never within one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace headrace::HEADRACE_ISA {

constexpr int32_t kLanes = 16;

// Lanes of the vector at column i that hold part of a row.
inline int32_t lanes_at(int32_t i, int32_t width) { return width - i < kLanes ? width - i : kLanes; }

#if defined(__AVX512F__)

struct F32 {
  __m512 v;
};

inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
inline F32 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
// a × b + c
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Of a NaN and a number: b.
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
// To the nearest integer, ties to even.
inline F32 round(F32 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
// The first `count` lanes of a, the others of b; 0 ≤ count ≤ 16.
inline F32 first(int32_t count, F32 a, F32 b) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>((1u << count) - 1u), b.v, a.v)};
}
// x where a < b, y elsewhere (and where a or b is NaN).
inline F32 select_less(F32 a, F32 b, F32 x, F32 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// The first `count` floats, zero after them; memory behind is not read.
inline F32 load_first(const float* p, int32_t count) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p)};
}
inline void store_first(float* p, F32 a, int32_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), a.v);
}
// 2^n for integers n, |n| ≤ 126.
inline F32 power_of_two(F32 n) {
  const __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 23))};
}
inline F32 load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F32 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline F32 load_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline F32 load_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// Integers within ±127, already rounded.
inline void store_i8(int8_t* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

#elif defined(__AVX2__)

struct F32 {
  __m256 lo, hi;
};

inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline F32 splat(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F32 fma(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F32 round(F32 a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F32 abs(F32 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline __m256i lane_mask(int32_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
}
inline F32 first(int32_t count, F32 a, F32 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(lane_mask(count))),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(lane_mask(count - 8)))};
}
inline F32 select_less(F32 a, F32 b, F32 x, F32 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline F32 load_first(const float* p, int32_t count) {
  return {_mm256_maskload_ps(p, lane_mask(count)), _mm256_maskload_ps(p + 8, lane_mask(count - 8))};
}
inline void store_first(float* p, F32 a, int32_t count) {
  _mm256_maskstore_ps(p, lane_mask(count), a.lo);
  _mm256_maskstore_ps(p + 8, lane_mask(count - 8), a.hi);
}
inline F32 power_of_two(F32 n) {
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i lo = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.lo), bias), 23);
  const __m256i hi = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.hi), bias), 23);
  return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)};
}
inline F32 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline F32 load_bf16(const uint16_t* p) {
  const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
inline F32 load_i8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
}
inline F32 load_u8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
}
inline void store_i8(int8_t* p, F32 a) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#else

struct F32 {
  float v[kLanes];
};

// Calls f(lane) for each lane.
template <class Function>
inline F32 each(Function f) {
  F32 out;
  for (int32_t i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}

inline F32 load(const float* p) {
  return each([=](int32_t i) { return p[i]; });
}
inline void store(float* p, F32 a) { std::memcpy(p, a.v, sizeof a.v); }
inline F32 splat(float x) {
  return each([=](int32_t) { return x; });
}
inline F32 add(F32 a, F32 b) {
  return each([&](int32_t i) { return a.v[i] + b.v[i]; });
}
inline F32 sub(F32 a, F32 b) {
  return each([&](int32_t i) { return a.v[i] - b.v[i]; });
}
inline F32 mul(F32 a, F32 b) {
  return each([&](int32_t i) { return a.v[i] * b.v[i]; });
}
inline F32 div(F32 a, F32 b) {
  return each([&](int32_t i) { return a.v[i] / b.v[i]; });
}
inline F32 fma(F32 a, F32 b, F32 c) {
  return each([&](int32_t i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F32 max(F32 a, F32 b) {
  return each([&](int32_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32 min(F32 a, F32 b) {
  return each([&](int32_t i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32 round(F32 a) {
  return each([&](int32_t i) { return __builtin_rintf(a.v[i]); });
}
inline F32 abs(F32 a) {
  return each([&](int32_t i) { return __builtin_fabsf(a.v[i]); });
}
inline F32 first(int32_t count, F32 a, F32 b) {
  return each([&](int32_t i) { return i < count ? a.v[i] : b.v[i]; });
}
inline F32 select_less(F32 a, F32 b, F32 x, F32 y) {
  return each([&](int32_t i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
inline F32 load_first(const float* p, int32_t count) {
  return each([=](int32_t i) { return i < count ? p[i] : 0.0f; });
}
inline void store_first(float* p, F32 a, int32_t count) {
  std::memcpy(p, a.v, sizeof(float) * static_cast<size_t>(count));
}
inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline F32 power_of_two(F32 n) {
  return each([&](int32_t i) { return from_bits(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23); });
}
// IEEE half to single: exact, NaN and infinity included.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  if ((h & 0x7C00u) == 0x7C00u) return from_bits(sign | 0x7F800000u | rest);
  // Multiplying by 2^112 rebiases the exponent, of subnormal numbers too.
  return from_bits(sign | 0u) + (sign ? -1.0f : 1.0f) * (from_bits(rest) * 0x1p112f);
}
inline F32 load_f16(const uint16_t* p) {
  return each([=](int32_t i) { return half_to_float(p[i]); });
}
inline F32 load_bf16(const uint16_t* p) {
  return each([=](int32_t i) { return from_bits(static_cast<uint32_t>(p[i]) << 16); });
}
inline F32 load_i8(const int8_t* p) {
  return each([=](int32_t i) { return static_cast<float>(p[i]); });
}
inline F32 load_u8(const uint8_t* p) {
  return each([=](int32_t i) { return static_cast<float>(p[i]); });
}
inline void store_i8(int8_t* p, F32 a) {
  for (int32_t i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

#endif

// ---------------------------------------------------------------- the same on every machine

inline float one_of(F32 a, int32_t lane) {
  float lanes[kLanes];
  store(lanes, a);
  return lanes[lane];
}

// Pairs at distance 8, then 4, 2, 1: one order on every machine.
inline float sum(F32 a) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
#else
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float x[kLanes];
  store(x, a);
  for (int32_t half = kLanes / 2; half > 0; half /= 2) {
    for (int32_t i = 0; i < half; ++i) x[i] = x[i] + x[i + half];
  }
  return x[0];
#endif
}

// In the same order.
inline float largest(F32 a) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
#else
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
#endif
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  float x[kLanes];
  store(x, a);
  for (int32_t half = kLanes / 2; half > 0; half /= 2) {
    for (int32_t i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  }
  return x[0];
#endif
}

// e^x to within 2 ulp: x = n ln 2 + r, |r| ≤ ln 2 / 2, e^r by its Taylor polynomial of degree 7 (error < 2^-27).
// Input is held within -87 … 88: what lies below gives e^-87 = 1.6e-38, above e^88 = 1.7e38. A NaN gives e^88: callers
// look for NaN elsewhere. Always inline: a call would pass its vectors through memory (measured: silu 6 times slower).
[[gnu::always_inline]] inline F32 exp(F32 x) {
  const F32 clamped = max(min(x, splat(88.0f)), splat(-87.0f));
  const F32 n = round(mul(clamped, splat(1.44269504f)));
  const F32 r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), clamped));
  F32 p = splat(1.0f / 5040.0f);
  p = fma(p, r, splat(1.0f / 720.0f));
  p = fma(p, r, splat(1.0f / 120.0f));
  p = fma(p, r, splat(1.0f / 24.0f));
  p = fma(p, r, splat(1.0f / 6.0f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return mul(p, power_of_two(n));
}

}  // namespace headrace::HEADRACE_ISA
