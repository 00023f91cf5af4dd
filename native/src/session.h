// One engine's live requests on a program: their tokens, block tables and sampling, and the step that computes some of
// them (docs/CONTRACTS.md §1). A plan that breaks the protocol throws std::invalid_argument.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "program.h"
#include "sampling.h"

namespace headrace {

// The memory behind the blocks, of all layers.
class KvStore {
 public:
  KvStore(KvType type, int32_t block_size, int32_t num_blocks)
      : type_(type), block_size_(block_size), num_blocks_(num_blocks) {}
  KvStore(const KvStore&) = delete;
  KvStore& operator=(const KvStore&) = delete;
  // Layers first, then their memory: a block's parts of all layers lie together, so that a request's memory is one
  // run after another, on huge pages, and copying a block is one copy.
  void add_layer(int32_t kv_heads, int32_t head_dim);
  void allocate();  // once; again does nothing
  void copy(int32_t source, int32_t target);
  int64_t bytes() const { return block_bytes_ * num_blocks_; }
  int32_t num_layers() const { return static_cast<int32_t>(layers_.size()); }
  const KvLayer* layer(int32_t index) const { return layers_.at(static_cast<size_t>(index)).get(); }
  int32_t block_size() const { return block_size_; }
  int32_t num_blocks() const { return num_blocks_; }

 private:
  KvType type_;
  int32_t block_size_, num_blocks_;
  std::vector<std::unique_ptr<KvLayer>> layers_;
  int64_t block_bytes_ = 0;
  std::unique_ptr<Bytes> memory_;
};

struct Limits {
  int32_t vocab, max_rows, max_tokens, max_model_len;
};

// What a plan asks of one row.
struct Ask {
  int32_t row, start, length;
  std::vector<int32_t> drafts;
  bool sample, logits, score_prompt;
  std::string mask;  // bits of the vocabulary for each sampled position
  bool has_mask;
};

struct Answer {
  std::vector<int32_t> tokens;
  int32_t accepted = 0;
  std::vector<Logprobs> logprobs;         // one a token, if asked for
  std::vector<Logprobs> prompt_logprobs;  // if asked for
  std::vector<float> logits;              // [positions][vocabulary], if asked for
  bool has_logits = false;
  SampleFault fault = SampleFault::none;
  int64_t detail = 0;
};

class Session {
 public:
  // Operations [0, head) of the program make hidden states in buffer `hidden`; [head, …) make logits in buffer `logits`
  // of rows taken from there.
  Session(std::shared_ptr<const Program> program, std::shared_ptr<KvStore> kv, Limits limits, int32_t threads,
          int32_t head, int32_t logits);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  void admit(int32_t row, std::vector<int32_t> tokens, int32_t num_prompt, RowSampling sampling, int32_t adapter);
  void release(int32_t row);
  void append_blocks(int32_t row, const std::vector<int32_t>& blocks);
  void ask(Ask ask);
  void cancel() { asks_.clear(); }
  // Computes what was asked since the last run; one answer an ask, in order.
  std::vector<Answer> run();
  // From now on, or no more, runs keep when each operation began and ended.
  void profile(bool on) { workspace_->timings = on ? &timings_ : nullptr; }
  std::vector<Timing> take_timings() { return timings_.take(); }

  // Of the last run: seconds of making arrays, of the layers and the head, of sampling.
  double prepare_s = 0.0, forward_s = 0.0, sample_s = 0.0;
  const Workspace& workspace() const { return *workspace_; }
  KvStore& kv() { return *kv_; }
  const Program& program() const { return *program_; }
  int64_t bytes() const { return workspace_->bytes(); }
  int32_t vocab() const { return limits_.vocab; }

 private:
  struct Row {
    bool live = false;
    std::vector<int32_t> tokens;
    std::vector<int32_t> blocks;
    RowSampling sampling;
    int32_t adapter = -1;
  };
  // A token of the step whose logits are wanted.
  struct Wanted {
    int32_t place;     // among the step's tokens
    int32_t ask;
    int32_t position;  // in its sequence
    bool sample, score, keep;
  };

  Row& row(int32_t index);
  void keep_timing(int32_t what, size_t rows, Timings::Clock::time_point began);
  void lay_out(std::vector<Span>& spans);
  std::vector<Wanted> wanted() const;
  void head(const std::vector<Wanted>& wanted, std::vector<Answer>& answers,
            std::vector<std::vector<SampleOutcome>>& sampled);
  SampleOutcome score(const Wanted& one, const float* logits, SampleScratch& scratch) const;
  SampleOutcome sample(const Wanted& one, const float* logits, SampleScratch& scratch) const;
  void accept(const Ask& ask, const std::vector<SampleOutcome>& sampled, Answer& answer);

  std::shared_ptr<const Program> program_;
  std::shared_ptr<KvStore> kv_;
  Limits limits_;
  int32_t head_, logits_, head_rows_;
  Timings timings_;
  std::unique_ptr<Workspace> workspace_;
  std::vector<Row> rows_;
  std::vector<Ask> asks_;
  std::vector<SampleScratch> scratch_;  // a thread
  // The step's arrays.
  std::vector<int32_t> ids_, positions_, adapters_;
  std::vector<int64_t> slots_;
  bool any_adapter_ = false;
};

}  // namespace headrace
