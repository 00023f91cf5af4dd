#include "operations.h"

#include <algorithm>
#include <cmath>

namespace headrace {

namespace {

constexpr int32_t kPair = 2 * kPanel;

int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Panels that make an item. With few tokens a product is a matter of reading weights, and a thread reads fastest what
// lies together: everybody gets one part (measured: 82 GB/s in halves, 46 in pieces of four panels). With many it is a
// matter of arithmetic, and small items even out what threads are given of the machine.
int32_t panels_an_item(int32_t panels, int32_t tokens, const Workspace& workspace) {
  constexpr int32_t kFew = 4, kSome = 16, kSmall = 2;
  if (tokens > kSome) return kSmall;
  const int32_t parts = workspace.threads() * (tokens <= kFew ? 1 : 2);
  return std::max<int32_t>(1, static_cast<int32_t>(pieces(panels, parts)));
}

}  // namespace

Norm::Norm(NormKind kind, float eps, std::vector<float> weight_values, std::vector<float> bias_values)
    : weight(std::move(weight_values)),
      bias(std::move(bias_values)),
      args{kind, weight.data(), bias.empty() ? nullptr : bias.data(), eps, static_cast<int32_t>(weight.size())} {}

void Embed::run(const Step& step, Workspace& workspace, int32_t, int64_t item, int32_t) const {
  float* y = workspace.row(y_, item);
  unpack_row(table_->weight, step.ids[item], y);
  if (scale_ != 1.0f) {
    for (int32_t i = 0; i < table_->weight.columns; ++i) y[i] *= scale_;
  }
}

void Gather::run(const Step& step, Workspace& workspace, int32_t, int64_t item, int32_t) const {
  std::copy_n(workspace.row(x_, step.places[item]), workspace.width(y_), workspace.row(y_, item));
}

// ---------------------------------------------------------------- row by row

void RowOperation::run(const Step& step, Workspace& workspace, int32_t, int64_t item, int32_t) const {
  const int64_t stop = std::min<int64_t>(step.tokens, (item + 1) * kRows);
  for (int64_t i = item * kRows; i < stop; ++i) {
    row(workspace, i);
    if (quantise_ >= 0) {
      const QuantRows rows = workspace.quantised(quantise_, 0, step.tokens);
      workspace.kernels().quantise_row(workspace.row(quantise_, i), rows, i, 0, rows.width / kGroup);
    }
  }
}

void NormRows::row(Workspace& workspace, int64_t row) const {
  workspace.kernels().norm_row(norm_->args, workspace.row(x_, row), workspace.row(y_, row));
}

void ActivateRows::row(Workspace& workspace, int64_t row) const {
  const float* x = workspace.row(x_, row);
  workspace.kernels().activate_row(activation_, x, gated_ ? x + width_ : nullptr, width_, workspace.row(y_, row));
}

void AddRows::row(Workspace& workspace, int64_t row) const {
  workspace.kernels().add_row(workspace.row(x_, row), scale_, workspace.width(y_), workspace.row(y_, row));
}

void ScaleRows::row(Workspace& workspace, int64_t row) const {
  workspace.kernels().scale_row(scale_, cap_, workspace.width(x_), workspace.row(x_, row));
}

// ---------------------------------------------------------------- products

void run_linear(const Kernels& kernels, const Linear& layer, const float* x, int64_t x_stride, QuantRows quantised,
                float* y, int64_t y_stride, int32_t tokens, Store store, float scale, int32_t begin, int32_t end) {
  const LinearArgs args{
      .weight = &layer.weight->weight,
      .bias = layer.bias.empty() ? nullptr : layer.bias.data(),
      .x = x,
      .x_stride = x_stride,
      .quantised = quantised,
      .y = y + layer.column,
      .y_stride = y_stride,
      .tokens = tokens,
      .store = store,
      .scale = scale,
  };
  kernels.linear(args, begin, end);
}

void add_delta(const Kernels& kernels, const Linear& layer, int32_t adapter, const float* x, float* y, float scale) {
  for (const LowRank& delta : layer.deltas) {
    if (delta.adapter != adapter) continue;
    const Weight &a = delta.a->weight, &b = delta.b->weight;
    std::vector<float> inner(static_cast<size_t>(a.rows));
    kernels.linear({&a, nullptr, x, a.columns, {}, inner.data(), a.rows, 1, Store::put, 1.0f}, 0,
                   static_cast<int32_t>(pieces(a.rows, kPanel)));
    kernels.linear({&b, nullptr, inner.data(), b.columns, {}, y + layer.column, b.rows, 1, Store::add,
                    scale * delta.scale},
                   0, static_cast<int32_t>(pieces(b.rows, kPanel)));
  }
}

Product::Product(std::vector<std::shared_ptr<Linear>> layers, int32_t x, int32_t y, Store store, float scale)
    : layers_(std::move(layers)), x_(x), y_(y), store_(store), scale_(scale) {
  for (const auto& layer : layers_) panels_ += static_cast<int32_t>(pieces(layer->weight->weight.rows, kPanel));
}

int64_t Product::items(const Step& step, const Workspace& workspace, int32_t phase) const {
  return phase == 0 ? pieces(panels_, panels_an_item(panels_, step.tokens, workspace)) : step.tokens;
}

void Product::run(const Step& step, Workspace& workspace, int32_t phase, int64_t item, int32_t) const {
  const Kernels& kernels = workspace.kernels();
  if (phase == 1) {
    const int32_t adapter = step.adapters[item];
    if (adapter < 0) return;
    for (const auto& layer : layers_) {
      add_delta(kernels, *layer, adapter, workspace.row(x_, item), workspace.row(y_, item),
                store_ == Store::add ? scale_ : 1.0f);
    }
    return;
  }
  const int32_t size = panels_an_item(panels_, step.tokens, workspace);
  int32_t begin = static_cast<int32_t>(item) * size;
  int32_t end = std::min(panels_, begin + size);
  for (const auto& layer : layers_) {
    const int32_t panels = static_cast<int32_t>(pieces(layer->weight->weight.rows, kPanel));
    if (begin < panels && end > 0) {
      run_linear(kernels, *layer, workspace.row(x_, 0), workspace.stride(x_), workspace.quantised(x_, 0, step.tokens),
                 workspace.row(y_, 0), workspace.stride(y_), step.tokens, store_, scale_, std::max(begin, 0),
                 std::min(end, panels));
    }
    begin -= panels;
    end -= panels;
  }
}

// ---------------------------------------------------------------- the first half of an MLP

MlpInner::MlpInner(std::vector<std::shared_ptr<Linear>> layers, Activation activation, int32_t x, int32_t inner,
                   int32_t y, bool quantise)
    : layers_(layers),
      activation_(activation),
      x_(x),
      y_(y),
      quantise_(quantise),
      width_(layers.front()->weight->weight.rows),
      product_(layers, x, inner, Store::put, 1.0f),
      activate_(activation, layers.size() == 2, width_, inner, y, quantise) {}

// Of an item: pairs, whose columns are a group of what is quantised.
int32_t MlpInner::panels(const Step& step, const Workspace& workspace) const {
  const int32_t size = panels_an_item(static_cast<int32_t>(pieces(width_, kPanel)), step.tokens, workspace);
  return size + size % 2;
}

int64_t MlpInner::items(const Step& step, const Workspace& workspace, int32_t phase) const {
  if (step.adapters != nullptr) {
    return phase < 2 ? product_.items(step, workspace, phase) : activate_.items(step, workspace, 0);
  }
  return pieces(width_, kPanel * panels(step, workspace));
}

void MlpInner::run(const Step& step, Workspace& workspace, int32_t phase, int64_t item, int32_t thread) const {
  if (step.adapters != nullptr) {
    if (phase < 2) return product_.run(step, workspace, phase, item, thread);
    return activate_.run(step, workspace, 0, item, thread);
  }
  const int32_t size = kPanel * panels(step, workspace);
  const int32_t begin = static_cast<int32_t>(item) * size, end = std::min(width_, begin + size);
  for (int32_t token = 0; token < step.tokens; token += kTokens) {
    const int32_t count = std::min(kTokens, step.tokens - token);
    const int32_t columns = kTokens / count * kPair;  // as many as the scratch holds
    for (int32_t column = begin; column < end; column += columns) {
      part(step, workspace, token, count, column, std::min(columns, end - column));
    }
  }
}

// Columns [column, column + columns) for tokens [token, token + count).
void MlpInner::part(const Step& step, Workspace& workspace, int32_t token, int32_t count, int32_t column,
                    int32_t columns) const {
  const Kernels& kernels = workspace.kernels();
  alignas(64) float halves[2][kTokens * kPair];
  const QuantRows all = workspace.quantised(x_, 0, step.tokens);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Linear& layer = *layers_[i];
    Weight weight = layer.weight->weight;
    weight.data += column / kPanel * weight.panel_bytes;
    weight.rows = columns;
    const LinearArgs args{
        .weight = &weight,
        .bias = layer.bias.empty() ? nullptr : layer.bias.data() + column,
        .x = workspace.row(x_, token),
        .x_stride = workspace.stride(x_),
        .quantised = {all.data + kGroupBytes * (all.width / kGroup) * token, count, all.width},
        .y = halves[i],
        .y_stride = columns,
        .tokens = count,
        .store = Store::put,
        .scale = 1.0f,
    };
    kernels.linear(args, 0, static_cast<int32_t>(pieces(columns, kPanel)));
  }
  const QuantRows quantised = workspace.quantised(y_, 0, step.tokens);
  for (int32_t i = 0; i < count; ++i) {
    float* gate = halves[0] + i * columns;
    const float* up = layers_.size() == 2 ? halves[1] + i * columns : nullptr;
    kernels.activate_row(activation_, gate, up, columns, quantise_ ? gate : workspace.row(y_, token + i) + column);
    if (quantise_) {
      kernels.quantise_row(gate, quantised, token + i, column / kGroup, (column + columns) / kGroup);
    }
  }
}

