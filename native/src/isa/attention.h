// softmax(scale × q kᵀ) v over a block table.
//
// A query meets its keys in chunks of 64 positions (0 … 63, 64 … 127, …), two chunks make a segment. A chunk gives its
// maximum m, 16 sums of the weights e^(s - m), and the weighted values; chunks join their segment, segments the row, in
// the order of positions and by one formula (`merge`). A score is a sum over the dimensions in order, a weighted value
// a sum over the keys in order. So a query's bits depend on what it sees and on nothing else: not on the tile or the
// item in which it is computed, nor on how keys are cut into blocks or among threads.
//
// What a query does not see may be anything, NaN included: it is masked, never multiplied by zero, unless it has been
// found to be finite. A visible score that is not finite makes the row's sums NaN (exp alone would swallow it).
// -0 is not told from +0: `merge` ends with an addition of +0, since 0 × v has the sign of a v that is not seen.
#pragma once

#include "../kernels.h"
#include "../kv.h"
#include "rows.h"
#include "simd.h"

namespace headrace::HEADRACE_ISA {

// ---------------------------------------------------------------- one type of KV each

struct LoadF32 {
  using Element = float;
  static inline F32 at(const float* p) { return load(p); }
  static inline float one(float x) { return x; }
};
struct LoadBf16 {
  using Element = uint16_t;
  static inline F32 at(const uint16_t* p) { return load_bf16(p); }
  static inline float one(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
};
struct LoadI8 {
  using Element = int8_t;
  static inline F32 at(const int8_t* p) { return load_i8(p); }
  static inline float one(int8_t x) { return static_cast<float>(x); }
};

// Sums of 16 lanes that stay in registers. Numbers that are converted need one more register: with 6 sums of 3 rows,
// AVX2 keeps one of them in memory, and the loop waits for it (measured: a fifth slower).
#if defined(__AVX512F__)
constexpr int32_t kPlainSums = 24, kConvertedSums = 24;
#else
constexpr int32_t kPlainSums = 6, kConvertedSums = 5;
#endif

// Vectors that so many rows meet at a time, of four.
template <class Load>
constexpr int32_t widest(int32_t rows) {
  const int32_t sums = sizeof(typename Load::Element) < sizeof(float) ? kConvertedSums : kPlainSums;
  return 4 * rows <= sums ? 4 : 2 * rows <= sums ? 2 : 1;
}

constexpr int32_t kGroups = kChunk / kLanes;
constexpr float kInfinity = __builtin_inff();

// ---------------------------------------------------------------- states

// [0, 16): sums of weights, [16]: maximum, [32, …): weighted values
inline float* values_of(float* state) { return state + 2 * kLanes; }

inline void clear_state(float* state, int32_t width) {
  store(state, splat(0.0f));
  store(state + kLanes, splat(-kInfinity));
  for (int32_t i = 0; i < width; i += kLanes) store(values_of(state) + i, splat(0.0f));
}

// What two states are scaled by when they join.
struct Factors {
  F32 maximum, old_factor, new_factor;
};
inline Factors join(F32 old_maximum, F32 new_maximum) {
  const F32 maximum = max(old_maximum, new_maximum);
  return {maximum, exp(sub(old_maximum, maximum)), exp(sub(new_maximum, maximum))};
}
inline F32 merge(F32 old_value, F32 old_factor, F32 new_value, F32 new_factor) {
  return add(fma(old_value, old_factor, mul(new_value, new_factor)), splat(0.0f));
}

// An empty state changes nothing.
inline void merge_state(float* state, const float* later, int32_t width) {
  const Factors f = join(load(state + kLanes), load(later + kLanes));
  store(state + kLanes, f.maximum);
  store(state, merge(load(state), f.old_factor, load(later), f.new_factor));
  for (int32_t i = 2 * kLanes; i < 2 * kLanes + width; i += kLanes) {
    store(state + i, merge(load(state + i), f.old_factor, load(later + i), f.new_factor));
  }
}

inline void finish_state(const float* state, int32_t dim, float* out) {
  const F32 total = splat(sum(load(state)));
  const float* values = state + 2 * kLanes;
  each_vector(dim, [&](int32_t i, auto columns) { columns.store(out + i, div(load(values + i), total)); });
}

// ---------------------------------------------------------------- an item, a chunk

// One head of an item. A row is a query of a token: row = token × group + query.
struct Meeting {
  const AttentionArgs* args;
  const int32_t* blocks;
  int32_t kv_head;
  int32_t group;
  int32_t rows;
  int32_t position;  // of the first token
  int32_t dim;
  int32_t width;  // dim, padded
  int32_t state;  // floats of a state

