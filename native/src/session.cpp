#include "session.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "kv.h"

namespace headrace {

namespace {

constexpr int32_t kHeadRows = 64;  // rows of logits that are there at one time

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point began) { return std::chrono::duration<double>(Clock::now() - began).count(); }

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string text(int64_t number) { return std::to_string(number); }

}  // namespace

// ---------------------------------------------------------------- keys and values

void KvStore::add_layer(int32_t kv_heads, int32_t head_dim) {
  layers_.push_back(std::make_unique<KvLayer>(
      KvLayer{nullptr, nullptr, nullptr, nullptr, type_, kv_heads, head_dim, block_size_, num_blocks_, 0, 0, 0}));
}

void KvStore::allocate() {
  if (memory_ != nullptr) return;
  struct Part {
    int64_t keys, values, key_scales, value_scales;
  };
  std::vector<Part> parts;
  const int64_t each = element_bytes(type_);
  block_bytes_ = 0;
  const auto take = [this](int64_t size) {
    constexpr int64_t kLine = 64;
    const int64_t at = block_bytes_;
    block_bytes_ += (size + kLine - 1) / kLine * kLine;
    return at;
  };
  for (const auto& layer : layers_) {
    const int64_t scales = 4 * block_scales(*layer);
    parts.push_back({take(each * block_keys(*layer)), take(each * block_values(*layer)), take(scales), take(scales)});
  }
  memory_ = std::make_unique<Bytes>(bytes(), true);
  for (size_t i = 0; i < layers_.size(); ++i) {
    KvLayer& layer = *layers_[i];
    layer.keys = memory_->data() + parts[i].keys;
    layer.values = memory_->data() + parts[i].values;
    layer.key_scales = reinterpret_cast<float*>(memory_->data() + parts[i].key_scales);
    layer.value_scales = reinterpret_cast<float*>(memory_->data() + parts[i].value_scales);
    layer.key_step = layer.value_step = block_bytes_ / each;
    layer.scale_step = block_bytes_ / 4;
  }
}

void KvStore::copy(int32_t source, int32_t target) {
  if (std::min(source, target) < 0 || std::max(source, target) >= num_blocks_) {
    refuse("block " + text(source) + " is copied to " + text(target) + ", there are " + text(num_blocks_));
  }
  std::memcpy(memory_->data() + target * block_bytes_, memory_->data() + source * block_bytes_,
              static_cast<size_t>(block_bytes_));
}

// ---------------------------------------------------------------- rows

Session::Session(std::shared_ptr<const Program> program, std::shared_ptr<KvStore> kv, Limits limits, int32_t threads,
                 int32_t head, int32_t logits)
    : program_(std::move(program)),
      kv_(std::move(kv)),
      limits_(limits),
      head_(head),
      logits_(logits),
      head_rows_(std::max(kHeadRows, limits.max_rows)),
      workspace_(program_->workspace(threads, limits.max_tokens, head_rows_)),
      rows_(static_cast<size_t>(limits.max_rows)) {
  kv_->allocate();
  for (int32_t i = 0; i < threads; ++i) scratch_.emplace_back(program_->kernels().sampling, limits.vocab);
}

Session::Row& Session::row(int32_t index) {
  if (index < 0 || index >= limits_.max_rows || !rows_[static_cast<size_t>(index)].live) {
    refuse("the plan names row " + text(index) + ", where no request is");
  }
  return rows_[static_cast<size_t>(index)];
}

void Session::admit(int32_t index, std::vector<int32_t> tokens, int32_t num_prompt, RowSampling sampling,
                    int32_t adapter) {
  if (index < 0 || index >= limits_.max_rows || rows_[static_cast<size_t>(index)].live) {
    refuse("row " + text(index) + " is not free");
  }
  const auto count = static_cast<int64_t>(tokens.size());
  if (count < 1 || count > limits_.max_model_len || num_prompt < 1 || num_prompt > count) {
    refuse("row " + text(index) + " is admitted with " + text(num_prompt) + " prompt tokens of " + text(count));
  }
  for (const int32_t id : tokens) {
    if (id < 0 || id >= limits_.vocab) {
      refuse("row " + text(index) + " is admitted with token " + text(id) + ", the vocabulary has " + text(limits_.vocab));
    }
  }
  rows_[static_cast<size_t>(index)] = {true, std::move(tokens), {}, std::move(sampling), adapter};
}