// ---------------------------------------------------------------- attention

Rotate::Rotate(int32_t qkv, int32_t heads, std::unique_ptr<Norm> q_norm, std::unique_ptr<Norm> k_norm,
               std::shared_ptr<const std::vector<float>> cos, std::shared_ptr<const std::vector<float>> sin,
               int32_t dim, bool interleaved, const KvLayer* kv)
    : qkv_(qkv),
      heads_(heads),
      q_norm_(std::move(q_norm)),
      k_norm_(std::move(k_norm)),
      cos_(std::move(cos)),
      sin_(std::move(sin)),
      rope_{cos_ ? cos_->data() : nullptr, sin_ ? sin_->data() : nullptr, dim, interleaved},
      kv_(kv) {}

namespace {

// Keys of one dimension and neighbouring tokens share a cache line: threads had better not share it as well.
int32_t rotated_tokens(int32_t tokens, const Workspace& workspace) {
  constexpr int32_t kFew = 4, kMany = 16;
  return tokens >= 2 * kMany * workspace.threads() ? kMany : kFew;
}

}  // namespace

int64_t Rotate::items(const Step& step, const Workspace& workspace, int32_t) const {
  return pieces(step.tokens, rotated_tokens(step.tokens, workspace));
}

void Rotate::run(const Step& step, Workspace& workspace, int32_t, int64_t item, int32_t) const {
  float* q = workspace.row(qkv_, 0);
  float* k = q + static_cast<int64_t>(heads_) * kv_->head_dim;
  float* v = k + static_cast<int64_t>(kv_->kv_heads) * kv_->head_dim;
  const int64_t stride = workspace.stride(qkv_);
  const RotateArgs args{
      .q = q,
      .k = k,
      .v = v,
      .q_stride = stride,
      .k_stride = stride,
      .v_stride = stride,
      .heads = heads_,
      .q_norm = q_norm_ ? &q_norm_->args : nullptr,
      .k_norm = k_norm_ ? &k_norm_->args : nullptr,
      .rope = rope_,
      .kv = kv_,
      .positions = step.positions,
      .slots = step.slots,
  };
  const int32_t size = rotated_tokens(step.tokens, workspace);
  const int32_t begin = static_cast<int32_t>(item) * size;
  workspace.kernels().rotate_and_store(args, begin, std::min(step.tokens, begin + size));
}

