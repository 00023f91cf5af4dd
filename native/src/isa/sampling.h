// The sampler's loops over a vocabulary (sampling_kernels.h). Part of a kernel file: see simd.h for what may
// be used.
#pragma once

#include "simd.h"

#include "../sampling_kernels.h"

namespace headrace::HEADRACE_ISA {

constexpr int32_t kDoubles = 8;
constexpr float kNothing = -__builtin_inff();

#if defined(__AVX512F__)

struct F64 {
  __m512d v;
};

inline F64 widen(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
inline void store(double* p, F64 a) { _mm512_storeu_pd(p, a.v); }
inline F64 splat(double x) { return {_mm512_set1_pd(x)}; }
inline F64 add(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline F64 sub(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline F64 mul(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
// a × 2^n, where n stands in the lowest bits of the doubles of `shifted`.
inline F64 scale_by_power(F64 a, F64 shifted) {
  const __m512i n = _mm512_slli_epi64(_mm512_castpd_si512(shifted.v), 52);
  return {_mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(a.v), n))};
}

// The same of floats.
inline F32 scale_by_power(F32 a, F32 shifted) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), n))};
}

// A bit a lane.
inline uint32_t at_least(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
// x where a ≥ b, 0 elsewhere.
inline F32 where_at_least(F32 a, F32 b, F32 x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), x.v)};
}
inline uint32_t not_numbers(F32 a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
// Sixteen ids.
struct Ids {
  __m512i v;
};

inline Ids ids_from(int32_t start) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_add_epi32(lane, _mm512_set1_epi32(start))};
}
inline Ids load_ids(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
// Writes the lanes of `bits` without gaps; what 16 lanes would fill may be overwritten. Returns how many they are.
inline int32_t close_up(F32 a, Ids ids, uint32_t bits, float* values_out, int32_t* ids_out) {
  const auto mask = static_cast<__mmask16>(bits);
  _mm512_storeu_ps(values_out, _mm512_maskz_compress_ps(mask, a.v));
  _mm512_storeu_si512(ids_out, _mm512_maskz_compress_epi32(mask, ids.v));
  return __builtin_popcount(bits);
}
// The lanes whose bit is 1, -inf elsewhere.
inline F32 masked(F32 a, uint32_t bits) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), _mm512_set1_ps(kNothing), a.v)};
}
// The upper 24 bits of sixteen words.
inline F32 upper_bits(const uint32_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_loadu_si512(p), 8))};
}

// Eight 32-bit words, each in the lower half of a lane; what the upper halves hold means nothing.
struct Words {
  __m512i v;
};

