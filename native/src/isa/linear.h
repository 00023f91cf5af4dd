// y = x wᵀ. A weight lies in panels of 16 rows; a tile is one panel (or, with AVX2, half of one) by R tokens.
//
// Codes: int8 activations meet unsigned codes of 4, 6 or 8 bits in integer arithmetic, exactly; a group of 32 columns
// then adds  scale × (sum - zero × count) + minimum × (sum of x)  to the token's 16 floats, group after group.
// Plain numbers: one fma a column, column after column.
// So what a token gets depends on no other token: neither on R, nor on who computes which panel.
//
// AVX2 has no product of bytes that sums into 32 bits. Codes of 4 bits leave room in 16: 15 × 127 × 2, eight times, is
// 30480. Wider codes are taken apart into nibbles.
#pragma once

#include "../kernels.h"
#include "simd.h"

namespace headrace::HEADRACE_ISA {

constexpr int32_t kColumns = 256;  // columns of plain numbers that meet them at a time

constexpr bool has_minimum(Scales scales) {
  return scales == Scales::halves || scales == Scales::singles || scales == Scales::k4;
}

// ---------------------------------------------------------------- lanes of a tile

#if defined(__AVX512F__)

constexpr int32_t kParts = 1;  // a panel's rows, in so many vectors
using Part = F32;

inline Part part_load(const float* p) { return load(p); }
inline void part_store(float* p, Part a) { store(p, a); }
inline Part part_f16(const uint8_t* p) { return load_f16(reinterpret_cast<const uint16_t*>(p)); }
inline Part part_u8(const uint8_t* p) { return load_u8(p); }
inline Part part_i8(const uint8_t* p) { return load_i8(reinterpret_cast<const int8_t*>(p)); }
inline Part part_splat(float x) { return splat(x); }
inline Part part_mul(Part a, Part b) { return mul(a, b); }
inline Part part_sub(Part a, Part b) { return sub(a, b); }
inline Part part_fma(Part a, Part b, Part c) { return fma(a, b, c); }
inline Part part_negative(Part a) { return sub(splat(0.0f), a); }
constexpr int32_t kPartLanes = 16;

// Sums of a group for R tokens of a tile of L; each half of the group by itself where `kHalves`. `x`: the group's codes
// of the first of them.
template <Codes kCodes, bool kHalves, int R, int L>
struct Sums {
  __m512i total[R][kHalves ? 2 : 1];

  inline void compute(const uint8_t* codes, int32_t, const uint8_t* x) {
    const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      for (int h = 0; h < (kHalves ? 2 : 1); ++h) total[r][h] = _mm512_setzero_si512();
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512i first, second;
      const __m512i packed = _mm512_loadu_si512(codes + 64 * j);
      if constexpr (kCodes == Codes::q8) {
        first = packed;
        second = _mm512_loadu_si512(codes + 64 * (j + 4));
      } else {
        first = _mm512_and_si512(packed, nibble);
        second = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
      }
      if constexpr (kCodes == Codes::q6) {
        const __m512i two = _mm512_set1_epi8(3);
        const __m512i high0 = _mm512_loadu_si512(codes + 256);
        const __m512i high1 = _mm512_loadu_si512(codes + 320);
        const __m512i a = _mm512_and_si512(_mm512_srl_epi16(high0, _mm_cvtsi32_si128(2 * j)), two);
        const __m512i b = _mm512_and_si512(_mm512_srl_epi16(high1, _mm_cvtsi32_si128(2 * j)), two);
        first = _mm512_or_si512(first, _mm512_slli_epi16(a, 4));
        second = _mm512_or_si512(second, _mm512_slli_epi16(b, 4));
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512i x0 = _mm512_set1_epi32(word(x + 4 * (L * j + r)));
        const __m512i x1 = _mm512_set1_epi32(word(x + 4 * (L * (j + 4) + r)));
        total[r][0] = _mm512_dpbusd_epi32(total[r][0], first, x0);
        constexpr int h = kHalves ? 1 : 0;
        total[r][h] = _mm512_dpbusd_epi32(total[r][h], second, x1);
      }
    }
  }
  inline Part get(int r, int half) const { return {_mm512_cvtepi32_ps(total[r][half])}; }