namespace {

struct AttendState : State {
  AttentionPlan plan;
  std::vector<float> partials;
  std::vector<std::vector<float>> scratch;  // a thread
};

}  // namespace

Attend::Attend(int32_t own, int32_t shared, int32_t qkv, int32_t y, int32_t heads, float scale, float softcap,
               int32_t window, const KvLayer* kv)
    : own_(own),
      shared_(shared),
      qkv_(qkv),
      y_(y),
      heads_(heads),
      scale_(scale),
      softcap_(softcap),
      window_(window),
      kv_(kv) {}

void Attend::prepare(const Step& step, Workspace& workspace) const {
  if (own_ != shared_) return;
  auto& place = workspace.states[own_];
  const int32_t threads = workspace.pool().threads();
  if (place == nullptr) {
    auto made = std::make_unique<AttendState>();
    const auto floats = static_cast<size_t>(attention_scratch(heads_, kv_->kv_heads, kv_->head_dim));
    made->scratch.resize(static_cast<size_t>(threads), std::vector<float>(floats));
    place = std::move(made);
  }
  auto& state = static_cast<AttendState&>(*place);
  state.plan.make(step.spans, step.num_spans, {heads_, kv_->kv_heads, kv_->head_dim, window_}, threads);
  const auto needed = static_cast<size_t>(state.plan.partial_floats());
  if (state.partials.size() < needed) state.partials.resize(needed);
}

