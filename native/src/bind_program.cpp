#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

#include "bindings.h"
#include "operations.h"
#include "session.h"

namespace nb = nanobind;
using namespace headrace;
using namespace nb::literals;

namespace {

using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using LinearPtr = std::shared_ptr<Linear>;
using WeightPtr = std::shared_ptr<PackedWeight>;

std::vector<float> copy_of(const Floats& array) { return {array.data(), array.data() + array.shape(0)}; }
std::vector<float> copy_of(const std::optional<Floats>& array) {
  return array ? copy_of(*array) : std::vector<float>();
}

// The weights of a norm, until an operation takes them.
struct NormParts {
  NormKind kind;
  float eps;
  std::vector<float> weight, bias;

  std::unique_ptr<Norm> make() const { return std::make_unique<Norm>(kind, eps, weight, bias); }
};

std::unique_ptr<Norm> make(const std::optional<NormParts>& parts) { return parts ? parts->make() : nullptr; }

// cos and sin of every position, shared by the layers that turn alike.
struct RopeTable {
  std::shared_ptr<const std::vector<float>> cos, sin;
  int32_t dim;
  bool interleaved;
};

KvType kv_type_named(const std::string& name) {
  if (name == "float32") return KvType::f32;
  if (name == "bfloat16") return KvType::bf16;
  if (name == "int8") return KvType::i8;
  throw std::invalid_argument("no keys and values of type " + name);
}

// A program being made, and the memory that its operations point to.
struct Builder {
  std::shared_ptr<Program> program;
  std::shared_ptr<KvStore> kv;

  int32_t add(std::unique_ptr<Operation> operation, int32_t phases = 1) {
    return program->add(std::move(operation), phases);
  }
};

}  // namespace