  static inline int32_t word(const uint8_t* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
};

#elif defined(__AVX2__)

constexpr int32_t kParts = 2;
constexpr int32_t kPartLanes = 8;
struct Part {
  __m256 v;
};

inline Part part_load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void part_store(float* p, Part a) { _mm256_storeu_ps(p, a.v); }
inline Part part_f16(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Part part_u8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline Part part_i8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline Part part_splat(float x) { return {_mm256_set1_ps(x)}; }
inline Part part_mul(Part a, Part b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Part part_sub(Part a, Part b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Part part_fma(Part a, Part b, Part c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Part part_negative(Part a) { return {_mm256_sub_ps(_mm256_setzero_ps(), a.v)}; }

template <Codes kCodes, bool kHalves, int R, int L>
struct Sums {
  static constexpr bool kWide = kCodes != Codes::q4;  // more than a nibble
  static constexpr int kSums = kHalves ? 2 : 1;
  __m256i low[R][kSums];
  __m256i high[R][kSums];

  inline void compute(const uint8_t* codes, int32_t part, const uint8_t* x) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const uint8_t* mine = codes + 32 * part;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      for (int h = 0; h < kSums; ++h) {
        low[r][h] = _mm256_setzero_si256();
        if constexpr (kWide) high[r][h] = _mm256_setzero_si256();
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m256i first, second, first_high{}, second_high{};
      const __m256i packed = at(mine + 64 * j);
      if constexpr (kCodes == Codes::q8) {
        const __m256i other = at(mine + 64 * (j + 4));
        first = _mm256_and_si256(packed, nibble);
        first_high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
        second = _mm256_and_si256(other, nibble);
        second_high = _mm256_and_si256(_mm256_srli_epi16(other, 4), nibble);
      } else {
        first = _mm256_and_si256(packed, nibble);
        second = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
      }
      if constexpr (kCodes == Codes::q6) {
        const __m256i two = _mm256_set1_epi8(3);
        const __m128i shift = _mm_cvtsi32_si128(2 * j);
        first_high = _mm256_and_si256(_mm256_srl_epi16(at(mine + 256), shift), two);
        second_high = _mm256_and_si256(_mm256_srl_epi16(at(mine + 320), shift), two);
      }
      constexpr int h = kHalves ? 1 : 0;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m256i x0 = word(x + 4 * (L * j + r));
        const __m256i x1 = word(x + 4 * (L * (j + 4) + r));
        low[r][0] = plus(low[r][0], _mm256_maddubs_epi16(first, x0));
        low[r][h] = plus(low[r][h], _mm256_maddubs_epi16(second, x1));
        if constexpr (kWide) {
          high[r][0] = plus(high[r][0], _mm256_maddubs_epi16(first_high, x0));
          high[r][h] = plus(high[r][h], _mm256_maddubs_epi16(second_high, x1));
        }
      }
    }
  }
  inline Part get(int r, int half) const {
    __m256i total = _mm256_madd_epi16(low[r][half], _mm256_set1_epi16(1));
    if constexpr (kWide) {
      total = _mm256_add_epi32(total, _mm256_madd_epi16(high[r][half], _mm256_set1_epi16(16)));
    }
    return {_mm256_cvtepi32_ps(total)};
  }

  // The compiler would rather add the products up as a tree: it has no registers for that.
  static inline __m256i plus(__m256i a, __m256i b) {
    __m256i c = _mm256_add_epi16(a, b);
    asm("" : "+x"(c));
    return c;
  }
  static inline __m256i at(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static inline __m256i word(const uint8_t* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return _mm256_set1_epi32(x);
  }
};

#else

constexpr int32_t kParts = 1;
constexpr int32_t kPartLanes = 16;
using Part = F32;

inline Part part_load(const float* p) { return load(p); }
inline void part_store(float* p, Part a) { store(p, a); }
inline Part part_f16(const uint8_t* p) {
  uint16_t halves[kLanes];
  std::memcpy(halves, p, sizeof halves);
  return load_f16(halves);
}
inline Part part_u8(const uint8_t* p) { return load_u8(p); }
inline Part part_i8(const uint8_t* p) { return load_i8(reinterpret_cast<const int8_t*>(p)); }
inline Part part_splat(float x) { return splat(x); }
inline Part part_mul(Part a, Part b) { return mul(a, b); }
inline Part part_sub(Part a, Part b) { return sub(a, b); }
inline Part part_fma(Part a, Part b, Part c) { return fma(a, b, c); }
inline Part part_negative(Part a) { return sub(splat(0.0f), a); }

template <Codes kCodes, bool kHalves, int R, int L>
struct Sums {
  int32_t total[R][kHalves ? 2 : 1][kLanes];

  inline void compute(const uint8_t* codes, int32_t, const uint8_t* x) {
    std::memset(total, 0, sizeof total);
    for (int step = 0; step < 8; ++step) {
      const int h = kHalves ? step / 4 : 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < 4; ++i) {
          const int32_t code = code_at(codes, step, 4 * lane + i);
          for (int r = 0; r < R; ++r) total[r][h][lane] += code * static_cast<int8_t>(x[4 * (L * step + r) + i]);
        }
      }
    }
  }
  inline Part get(int r, int half) const {
    return each([&](int32_t i) { return static_cast<float>(total[r][half][i]); });
  }

  static inline int32_t code_at(const uint8_t* codes, int step, int place) {
    if constexpr (kCodes == Codes::q8) return codes[64 * step + place];
    const uint8_t packed = codes[64 * (step % 4) + place];
    const int32_t low = step < 4 ? packed & 15 : packed >> 4;
    if constexpr (kCodes == Codes::q4) return low;
    return low | (codes[256 + 64 * (step / 4) + place] >> (2 * (step % 4)) & 3) << 4;
  }
};

#endif

// ---------------------------------------------------------------- codes

// What belongs to the codes of a tile of L tokens: see QuantRows.
enum class Figure : int32_t { scale, sum, count, half };

template <int L>
inline Part figure(const uint8_t* x, Figure which, int r) {
  float value;
  std::memcpy(&value, x + kGroup * L + 4 * (L * static_cast<int32_t>(which) + r), sizeof value);
  return part_splat(value);
}

template <Scales kScales>
inline void read_scales(const uint8_t* header, int32_t part, Part& scale, Part& minimum) {
  constexpr int32_t kBytes = 2 * kPartLanes;
  if constexpr (kScales == Scales::half || kScales == Scales::k6) {
    scale = part_f16(header + kBytes * part);
  } else if constexpr (kScales == Scales::halves || kScales == Scales::k4) {
    scale = part_f16(header + kBytes * part);
    minimum = part_f16(header + 32 + kBytes * part);
  } else {
    scale = part_load(reinterpret_cast<const float*>(header) + kPartLanes * part);
    if constexpr (kScales == Scales::singles) {
      minimum = part_load(reinterpret_cast<const float*>(header + 64) + kPartLanes * part);
    }
  }
}

// With few tokens a product waits for memory: what comes next is asked for while this is computed.
constexpr int32_t kStreamedRows = 4;
constexpr int32_t kAhead = 8192;

template <int kBytes>
inline void fetch_ahead(const uint8_t* at) {
#pragma GCC unroll 16
  for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(at + kAhead + i);
}

// P parts of a panel, from `part` on, by R tokens of a tile of L, all columns. `x`: codes of the first of them. out:
// [R][16].
template <Codes kCodes, Scales kScales, int R, int L, int P>
inline void code_tile(const Weight& weight, const uint8_t* panel, int32_t part, const uint8_t* x, float* out) {
  constexpr bool kHalves = kScales == Scales::k6;
  Part acc[P][R];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[p][r] = part_splat(0.0f);
  }
  const int32_t all = weight.columns / kGroup;
  const Part negative_zero_point = part_splat(-static_cast<float>(weight.zero));
  const bool centred = weight.zero != 0;
  const uint8_t* at = panel;
  for (int32_t start = 0; start < all; start += weight.groups) {
    Part block_scale[P], block_minimum[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) read_scales<kScales>(at, part + p, block_scale[p], block_minimum[p]);
    at += header_bytes(kScales);
    const int32_t stop = start + weight.groups < all ? start + weight.groups : all;
    for (int32_t g = start; g < stop; ++g) {
      const uint8_t* group_header = at;
      at += group_header_bytes(kScales);
      if constexpr (R <= kStreamedRows) fetch_ahead<code_bytes(kCodes) + header_bytes(kScales)>(at);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        Sums<kCodes, kHalves, R, L> sums;
        sums.compute(at, part + p, x);
        Part scale = block_scale[p], minimum = block_minimum[p], second = scale;
        if constexpr (kScales == Scales::k4) {
          scale = part_mul(scale, part_u8(group_header + kPartLanes * (part + p)));
          minimum = part_negative(part_mul(minimum, part_u8(group_header + 16 + kPartLanes * (part + p))));
        }
        if constexpr (kHalves) {
          second = part_mul(block_scale[p], part_i8(group_header + 16 + kPartLanes * (part + p)));
          scale = part_mul(scale, part_i8(group_header + kPartLanes * (part + p)));
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Part x_scale = figure<L>(x, Figure::scale, r);
          Part sum = sums.get(r, 0);
          if constexpr (kHalves) {
            const Part half = figure<L>(x, Figure::half, r);
            sum = part_fma(negative_zero_point, half, sum);
            acc[p][r] = part_fma(sum, part_mul(scale, x_scale), acc[p][r]);
            const Part others = part_sub(figure<L>(x, Figure::count, r), half);
            const Part rest = part_fma(negative_zero_point, others, sums.get(r, 1));
            acc[p][r] = part_fma(rest, part_mul(second, x_scale), acc[p][r]);
          } else {
            if constexpr (!has_minimum(kScales)) {
              if (centred) sum = part_fma(negative_zero_point, figure<L>(x, Figure::count, r), sum);
            }
            acc[p][r] = part_fma(sum, part_mul(scale, x_scale), acc[p][r]);
            if constexpr (has_minimum(kScales)) {
              acc[p][r] = part_fma(minimum, figure<L>(x, Figure::sum, r), acc[p][r]);
            }
          }
        }
      }
      at += code_bytes(kCodes);
      x += kGroupBytes * L;
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) part_store(out + kPanel * r + kPartLanes * (part + p), acc[p][r]);
  }
}