int64_t Attend::items(const Step&, const Workspace& workspace, int32_t) const {
  return static_cast<const AttendState&>(*workspace.states[shared_]).plan.size();
}

void Attend::run(const Step& step, Workspace& workspace, int32_t, int64_t item, int32_t thread) const {
  auto& state = static_cast<AttendState&>(*workspace.states[shared_]);
  const AttentionArgs args{
      .q = workspace.row(qkv_, 0),
      .q_stride = workspace.stride(qkv_),
      .out = workspace.row(y_, 0),
      .out_stride = workspace.stride(y_),
      .heads = heads_,
      .scale = scale_,
      .softcap = softcap_,
      .window = window_,
      .kv = kv_,
      .spans = step.spans,
      .num_spans = step.num_spans,
  };
  const int32_t i = static_cast<int32_t>(item);
  workspace.kernels().attend(args, state.plan.work(state.partials.data()), i, i + 1,
                             state.scratch[static_cast<size_t>(thread)].data());
}

// ---------------------------------------------------------------- experts

namespace {

struct ExpertsState : State {
  std::vector<int32_t> chosen;   // [tokens][experts a token]
  std::vector<float> weights;    // the same
  std::vector<int32_t> place;    // the same: its row among the gathered
  std::vector<int32_t> token;    // [gathered rows]
  std::vector<int32_t> expert;   // [gathered rows]
  std::vector<int32_t> starts;   // [experts + 1] its first gathered row
  std::vector<int32_t> active;   // experts that have rows
};

ExpertsState& experts_state(const Workspace& workspace, int32_t own) {
  return static_cast<ExpertsState&>(*workspace.states[own]);
}

int32_t panels_of(const Linear& layer) { return static_cast<int32_t>(pieces(layer.weight->weight.rows, kPanel)); }

}  // namespace

Experts::Experts(Settings settings, std::shared_ptr<Linear> router, std::vector<Expert> experts)
    : s_(settings), router_(std::move(router)), experts_(std::move(experts)) {
  quantise_inner_ = std::any_of(experts_.begin(), experts_.end(), [](const Expert& one) {
    return std::any_of(one.inner.begin(), one.inner.end(), [](const auto& layer) { return layer->quantised(); });
  });
  quantise_down_ = std::any_of(experts_.begin(), experts_.end(), [](const Expert& one) { return one.down->quantised(); });
}