void bind_program(nb::module_& m) {
  nb::class_<Linear>(m, "Linear", "A linear layer whose outputs begin at `column` of a row.")
      .def(
          "__init__",
          [](Linear* self, WeightPtr weight, const std::optional<Floats>& bias, int32_t column) {
            if (bias && static_cast<int32_t>(bias->shape(0)) != weight->weight.rows) {
              throw std::invalid_argument("a bias must have a number a row of the weight");
            }
            new (self) Linear(std::move(weight), copy_of(bias), column);
          },
          "weight"_a, "bias"_a.none(), "column"_a)
      .def_prop_ro("quantised", &Linear::quantised)
      .def(
          "add_delta",
          [](Linear& self, Packer& packer, int32_t adapter, float scale, const Floats2& a, const Floats2& b) {
            const auto pack = [&packer](const Floats2& one) {
              const Plane plane{reinterpret_cast<const uint8_t*>(one.data()),
                                static_cast<int64_t>(sizeof(float) * one.shape(1)), sizeof(float)};
              return pack_numbers(packer, Codes::f32, Codes::f32, plane, static_cast<int32_t>(one.shape(0)),
                                  static_cast<int32_t>(one.shape(1)));
            };
            const Weight& w = self.weight->weight;
            if (static_cast<int32_t>(a.shape(1)) != w.columns || static_cast<int32_t>(b.shape(0)) != w.rows ||
                a.shape(0) != b.shape(1)) {
              throw std::invalid_argument("a and b do not fit the layer");
            }
            self.deltas.push_back({adapter, scale, pack(a), pack(b)});
            return self.deltas.back().a->bytes.size() + self.deltas.back().b->bytes.size();
          },
          "packer"_a, "adapter"_a, "scale"_a, "a"_a, "b"_a, "Rows of this adapter get scale × b (a x) too; -> bytes.");

  nb::class_<NormParts>(m, "Norm", "RMSNorm or LayerNorm.")
      .def(
          "__init__",
          [](NormParts* self, const std::string& kind, float eps, const Floats& weight,
             const std::optional<Floats>& bias) {
            new (self) NormParts{kind == "layer" ? NormKind::layer : NormKind::rms, eps, copy_of(weight), copy_of(bias)};
          },
          "kind"_a, "eps"_a, "weight"_a, "bias"_a.none());
  nb::class_<RopeTable>(m, "RopeTable", "cos and sin of every position, (positions, dim / 2) each.")
      .def(
          "__init__",
          [](RopeTable* self, const Floats2& cos, const Floats2& sin, bool interleaved) {
            const auto all = [](const Floats2& one) {
              return std::make_shared<const std::vector<float>>(one.data(), one.data() + one.size());
            };
            new (self) RopeTable{all(cos), all(sin), 2 * static_cast<int32_t>(cos.shape(1)), interleaved};
          },
          "cos"_a, "sin"_a, "interleaved"_a);

  nb::class_<KvStore>(m, "KvStore", "The memory behind the blocks.")
      .def("__init__",
           [](KvStore* self, const std::string& type, int32_t block_size, int32_t num_blocks) {
             new (self) KvStore(kv_type_named(type), block_size, num_blocks);
           },
           "type"_a, "block_size"_a, "num_blocks"_a)
      .def("add_layer",
           [](KvStore& self, int32_t kv_heads, int32_t head_dim) {
             self.add_layer(kv_heads, head_dim);
             return self.num_layers() - 1;
           },
           "kv_heads"_a, "head_dim"_a)
      .def("copy", &KvStore::copy, "source"_a, "target"_a)
      .def_prop_ro("nbytes", &KvStore::bytes);

  nb::class_<Program>(m, "FinishedProgram");
  nb::class_<Builder>(m, "Program", "A list of operations in the making; buffers and operations go by their numbers.")
      .def(
          "__init__",
          [](Builder* self, const std::string& isa, std::shared_ptr<KvStore> kv) {
            new (self) Builder{std::make_shared<Program>(kernels_named(isa)), std::move(kv)};
          },
          "instruction_set"_a, "kv"_a)
      .def(
          "buffer",
          [](Builder& self, int32_t width, bool quantised, int32_t rows_a_token, bool head) {
            if (width < 1 || (quantised && width % kGroup)) throw std::invalid_argument("a buffer of no whole groups");
            return self.program->add_buffer({width, quantised, rows_a_token, head});
          },
          "width"_a, "quantised"_a = false, "rows_a_token"_a = 1, "head"_a = false)
      .def(
          "embed",
          [](Builder& self, WeightPtr table, float scale, int32_t y) {
            return self.add(std::make_unique<Embed>(std::move(table), scale, y));
          },
          "table"_a, "scale"_a, "y"_a)
      .def(
          "gather", [](Builder& self, int32_t x, int32_t y) { return self.add(std::make_unique<Gather>(x, y)); }, "x"_a,
          "y"_a)
      .def(
          "norm",
          [](Builder& self, const NormParts& norm, int32_t x, int32_t y, bool quantise) {
            return self.add(std::make_unique<NormRows>(norm.make(), x, y, quantise));
          },
          "norm"_a, "x"_a, "y"_a, "quantise"_a)
      .def(
          "mlp_inner",
          [](Builder& self, std::vector<LinearPtr> layers, const std::string& activation, int32_t x, int32_t inner,
             int32_t y, bool quantise) {
            return self.add(std::make_unique<MlpInner>(std::move(layers), activation_named(activation), x, inner, y,
                                                       quantise),
                            3);
          },
          "layers"_a, "activation"_a, "x"_a, "inner"_a, "y"_a, "quantise"_a)
      .def(
          "add_rows",
          [](Builder& self, float scale, int32_t x, int32_t y) {
            return self.add(std::make_unique<AddRows>(scale, x, y));
          },
          "scale"_a, "x"_a, "y"_a)
      .def(
          "quantise", [](Builder& self, int32_t x) { return self.add(std::make_unique<QuantiseRows>(x)); }, "x"_a)
      .def(
          "scale_rows",
          [](Builder& self, float scale, float cap, int32_t x) {
            return self.add(std::make_unique<ScaleRows>(scale, cap, x));
          },
          "scale"_a, "cap"_a, "x"_a)
      .def(
          "product",
          [](Builder& self, std::vector<LinearPtr> layers, int32_t x, int32_t y, bool add, float scale) {
            return self.add(std::make_unique<Product>(std::move(layers), x, y, add ? Store::add : Store::put, scale), 2);
          },
          "layers"_a, "x"_a, "y"_a, "add"_a = false, "scale"_a = 1.0f)
      .def(
          "rotate",
          [](Builder& self, int32_t qkv, int32_t heads, const std::optional<NormParts>& q_norm,
             const std::optional<NormParts>& k_norm, const std::optional<RopeTable>& rope, int32_t layer) {
            return self.add(std::make_unique<Rotate>(
                qkv, heads, make(q_norm), make(k_norm), rope ? rope->cos : nullptr, rope ? rope->sin : nullptr,
                rope ? rope->dim : 0, rope && rope->interleaved, self.kv->layer(layer)));
          },
          "qkv"_a, "heads"_a, "q_norm"_a.none(), "k_norm"_a.none(), "rope"_a.none(), "layer"_a)
      .def(
          "attend",
          [](Builder& self, int32_t shared, int32_t qkv, int32_t y, int32_t heads, float scale, float softcap,
             int32_t window, int32_t layer) {
            const int32_t own = self.program->size();
            return self.add(std::make_unique<Attend>(own, shared < 0 ? own : shared, qkv, y, heads, scale, softcap,
                                                     window, self.kv->layer(layer)));
          },
          "shared"_a, "qkv"_a, "y"_a, "heads"_a, "scale"_a, "softcap"_a, "window"_a, "layer"_a,
          "`shared`: an earlier operation over the same heads and window, or -1.")
      .def(
          "experts",
          [](Builder& self, LinearPtr router, const std::vector<std::pair<std::vector<LinearPtr>, LinearPtr>>& experts,
             int32_t x, int32_t y, const std::vector<int32_t>& buffers, int32_t chosen, int32_t width, bool normalise,
             bool gated, const std::string& activation) {
            if (buffers.size() != 4 || experts.empty() || chosen < 1 || chosen > static_cast<int32_t>(experts.size())) {
              throw std::invalid_argument("experts need four buffers and as many as a token has");
            }
            std::vector<Experts::Expert> all;
            for (const auto& [inner, down] : experts) all.push_back({inner, down});
            const Experts::Settings settings{self.program->size(), x,      y,         buffers[0],
                                             buffers[1],           buffers[2], buffers[3], chosen,
                                             width,                normalise,  gated,      activation_named(activation)};
            return self.add(std::make_unique<Experts>(settings, std::move(router), std::move(all)), 9);
          },
          "router"_a, "experts"_a, "x"_a, "y"_a, "buffers"_a, "chosen"_a, "width"_a, "normalise"_a, "gated"_a,
          "activation"_a, "`buffers`: gathered, inner, activated and answers, `chosen` rows a token each.")
      .def_prop_ro("size", [](const Builder& self) { return self.program->size(); })
      .def("finish", [](const Builder& self) { return self.program; });
}