// One panel by R tokens of a tile of L.
template <Codes kCodes, Scales kScales, int R, int L>
inline void code_panel(const Weight& weight, const uint8_t* panel, const uint8_t* x, float* out) {
  if constexpr (kParts == 1) {
    code_tile<kCodes, kScales, R, L, 1>(weight, panel, 0, x, out);
  } else if constexpr (R <= 2) {  // both halves at once: the panel is read once
    code_tile<kCodes, kScales, R, L, 2>(weight, panel, 0, x, out);
  } else {
    code_tile<kCodes, kScales, R, L, 1>(weight, panel, 0, x, out);
    code_tile<kCodes, kScales, R, L, 1>(weight, panel, 1, x, out);
  }
}

// One panel by a tile of L tokens. More than a nibble a code, and AVX2 has no registers for more than four.
template <Codes kCodes, Scales kScales, int L>
inline void code_whole(const Weight& weight, const uint8_t* panel, const uint8_t* x, float* out) {
  constexpr int kMost = kParts == 2 && kCodes != Codes::q4 ? 4 : L;
  if constexpr (L <= kMost) {
    code_panel<kCodes, kScales, L, L>(weight, panel, x, out);
  } else {
    constexpr int kHalf = (L + 1) / 2;
    code_panel<kCodes, kScales, kHalf, L>(weight, panel, x, out);
    code_panel<kCodes, kScales, L - kHalf, L>(weight, panel, x + 4 * kHalf, out + kPanel * kHalf);
  }
}

