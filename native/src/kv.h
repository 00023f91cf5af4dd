// Where a layer's keys and values lie, and the pieces into which attention is cut. Included by the kernel files too:
// functions are `static`, so that each of these has its own.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace headrace {

// ---------------------------------------------------------------- layout

static inline int32_t round_up(int32_t n, int32_t unit) { return (n + unit - 1) / unit * unit; }

static inline int32_t padded_block(const KvLayer& kv) { return round_up(kv.block_size, 16); }
static inline int32_t padded_dim(const KvLayer& kv) { return round_up(kv.head_dim, 16); }

static inline int32_t element_bytes(KvType type) {
  return type == KvType::f32 ? 4 : type == KvType::bf16 ? 2 : 1;
}

// Elements of one block, all heads.
static inline int64_t block_keys(const KvLayer& kv) {
  return static_cast<int64_t>(kv.kv_heads) * kv.head_dim * padded_block(kv);
}
static inline int64_t block_values(const KvLayer& kv) {
  return static_cast<int64_t>(kv.kv_heads) * padded_dim(kv) * padded_block(kv);
}
// Scales of one block's keys, and as many of its values; none unless the type is i8.
static inline int64_t block_scales(const KvLayer& kv) {
  return kv.type == KvType::i8 ? static_cast<int64_t>(kv.kv_heads) * padded_block(kv) : 0;
}

// Of a head's first key (dimension 0), value and scale in a block; in elements.
static inline int64_t key_place(const KvLayer& kv, int64_t block, int32_t head) {
  return block * kv.key_step + static_cast<int64_t>(head) * kv.head_dim * padded_block(kv);
}
static inline int64_t value_place(const KvLayer& kv, int64_t block, int32_t head) {
  return block * kv.value_step + static_cast<int64_t>(head) * padded_block(kv) * padded_dim(kv);
}
static inline int64_t scale_place(const KvLayer& kv, int64_t block, int32_t head) {
  return block * kv.scale_step + static_cast<int64_t>(head) * padded_block(kv);
}

// ---------------------------------------------------------------- pieces of attention

constexpr int32_t kChunk = 64;            // keys whose scores share a maximum
constexpr int32_t kSegment = 2 * kChunk;  // keys whose chunks are summed before they join the others
constexpr int32_t kTileRows = 6;          // queries in registers at a time
constexpr int32_t kItemRows = 48;         // queries that share a load of keys, unless one token has more

// The queries [query, query + queries) of a span in the heads of [kv_head, kv_head + kv_heads), and of what they see
// the segments [first_segment, end_segment).
struct AttentionItem {
  int32_t span;
  int32_t kv_head;
  int32_t kv_heads;
  int32_t query;
  int32_t queries;
  int32_t first_segment;
  int32_t end_segment;
  int32_t split;  // of which this is a part, or -1: the item sees all that its queries see
};

// Queries whose segments several items hold (of one head). Whoever finishes last merges them.
struct AttentionSplit {
  int32_t first_segment;
  int32_t end_segment;
  int32_t parts;
  int32_t remaining;  // parts that are not finished; counts again from `parts` once they are
  int64_t partials;   // where its rows' states begin: [segment][row][state], in floats
};

struct AttentionWork {
  const AttentionItem* items;
  AttentionSplit* splits;
  float* partials;
};

// Floats of what is known of a row after some keys: 16 sums of weights, the maximum (16 times), weighted values.
static inline int32_t state_floats(int32_t head_dim) { return 32 + round_up(head_dim, 16); }

// Most rows of an item: `group` queries share a KV head.
static inline int32_t item_rows(int32_t group) { return group > kItemRows ? group : kItemRows / group * group; }

// Floats of a thread's scratch for `attend`.
static inline int64_t attention_scratch(int32_t heads, int32_t kv_heads, int32_t head_dim) {
  const int64_t rows = item_rows(heads / kv_heads);
  const int64_t queries = round_up(static_cast<int32_t>(rows * head_dim), 16);
  const int64_t chunk = static_cast<int64_t>(kChunk) * (head_dim + round_up(head_dim, 16));
  return queries + 2 * rows * state_floats(head_dim) + kTileRows * kChunk + chunk + 2 * kChunk;
}

}  // namespace headrace