void Experts::prepare(const Step& step, Workspace& workspace) const {
  auto& place = workspace.states[s_.own];
  if (place == nullptr) place = std::make_unique<ExpertsState>();
  ExpertsState& state = experts_state(workspace, s_.own);
  const size_t rows = static_cast<size_t>(step.tokens) * static_cast<size_t>(s_.chosen);
  state.chosen.resize(rows);
  state.weights.resize(rows);
  state.place.resize(rows);
  state.token.resize(rows);
  state.expert.resize(rows);
}

// 0 route · 1 group · 2 gather · 3 inner · 4 its adapters · 5 activate · 6 down · 7 its adapters · 8 combine
int64_t Experts::items(const Step& step, const Workspace& workspace, int32_t phase) const {
  const int64_t rows = static_cast<int64_t>(step.tokens) * s_.chosen;
  switch (phase) {
    case 0: case 8: return step.tokens;
    case 1: return 1;
    case 2: case 5: return rows;
    case 4: case 7: return step.adapters != nullptr ? rows : 0;
    default: break;
  }
  const ExpertsState& state = experts_state(workspace, s_.own);
  const auto active = static_cast<int64_t>(state.active.size());
  const Expert& like = experts_.front();
  const int32_t panels = phase == 6 ? panels_of(*like.down) : panels_of(*like.inner.front());
  return active * pieces(panels, panels_an_item(panels, step.tokens, workspace));
}

void Experts::run(const Step& step, Workspace& workspace, int32_t phase, int64_t item, int32_t) const {
  const Kernels& kernels = workspace.kernels();
  ExpertsState& state = experts_state(workspace, s_.own);
  const auto quantise = [&](int32_t buffer, int64_t row) {
    const auto expert = static_cast<size_t>(state.expert[static_cast<size_t>(row)]);
    const int32_t first = state.starts[expert];
    const QuantRows rows = workspace.quantised(buffer, first, state.starts[expert + 1] - first);
    kernels.quantise_row(workspace.row(buffer, row), rows, row - first, 0, rows.width / kGroup);
  };
  switch (phase) {
    case 0: return route(step, workspace, item);
    case 1: return group(step, workspace);
    case 2:
      std::copy_n(workspace.row(s_.x, state.token[static_cast<size_t>(item)]), workspace.width(s_.gathered),
                  workspace.row(s_.gathered, item));
      if (quantise_inner_) quantise(s_.gathered, item);
      return;
    case 5: {
      const float* x = workspace.row(s_.inner, item);
      kernels.activate_row(s_.activation, x, s_.gated ? x + s_.width : nullptr, s_.width,
                           workspace.row(s_.activated, item));
      if (quantise_down_) quantise(s_.activated, item);
      return;
    }
    case 4: case 7: {
      const int32_t adapter = step.adapters[state.token[static_cast<size_t>(item)]];
      if (adapter < 0) return;
      const Expert& expert = experts_[static_cast<size_t>(state.expert[static_cast<size_t>(item)])];
      if (phase == 7) {
        return add_delta(kernels, *expert.down, adapter, workspace.row(s_.activated, item),
                         workspace.row(s_.answers, item), 1.0f);
      }
      for (const auto& layer : expert.inner) {
        add_delta(kernels, *layer, adapter, workspace.row(s_.gathered, item), workspace.row(s_.inner, item), 1.0f);
      }
      return;
    }
    case 8: return combine(workspace, item);
    default: break;
  }
  const Expert& like = experts_.front();
  const int32_t panels = phase == 6 ? panels_of(*like.down) : panels_of(*like.inner.front());
  const int32_t size = panels_an_item(panels, step.tokens, workspace);
  const int64_t parts = pieces(panels, size);
  const int32_t index = state.active[static_cast<size_t>(item / parts)];
  const Expert& expert = experts_[static_cast<size_t>(index)];
  const int32_t begin = static_cast<int32_t>(item % parts) * size;
  const int32_t end = std::min(panels, begin + size);
  const int32_t first = state.starts[static_cast<size_t>(index)];
  const int32_t count = state.starts[static_cast<size_t>(index) + 1] - first;
  const auto product = [&](const Linear& layer, int32_t x, int32_t y) {
    run_linear(kernels, layer, workspace.row(x, first), workspace.stride(x), workspace.quantised(x, first, count),
               workspace.row(y, first), workspace.stride(y), count, Store::put, 1.0f, begin, end);
  };
  if (phase == 6) return product(*expert.down, s_.activated, s_.answers);
  for (const auto& layer : expert.inner) product(*layer, s_.gathered, s_.inner);
}