// ---------------------------------------------------------------- plain numbers

template <Codes kCodes>
inline F32 load_numbers(const uint8_t* p) {
  if constexpr (kCodes == Codes::f32) return load(reinterpret_cast<const float*>(p));
  if constexpr (kCodes == Codes::f16) return load_f16(reinterpret_cast<const uint16_t*>(p));
  return load_bf16(reinterpret_cast<const uint16_t*>(p));
}

// Panels that meet a token's number together, as far as there are registers.
#if defined(__AVX512F__)
constexpr int kNumberPanels = 2;
#else
constexpr int kNumberPanels = 1;
#endif

// Columns [start, stop) of P panels by R tokens, added to out: [P][kTokens][16].
template <Codes kCodes, int R, int P>
inline void number_tile(const uint8_t* panel, int64_t panel_bytes, const float* x, int64_t x_stride, int32_t start,
                        int32_t stop, float* out) {
  constexpr int32_t kBytes = kPanel * (kCodes == Codes::f32 ? 4 : 2);
  F32 acc[P][R];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[p][r] = load(out + kPanel * (kTokens * p + r));
  }
  const uint8_t* at = panel + static_cast<int64_t>(kBytes) * start;
  for (int32_t k = start; k < stop; ++k, at += kBytes) {
    F32 w[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) w[p] = load_numbers<kCodes>(at + p * panel_bytes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F32 number = splat(x[r * x_stride + k]);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) acc[p][r] = fma(number, w[p], acc[p][r]);
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(out + kPanel * (kTokens * p + r), acc[p][r]);
  }
}