void Session::release(int32_t index) { row(index) = Row(); }

void Session::append_blocks(int32_t index, const std::vector<int32_t>& blocks) {
  Row& one = row(index);
  const int64_t most = (limits_.max_model_len + kv_->block_size() - 1) / kv_->block_size();
  if (static_cast<int64_t>(one.blocks.size() + blocks.size()) > most) {
    refuse("row " + text(index) + " gets more blocks than the longest sequence needs");
  }
  for (const int32_t block : blocks) {
    if (block < 0 || block >= kv_->num_blocks()) {
      refuse("row " + text(index) + " gets a block outside 0 … " + text(kv_->num_blocks() - 1));
    }
    one.blocks.push_back(block);
  }
}

void Session::ask(Ask ask) {
  const Row& one = row(ask.row);
  const auto known = static_cast<int64_t>(one.tokens.size());
  const int64_t stop = static_cast<int64_t>(ask.start) + ask.length;
  const auto drafts = static_cast<int64_t>(ask.drafts.size());
  if (ask.start < 0 || ask.length < 1 || stop > known) {
    refuse("row " + text(ask.row) + " has " + text(known) + " tokens, the plan wants " + text(ask.start) + " to " +
           text(stop));
  }
  if ((ask.sample || drafts > 0) && stop != known) {
    refuse("row " + text(ask.row) + " cannot sample after token " + text(stop) + " of " + text(known));
  }
  if (drafts > 0 && !ask.sample) refuse("row " + text(ask.row) + " has drafts but does not sample");
  const int64_t held = static_cast<int64_t>(one.blocks.size()) * kv_->block_size();
  if (stop + drafts > held) {
    refuse("row " + text(ask.row) + " has " + text(static_cast<int64_t>(one.blocks.size())) + " blocks for " +
           text(stop + drafts) + " tokens");
  }
  for (const int32_t id : ask.drafts) {
    if (id < 0 || id >= limits_.vocab) {
      refuse("row " + text(ask.row) + " has draft " + text(id) + ", the vocabulary has " + text(limits_.vocab));
    }
  }
  int64_t tokens = ask.length + drafts;
  for (const Ask& other : asks_) tokens += other.length + static_cast<int64_t>(other.drafts.size());
  if (tokens > limits_.max_tokens) {
    refuse("the plan has " + text(tokens) + " tokens or more, a step computes " + text(limits_.max_tokens));
  }
  asks_.push_back(std::move(ask));
}

// ---------------------------------------------------------------- a step

void Session::lay_out(std::vector<Span>& spans) {
  ids_.clear();
  positions_.clear();
  adapters_.clear();
  slots_.clear();
  any_adapter_ = false;
  const int32_t size = kv_->block_size();
  for (const Ask& ask : asks_) {
    Row& one = rows_[static_cast<size_t>(ask.row)];
    // Drafts stand after the known tokens while the step runs, so that each position's past is one array.
    one.tokens.insert(one.tokens.end(), ask.drafts.begin(), ask.drafts.end());
    const int32_t count = ask.length + static_cast<int32_t>(ask.drafts.size());
    spans.push_back({static_cast<int32_t>(ids_.size()), count, ask.start + count, one.blocks.data()});
    any_adapter_ |= one.adapter >= 0;
    for (int32_t position = ask.start; position < ask.start + count; ++position) {
      ids_.push_back(one.tokens[static_cast<size_t>(position)]);
      positions_.push_back(position);
      adapters_.push_back(one.adapter);
      slots_.push_back(static_cast<int64_t>(one.blocks[static_cast<size_t>(position / size)]) * size + position % size);
    }
  }
}