  float* queries;   // tile by tile, [dim][rows of the tile]
  float* segments;  // [rows][state]
  float* totals;    // [rows][state]
  float* weights;   // [rows of a tile][64]
  float* keys;      // [dim][64], if converted
  float* values;    // [64][width]
  float* key_scales;    // [64], `scale` included
  float* value_scales;  // [64]
};

// Sixteen keys each. Groups that no query of the item sees have no address.
struct Chunk {
  const void* keys[kGroups];
  const void* values[kGroups];
  int64_t key_stride;
  int32_t first;  // position
  bool finite;    // the values that some query of the item sees, if some other does not
};

// Of a chunk, what the token at `position` sees: [low, high) within 0 … 64.
struct Range {
  int32_t low, high;
};
inline Range seen(const AttentionArgs& args, int32_t position, int32_t first) {
  const int32_t start = args.window > 0 && position >= args.window ? position - args.window + 1 : 0;
  const int32_t low = start - first, high = position + 1 - first;
  return {low < 0 ? 0 : low > kChunk ? kChunk : low, high < 0 ? 0 : high > kChunk ? kChunk : high};
}

// a in the lanes of group g that are seen, b in the others.
inline F32 where_seen(Range range, int32_t g, F32 a, F32 b) {
  const int32_t low = range.low - kLanes * g, high = range.high - kLanes * g;
  const F32 below = first(high < 0 ? 0 : high > kLanes ? kLanes : high, a, b);
  return first(low < 0 ? 0 : low > kLanes ? kLanes : low, b, below);
}

// ---------------------------------------------------------------- scores

// q k of R rows and G groups of keys.
template <class Load, int R, int G>
inline void score(const float* queries, const void* const* keys, int64_t stride, int32_t dim, float* out) {
  using Element = typename Load::Element;
  const Element* address[G];
  F32 total[R][G];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    address[g] = static_cast<const Element*>(keys[g]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total[r][g] = splat(0.0f);
  }
  for (int32_t d = 0; d < dim; ++d) {
    F32 key[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) key[g] = Load::at(address[g] + d * stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32 x = splat(queries[d * R + r]);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) total[r][g] = fma(x, key[g], total[r][g]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) store(out + r * kChunk + g * kLanes, total[r][g]);
  }
}

template <class Load, int R>
inline void scores(const Meeting& m, const Chunk& c, const float* queries, int32_t begin, int32_t end) {
  constexpr int kWide = widest<Load>(R);
  int32_t g = begin;
  for (; g + kWide <= end; g += kWide) {
    score<Load, R, kWide>(queries, c.keys + g, c.key_stride, m.dim, m.weights + g * kLanes);
  }
  for (; g < end; ++g) score<Load, R, 1>(queries, c.keys + g, c.key_stride, m.dim, m.weights + g * kLanes);
}

inline F32 capped(F32 x, F32 cap) { return mul(cap, tanh(div(x, cap))); }

// A row's scores become weights. Returns the chunk's maximum; `sums` gets the weights' sums, lane by lane.
template <bool kWhole>
inline float soften(const Meeting& m, float* row, Range range, F32* sums) {
  const AttentionArgs& args = *m.args;
  const F32 zero = splat(0.0f), nothing = splat(-kInfinity);
  F32 s[kGroups];
  F32 total = zero;
  F32 peak = nothing;
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    s[g] = mul(load(row + g * kLanes), load(m.key_scales + g * kLanes));
    if constexpr (!kWhole) s[g] = where_seen(range, g, s[g], zero);
    total = fma(s[g], zero, total);  // NaN, if the score is not finite
    if (args.softcap != 0.0f) s[g] = capped(s[g], splat(args.softcap));
    if constexpr (!kWhole) s[g] = where_seen(range, g, s[g], nothing);
    peak = max(peak, s[g]);
  }
  const float maximum = largest(peak);
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    F32 weight = exp(sub(s[g], splat(maximum)));
    if constexpr (!kWhole) weight = where_seen(range, g, weight, zero);
    total = add(total, weight);
    if (args.kv->type == KvType::i8) {
      weight = mul(weight, load(m.value_scales + g * kLanes));
      if constexpr (!kWhole) weight = where_seen(range, g, weight, zero);
    }
    store(row + g * kLanes, weight);
  }
  *sums = total;
  return maximum;
}