// Softmax of the router's scores, in float32; the likeliest experts, the lowest number first on a tie.
void Experts::route(const Step& step, Workspace& workspace, int64_t token) const {
  const Kernels& kernels = workspace.kernels();
  const auto count = experts_.size();
  std::vector<float> scores(count);
  const float* x = workspace.row(s_.x, token);
  run_linear(kernels, *router_, x, workspace.stride(s_.x), {}, scores.data(), static_cast<int64_t>(count), 1, Store::put,
             1.0f, 0, panels_of(*router_));
  if (step.adapters != nullptr && step.adapters[token] >= 0) {
    add_delta(kernels, *router_, step.adapters[token], x, scores.data(), 1.0f);
  }
  const float peak = *std::max_element(scores.begin(), scores.end());
  float total = 0.0f;
  for (float& score : scores) {
    score = std::exp(score - peak);
    total += score;
  }
  ExpertsState& state = experts_state(workspace, s_.own);
  float kept = 0.0f;
  const int64_t first = token * s_.chosen;
  std::vector<bool> taken(count);
  for (int32_t i = 0; i < s_.chosen; ++i) {
    size_t best = count;
    for (size_t expert = 0; expert < count; ++expert) {
      if (!taken[expert] && (best == count || scores[expert] > scores[best])) best = expert;
    }
    taken[best] = true;
    const float weight = scores[best] / total;
    state.chosen[static_cast<size_t>(first + i)] = static_cast<int32_t>(best);
    state.weights[static_cast<size_t>(first + i)] = weight;
    kept += weight;
  }
  if (s_.normalise) {
    for (int32_t i = 0; i < s_.chosen; ++i) state.weights[static_cast<size_t>(first + i)] /= kept;
  }
}

// Rows of one expert together, in the order of their tokens.
void Experts::group(const Step& step, Workspace& workspace) const {
  ExpertsState& state = experts_state(workspace, s_.own);
  state.starts.assign(experts_.size() + 1, 0);
  for (const int32_t expert : state.chosen) ++state.starts[static_cast<size_t>(expert) + 1];
  state.active.clear();
  for (size_t i = 0; i < experts_.size(); ++i) {
    if (state.starts[i + 1] > 0) state.active.push_back(static_cast<int32_t>(i));
    state.starts[i + 1] += state.starts[i];
  }
  std::vector<int32_t> next(state.starts.begin(), state.starts.end() - 1);
  const size_t rows = static_cast<size_t>(step.tokens) * static_cast<size_t>(s_.chosen);
  for (size_t i = 0; i < rows; ++i) {
    const int32_t row = next[static_cast<size_t>(state.chosen[i])]++;
    state.place[i] = row;
    state.token[static_cast<size_t>(row)] = static_cast<int32_t>(i / static_cast<size_t>(s_.chosen));
    state.expert[static_cast<size_t>(row)] = state.chosen[i];
  }
}

void Experts::combine(Workspace& workspace, int64_t token) const {
  const ExpertsState& state = experts_state(workspace, s_.own);
  const int32_t width = workspace.width(s_.y);
  float* y = workspace.row(s_.y, token);
  std::fill_n(y, width, 0.0f);
  for (int32_t i = 0; i < s_.chosen; ++i) {
    const auto place = static_cast<size_t>(token * s_.chosen + i);
    workspace.kernels().add_row(workspace.row(s_.answers, state.place[place]), state.weights[place], width, y);
  }
}

}  // namespace headrace