std::vector<Session::Wanted> Session::wanted() const {
  std::vector<Wanted> found;
  int32_t first = 0;
  for (size_t i = 0; i < asks_.size(); ++i) {
    const Ask& ask = asks_[i];
    const int32_t num_prompt = rows_[static_cast<size_t>(ask.row)].sampling.num_prompt;
    const int32_t count = ask.length + static_cast<int32_t>(ask.drafts.size());
    for (int32_t offset = 0; offset < count; ++offset) {
      const bool sample = ask.sample && offset >= ask.length - 1;
      const bool score = ask.score_prompt && offset < ask.length && ask.start + offset + 1 < num_prompt;
      if (sample || score || ask.logits) {
        found.push_back({first + offset, static_cast<int32_t>(i), ask.start + offset, sample, score, ask.logits});
      }
    }
    first += count;
  }
  return found;
}

void Session::keep_timing(int32_t what, size_t rows, Clock::time_point began) {
  if (workspace_->timings == nullptr) return;
  timings_.make_room(1);
  timings_.keep(what, static_cast<int32_t>(rows), began);
}

std::vector<Answer> Session::run() {
  const auto began = Clock::now();
  std::vector<Answer> answers(asks_.size());
  std::vector<std::vector<SampleOutcome>> sampled(asks_.size());
  std::vector<Span> spans;
  lay_out(spans);
  const Step step{
      .tokens = static_cast<int32_t>(ids_.size()),
      .ids = ids_.data(),
      .positions = positions_.data(),
      .slots = slots_.data(),
      .adapters = any_adapter_ ? adapters_.data() : nullptr,
      .spans = spans.data(),
      .num_spans = static_cast<int32_t>(spans.size()),
  };
  const std::vector<Wanted> wants = wanted();
  prepare_s = seconds_since(began);
  keep_timing(Timings::kPrepare, ids_.size(), began);
  sample_s = 0.0;
  const auto forward = Clock::now();
  if (step.tokens > 0) program_->run(step, *workspace_, 0, head_);
  head(wants, answers, sampled);
  forward_s = seconds_since(forward) - sample_s;
  for (size_t i = 0; i < asks_.size(); ++i) {
    Row& one = rows_[static_cast<size_t>(asks_[i].row)];
    one.tokens.resize(one.tokens.size() - asks_[i].drafts.size());
    accept(asks_[i], sampled[i], answers[i]);
  }
  asks_.clear();
  return answers;
}

void Session::head(const std::vector<Wanted>& wanted, std::vector<Answer>& answers,
                   std::vector<std::vector<SampleOutcome>>& sampled) {
  const auto vocab = static_cast<size_t>(limits_.vocab);
  std::vector<int32_t> places, adapters;
  std::vector<SampleOutcome> outcomes, scores;
  for (size_t begin = 0; begin < wanted.size(); begin += static_cast<size_t>(head_rows_)) {
    const size_t count = std::min(wanted.size() - begin, static_cast<size_t>(head_rows_));
    places.clear();
    adapters.clear();
    for (size_t i = begin; i < begin + count; ++i) {
      places.push_back(wanted[i].place);
      adapters.push_back(adapters_[static_cast<size_t>(wanted[i].place)]);
    }
    const Step step{
        .tokens = static_cast<int32_t>(count),
        .adapters = any_adapter_ ? adapters.data() : nullptr,
        .places = places.data(),
    };
    program_->run(step, *workspace_, head_, program_->size());
    const auto began = Clock::now();
    outcomes.assign(count, {});
    scores.assign(count, {});
    parallel_for(workspace_->pool(), static_cast<int64_t>(count), 1, [&](int64_t row, int64_t, int32_t thread) {
      const auto i = static_cast<size_t>(row);
      const float* logits = workspace_->row(logits_, row);
      SampleScratch& scratch = scratch_[static_cast<size_t>(thread)];
      const Wanted& one = wanted[begin + i];
      if (one.score) scores[i] = score(one, logits, scratch);
      if (one.sample) outcomes[i] = sample(one, logits, scratch);
    });
    for (size_t i = 0; i < count; ++i) {
      const Wanted& one = wanted[begin + i];
      Answer& answer = answers[static_cast<size_t>(one.ask)];
      if (one.sample) sampled[static_cast<size_t>(one.ask)].push_back(outcomes[i]);
      if (one.score) {
        answer.prompt_logprobs.push_back(scores[i].logprobs);
        if (answer.fault == SampleFault::none) answer.fault = scores[i].fault;
      }
      if (one.keep) {
        const float* logits = workspace_->row(logits_, static_cast<int64_t>(i));
        answer.logits.insert(answer.logits.end(), logits, logits + vocab);
        answer.has_logits = true;
      }
    }
    sample_s += seconds_since(began);
    keep_timing(Timings::kSample, count, began);
  }
}