// ---------------------------------------------------------------- values

// How a chunk joins the segment of each row of a tile.
struct Joining {
  float old_factor[kLanes];
  float new_factor[kLanes];
  bool any[kLanes];  // the row sees some of the chunk
};

// Values at columns [column, column + 16 G) of keys [low, high), weighted, into the segments of R rows.
template <class Load, int R, int G>
inline void weigh(const Meeting& m, const Chunk& c, const float* weights, Range range, int32_t column,
                  const Joining& j, int32_t row, int32_t at) {
  using Element = typename Load::Element;
  F32 total[R][G];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) total[r][g] = splat(0.0f);
  }
  int32_t key = range.low;
  while (key < range.high) {
    const int32_t group = key / kLanes, end = (group + 1) * kLanes < range.high ? (group + 1) * kLanes : range.high;
    const Element* value = static_cast<const Element*>(c.values[group]) + (key - group * kLanes) * m.width + column;
    for (; key < end; ++key, value += m.width) {
      F32 v[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) v[g] = Load::at(value + g * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F32 x = splat(weights[r * kChunk + key]);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) total[r][g] = fma(x, v[g], total[r][g]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (!j.any[at + r]) continue;
    const F32 old_factor = splat(j.old_factor[at + r]), new_factor = splat(j.new_factor[at + r]);
    float* out = values_of(m.segments + static_cast<int64_t>(row + r) * m.state) + column;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      store(out + g * kLanes, merge(load(out + g * kLanes), old_factor, total[r][g], new_factor));
    }
  }
}

// `row`: the first of R in the item; `at`: in the tile.
template <class Load, int R>
inline void weigh_all(const Meeting& m, const Chunk& c, Range range, const Joining& j, int32_t row, int32_t at) {
  constexpr int kWide = widest<Load>(R);
  const float* weights = m.weights + at * kChunk;
  int32_t column = 0;
  for (; column + kWide * kLanes <= m.width; column += kWide * kLanes) {
    weigh<Load, R, kWide>(m, c, weights, range, column, j, row, at);
  }
  for (; column < m.width; column += kLanes) weigh<Load, R, 1>(m, c, weights, range, column, j, row, at);
}

// ---------------------------------------------------------------- a tile of R rows and a chunk

template <class Load, int R>
void meet(const Meeting& m, const Chunk& c, int32_t row) {
  Range ranges[R], all = {kChunk, 0};
  bool whole = true, alike = true;
  for (int r = 0; r < R; ++r) {
    const Range range = ranges[r] = seen(*m.args, m.position + (row + r) / m.group, c.first);
    whole = whole && range.low == 0 && range.high == kChunk;
    alike = alike && range.low == ranges[0].low && range.high == ranges[0].high;
    if (range.low >= range.high) continue;
    all = {range.low < all.low ? range.low : all.low, range.high > all.high ? range.high : all.high};
  }
  if (all.low >= all.high) return;
  scores<Load, R>(m, c, m.queries + static_cast<int64_t>(row) * m.dim, all.low / kLanes,
                  (all.high + kLanes - 1) / kLanes);

  Joining j;
  F32 sums[R];
  float old_maximum[kLanes] = {}, new_maximum[kLanes] = {};
  float* const state = m.segments + static_cast<int64_t>(row) * m.state;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* weights = m.weights + r * kChunk;
    new_maximum[r] = whole ? soften<true>(m, weights, ranges[r], &sums[r])
                           : soften<false>(m, weights, ranges[r], &sums[r]);
    old_maximum[r] = state[static_cast<int64_t>(r) * m.state + kLanes];
    j.any[r] = ranges[r].low < ranges[r].high;
  }
  const Factors f = join(load(old_maximum), load(new_maximum));
  store(j.old_factor, f.old_factor);
  store(j.new_factor, f.new_factor);
  store(new_maximum, f.maximum);
  for (int r = 0; r < R; ++r) {
    if (!j.any[r]) continue;
    float* own = state + static_cast<int64_t>(r) * m.state;
    store(own + kLanes, splat(new_maximum[r]));
    store(own, merge(load(own), splat(j.old_factor[r]), sums[r], splat(j.new_factor[r])));
  }

  if (alike || c.finite) {
    weigh_all<Load, R>(m, c, all, j, row, 0);
  } else {  // 0 × a value that another row sees could be NaN
    for (int r = 0; r < R; ++r) weigh_all<Load, 1>(m, c, ranges[r], j, row + r, r);
  }
}