inline Words words_of(uint32_t x) { return {_mm512_set1_epi64(x)}; }
inline Words count_from(uint32_t x) {
  return {_mm512_add_epi64(_mm512_set1_epi64(x), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
}
inline Words load_words(const int32_t* p) {
  return {_mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Words quarter(Words a) { return {_mm512_srli_epi64(a.v, 2)}; }
inline Words product(Words a, uint32_t b) { return {_mm512_mul_epu32(a.v, _mm512_set1_epi64(b))}; }
inline Words upper(Words a) { return {_mm512_srli_epi64(a.v, 32)}; }
inline Words mix(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Words mix(Words a, Words b, Words c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
// The four words of eight counters.
struct Random {
  Words w0, w1, w2, w3;
};

// All words of a counter, then those of the next.
inline void store_interleaved(uint32_t* p, Random a) {
  const __m512i ab = _mm512_mask_blend_epi32(0xAAAA, a.w0.v, _mm512_slli_epi64(a.w1.v, 32));
  const __m512i cd = _mm512_mask_blend_epi32(0xAAAA, a.w2.v, _mm512_slli_epi64(a.w3.v, 32));
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi64(ab, low, cd));
  _mm512_storeu_si512(p + 16, _mm512_permutex2var_epi64(ab, high, cd));
}
// One word of each counter: `which` modulo 4.
inline void store_picked(uint32_t* p, Words which, Random a) {
  const __mmask8 odd = _mm512_test_epi64_mask(which.v, _mm512_set1_epi64(1));
  const __mmask8 high = _mm512_test_epi64_mask(which.v, _mm512_set1_epi64(2));
  const __m512i low_pair = _mm512_mask_blend_epi64(odd, a.w0.v, a.w1.v);
  const __m512i high_pair = _mm512_mask_blend_epi64(odd, a.w2.v, a.w3.v);
  const __m512i picked = _mm512_mask_blend_epi64(high, low_pair, high_pair);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(picked));
}

#elif defined(__AVX2__)

struct F64 {
  __m256d lo, hi;
};

inline F64 widen(const float* p) {
  return {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
}
inline void store(double* p, F64 a) {
  _mm256_storeu_pd(p, a.lo);
  _mm256_storeu_pd(p + 4, a.hi);
}
inline F64 splat(double x) {
  const __m256d v = _mm256_set1_pd(x);
  return {v, v};
}
inline F64 add(F64 a, F64 b) { return {_mm256_add_pd(a.lo, b.lo), _mm256_add_pd(a.hi, b.hi)}; }
inline F64 sub(F64 a, F64 b) { return {_mm256_sub_pd(a.lo, b.lo), _mm256_sub_pd(a.hi, b.hi)}; }
inline F64 mul(F64 a, F64 b) { return {_mm256_mul_pd(a.lo, b.lo), _mm256_mul_pd(a.hi, b.hi)}; }
inline F64 fma(F64 a, F64 b, F64 c) {
  return {_mm256_fmadd_pd(a.lo, b.lo, c.lo), _mm256_fmadd_pd(a.hi, b.hi, c.hi)};
}
inline F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.lo, b.lo), _mm256_max_pd(a.hi, b.hi)}; }
inline __m256 scale_by_power(__m256 a, __m256 shifted) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), n));
}
inline F32 scale_by_power(F32 a, F32 shifted) {
  return {scale_by_power(a.lo, shifted.lo), scale_by_power(a.hi, shifted.hi)};
}
inline __m256d scale_by_power(__m256d a, __m256d shifted) {
  const __m256i n = _mm256_slli_epi64(_mm256_castpd_si256(shifted), 52);
  return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(a), n));
}
inline F64 scale_by_power(F64 a, F64 shifted) {
  return {scale_by_power(a.lo, shifted.lo), scale_by_power(a.hi, shifted.hi)};
}

inline uint32_t lane_bits(__m256 lo, __m256 hi) {
  return static_cast<uint32_t>(_mm256_movemask_ps(lo)) | static_cast<uint32_t>(_mm256_movemask_ps(hi)) << 8;
}
inline uint32_t at_least(F32 a, F32 b) {
  return lane_bits(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ));
}
inline uint32_t not_numbers(F32 a) {
  return lane_bits(_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q));
}
inline __m256 masked(__m256 a, uint32_t byte) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(byte)), lane);
  return _mm256_blendv_ps(_mm256_set1_ps(kNothing), a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
}
inline F32 masked(F32 a, uint32_t bits) { return {masked(a.lo, bits & 0xFF), masked(a.hi, bits >> 8)}; }
// For each byte, the places of its bits that are 1, in order.
struct BitPlaces {
  uint8_t of[256][8];
};
constexpr BitPlaces bit_places() {
  BitPlaces places{};
  for (int32_t byte = 0; byte < 256; ++byte) {
    int32_t count = 0;
    for (uint8_t bit = 0; bit < 8; ++bit) {
      if ((byte >> bit & 1) != 0) places.of[byte][count++] = bit;
    }
  }
  return places;
}
alignas(64) constexpr BitPlaces kBitPlaces = bit_places();
inline F32 where_at_least(F32 a, F32 b, F32 x) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), x.lo),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ), x.hi)};
}
struct Ids {
  __m256i lo, hi;
};

