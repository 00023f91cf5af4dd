// The operations a program is made of. Each reads and writes buffers of the workspace, named by their numbers; x, y: a
// row a token.
#pragma once

#include <memory>
#include <vector>

#include "attention_plan.h"
#include "program.h"

namespace headrace {

// A norm with its own weights.
struct Norm {
  Norm(NormKind kind, float eps, std::vector<float> weight_values, std::vector<float> bias_values);
  Norm(const Norm&) = delete;
  std::vector<float> weight, bias;
  NormArgs args;
};

// What an adapter adds to a linear layer: scale × b (a x).
struct LowRank {
  int32_t adapter;
  float scale;
  std::unique_ptr<PackedWeight> a, b;
};

// One named linear layer, and where its outputs lie in a row of y.
struct Linear {
  Linear(std::shared_ptr<const PackedWeight> weight_, std::vector<float> bias_, int32_t column_)
      : weight(std::move(weight_)), bias(std::move(bias_)), column(column_) {}
  Linear(const Linear&) = delete;
  Linear& operator=(const Linear&) = delete;

  std::shared_ptr<const PackedWeight> weight;
  std::vector<float> bias;  // or empty
  int32_t column;
  std::vector<LowRank> deltas;

  bool quantised() const { return weight->weight.scales != Scales::none; }
};

// y = rows of a table × scale
class Embed : public Operation {
 public:
  Embed(std::shared_ptr<const PackedWeight> table, float scale, int32_t y) : table_(table), scale_(scale), y_(y) {}
  int64_t items(const Step& step, const Workspace&, int32_t) const override { return step.tokens; }
  void run(const Step&, Workspace&, int32_t, int64_t item, int32_t) const override;

 private:
  std::shared_ptr<const PackedWeight> table_;
  float scale_;
  int32_t y_;
};

// y = the rows of x at step.places
class Gather : public Operation {
 public:
  Gather(int32_t x, int32_t y) : x_(x), y_(y) {}
  int64_t items(const Step& step, const Workspace&, int32_t) const override { return step.tokens; }
  void run(const Step&, Workspace&, int32_t, int64_t item, int32_t) const override;

 private:
  int32_t x_, y_;
};

// What is done to rows one by one; a few make an item.
class RowOperation : public Operation {
 public:
  explicit RowOperation(int32_t quantise) : quantise_(quantise) {}
  int64_t items(const Step& step, const Workspace&, int32_t) const override { return (step.tokens + kRows - 1) / kRows; }
  void run(const Step&, Workspace&, int32_t, int64_t item, int32_t) const override;

 protected:
  virtual void row(Workspace&, int64_t row) const = 0;

 private:
  static constexpr int32_t kRows = 4;
  int32_t quantise_;  // the buffer whose row is then kept as int8 too, or -1
};

// y = norm(x)
class NormRows : public RowOperation {
 public:
  NormRows(std::unique_ptr<Norm> norm, int32_t x, int32_t y, bool quantise)
      : RowOperation(quantise ? y : -1), norm_(std::move(norm)), x_(x), y_(y) {}

 protected:
  void row(Workspace&, int64_t row) const override;

 private:
  std::unique_ptr<Norm> norm_;
  int32_t x_, y_;
};

// y = act(x) of the first `width` columns; × the next `width` where `gated`
class ActivateRows : public RowOperation {
 public:
  ActivateRows(Activation activation, bool gated, int32_t width, int32_t x, int32_t y, bool quantise)
      : RowOperation(quantise ? y : -1), activation_(activation), gated_(gated), width_(width), x_(x), y_(y) {}

 protected:
  void row(Workspace&, int64_t row) const override;

 private:
  Activation activation_;
  bool gated_;
  int32_t width_, x_, y_;
};

// y += scale × x
class AddRows : public RowOperation {
 public:
  AddRows(float scale, int32_t x, int32_t y) : RowOperation(-1), scale_(scale), x_(x), y_(y) {}

 protected:
  void row(Workspace&, int64_t row) const override;

 private:
  float scale_;
  int32_t x_, y_;
};

class QuantiseRows : public RowOperation {
 public:
  explicit QuantiseRows(int32_t x) : RowOperation(x) {}

 protected:
  void row(Workspace&, int64_t) const override {}
};

// x × scale, then cap × tanh(x / cap), in place
class ScaleRows : public RowOperation {
 public:
  ScaleRows(float scale, float cap, int32_t x) : RowOperation(-1), scale_(scale), cap_(cap), x_(x) {}

 protected:
  void row(Workspace&, int64_t row) const override;

 private:
  float scale_, cap_;
  int32_t x_;
};

// y = x wᵀ + bias of several layers that read the same x, or y += scale × that
class Product : public Operation {
 public:
  Product(std::vector<std::shared_ptr<Linear>> layers, int32_t x, int32_t y, Store store, float scale);
  int32_t phases(const Step& step) const override { return step.adapters != nullptr ? 2 : 1; }
  int64_t items(const Step&, const Workspace&, int32_t phase) const override;
  void run(const Step&, Workspace&, int32_t phase, int64_t item, int32_t) const override;

