// What is done to one token's activations at a time: norms, activations, quantising. A reduction over a row sums sixteen
// partial sums, column i into sum i mod 16, and these in the order of `sum`: one order whatever the step holds.
#pragma once

#include "../kernels.h"
#include "simd.h"

namespace headrace::HEADRACE_ISA {

// Lanes of the vector at column i that hold part of the row.
inline int32_t lanes_at(int32_t i, int32_t width) { return width - i < kLanes ? width - i : kLanes; }

// ---------------------------------------------------------------- norms

inline float mean(const float* x, int32_t width, float minus, bool squared) {
  F32 total = splat(0.0f);
  const F32 centre = splat(minus);
  for (int32_t i = 0; i < width; i += kLanes) {
    const int32_t lanes = lanes_at(i, width);
    const F32 value = first(lanes, sub(load_first(x + i, lanes), centre), splat(0.0f));
    total = squared ? fma(value, value, total) : add(total, value);
  }
  return sum(total) / static_cast<float>(width);
}

// RMSNorm (arXiv 1910.07467): x / sqrt(mean(x²) + eps) × weight, or LayerNorm (arXiv 1607.06450). x and y may be one.
inline void norm_row(const NormArgs& args, const float* x, float* y) {
  const float centre = args.kind == NormKind::layer ? mean(x, args.width, 0.0f, false) : 0.0f;
  const float scale = 1.0f / __builtin_sqrtf(mean(x, args.width, centre, true) + args.eps);
  for (int32_t i = 0; i < args.width; i += kLanes) {
    const int32_t lanes = lanes_at(i, args.width);
    F32 value = mul(sub(load_first(x + i, lanes), splat(centre)), splat(scale));
    value = mul(value, load_first(args.weight + i, lanes));
    if (args.bias != nullptr) value = add(value, load_first(args.bias + i, lanes));
    store_first(y + i, value, lanes);
  }
}

// ---------------------------------------------------------------- activations

inline F32 sigmoid(F32 x) { return div(splat(1.0f), add(splat(1.0f), exp(sub(splat(0.0f), x)))); }

// To within 2 ulp: 1 - 2 / (e^2x + 1), but where |x| ≤ 0.6, and this would lose the last digits, the continued fraction
// x / (1 + x² / (3 + x² / (5 + x² / (7 + x² / 9)))), to within 1e-8 there. A NaN stays one: it is not above 0.6.
inline F32 tanh(F32 x) {
  const F32 z = mul(x, x);
  const F32 over = fma(z, add(z, splat(105.0f)), splat(945.0f));
  const F32 under = fma(z, fma(splat(15.0f), z, splat(420.0f)), splat(945.0f));
  const F32 near = div(mul(x, over), under);
  const F32 far = sub(splat(1.0f), div(splat(2.0f), add(exp(add(x, x)), splat(1.0f))));
  return select_less(splat(0.6f), abs(x), far, near);
}

inline F32 activate(Activation activation, F32 x) {
  switch (activation) {
    // Below -88 exp() grows no further. A NaN stays one: max() gives its second argument.
    case Activation::silu: return mul(max(splat(-88.0f), x), sigmoid(x));
    case Activation::gelu_tanh: {
      const F32 inner = mul(fma(mul(x, mul(x, x)), splat(0.044715f), x), splat(0.7978845608f));
      return mul(mul(splat(0.5f), x), add(splat(1.0f), tanh(inner)));
    }
    case Activation::gelu: {
      float lanes[kLanes];
      store(lanes, x);
      for (int32_t i = 0; i < kLanes; ++i) {
        lanes[i] = 0.5f * lanes[i] * (1.0f + __builtin_erff(lanes[i] * 0.70710678f));
      }
      return load(lanes);
    }
    case Activation::relu: {
      // A NaN stays one.
      return max(splat(0.0f), x);
    }
  }
  return x;
}

// y = act(gate) × up, or act(x) where up is null. y may be the gate.
inline void activate_row(Activation activation, const float* gate, const float* up, int32_t width, float* y) {
  for (int32_t i = 0; i < width; i += kLanes) {
    const int32_t lanes = lanes_at(i, width);
    F32 value = activate(activation, load_first(gate + i, lanes));
    if (up != nullptr) value = mul(value, load_first(up + i, lanes));
    store_first(y + i, value, lanes);
  }
}

// ---------------------------------------------------------------- rows as int8

// Row `row` of `out` from x. The scale of a group is its largest |x| / 127; under 2^-100 the group counts as zero. A
// value that is not finite makes the scale NaN.
inline void quantise_row(const float* x, const QuantRows& out, int64_t row) {
  const int32_t groups = out.width / kGroup;
  int8_t* codes = out.codes + row * out.width;
  for (int32_t g = 0; g < groups; ++g) {
    const F32 a = load(x + kGroup * g), b = load(x + kGroup * g + kLanes);
    const float peak = largest(max(abs(a), abs(b)));
    const float nothing = sum(add(mul(a, splat(0.0f)), mul(b, splat(0.0f))));
    const bool tiny = !(peak >= 0x1p-100f);
    const float inverse = tiny ? 0.0f : 127.0f / peak;
    const F32 first_codes = round(mul(a, splat(inverse))), second_codes = round(mul(b, splat(inverse)));
    const float scale = (tiny ? 0.0f : peak / 127.0f) + nothing;
    const bool finite = scale - scale == 0.0f;
    store_i8(codes + kGroup * g, finite ? first_codes : splat(0.0f));
    store_i8(codes + kGroup * g + kLanes, finite ? second_codes : splat(0.0f));
    const float half = finite ? sum(first_codes) : 0.0f;
    const float count = finite ? half + sum(second_codes) : 0.0f;
    const int64_t place = row * groups + g;
    out.scales[place] = scale;
    out.sums[place] = scale * count;
    out.counts[place] = count;
    out.halves[place] = half;
  }
}

// y += scale × x
inline void add_row(const float* x, float scale, int32_t width, float* y) {
  for (int32_t i = 0; i < width; i += kLanes) {
    const int32_t lanes = lanes_at(i, width);
    store_first(y + i, fma(splat(scale), load_first(x + i, lanes), load_first(y + i, lanes)), lanes);
  }
}

// x × scale, then cap × tanh(x / cap) unless cap is 0. In place. What is not finite becomes NaN: tanh would hide it.
inline void scale_row(float scale, float cap, int32_t width, float* x) {
  for (int32_t i = 0; i < width; i += kLanes) {
    const int32_t lanes = lanes_at(i, width);
    F32 value = mul(load_first(x + i, lanes), splat(scale));
    if (cap != 0.0f) value = fma(splat(cap), tanh(div(value, splat(cap))), mul(value, splat(0.0f)));
    store_first(x + i, value, lanes);
  }
}

}  // namespace headrace::HEADRACE_ISA