inline Ids ids_from(int32_t start) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_add_epi32(lane, _mm256_set1_epi32(start)),
          _mm256_add_epi32(lane, _mm256_set1_epi32(start + 8))};
}
inline Ids load_ids(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline void close_up(__m256 a, __m256i ids, uint32_t byte, float* values_out, int32_t* ids_out) {
  const __m256i places =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBitPlaces.of[byte])));
  _mm256_storeu_ps(values_out, _mm256_permutevar8x32_ps(a, places));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ids_out), _mm256_permutevar8x32_epi32(ids, places));
}
inline int32_t close_up(F32 a, Ids ids, uint32_t bits, float* values_out, int32_t* ids_out) {
  const int32_t low = __builtin_popcount(bits & 0xFF);
  close_up(a.lo, ids.lo, bits & 0xFF, values_out, ids_out);
  close_up(a.hi, ids.hi, bits >> 8, values_out + low, ids_out + low);
  return __builtin_popcount(bits);
}
inline __m256 upper_bits_of_8(const uint32_t* p) {
  return _mm256_cvtepi32_ps(_mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 8));
}
inline F32 upper_bits(const uint32_t* p) { return {upper_bits_of_8(p), upper_bits_of_8(p + 8)}; }

struct Words {
  __m256i lo, hi;
};

inline Words words_of(uint32_t x) {
  const __m256i v = _mm256_set1_epi64x(x);
  return {v, v};
}
inline Words count_from(uint32_t x) {
  const __m256i v = _mm256_set1_epi64x(x);
  return {_mm256_add_epi64(v, _mm256_setr_epi64x(0, 1, 2, 3)),
          _mm256_add_epi64(v, _mm256_setr_epi64x(4, 5, 6, 7))};
}
inline Words load_words(const int32_t* p) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_cvtepu32_epi64(_mm256_castsi256_si128(v)),
          _mm256_cvtepu32_epi64(_mm256_extracti128_si256(v, 1))};
}
inline Words quarter(Words a) { return {_mm256_srli_epi64(a.lo, 2), _mm256_srli_epi64(a.hi, 2)}; }
inline Words product(Words a, uint32_t b) {
  const __m256i v = _mm256_set1_epi64x(b);
  return {_mm256_mul_epu32(a.lo, v), _mm256_mul_epu32(a.hi, v)};
}
inline Words upper(Words a) { return {_mm256_srli_epi64(a.lo, 32), _mm256_srli_epi64(a.hi, 32)}; }
inline Words mix(Words a, Words b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
inline Words mix(Words a, Words b, Words c) {
  return {_mm256_xor_si256(_mm256_xor_si256(a.lo, b.lo), c.lo),
          _mm256_xor_si256(_mm256_xor_si256(a.hi, b.hi), c.hi)};
}
inline void store_interleaved(uint32_t* p, __m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i ab = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA);
  const __m256i cd = _mm256_blend_epi32(c, _mm256_slli_epi64(d, 32), 0xAA);
  const __m256i even = _mm256_unpacklo_epi64(ab, cd);
  const __m256i odd = _mm256_unpackhi_epi64(ab, cd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), _mm256_permute2x128_si256(even, odd, 0x31));
}
// The four words of eight counters.
struct Random {
  Words w0, w1, w2, w3;
};

inline void store_interleaved(uint32_t* p, Random a) {
  store_interleaved(p, a.w0.lo, a.w1.lo, a.w2.lo, a.w3.lo);
  store_interleaved(p + 16, a.w0.hi, a.w1.hi, a.w2.hi, a.w3.hi);
}
inline __m256i picked(__m256i which, __m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256d odd = _mm256_castsi256_pd(_mm256_slli_epi64(which, 63));
  const __m256d high = _mm256_castsi256_pd(_mm256_slli_epi64(which, 62));
  const __m256d low_pair = _mm256_blendv_pd(_mm256_castsi256_pd(a), _mm256_castsi256_pd(b), odd);
  const __m256d high_pair = _mm256_blendv_pd(_mm256_castsi256_pd(c), _mm256_castsi256_pd(d), odd);
  return _mm256_castpd_si256(_mm256_blendv_pd(low_pair, high_pair, high));
}
inline void store_picked(uint32_t* p, Words which, Random a) {
  const __m256i low = picked(which.lo, a.w0.lo, a.w1.lo, a.w2.lo, a.w3.lo);
  const __m256i high = picked(which.hi, a.w0.hi, a.w1.hi, a.w2.hi, a.w3.hi);
  const __m256 halves = _mm256_shuffle_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), 0x88);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_castps_si256(halves), 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}

