// Attention and the KV cache over numpy arrays, for tests: one step at a time, in one thread.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention_plan.h"
#include "bindings.h"
#include "kv.h"
#include "table.h"

namespace nb = nanobind;
using namespace headrace;

namespace {

template <class T>
using Array = nb::ndarray<T, nb::numpy, nb::c_contig, nb::device::cpu>;
using Bytes = Array<uint8_t>;
using Floats = Array<float>;
using ConstFloats = Array<const float>;

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

KvType kv_type(const std::string& name) {
  if (name == "f32") return KvType::f32;
  if (name == "bf16") return KvType::bf16;
  if (name == "i8") return KvType::i8;
  throw std::invalid_argument("no KV type named " + name + "; there are f32, bf16 and i8");
}

// One layer's KV in arrays of the caller's.
struct KvArrays {
  KvArrays(const std::string& type, int32_t kv_heads, int32_t head_dim, int32_t block_size, int32_t num_blocks,
           Bytes key_bytes, Bytes value_bytes, Floats key_floats, Floats value_floats)
      : keys(key_bytes), values(value_bytes), key_scales(key_floats), value_scales(value_floats) {
    require(kv_heads > 0 && head_dim > 0 && block_size > 0 && num_blocks > 0, "KV sizes must be positive");
    layer = {keys.data(), values.data(), key_scales.data(), value_scales.data(), kv_type(type), kv_heads, head_dim,
             block_size, num_blocks, 0, 0, 0};
    layer.key_step = block_keys(layer);
    layer.value_step = block_values(layer);
    layer.scale_step = block_scales(layer);
    const int64_t bytes = element_bytes(layer.type);
    require(static_cast<int64_t>(keys.size()) == block_keys(layer) * bytes * num_blocks, "keys: wrong size");
    require(static_cast<int64_t>(values.size()) == block_values(layer) * bytes * num_blocks, "values: wrong size");
    for (const Floats* scales : {&key_scales, &value_scales}) {
      require(static_cast<int64_t>(scales->size()) == block_scales(layer) * num_blocks, "scales: wrong size");
    }
  }