// Rows in tiles of about one size.
inline int32_t tile_count(int32_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int32_t tile_rows(int32_t rows, int32_t tile) {
  const int32_t tiles = tile_count(rows);
  return rows / tiles + (tile < rows % tiles ? 1 : 0);
}

template <class Load>
inline void meet_all(const Meeting& m, const Chunk& c) {
  int32_t row = 0;
  for (int32_t tile = 0; row < m.rows; ++tile) {
    const int32_t count = tile_rows(m.rows, tile);
    switch (count) {
      case 1: meet<Load, 1>(m, c, row); break;
      case 2: meet<Load, 2>(m, c, row); break;
      case 3: meet<Load, 3>(m, c, row); break;
      case 4: meet<Load, 4>(m, c, row); break;
      case 5: meet<Load, 5>(m, c, row); break;
      default: meet<Load, kTileRows>(m, c, row);
    }
    row += count;
  }
}

// ---------------------------------------------------------------- a chunk's keys and values

// Tokens [offset, offset + count) of a block become tokens [at, at + count) of the converted chunk.
template <class Load>
inline void convert(const Meeting& m, int64_t block, int32_t offset, int32_t count, int32_t at) {
  using Element = typename Load::Element;
  const KvLayer& kv = *m.args->kv;
  const int32_t stride = padded_block(kv);
  const Element* keys = reinterpret_cast<const Element*>(kv.keys) + key_place(kv, block, m.kv_head) + offset;
  const Element* values = reinterpret_cast<const Element*>(kv.values) + value_place(kv, block, m.kv_head) +
                          static_cast<int64_t>(offset) * m.width;
  for (int32_t d = 0; d < m.dim; ++d, keys += stride) {
    float* out = m.keys + d * kChunk + at;
    if (count == kLanes) {
      store(out, Load::at(keys));
    } else {  // the row is padded, so that 16 tokens can be read from the first of a group, and only from there
      for (int32_t i = 0; i < count; ++i) out[i] = Load::one(keys[i]);
    }
  }
  for (int32_t i = 0; i < count * m.width; i += kLanes) store(m.values + at * m.width + i, Load::at(values + i));
}

// Addresses, scales and, where asked for, conversion of what some query of the item sees.
template <class Load>
inline void open_chunk(const Meeting& m, Range range, bool converted, Chunk* c) {
  using Element = typename Load::Element;
  const AttentionArgs& args = *m.args;
  const KvLayer& kv = *args.kv;
  const bool whole_groups = kv.block_size % kLanes == 0;
  c->key_stride = converted ? kChunk : padded_block(kv);
  for (int32_t at = range.low / kLanes * kLanes; at < range.high;) {
    const int32_t position = c->first + at, offset = position % kv.block_size;
    const int64_t block = m.blocks[position / kv.block_size];
    int32_t count = kLanes;
    if (!whole_groups) {
      count = kv.block_size - offset < kLanes - at % kLanes ? kv.block_size - offset : kLanes - at % kLanes;
      if (count > range.high - at) count = range.high - at;
    }
    if (converted) {
      convert<Load>(m, block, offset, count, at);
    } else {
      c->keys[at / kLanes] = reinterpret_cast<const Element*>(kv.keys) + key_place(kv, block, m.kv_head) + offset;
      c->values[at / kLanes] = reinterpret_cast<const Element*>(kv.values) + value_place(kv, block, m.kv_head) +
                               static_cast<int64_t>(offset) * m.width;
    }
    if (kv.type == KvType::i8) {
      const int64_t place = scale_place(kv, block, m.kv_head) + offset;
      for (int32_t i = 0; i < count; ++i) {
        m.key_scales[at + i] = kv.key_scales[place + i] * args.scale;
        m.value_scales[at + i] = kv.value_scales[place + i];
      }
    }
    at += count;
  }
  if (!converted) return;
  for (int32_t g = 0; g < kGroups; ++g) {
    c->keys[g] = m.keys + g * kLanes;
    c->values[g] = m.values + static_cast<int64_t>(g) * kLanes * m.width;
  }
}

template <class Load>
inline bool all_finite(const Meeting& m, const Chunk& c, Range range) {
  using Element = typename Load::Element;
  F32 total = splat(0.0f);
  for (int32_t key = range.low; key < range.high; ++key) {
    const Element* value = static_cast<const Element*>(c.values[key / kLanes]) + key % kLanes * m.width;
    for (int32_t i = 0; i < m.width; i += kLanes) total = fma(Load::at(value + i), splat(0.0f), total);
  }
  return sum(total) == 0.0f;
}

template <class Load>
inline void meet_chunk(const Meeting& m, int32_t first) {
  const int32_t last = m.position + (m.rows - 1) / m.group;
  const Range early = seen(*m.args, m.position, first), late = seen(*m.args, last, first);
  const Range range = {early.low, late.high};
  if (range.low >= range.high) return;
  const bool alike = early.low == late.low && early.high == late.high;
  // A type that must be converted is converted once, unless it is met only once or twice.
  const bool narrow = element_bytes(m.args->kv->type) < 4;
  const bool converted = m.args->kv->block_size % kLanes != 0 || (narrow && tile_count(m.rows) > 2);
  Chunk c;
  c.first = first;
  open_chunk<Load>(m, range, converted, &c);
  // Codes are always finite: what is not is the scale, and that is masked.
  c.finite = alike || m.args->kv->type == KvType::i8 ||
             (converted ? all_finite<LoadF32>(m, c, range) : all_finite<Load>(m, c, range));
  if (converted) {
    meet_all<LoadF32>(m, c);
  } else {
    meet_all<Load>(m, c);
  }
}

inline void meet_segment(const Meeting& m, int32_t segment) {
  for (int32_t row = 0; row < m.rows; ++row) clear_state(m.segments + static_cast<int64_t>(row) * m.state, m.width);
  for (int32_t first = segment * kSegment; first < (segment + 1) * kSegment; first += kChunk) {
    switch (m.args->kv->type) {
      case KvType::f32: meet_chunk<LoadF32>(m, first); break;
      case KvType::bf16: meet_chunk<LoadBf16>(m, first); break;
      case KvType::i8: meet_chunk<LoadI8>(m, first); break;
    }
  }
}

// ---------------------------------------------------------------- items

inline Meeting open_item(const AttentionArgs& args, const AttentionItem& item, float* scratch) {
  const KvLayer& kv = *args.kv;
  const Span& span = args.spans[item.span];
  Meeting m;
  m.args = &args;
  m.blocks = span.blocks;
  m.group = args.heads / kv.kv_heads;
  m.rows = item.queries * m.group;
  m.position = span.context - span.length + item.query;
  m.dim = kv.head_dim;
  m.width = padded_dim(kv);
  m.state = state_floats(m.dim);
  const auto take = [&scratch](int64_t count) {
    float* const taken = scratch;
    scratch += count;
    return taken;
  };
  m.queries = take(round_up(m.rows * m.dim, kLanes));
  m.segments = take(static_cast<int64_t>(m.rows) * m.state);
  m.totals = take(static_cast<int64_t>(m.rows) * m.state);
  m.weights = take(kTileRows * kChunk);
  m.keys = take(static_cast<int64_t>(m.dim) * kChunk);
  m.values = take(static_cast<int64_t>(m.width) * kChunk);
  m.key_scales = take(kChunk);
  m.value_scales = take(kChunk);
  return m;
}

inline int64_t token_of(const Meeting& m, const AttentionItem& item, int32_t row) {
  return static_cast<int64_t>(m.args->spans[item.span].first) + item.query + row / m.group;
}
inline int64_t head_of(const Meeting& m, int32_t row) {
  return static_cast<int64_t>(m.kv_head) * m.group + row % m.group;
}

// Queries of a tile side by side, dimension after dimension.
inline void pack_queries(const Meeting& m, const AttentionItem& item) {
  float* out = m.queries;
  for (int32_t row = 0, tile = 0; row < m.rows; ++tile) {
    const int32_t count = tile_rows(m.rows, tile);
    for (int32_t r = 0; r < count; ++r, ++row) {
      const float* q = m.args->q + token_of(m, item, row) * m.args->q_stride + head_of(m, row) * m.dim;
      for (int32_t d = 0; d < m.dim; ++d) out[d * count + r] = q[d];
    }
    out += count * m.dim;
  }
}

inline void write_out(const Meeting& m, const AttentionItem& item) {
  for (int32_t row = 0; row < m.rows; ++row) {
    float* out = m.args->out + token_of(m, item, row) * m.args->out_stride + head_of(m, row) * m.dim;
    finish_state(m.totals + static_cast<int64_t>(row) * m.state, m.dim, out);
  }
}

inline void clear_totals(const Meeting& m) {
  for (int32_t row = 0; row < m.rows; ++row) clear_state(m.totals + static_cast<int64_t>(row) * m.state, m.width);
}
inline void merge_totals(const Meeting& m, const float* states) {
  for (int32_t row = 0; row < m.rows; ++row) {
    const int64_t place = static_cast<int64_t>(row) * m.state;
    merge_state(m.totals + place, states + place, m.width);
  }
}

// Of a split's part: the segments' states, and if it is the last one to finish, all of the rows' answer.
inline void attend_part(Meeting m, const AttentionItem& item, const AttentionWork& work) {
  AttentionSplit& split = work.splits[item.split];
  float* const states = work.partials + split.partials;
  const int64_t size = static_cast<int64_t>(m.rows) * m.state;
  for (int32_t segment = item.first_segment; segment < item.end_segment; ++segment) {
    m.segments = states + (segment - split.first_segment) * size;
    meet_segment(m, segment);
  }
  if (__atomic_sub_fetch(&split.remaining, 1, __ATOMIC_ACQ_REL) != 0) return;
  clear_totals(m);
  for (int32_t i = 0; i < split.end_segment - split.first_segment; ++i) merge_totals(m, states + i * size);
  write_out(m, item);
  __atomic_store_n(&split.remaining, split.parts, __ATOMIC_RELEASE);
}

// With few queries an item waits for memory: its blocks lie anywhere, and it goes through them head by head, keys and
// then values, in pieces too short for the machine to see where that leads. Block by block it does (measured: 8.7 µs
// instead of 12.1 for 128 tokens; asking for them with prefetch instructions: 11.2).
inline void read_blocks(const Meeting& m, const AttentionItem& item) {
  const KvLayer& kv = *m.args->kv;
  const int64_t each = element_bytes(kv.type);
  const int64_t keys = each * item.kv_heads * kv.head_dim * padded_block(kv);
  const int64_t values = each * item.kv_heads * padded_dim(kv) * padded_block(kv);
  const int32_t end = item.end_segment * kSegment < m.position + 1 ? item.end_segment * kSegment : m.position + 1;
  for (int32_t b = item.first_segment * kSegment / kv.block_size; b * kv.block_size < end; ++b) {
    read_through(kv.keys + each * key_place(kv, m.blocks[b], item.kv_head), keys);
    read_through(kv.values + each * value_place(kv, m.blocks[b], item.kv_head), values);
  }
}

// Items [begin, end) of the plan for these arguments; any thread may take any of them, in any order, each once.
// `scratch`: the thread's own, `attention_scratch` floats.
inline void attend(const AttentionArgs& args, const AttentionWork& work, int32_t begin, int32_t end, float* scratch) {
  for (int32_t i = begin; i < end; ++i) {
    const AttentionItem& item = work.items[i];
    Meeting m = open_item(args, item, scratch);
    for (int32_t g = 0; g < kGroups * kLanes; ++g) m.key_scales[g] = args.scale;
    if (m.rows <= kTileRows) read_blocks(m, item);
    for (m.kv_head = item.kv_head; m.kv_head < item.kv_head + item.kv_heads; ++m.kv_head) {
      pack_queries(m, item);
      if (item.split >= 0) {
        attend_part(m, item, work);
        continue;
      }
      clear_totals(m);
      for (int32_t segment = item.first_segment; segment < item.end_segment; ++segment) {
        meet_segment(m, segment);
        merge_totals(m, m.segments);
      }
      write_out(m, item);
    }
  }
}

}  // namespace headrace::HEADRACE_ISA