 private:
  std::vector<std::shared_ptr<Linear>> layers_;
  int32_t x_, y_;
  Store store_;
  float scale_;
  int32_t panels_ = 0;
};

// y = act(x wᵀ + bias), × (x wᵀ + bias) of a second layer where there are two. What lies between stays in the cache,
// unless adapters have to be added to it: then it goes through the buffer `inner`.
class MlpInner : public Operation {
 public:
  // `quantise`: y holds the answer as int8 only.
  MlpInner(std::vector<std::shared_ptr<Linear>> layers, Activation activation, int32_t x, int32_t inner, int32_t y,
           bool quantise);
  int32_t phases(const Step& step) const override { return step.adapters != nullptr ? 3 : 1; }
  int64_t items(const Step&, const Workspace&, int32_t phase) const override;
  void run(const Step&, Workspace&, int32_t phase, int64_t item, int32_t thread) const override;

 private:
  int32_t panels(const Step&, const Workspace&) const;
  void part(const Step&, Workspace&, int32_t token, int32_t count, int32_t column, int32_t columns) const;

  std::vector<std::shared_ptr<Linear>> layers_;
  Activation activation_;
  int32_t x_, y_;
  bool quantise_;
  int32_t width_;
  Product product_;
  ActivateRows activate_;
};

// q, k and v of one buffer: norms, rotary embedding, keys and values stored
class Rotate : public Operation {
 public:
  Rotate(int32_t qkv, int32_t heads, std::unique_ptr<Norm> q_norm, std::unique_ptr<Norm> k_norm,
         std::shared_ptr<const std::vector<float>> cos, std::shared_ptr<const std::vector<float>> sin, int32_t dim,
         bool interleaved, const KvLayer* kv);
  int64_t items(const Step& step, const Workspace& workspace, int32_t) const override;
  void run(const Step&, Workspace&, int32_t, int64_t item, int32_t) const override;

 private:
  int32_t qkv_, heads_;
  std::unique_ptr<Norm> q_norm_, k_norm_;
  std::shared_ptr<const std::vector<float>> cos_, sin_;
  RopeArgs rope_;
  const KvLayer* kv_;
};

// y = attention of q over the block tables
class Attend : public Operation {
 public:
  // `shared`: the first operation with the same shape and window, whose plan this one uses; its own number otherwise.
  Attend(int32_t own, int32_t shared, int32_t qkv, int32_t y, int32_t heads, float scale, float softcap,
         int32_t window, const KvLayer* kv);
  void prepare(const Step&, Workspace&) const override;
  int64_t items(const Step&, const Workspace&, int32_t) const override;
  void run(const Step&, Workspace&, int32_t, int64_t item, int32_t thread) const override;

 private:
  int32_t own_, shared_, qkv_, y_, heads_;
  float scale_, softcap_;
  int32_t window_;
  const KvLayer* kv_;
};

// Mixture of experts: y = sum of the chosen experts' answers (arXiv 2101.03961, 2401.04088), the likeliest first
class Experts : public Operation {
 public:
  struct Expert {
    std::vector<std::shared_ptr<Linear>> inner;  // gate (if gated) and up
    std::shared_ptr<Linear> down;
  };
  struct Settings {
    int32_t own, x, y;                              // its own number; buffers
    int32_t gathered, inner, activated, answers;    // buffers with `chosen` rows a token
    int32_t chosen, width;                          // experts a token; of an expert
    bool normalise, gated;
    Activation activation;
  };
  Experts(Settings settings, std::shared_ptr<Linear> router, std::vector<Expert> experts);
  void prepare(const Step&, Workspace&) const override;
  int32_t phases(const Step&) const override { return 9; }
  int64_t items(const Step&, const Workspace&, int32_t phase) const override;
  void run(const Step&, Workspace&, int32_t phase, int64_t item, int32_t) const override;

 private:
  void route(const Step&, Workspace&, int64_t token) const;
  void group(const Step&, Workspace&) const;
  void combine(Workspace&, int64_t token) const;

  Settings s_;
  std::shared_ptr<Linear> router_;
  std::vector<Expert> experts_;
  bool quantise_inner_, quantise_down_;
};

// Parts [begin, end) of the product's panels, and what adapters add to one token's row.
void run_linear(const Kernels&, const Linear&, const float* x, int64_t x_stride, QuantRows quantised, float* y,
                int64_t y_stride, int32_t tokens, Store store, float scale, int32_t begin, int32_t end);
void add_delta(const Kernels&, const Linear&, int32_t adapter, const float* x, float* y, float scale);

}  // namespace headrace