  Bytes keys, values;
  Floats key_scales, value_scales;
  KvLayer layer;
};

// Weight, bias, eps, and whether it is a LayerNorm.
using Norm = std::tuple<ConstFloats, std::optional<ConstFloats>, float, bool>;

NormArgs norm_args(const Norm& norm, int32_t head_dim) {
  const auto& [weight, bias, eps, layer] = norm;
  require(static_cast<int64_t>(weight.size()) == head_dim, "norm: wrong width");
  require(!bias || static_cast<int64_t>(bias->size()) == head_dim, "norm: wrong width of the bias");
  return {layer ? NormKind::layer : NormKind::rms, weight.data(), bias ? bias->data() : nullptr, eps, head_dim};
}

int64_t rows_of(const nb::ndarray<>& array, int64_t width, const char* name) {
  require(array.ndim() == 2 && static_cast<int64_t>(array.shape(1)) >= width, std::string(name) + ": wrong shape");
  return static_cast<int64_t>(array.shape(0));
}

void rotate(const std::string& isa, const KvArrays& kv, Floats q, Floats k, Floats v, int32_t heads,
            const std::optional<Norm>& q_norm, const std::optional<Norm>& k_norm, ConstFloats cos, ConstFloats sin,
            bool interleaved, Array<const int32_t> positions, Array<const int64_t> slots) {
  const KvLayer& layer = kv.layer;
  const int64_t tokens = rows_of(nb::ndarray<>(q), static_cast<int64_t>(heads) * layer.head_dim, "q");
  const int64_t kv_width = static_cast<int64_t>(layer.kv_heads) * layer.head_dim;
  require(rows_of(nb::ndarray<>(k), kv_width, "k") == tokens, "k: wrong number of tokens");
  require(rows_of(nb::ndarray<>(v), kv_width, "v") == tokens, "v: wrong number of tokens");
  require(static_cast<int64_t>(positions.size()) == tokens, "positions: wrong number of tokens");
  require(static_cast<int64_t>(slots.size()) == tokens, "slots: wrong number of tokens");
  const int64_t table = rows_of(nb::ndarray<>(cos), 0, "cos"), pairs = static_cast<int64_t>(cos.shape(1));
  require(rows_of(nb::ndarray<>(sin), pairs, "sin") == table && 2 * pairs <= layer.head_dim, "sin: wrong shape");
  for (int64_t i = 0; i < tokens; ++i) {
    require(positions.data()[i] >= 0 && positions.data()[i] < table, "positions: outside the table");
    require(slots.data()[i] >= 0 && slots.data()[i] < static_cast<int64_t>(layer.num_blocks) * layer.block_size,
            "slots: outside the blocks");
  }
  NormArgs norms[2];
  if (q_norm) norms[0] = norm_args(*q_norm, layer.head_dim);
  if (k_norm) norms[1] = norm_args(*k_norm, layer.head_dim);
  const auto stride = [](const Floats& array) { return static_cast<int64_t>(array.shape(1)); };
  const RotateArgs args{q.data(), k.data(), v.data(), stride(q), stride(k), stride(v), heads,
                        q_norm ? &norms[0] : nullptr, k_norm ? &norms[1] : nullptr,
                        {cos.data(), sin.data(), static_cast<int32_t>(2 * pairs), interleaved},
                        &layer, positions.data(), slots.data()};
  kernels_named(isa).rotate_and_store(args, 0, static_cast<int32_t>(tokens));
}

// Spans from rows of (first, length, context), each with its row of `tables`.
std::vector<Span> spans_of(const Array<const int32_t>& rows, const Array<const int32_t>& tables,
                           const KvLayer& layer, int64_t tokens) {
  require(rows.ndim() == 2 && rows.shape(1) == 3, "spans: wrong shape");
  require(tables.ndim() == 2 && tables.shape(0) == rows.shape(0), "tables: wrong shape");
  std::vector<Span> spans;
  for (size_t i = 0; i < rows.shape(0); ++i) {
    const int32_t* row = rows.data() + 3 * i;
    const int32_t* table = tables.data() + i * tables.shape(1);
    require(row[0] >= 0 && row[1] > 0 && static_cast<int64_t>(row[0]) + row[1] <= tokens, "spans: outside the tokens");
    require(row[2] >= row[1], "spans: context shorter than the span");
    const int64_t blocks = (static_cast<int64_t>(row[2]) + layer.block_size - 1) / layer.block_size;
    require(blocks <= static_cast<int64_t>(tables.shape(1)), "tables: too few blocks");
    require(std::all_of(table, table + blocks, [&](int32_t b) { return b >= 0 && b < layer.num_blocks; }),
            "tables: outside the blocks");
    spans.push_back({row[0], row[1], row[2], table});
  }
  return spans;
}

// Items planned for `threads`, run in an order drawn with `seed` (0: as planned). Returns how many there are.
int32_t attend(const std::string& isa, const KvArrays& kv, ConstFloats q, Floats out, int32_t heads, float scale,
               float softcap, int32_t window, Array<const int32_t> rows, Array<const int32_t> tables, int32_t threads,
               uint32_t seed) {
  const KvLayer& layer = kv.layer;
  require(heads > 0 && heads % layer.kv_heads == 0, "heads: must be a multiple of the KV heads");
  require(threads > 0 && window >= 0, "threads must be positive, the window must not be negative");
  const int64_t width = static_cast<int64_t>(heads) * layer.head_dim;
  const int64_t tokens = rows_of(nb::ndarray<>(q), width, "q");
  require(rows_of(nb::ndarray<>(out), width, "out") == tokens, "out: wrong number of tokens");
  const std::vector<Span> spans = spans_of(rows, tables, layer, tokens);
  AttentionPlan plan;
  plan.make(spans.data(), static_cast<int32_t>(spans.size()), {heads, layer.kv_heads, layer.head_dim, window},
            threads);
  std::vector<int32_t> order(plan.size());
  std::iota(order.begin(), order.end(), 0);
  if (seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  // What is not written must not matter.
  std::vector<float> partials(plan.partial_floats(), std::nanf(""));
  std::vector<float> scratch(attention_scratch(heads, layer.kv_heads, layer.head_dim), std::nanf(""));
  const AttentionArgs args{q.data(), static_cast<int64_t>(q.shape(1)), out.data(),
                           static_cast<int64_t>(out.shape(1)), heads, scale, softcap, window, &layer,
                           spans.data(), static_cast<int32_t>(spans.size())};
  const AttentionWork work = plan.work(partials.data());
  const Kernels& kernels = kernels_named(isa);
  nb::gil_scoped_release unlocked;
  for (const int32_t item : order) kernels.attend(args, work, item, item + 1, scratch.data());
  return plan.size();
}

}  // namespace

void bind_attention(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<KvArrays>(m, "KvArrays", "One layer's KV cache in the caller's arrays; kernels.h says how they lie.")
      .def(nb::init<const std::string&, int32_t, int32_t, int32_t, int32_t, Bytes, Bytes, Floats, Floats>(), "type"_a,
           "kv_heads"_a, "head_dim"_a, "block_size"_a, "num_blocks"_a, "keys"_a, "values"_a, "key_scales"_a,
           "value_scales"_a);
  m.def("rotate_and_store", &rotate, "isa"_a, "kv"_a, "q"_a, "k"_a, "v"_a, "heads"_a, "q_norm"_a.none(),
        "k_norm"_a.none(), "cos"_a, "sin"_a, "interleaved"_a, "positions"_a, "slots"_a,
        "Norms and turns queries and keys in place, stores keys and values; ValueError for what does not fit.");
  m.def("attend", &attend, "isa"_a, "kv"_a, "q"_a, "out"_a, "heads"_a, "scale"_a, "softcap"_a, "window"_a, "spans"_a,
        "tables"_a, "threads"_a = 1, "seed"_a = 0,
        "Attention of spans (first, length, context), cut for `threads`, its items in an order drawn with `seed`.");
}
