// What is done to one token's activations at a time: norms, activations, quantising. A reduction over a row sums sixteen
// partial sums, column i into sum i mod 16, and these in the order of `sum`: one order whatever the step holds.
#pragma once

#include "../kernels.h"
#include "linear.h"
#include "simd.h"

namespace headrace::HEADRACE_ISA {

// Sixteen columns of a row, or the few that are left at its end; those beyond it read as zeros and are not written.
struct Whole {
  inline F32 load(const float* p) const { return HEADRACE_ISA::load(p); }
  inline void store(float* p, F32 a) const { HEADRACE_ISA::store(p, a); }
  inline F32 clear(F32 a) const { return a; }
};
struct Rest {
  int32_t lanes;
  inline F32 load(const float* p) const { return load_first(p, lanes); }
  inline void store(float* p, F32 a) const { store_first(p, a, lanes); }
  inline F32 clear(F32 a) const { return first(lanes, a, splat(0.0f)); }
};

// Calls function(i, columns) for columns i … i + 15 of a row, one after another.
template <class Function>
inline void each_vector(int32_t width, const Function& function) {
  int32_t i = 0;
  for (; i + kLanes <= width; i += kLanes) function(i, Whole{});
  if (i < width) function(i, Rest{width - i});
}

// ---------------------------------------------------------------- norms

inline float mean(const float* x, int32_t width, float minus, bool squared) {
  F32 total = splat(0.0f);
  const F32 centre = splat(minus);
  each_vector(width, [&](int32_t i, auto columns) {
    const F32 value = columns.clear(sub(columns.load(x + i), centre));
    total = squared ? fma(value, value, total) : add(total, value);
  });
  return sum(total) / static_cast<float>(width);
}

// RMSNorm (arXiv 1910.07467): x / sqrt(mean(x²) + eps) × weight, or LayerNorm (arXiv 1607.06450). x and y may be one.
inline void norm_row(const NormArgs& args, const float* x, float* y) {
  const float centre = args.kind == NormKind::layer ? mean(x, args.width, 0.0f, false) : 0.0f;
  const float scale = 1.0f / __builtin_sqrtf(mean(x, args.width, centre, true) + args.eps);
  each_vector(args.width, [&](int32_t i, auto columns) {
    F32 value = mul(sub(columns.load(x + i), splat(centre)), splat(scale));
    value = mul(value, columns.load(args.weight + i));
    if (args.bias != nullptr) value = add(value, columns.load(args.bias + i));
    columns.store(y + i, value);
  });
}

// ---------------------------------------------------------------- activations

// Below -88 exp() grows no further. A NaN stays one: max() gives its second argument.
[[gnu::always_inline]] inline F32 silu(F32 x) {
  return mul(max(splat(-88.0f), x), div(splat(1.0f), add(splat(1.0f), exp(sub(splat(0.0f), x)))));
}

// To within 2 ulp: 1 - 2 / (e^2x + 1), but where |x| ≤ 0.6, and this would lose the last digits, the continued fraction
// x / (1 + x² / (3 + x² / (5 + x² / (7 + x² / 9)))), to within 1e-8 there. A NaN stays one: it is not above 0.6.
[[gnu::always_inline]] inline F32 tanh(F32 x) {
  const F32 z = mul(x, x);
  const F32 over = fma(z, add(z, splat(105.0f)), splat(945.0f));
  const F32 under = fma(z, fma(splat(15.0f), z, splat(420.0f)), splat(945.0f));
  const F32 near = div(mul(x, over), under);
  const F32 far = sub(splat(1.0f), div(splat(2.0f), add(exp(add(x, x)), splat(1.0f))));
  return select_less(splat(0.6f), abs(x), far, near);
}

[[gnu::always_inline]] inline F32 gelu_tanh(F32 x) {
  const F32 inner = mul(fma(mul(x, mul(x, x)), splat(0.044715f), x), splat(0.7978845608f));
  return mul(mul(splat(0.5f), x), add(splat(1.0f), tanh(inner)));
}

inline F32 gelu(F32 x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int32_t i = 0; i < kLanes; ++i) lanes[i] = 0.5f * lanes[i] * (1.0f + __builtin_erff(lanes[i] * 0.70710678f));
  return load(lanes);
}