// ---------------------------------------------------------------- the product

#if defined(__AVX512F__)
constexpr int32_t kTile = 12;  // most tokens of a tile
#elif defined(__AVX2__)
constexpr int32_t kTile = 6;
#else
constexpr int32_t kTile = 4;
#endif

// Calls a tile of the largest size that fits, from kMost down: Tile::template run<R>(args…).
template <class Tile, int R, class... Args>
inline void run_tile(int32_t count, Args... args) {
  if constexpr (R > 1) {
    if (count < R) return run_tile<Tile, R - 1>(count, args...);
  }
  Tile::template run<R>(args...);
}

inline void put(const LinearArgs& args, int32_t panel, int32_t first, int32_t count, const float* tile) {
  const int32_t column = kPanel * panel;
  const int32_t width = args.weight->rows - column < kPanel ? args.weight->rows - column : kPanel;
  const F32 bias = args.bias == nullptr ? splat(0.0f) : load_first(args.bias + column, width);
  const F32 scale = splat(args.scale);
  for (int32_t r = 0; r < count; ++r) {
    float* y = args.y + (first + r) * args.y_stride + column;
    F32 value = load(tile + kPanel * r);
    if (args.bias != nullptr) value = add(value, bias);
    if (args.store == Store::add) value = fma(scale, value, load_first(y, width));
    if (width == kPanel) {
      store(y, value);
    } else {
      store_first(y, value, width);
    }
  }
}

template <Codes kCodes, Scales kScales>
struct CodeTile {
  template <int L>
  static void run(const LinearArgs* args, const uint8_t* panel, const uint8_t* x, float* out) {
    code_whole<kCodes, kScales, L>(*args->weight, panel, x, out);
  }
};

template <Codes kCodes, int P>
struct NumberTile {
  template <int R>
  static void run(const LinearArgs* args, const uint8_t* panel, int32_t first, int32_t start, int32_t stop,
                  float* out) {
    number_tile<kCodes, R, P>(panel, args->weight->panel_bytes, args->x + first * args->x_stride, args->x_stride, start,
                              stop, out);
  }
};

// Reads a run of memory once, in order, so that what follows finds it in the cache: a load a line, of which none waits for
// another. Where several tiles meet a panel, the first of them would else wait for each of its lines (measured with 32
// tokens: 75 · 10⁹ products a second, so 81).
inline void read_through(const uint8_t* run, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) static_cast<void>(*static_cast<const volatile uint8_t*>(run + i));
}

template <Codes kCodes, Scales kScales>
void linear_codes(const LinearArgs& args, int32_t begin, int32_t end) {
  alignas(64) float tile[kPanel * kTile];
  const int64_t row_bytes = kGroupBytes * (args.quantised.width / kGroup);
  for (int32_t block = 0; block < args.tokens; block += kTokens) {
    const int32_t stop = block + kTokens < args.tokens ? block + kTokens : args.tokens;
    for (int32_t panel = begin; panel < end; ++panel) {
      const uint8_t* data = args.weight->data + panel * args.weight->panel_bytes;
      if (stop - block > kTile) read_through(data, args.weight->panel_bytes);
      for (int32_t first = block; first < stop; first += kTile) {
        const int32_t count = stop - first < kTile ? stop - first : kTile;
        const uint8_t* x = args.quantised.data + row_bytes * first;
        run_tile<CodeTile<kCodes, kScales>, kTile>(count, &args, data, x, static_cast<float*>(tile));
        put(args, panel, first, count, tile);
      }
    }
  }
}