SampleOutcome Session::score(const Wanted& one, const float* logits, SampleScratch& scratch) const {
  const Row& row = rows_[static_cast<size_t>(asks_[static_cast<size_t>(one.ask)].row)];
  const int32_t token = row.tokens[static_cast<size_t>(one.position) + 1];
  return score_row(logits, token, row.sampling.prompt_logprobs, scratch);
}

SampleOutcome Session::sample(const Wanted& one, const float* logits, SampleScratch& scratch) const {
  const Ask& ask = asks_[static_cast<size_t>(one.ask)];
  const Row& row = rows_[static_cast<size_t>(ask.row)];
  // The mask holds one vocabulary's bits for each sampled position.
  const auto which = static_cast<size_t>(one.position - (ask.start + ask.length - 1));
  const size_t positions = 1 + ask.drafts.size();
  const size_t size = (ask.mask.size() + positions - 1) / positions;
  const size_t first = std::min(which * size, ask.mask.size());
  const auto* mask = ask.has_mask ? reinterpret_cast<const uint8_t*>(ask.mask.data()) + first : nullptr;
  return sample_row(logits, row.sampling, row.tokens.data(), one.position + 1, mask,
                    static_cast<int64_t>(std::min(size, ask.mask.size() - first)), scratch);
}

// Drafts are kept while each is the token that was sampled before it. A draft is a guess: what goes wrong behind one
// costs only what was sampled there.
void Session::accept(const Ask& ask, const std::vector<SampleOutcome>& sampled, Answer& answer) {
  if (answer.fault != SampleFault::none) return;
  Row& one = rows_[static_cast<size_t>(ask.row)];
  for (size_t i = 0; i < sampled.size(); ++i) {
    const SampleOutcome& outcome = sampled[i];
    if (outcome.fault != SampleFault::none) {
      if (i == 0) {
        answer.fault = outcome.fault;
        answer.detail = outcome.detail;
      } else {
        --answer.accepted;
      }
      break;
    }
    answer.tokens.push_back(outcome.token);
    if (outcome.has_logprobs) answer.logprobs.push_back(outcome.logprobs);
    if (i == ask.drafts.size() || outcome.token != ask.drafts[i]) break;
    ++answer.accepted;
  }
  if (answer.has_logits && !ask.sample) {
    const bool finite = std::all_of(answer.logits.begin(), answer.logits.end(), [](float x) { return std::isfinite(x); });
    if (!finite) answer.fault = SampleFault::not_finite;
  }
  if (answer.fault != SampleFault::none) return;
  // Ids past the longest sequence are dropped: no plan can ever compute them.
  const size_t room = static_cast<size_t>(limits_.max_model_len) - one.tokens.size();
  one.tokens.insert(one.tokens.end(), answer.tokens.begin(),
                    answer.tokens.begin() + static_cast<int64_t>(std::min(room, answer.tokens.size())));
}

}  // namespace headrace