template <class Function>
inline void activate_each(const Function& function, const float* gate, const float* up, int32_t width, float* y) {
  each_vector(width, [&](int32_t i, auto columns) {
    const F32 value = function(columns.load(gate + i));
    columns.store(y + i, up == nullptr ? value : mul(value, columns.load(up + i)));
  });
}

// y = act(gate) × up, or act(gate) where up is null. y may be the gate.
inline void activate_row(Activation activation, const float* gate, const float* up, int32_t width, float* y) {
  switch (activation) {
    case Activation::silu: return activate_each([](F32 x) { return silu(x); }, gate, up, width, y);
    case Activation::gelu_tanh: return activate_each([](F32 x) { return gelu_tanh(x); }, gate, up, width, y);
    case Activation::gelu: return activate_each([](F32 x) { return gelu(x); }, gate, up, width, y);
    case Activation::relu:  // a NaN stays one
      return activate_each([](F32 x) { return max(splat(0.0f), x); }, gate, up, width, y);
  }
}

// ---------------------------------------------------------------- rows as int8

// Groups [begin, end) of row `row` of `out`; x: their values. The scale of a group is its largest |x| / 127; under
// 2^-100 the group counts as zero. A value that is not finite makes the scale NaN.
inline void quantise_row(const float* x, const QuantRows& out, int64_t row, int32_t begin, int32_t end) {
  const int32_t groups = out.width / kGroup;
  const int32_t lane = static_cast<int32_t>(row % kTile);
  const int64_t first = row - lane;
  const int32_t lanes = static_cast<int32_t>(out.rows - first < kTile ? out.rows - first : kTile);
  uint8_t* at = out.data + kGroupBytes * (groups * first + lanes * begin) + 4 * lane;
  for (int32_t g = begin; g < end; ++g, at += kGroupBytes * lanes, x += kGroup) {
    const F32 a = load(x), b = load(x + kLanes);
    const float peak = largest(max(abs(a), abs(b)));
    const float nothing = sum(add(mul(a, splat(0.0f)), mul(b, splat(0.0f))));
    const bool tiny = !(peak >= 0x1p-100f);
    const float inverse = tiny ? 0.0f : 127.0f / peak;
    const float scale = (tiny ? 0.0f : peak / 127.0f) + nothing;
    const bool finite = scale - scale == 0.0f;
    const F32 first_codes = finite ? round(mul(a, splat(inverse))) : splat(0.0f);
    const F32 second_codes = finite ? round(mul(b, splat(inverse))) : splat(0.0f);
    int8_t codes[kGroup];
    store_i8(codes, first_codes);
    store_i8(codes + kLanes, second_codes);
    for (int32_t step = 0; step < 8; ++step) std::memcpy(at + 4 * lanes * step, codes + 4 * step, 4);
    const float half = sum(first_codes);
    const float count = half + sum(second_codes);
    const float figures[] = {scale, scale * count, count, half};
    for (int32_t i = 0; i < 4; ++i) std::memcpy(at + kGroup * lanes + 4 * lanes * i, &figures[i], sizeof(float));
  }
}

// y += scale × x
inline void add_row(const float* x, float scale, int32_t width, float* y) {
  each_vector(width, [&](int32_t i, auto columns) {
    columns.store(y + i, fma(splat(scale), columns.load(x + i), columns.load(y + i)));
  });
}

// x × scale, then cap × tanh(x / cap) unless cap is 0. In place. What is not finite becomes NaN: tanh would hide it.
inline void scale_row(float scale, float cap, int32_t width, float* x) {
  each_vector(width, [&](int32_t i, auto columns) {
    F32 value = mul(columns.load(x + i), splat(scale));
    if (cap != 0.0f) value = fma(splat(cap), tanh(div(value, splat(cap))), mul(value, splat(0.0f)));
    columns.store(x + i, value);
  });
}

}  // namespace headrace::HEADRACE_ISA