#else

struct F64 {
  double v[kDoubles];
};

template <class Function>
inline F64 each_double(Function f) {
  F64 out;
  for (int32_t i = 0; i < kDoubles; ++i) out.v[i] = f(i);
  return out;
}

inline F64 widen(const float* p) {
  return each_double([=](int32_t i) { return static_cast<double>(p[i]); });
}
inline void store(double* p, F64 a) { std::memcpy(p, a.v, sizeof a.v); }
inline F64 splat(double x) {
  return each_double([=](int32_t) { return x; });
}
inline F64 add(F64 a, F64 b) {
  return each_double([&](int32_t i) { return a.v[i] + b.v[i]; });
}
inline F64 sub(F64 a, F64 b) {
  return each_double([&](int32_t i) { return a.v[i] - b.v[i]; });
}
inline F64 mul(F64 a, F64 b) {
  return each_double([&](int32_t i) { return a.v[i] * b.v[i]; });
}
inline F64 fma(F64 a, F64 b, F64 c) {
  return each_double([&](int32_t i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F64 max(F64 a, F64 b) {
  return each_double([&](int32_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline double scale_by_power(double a, double shifted) {
  uint64_t bits, n;
  std::memcpy(&bits, &a, sizeof bits);
  std::memcpy(&n, &shifted, sizeof n);
  bits += n << 52;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}
inline F32 scale_by_power(F32 a, F32 shifted) {
  return each([&](int32_t i) {
    uint32_t bits, n;
    std::memcpy(&bits, &a.v[i], sizeof bits);
    std::memcpy(&n, &shifted.v[i], sizeof n);
    return from_bits(bits + (n << 23));
  });
}
inline F64 scale_by_power(F64 a, F64 shifted) {
  return each_double([&](int32_t i) { return scale_by_power(a.v[i], shifted.v[i]); });
}

inline uint32_t at_least(F32 a, F32 b) {
  uint32_t bits = 0;
  for (int32_t i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
  return bits;
}
inline uint32_t not_numbers(F32 a) {
  uint32_t bits = 0;
  for (int32_t i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a.v[i] != a.v[i]) << i;
  return bits;
}
inline F32 masked(F32 a, uint32_t bits) {
  return each([&](int32_t i) { return (bits >> i & 1u) != 0 ? a.v[i] : kNothing; });
}
inline F32 where_at_least(F32 a, F32 b, F32 x) {
  return each([&](int32_t i) { return a.v[i] >= b.v[i] ? x.v[i] : 0.0f; });
}
struct Ids {
  int32_t v[kLanes];
};

inline Ids ids_from(int32_t start) {
  Ids out;
  for (int32_t i = 0; i < kLanes; ++i) out.v[i] = start + i;
  return out;
}
inline Ids load_ids(const int32_t* p) {
  Ids out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
inline int32_t close_up(F32 a, Ids ids, uint32_t bits, float* values_out, int32_t* ids_out) {
  int32_t kept = 0;
  for (; bits != 0; bits &= bits - 1) {
    const int32_t lane = __builtin_ctz(bits);
    ids_out[kept] = ids.v[lane];
    values_out[kept++] = a.v[lane];
  }
  return kept;
}
inline F32 upper_bits(const uint32_t* p) {
  return each([=](int32_t i) { return static_cast<float>(static_cast<int32_t>(p[i] >> 8)); });
}

struct Words {
  uint64_t v[kDoubles];
};

template <class Function>
inline Words each_word(Function f) {
  Words out;
  for (int32_t i = 0; i < kDoubles; ++i) out.v[i] = f(i);
  return out;
}

inline Words words_of(uint32_t x) {
  return each_word([=](int32_t) { return uint64_t{x}; });
}
inline Words count_from(uint32_t x) {
  return each_word([=](int32_t i) { return uint64_t{x} + static_cast<uint64_t>(i); });
}
inline Words load_words(const int32_t* p) {
  return each_word([=](int32_t i) { return uint64_t{static_cast<uint32_t>(p[i])}; });
}
inline Words quarter(Words a) {
  return each_word([&](int32_t i) { return a.v[i] / 4; });
}
inline Words product(Words a, uint32_t b) {
  return each_word([&](int32_t i) { return (a.v[i] & 0xFFFFFFFFu) * b; });
}
inline Words upper(Words a) {
  return each_word([&](int32_t i) { return a.v[i] >> 32; });
}
inline Words mix(Words a, Words b) {
  return each_word([&](int32_t i) { return a.v[i] ^ b.v[i]; });
}
inline Words mix(Words a, Words b, Words c) {
  return each_word([&](int32_t i) { return a.v[i] ^ b.v[i] ^ c.v[i]; });
}
// The four words of eight counters.
struct Random {
  Words w0, w1, w2, w3;
};

inline void store_interleaved(uint32_t* p, Random a) {
  for (int32_t i = 0; i < kDoubles; ++i) {
    p[4 * i] = static_cast<uint32_t>(a.w0.v[i]);
    p[4 * i + 1] = static_cast<uint32_t>(a.w1.v[i]);
    p[4 * i + 2] = static_cast<uint32_t>(a.w2.v[i]);
    p[4 * i + 3] = static_cast<uint32_t>(a.w3.v[i]);
  }
}
inline void store_picked(uint32_t* p, Words which, Random a) {
  const Words* all[] = {&a.w0, &a.w1, &a.w2, &a.w3};
  for (int32_t i = 0; i < kDoubles; ++i) p[i] = static_cast<uint32_t>(all[which.v[i] % 4]->v[i]);
}

#endif

// ---------------------------------------------------------------- the same on every machine

// Sixteen values, -inf behind the end of the array.
inline F32 load_values(const float* p, int32_t left) {
  return left >= kLanes ? load(p) : first(left, load_first(p, left), splat(kNothing));
}

// e^x to within 2 ulp for x ≤ 0, held above -708: x = n ln 2 + r, |r| ≤ ln 2 / 2, e^r by its Taylor
// polynomial of degree 13 (error < 5e-18). e^0 is 1 exactly.
inline F64 exp(F64 x) {
  constexpr double kShift = 0x1.8p52;  // adding it rounds to an integer, which its lowest bits then hold
  const F64 clamped = max(x, splat(-708.0));
  const F64 shifted = fma(clamped, splat(0x1.71547652b82fep0), splat(kShift));
  const F64 n = sub(shifted, splat(kShift));
  // ln 2 in two parts, the first of 32 bits: n times it is exact.
  const F64 r = fma(n, splat(-0x1.a39ef35793c76p-33), fma(n, splat(-0x1.62e42feep-1), clamped));
  F64 p = splat(1.0 / 6227020800.0);
  p = fma(p, r, splat(1.0 / 479001600.0));
  p = fma(p, r, splat(1.0 / 39916800.0));
  p = fma(p, r, splat(1.0 / 3628800.0));
  p = fma(p, r, splat(1.0 / 362880.0));
  p = fma(p, r, splat(1.0 / 40320.0));
  p = fma(p, r, splat(1.0 / 5040.0));
  p = fma(p, r, splat(1.0 / 720.0));
  p = fma(p, r, splat(1.0 / 120.0));
  p = fma(p, r, splat(1.0 / 24.0));
  p = fma(p, r, splat(1.0 / 6.0));
  p = fma(p, r, splat(0.5));
  p = fma(p, r, splat(1.0));
  p = fma(p, r, splat(1.0));
  return scale_by_power(p, shifted);
}

inline float largest(const float* values, int32_t count) {
  F32 best = splat(kNothing);
  F32 other = best;
  int32_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    best = max(best, load(values + i));
    other = max(other, load(values + i + kLanes));
  }
  for (; i < count; i += kLanes) best = max(best, load_values(values + i, count - i));
  return largest(max(best, other));
}

inline Peak find_peak(const float* values, int32_t count) {
  constexpr int32_t kStretch = 1024;  // the peak's place is looked for in one stretch alone
  Peak peak{kNothing, 0, true};
  uint32_t bad = 0;
  int32_t stretch = 0;
  for (int32_t start = 0; start < count; start += kStretch) {
    const int32_t stop = count - start < kStretch ? count : start + kStretch;
    F32 best = splat(kNothing);
    for (int32_t i = start; i < stop; i += kLanes) {
      const F32 x = load_values(values + i, stop - i);
      bad |= not_numbers(x);
      best = max(best, x);
    }
    const float found = largest(best);
    if (found > peak.value) {
      peak.value = found;
      stretch = start;
    }
  }
  peak.finite = bad == 0 && peak.value < -kNothing;
  if (peak.finite) {
    peak.index = stretch;
    while (values[peak.index] != peak.value) ++peak.index;
  }
  return peak;
}

inline void group_maxima(const float* values, int32_t count, float* maxima) {
  constexpr int32_t kTile = kLanes * kMaximaGroup;
  for (int32_t start = 0; start < count; start += kTile, maxima += kLanes) {
    const int32_t stop = count - start < kTile ? count : start + kTile;
    F32 best = splat(kNothing);
    for (int32_t i = start; i < stop; i += kLanes) best = max(best, load_values(values + i, stop - i));
    store(maxima, best);
  }
}

template <bool kIndices>
inline int32_t collect(const float* values, const int32_t* ids, int32_t count, float floor, int32_t* found_ids,
                       float* found) {
  constexpr int32_t kGroups = 4;  // one branch for all of them: where few values are found, most hold none
  const F32 least = splat(floor);
  int32_t kept = 0;
  int32_t i = 0;
  for (; i + kGroups * kLanes <= count; i += kGroups * kLanes) {
    uint32_t bits[kGroups];
    uint32_t any = 0;
    for (int32_t j = 0; j < kGroups; ++j) {
      bits[j] = at_least(load(values + i + kLanes * j), least);
      any |= bits[j];
    }
    if (any == 0) continue;
    for (int32_t j = 0; j < kGroups; ++j) {
      const int32_t start = i + kLanes * j;
      const Ids all = kIndices ? ids_from(start) : load_ids(ids + start);
      kept += close_up(load(values + start), all, bits[j], found + kept, found_ids + kept);
    }
  }
  for (; i < count; ++i) {
    const float value = values[i];
    found_ids[kept] = kIndices ? i : ids[i];
    found[kept] = value;
    kept += static_cast<int32_t>(value >= floor);
  }
  return kept;
}

inline int32_t collect(const float* values, const int32_t* ids, int32_t count, float floor, int32_t* found_ids,
                       float* found) {
  return ids == nullptr ? collect<true>(values, ids, count, floor, found_ids, found)
                        : collect<false>(values, ids, count, floor, found_ids, found);
}

inline void apply_mask(float* values, const uint8_t* bits, int32_t count) {
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const uint32_t lanes = bits[i / 8] | static_cast<uint32_t>(bits[i / 8 + 1]) << 8;
    store(values + i, masked(load(values + i), lanes));
  }
  for (; i < count; ++i) {
    if ((bits[i / 8] >> (i % 8) & 1) == 0) values[i] = kNothing;
  }
}

inline F64 weights_of_8(const float* values, F64 peak, F64 inverse_temperature) {
  return exp(mul(sub(widen(values), peak), inverse_temperature));
}

inline double sum_weights(const float* values, int32_t count, double peak, double inverse_temperature) {
  const F64 top = splat(peak);
  const F64 inverse = splat(inverse_temperature);
  F64 low = splat(0.0);
  F64 high = low;
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    low = add(low, weights_of_8(values + i, top, inverse));
    high = add(high, weights_of_8(values + i + kDoubles, top, inverse));
  }
  double sums[kDoubles];
  store(sums, add(low, high));
  double sum = 0.0;
  for (double one : sums) sum += one;
  if (i < count) {
    float last[kLanes];
    double rest[kLanes];
    store(last, load_values(values + i, count - i));
    store(rest, weights_of_8(last, top, inverse));
    store(rest + kDoubles, weights_of_8(last + kDoubles, top, inverse));
    for (int32_t j = 0; j < count - i; ++j) sum += rest[j];
  }
  return sum;
}

inline void weights(const float* values, int32_t count, double peak, double inverse_temperature,
                    double* out) {
  const F64 top = splat(peak);
  const F64 inverse = splat(inverse_temperature);
  int32_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) store(out + i, weights_of_8(values + i, top, inverse));
  if (i < count) {
    float last[kLanes];
    double rest[kDoubles];
    store(last, load_values(values + i, count - i));
    store(rest, weights_of_8(last, top, inverse));
    std::memcpy(out + i, rest, sizeof(double) * static_cast<size_t>(count - i));
  }
}

// Weights to within 1.2e-4: 2^n 2^f, |f| ≤ ½, 2^f by the polynomial of degree 3 that errs least (7.5e-5); rounding
// adds 3e-5 at most. 2^-125 for all that weigh less.
class RoughWeights {
 public:
  RoughWeights(float peak, double inverse_temperature)
      : peak_(splat(peak)),
        log2_(splat(static_cast<float>(inverse_temperature * 1.4426950408889634))),
        least_(splat(-125.0f / static_cast<float>(inverse_temperature * 1.4426950408889634))) {}

  F32 of(F32 values) const {
    const F32 shift = splat(0x1.8p23f);  // adding it rounds to an integer, which the lowest bits then hold
    const F32 x = max(sub(values, peak_), least_);
    const F32 shifted = fma(x, log2_, shift);
    const F32 f = fma(x, log2_, sub(shift, shifted));
    F32 p = splat(0.05517167f);
    p = fma(p, f, splat(0.24261113f));
    p = fma(p, f, splat(0.69326097f));
    p = fma(p, f, splat(0.99992806f));
    return scale_by_power(p, shifted);
  }

 private:
  F32 peak_;
  F32 log2_;
  F32 least_;
};

// The sum of 64 floats of one sign errs by 4e-6 at most.
template <bool kAll>
inline double sum_roughly(const float* values, int32_t count, float floor, float peak,
                          double inverse_temperature) {
  constexpr int32_t kStretch = 64 * kLanes;
  const RoughWeights weights(peak, inverse_temperature);
  const F32 least = splat(floor);
  double total = 0.0;
  for (int32_t start = 0; start < count; start += kStretch) {
    const int32_t stop = count - start < kStretch ? count : start + kStretch;
    F32 sums = splat(0.0f);
    for (int32_t i = start; i < stop; i += kLanes) {
      const F32 x = load_values(values + i, stop - i);
      sums = add(sums, kAll ? weights.of(x) : where_at_least(x, least, weights.of(x)));
    }
    total += static_cast<double>(sum(sums));
  }
  return total;
}

inline double sum_roughly(const float* values, int32_t count, float floor, float peak,
                          double inverse_temperature) {
  return floor == kNothing ? sum_roughly<true>(values, count, floor, peak, inverse_temperature)
                           : sum_roughly<false>(values, count, floor, peak, inverse_temperature);
}

// Philox4x32-10 (philox.h) of counters (group, position). Only the first word of a counter varies here, so half of
// the first two rounds is the same for all.
class Philox {
 public:
  Philox(uint64_t seed, uint64_t position) {
    uint32_t key0 = static_cast<uint32_t>(seed);
    uint32_t key1 = static_cast<uint32_t>(seed >> 32);
    const uint64_t first = uint64_t{static_cast<uint32_t>(position >> 32)} * kTimes1;
    const uint32_t word0 = static_cast<uint32_t>(first >> 32) ^ static_cast<uint32_t>(position) ^ key0;
    const uint64_t second = uint64_t{word0} * kTimes0;
    after1_ = words_of(key1);
    after2_[0] = words_of(static_cast<uint32_t>(first) ^ (key0 + kStep0));
    after2_[1] = words_of(static_cast<uint32_t>(second >> 32) ^ (key1 + kStep1));
    for (int32_t round = 2; round < kRounds; ++round) {
      key0 = static_cast<uint32_t>(seed) + static_cast<uint32_t>(round) * kStep0;
      key1 = static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(round) * kStep1;
      keys_[round][0] = words_of(key0);
      keys_[round][1] = words_of(key1);
    }
    last2_ = words_of(static_cast<uint32_t>(second));
  }

  Random of(Words group) const {
    const Words product0 = product(group, kTimes0);
    const Words product1 = product(mix(upper(product0), after1_), kTimes1);
    Random c{mix(upper(product1), after2_[0]), product1, mix(product0, after2_[1]), last2_};
    for (int32_t round = 2; round < kRounds; ++round) {
      const Words one = product(c.w0, kTimes0);
      const Words other = product(c.w2, kTimes1);
      c = {mix(upper(other), c.w1, keys_[round][0]), other, mix(upper(one), c.w3, keys_[round][1]), one};
    }
    return c;
  }

 private:
  static constexpr int32_t kRounds = 10;
  static constexpr uint32_t kTimes0 = 0xD2511F53u;
  static constexpr uint32_t kTimes1 = 0xCD9E8D57u;
  static constexpr uint32_t kStep0 = 0x9E3779B9u;
  static constexpr uint32_t kStep1 = 0xBB67AE85u;
  Words after1_;
  Words after2_[2];
  Words last2_;
  Words keys_[kRounds][2];
};

inline void noise_words(uint64_t seed, uint64_t position, int32_t first_id, uint32_t* words) {
  const Philox philox(seed, position);
  for (int32_t i = 0; i < kNoiseChunk; i += 4 * kDoubles) {
    store_interleaved(words + i, philox.of(count_from(static_cast<uint32_t>(first_id + i) / 4)));
  }
}

inline void noise_words_of(uint64_t seed, uint64_t position, const int32_t* ids, int32_t count,
                           uint32_t* words) {
  const Philox philox(seed, position);
  int32_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    const Words id = load_words(ids + i);
    store_picked(words + i, id, philox.of(quarter(id)));
  }
  if (i == count) return;
  int32_t last[kDoubles] = {};
  uint32_t found[kDoubles];
  std::memcpy(last, ids + i, sizeof(int32_t) * static_cast<size_t>(count - i));
  const Words id = load_words(last);
  store_picked(found, id, philox.of(quarter(id)));
  std::memcpy(words + i, found, sizeof(uint32_t) * static_cast<size_t>(count - i));
}

// An id beats the score where -ln u < weight / lead, with weight = e^((value - peak) / temperature); and 1 -
// u, here rounded down to 24 bits, is less than -ln u. All this is wrong by 2e-4 at most.
inline int32_t contenders(const float* values, const uint32_t* words, int32_t count, float peak,
                          float inverse_temperature, float lead, int32_t* indices) {
  const RoughWeights weights(peak, static_cast<double>(inverse_temperature));
  const F32 unit = splat(lead * 0x1p-24f);
  int32_t found = 0;
  for (int32_t i = 0; i < count; i += kLanes) {
    const F32 weight = weights.of(load_values(values + i, count - i));
    const F32 needed = mul(sub(splat(16777215.0f), upper_bits(words + i)), unit);
    uint32_t bits = at_least(mul(weight, splat(1.001f)), needed);
    if (count - i < kLanes) bits &= (1u << (count - i)) - 1u;
    for (; bits != 0; bits &= bits - 1) indices[found++] = i + __builtin_ctz(bits);
  }
  return found;
}

constexpr SamplingKernels kSamplingKernels = {
    find_peak, largest, group_maxima, collect, apply_mask, sum_weights, weights,
    sum_roughly, noise_words, noise_words_of, contenders,
};

}  // namespace headrace::HEADRACE_ISA
