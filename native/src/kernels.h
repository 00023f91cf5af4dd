// What is compiled once an instruction set: arguments, and the table of functions through which the rest of the
// library reaches them. Every function computes the part [begin, end) of its work, so that threads can share it; what
// it computes for a token never depends on which other tokens are there.
#pragma once

#include <cstdint>

namespace headrace {

// ---------------------------------------------------------------- rows of activations

constexpr int32_t kGroup = 32;  // activations that share a scale

// Rows of int8 activations: x ≈ scale × code, a scale for each 32 columns. A row whose input is not finite has scales
// that are not. Rows lie in tiles, as products meet them: `tile` rows (of the instruction set's table) interleaved, the
// last tile with the few that are left. Of a tile of R rows, each group is
//   8 steps of R × 4 codes, then R floats each: scales, sums (scale × sum of the codes), counts (sum of the codes), and
//   halves (sum of the codes of the first 16 columns)
struct QuantRows {
  uint8_t* data;
  int32_t rows;
  int32_t width;  // a multiple of kGroup
};

constexpr int64_t kGroupBytes = kGroup + 4 * sizeof(float);  // of one row

// ---------------------------------------------------------------- weights

constexpr int32_t kPanel = 16;  // rows of a weight that lie interleaved

enum class Codes : int32_t { f32, f16, bf16, q4, q6, q8 };

// What scales the codes of `groups` groups of 32 columns. A value is scale × (code - zero) + minimum.
enum class Scales : int32_t {
  none,     // plain numbers
  half,     // f16 scale
  halves,   // f16 scale, f16 minimum
  single,   // f32 scale
  singles,  // f32 scale, f32 minimum
  k4,       // 8 groups: f16 d, f16 e, and a group u8 s, u8 m: scale = d × s, minimum = -(e × m)
  k6        // 8 groups: f16 d, and half a group i8 s: scale = d × s
};

// A weight of (rows, columns), packed by `pack.h`: panels of 16 rows, the last one filled up with zeros.
struct Weight {
  const uint8_t* data;
  int64_t panel_bytes;
  int32_t rows;
  int32_t columns;
  Codes codes;
  Scales scales;
  int32_t groups;  // of 32 columns that share a scale
  int32_t zero;
};

// Bytes of a panel's group of codes. (`static`: each kernel file has its own.)
static constexpr int32_t code_bytes(Codes codes) { return codes == Codes::q4 ? 256 : codes == Codes::q6 ? 384 : 512; }

// Of what precedes `groups` groups, and of what precedes each of them.
static constexpr int32_t header_bytes(Scales scales) {
  switch (scales) {
    case Scales::half: return 32;
    case Scales::halves: return 64;
    case Scales::single: return 64;
    case Scales::singles: return 128;
    case Scales::k4: return 64;
    case Scales::k6: return 32;
    case Scales::none: return 0;
  }
  return 0;
}
static constexpr int32_t group_header_bytes(Scales scales) {
  return scales == Scales::k4 || scales == Scales::k6 ? 32 : 0;
}

// Tokens that meet a panel before the next panel comes: whole tiles on every machine.
constexpr int32_t kTokens = 120;

enum class Store : int32_t {
  put,  // y = x wᵀ + bias
  add   // y += scale × (x wᵀ + bias)
};

struct LinearArgs {
  const Weight* weight;
  const float* bias;  // [rows of the weight] or null
  const float* x;     // [tokens][x_stride]: for plain numbers
  int64_t x_stride;
  QuantRows quantised;  // for codes
  float* y;             // [tokens][y_stride]
  int64_t y_stride;
  int32_t tokens;
  Store store;
  float scale;
};

// ---------------------------------------------------------------- row by row

enum class NormKind : int32_t { rms, layer };

struct NormArgs {
  NormKind kind;
  const float* weight;
  const float* bias;  // or null
  float eps;
  int32_t width;
};

enum class Activation : int32_t { silu, gelu, gelu_tanh, relu };

// ---------------------------------------------------------------- keys and values

enum class KvType : int32_t { f32, bf16, i8 };

// One layer's memory, all blocks. A block's tokens are padded to a multiple of 16, a head's values as well.
// keys   [block][kv head][head dim][padded block]: sixteen tokens of one dimension lie together
// values [block][kv head][padded block][padded head dim]
// scales [block][kv head][padded block], of keys and of values, for i8 only: x ≈ scale × code, one scale a token
struct KvLayer {
  uint8_t* keys;
  uint8_t* values;
  float* key_scales;
  float* value_scales;
  KvType type;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t num_blocks;
  // From a block to the next, in numbers: all layers' parts of a block may lie together.
  int64_t key_step;
  int64_t value_step;
  int64_t scale_step;
};

// One request's tokens in this step.
struct Span {
  int32_t first;          // its first place among the step's tokens
  int32_t length;
  int32_t context;        // tokens that its last token sees, itself included
  const int32_t* blocks;  // block table
};

struct RopeArgs {
  const float* cos;  // [positions][dim / 2]
  const float* sin;  // [positions][dim / 2]
  int32_t dim;       // of a head's dimensions, the first so many turn; 0: none
  bool interleaved;  // pairs are (0, 1), (2, 3) … and not (i, i + dim / 2)
};

// Queries, keys and values of one token: normed (where there is a norm), turned, keys and values stored.
struct RotateArgs {
  float* q;  // [tokens][q_stride], of it heads × head dim
  float* k;  // [tokens][k_stride]
  float* v;
  int64_t q_stride, k_stride, v_stride;
  int32_t heads;
  const NormArgs* q_norm;  // over one head, or null
  const NormArgs* k_norm;
  RopeArgs rope;
  const KvLayer* kv;
  const int32_t* positions;  // [tokens]
  const int64_t* slots;      // [tokens] block × block size + offset
};

struct AttentionArgs {
  const float* q;  // [tokens][q_stride], of it heads × head dim
  int64_t q_stride;
  float* out;  // [tokens][out_stride]
  int64_t out_stride;
  int32_t heads;
  float scale;
  float softcap;   // of the scaled scores: cap × tanh(x / cap); 0: none
  int32_t window;  // position i sees positions > i - window; 0: all
  const KvLayer* kv;
  const Span* spans;
  int32_t num_spans;
};

}  // namespace headrace