// P panels from `panel` on by the tokens [first, first + count), at most kTokens.
template <Codes kCodes, int P>
inline void number_panels(const LinearArgs& args, int32_t panel, int32_t first, int32_t count) {
  constexpr int64_t kBytes = kPanel * (kCodes == Codes::f32 ? 4 : 2);
  alignas(64) float tiles[P * kTokens * kPanel];
  const int32_t columns = args.weight->columns;
  const int32_t parts = (count + kTile - 1) / kTile;  // of about one size: two tokens take as long as four
  const uint8_t* data = args.weight->data + panel * args.weight->panel_bytes;
  for (int p = 0; p < P; ++p) {
    std::memset(tiles + kPanel * kTokens * p, 0, sizeof(float) * static_cast<size_t>(kPanel * count));
  }
  for (int32_t start = 0; start < columns; start += kColumns) {
    const int32_t stop = start + kColumns < columns ? start + kColumns : columns;
    if (parts > 1) {
      for (int p = 0; p < P; ++p) {
        read_through(data + p * args.weight->panel_bytes + kBytes * start, kBytes * (stop - start));
      }
    }
    for (int32_t part = 0, i = 0; part < parts; ++part) {
      const int32_t size = count / parts + (part < count % parts ? 1 : 0);
      run_tile<NumberTile<kCodes, P>, kTile>(size, &args, data, first + i, start, stop, tiles + kPanel * i);
      i += size;
    }
  }
  for (int p = 0; p < P; ++p) put(args, panel + p, first, count, tiles + kPanel * kTokens * p);
}

template <Codes kCodes>
void linear_numbers(const LinearArgs& args, int32_t begin, int32_t end) {
  for (int32_t first = 0; first < args.tokens; first += kTokens) {
    const int32_t count = args.tokens - first < kTokens ? args.tokens - first : kTokens;
    int32_t panel = begin;
    for (; panel + kNumberPanels <= end; panel += kNumberPanels) {
      number_panels<kCodes, kNumberPanels>(args, panel, first, count);
    }
    if (panel < end) number_panels<kCodes, 1>(args, panel, first, count);
  }
}

template <Codes kCodes>
inline void linear_scaled(const LinearArgs& args, int32_t begin, int32_t end) {
  switch (args.weight->scales) {
    case Scales::half: return linear_codes<kCodes, Scales::half>(args, begin, end);
    case Scales::single: return linear_codes<kCodes, Scales::single>(args, begin, end);
    case Scales::singles: return linear_codes<kCodes, Scales::singles>(args, begin, end);
    default: return;  // `pack.h` makes no other
  }
}

// Panels [begin, end) of y, for all tokens.
inline void linear(const LinearArgs& args, int32_t begin, int32_t end) {
  const Weight& weight = *args.weight;
  switch (weight.codes) {
    case Codes::f32: return linear_numbers<Codes::f32>(args, begin, end);
    case Codes::f16: return linear_numbers<Codes::f16>(args, begin, end);
    case Codes::bf16: return linear_numbers<Codes::bf16>(args, begin, end);
    case Codes::q4:
      if (weight.scales == Scales::halves) return linear_codes<Codes::q4, Scales::halves>(args, begin, end);
      if (weight.scales == Scales::k4) return linear_codes<Codes::q4, Scales::k4>(args, begin, end);
      return linear_scaled<Codes::q4>(args, begin, end);
    case Codes::q6: return linear_codes<Codes::q6, Scales::k6>(args, begin, end);
    case Codes::q8:
      if (weight.scales == Scales::halves) return linear_codes<Codes::q8, Scales::halves>(args, begin, end);
      if (weight.scales == Scales::k4) return linear_codes<Codes::q8, Scales::k4>(args, begin, end);
      if (weight.scales == Scales::k6) return linear_codes<Codes::q8, Scales::k6>(args, begin, end);
      return linear_scaled<Codes::q8>(args, begin, end);
  }
}

}  // namespace headrace::HEADRACE_ISA
