// What happens to a token's queries, keys and values before attention: norms of single heads, rotary embedding, and
// keys and values into their places in the cache.
#pragma once

#include "../kernels.h"
#include "../kv.h"
#include "rows.h"
#include "simd.h"

namespace headrace::HEADRACE_ISA {

// x1 cos - x2 sin and x2 cos + x1 sin, each product rounded by itself, as the torch backend does it.
inline void rotate_head(const RopeArgs& rope, int32_t position, float* x) {
  const int32_t pairs = rope.dim / 2;
  const float* cos = rope.cos + static_cast<int64_t>(position) * pairs;
  const float* sin = rope.sin + static_cast<int64_t>(position) * pairs;
  if (rope.interleaved) {
    for (int32_t i = 0; i < pairs; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  each_vector(pairs, [&](int32_t i, auto columns) {
    const F32 a = columns.load(x + i), b = columns.load(x + pairs + i);
    const F32 c = columns.load(cos + i), s = columns.load(sin + i);
    columns.store(x + i, sub(mul(a, c), mul(b, s)));
    columns.store(x + pairs + i, add(mul(b, c), mul(a, s)));
  });
}

// ---------------------------------------------------------------- one token and head into the cache

// To the nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Scale of x: its largest |x| / 127. Too small for a normal number: 0, and all counts as zero. Not finite: NaN.
inline float int8_scale(const float* x, int32_t dim) {
  F32 peak = splat(0.0f), nothing = splat(0.0f);
  for (int32_t i = 0; i < dim; i += kLanes) {
    const F32 value = load_first(x + i, lanes_at(i, dim));
    peak = max(peak, abs(value));
    nothing = fma(value, splat(0.0f), nothing);
  }
  const float scale = largest(peak) / 127.0f + sum(nothing);
  return scale < 0x1p-126f ? 0.0f : scale;
}

// Codes of x[i …], zero where the scale is zero or NaN. `codes`: 16 of them, whatever `dim` is.
inline void int8_codes(const float* x, int32_t lanes, float scale, int8_t* codes) {
  store_i8(codes, scale > 0.0f ? round(div(load_first(x, lanes), splat(scale))) : splat(0.0f));
}

// The key goes where dimension d of its token lies, `stride` apart; the value is padded with zeros.
inline void store_head(const KvLayer& kv, int64_t block, int32_t offset, int32_t head, const float* k, const float* v) {
  const int32_t stride = padded_block(kv), width = padded_dim(kv), dim = kv.head_dim;
  const int64_t key = key_place(kv, block, head) + offset;
  const int64_t value = value_place(kv, block, head) + static_cast<int64_t>(offset) * width;
  switch (kv.type) {
    case KvType::f32: {
      float* keys = reinterpret_cast<float*>(kv.keys) + key;
      float* values = reinterpret_cast<float*>(kv.values) + value;
      for (int32_t d = 0; d < dim; ++d) keys[static_cast<int64_t>(d) * stride] = k[d];
      for (int32_t d = 0; d < width; ++d) values[d] = d < dim ? v[d] : 0.0f;
      return;
    }
    case KvType::bf16: {
      uint16_t* keys = reinterpret_cast<uint16_t*>(kv.keys) + key;
      uint16_t* values = reinterpret_cast<uint16_t*>(kv.values) + value;
      for (int32_t d = 0; d < dim; ++d) keys[static_cast<int64_t>(d) * stride] = to_bf16(k[d]);
      for (int32_t d = 0; d < width; ++d) values[d] = d < dim ? to_bf16(v[d]) : 0;
      return;
    }
    case KvType::i8: {
      int8_t* keys = reinterpret_cast<int8_t*>(kv.keys) + key;
      int8_t* values = reinterpret_cast<int8_t*>(kv.values) + value;
      const int64_t place = scale_place(kv, block, head) + offset;
      const float key_scale = kv.key_scales[place] = int8_scale(k, dim);
      const float value_scale = kv.value_scales[place] = int8_scale(v, dim);
      for (int32_t i = 0; i < dim; i += kLanes) {
        const int32_t lanes = lanes_at(i, dim);
        int8_t codes[kLanes];
        int8_codes(k + i, lanes, key_scale, codes);
        for (int32_t d = 0; d < lanes; ++d) keys[static_cast<int64_t>(i + d) * stride] = codes[d];
        int8_codes(v + i, lanes, value_scale, values + i);
      }
    }
  }
}

// ---------------------------------------------------------------- tokens

// Queries and keys of tokens [begin, end) are normed and turned in place; keys and values are stored.
inline void rotate_and_store(const RotateArgs& args, int32_t begin, int32_t end) {
  const KvLayer& kv = *args.kv;
  for (int32_t token = begin; token < end; ++token) {
    for (int32_t head = 0; head < args.heads; ++head) {
      float* q = args.q + token * args.q_stride + static_cast<int64_t>(head) * kv.head_dim;
      if (args.q_norm != nullptr) norm_row(*args.q_norm, q, q);
      rotate_head(args.rope, args.positions[token], q);
    }
    const int64_t block = args.slots[token] / kv.block_size;
    const int32_t offset = static_cast<int32_t>(args.slots[token] % kv.block_size);
    for (int32_t head = 0; head < kv.kv_heads; ++head) {
      float* k = args.k + token * args.k_stride + static_cast<int64_t>(head) * kv.head_dim;
      const float* v = args.v + token * args.v_stride + static_cast<int64_t>(head) * kv.head_dim;
      if (args.k_norm != nullptr) norm_row(*args.k_norm, k, k);
      rotate_head(args.rope, args.positions[token], k);
      store_head(kv, block, offset, head, k, v);
    }
  }
}

}  // namespace headrace::HEADRACE_ISA
