// Logits -> tokens: the fast equal of `headrace/backends/sampling.py`, which says what sampling means
// (docs/CONTRACTS.md §2). The same tokens, errors and, to 1e-12, log-probabilities.
//
// No sort of a vocabulary: a bound that provably loses nothing cuts the candidates out by value, and for top-p
// the winner of a draw among more than enough is asked whether it belongs there. What a row gets depends on
// nothing but that row.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sampling_kernels.h"

namespace headrace {

constexpr int32_t kMaxLogprobs = 20;

// A bit a token id, little-endian within a byte, as a grammar mask has them: 1 is allowed.
class TokenBits {
 public:
  TokenBits() = default;
  TokenBits(int32_t vocab, bool allowed);
  void set(int32_t id, bool allowed);
  bool empty() const { return bytes_.empty(); }
  const uint8_t* data() const { return bytes_.data(); }

 private:
  std::vector<uint8_t> bytes_;
};

// What a request asks of every draw: made once, when it enters its row. Every id is inside the vocabulary.
struct RowSampling {
  struct BadSequence {
    std::vector<int32_t> before;  // at least one id
    int32_t last;                 // masked where the answer ends in `before`
  };

  int32_t vocab = 0;
  double temperature = 0.0;
  int32_t top_k = 0;  // ≤ 0: all
  double top_p = 1.0;
  double min_p = 0.0;
  double typical_p = 1.0;
  double repetition_penalty = 1.0;
  double frequency_penalty = 0.0;
  double presence_penalty = 0.0;
  std::vector<std::pair<int32_t, float>> biases;  // of different ids
  TokenBits allowed;                              // empty: every id
  std::vector<BadSequence> bad_sequences;
  int64_t min_tokens = 0;
  std::vector<int32_t> stop_ids;  // masked while fewer than `min_tokens` are out
  bool has_seed = false;
  uint64_t seed = 0;  // two's complement
  int32_t num_prompt = 0;
  int32_t logprobs = -1;         // -1: none; at most kMaxLogprobs
  int32_t prompt_logprobs = -1;  // the same of the prompt's tokens

  bool penalises() const {
    return repetition_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0;
  }
};

enum class SampleFault : int32_t { none, not_finite, nothing_allowed, mask_size, no_seed, foreign_token };

// The stable code of `headrace.core.errors`.
const char* fault_code(SampleFault fault);
// One line. `detail` and `vocab` as the outcome and the call had them.
std::string fault_message(SampleFault fault, int64_t detail, int32_t vocab);

struct TokenLogprob {
  int32_t id;
  double logprob;
};

// Of the raw logits: the token's, and the likeliest ones, best first, ties by lowest id.
struct Logprobs {
  double logprob = 0.0;
  int32_t top_count = 0;
  std::array<TokenLogprob, kMaxLogprobs> top{};
};

struct SampleOutcome {
  int32_t token = -1;  // -1 where there is a fault
  SampleFault fault = SampleFault::none;
  int64_t detail = 0;      // the mask's bytes, or the foreign token
  bool has_logprobs = false;
  Logprobs logprobs;
};

// One thread's memory, for one size of vocabulary: sampling allocates nothing.
struct SampleScratch {
  struct Candidates {
    std::unique_ptr<int32_t[]> ids;
    std::unique_ptr<float[]> values;
  };

  SampleScratch(const SamplingKernels& kernels, int32_t vocab);

  const SamplingKernels* kernels;
  int32_t vocab;
  std::unique_ptr<float[]> changed;    // logits after masks, biases and penalties
  std::unique_ptr<int32_t[]> counts;   // always left as zeros
  std::unique_ptr<float[]> selection;  // what the search for a rank narrows down
  std::array<Candidates, 2> candidates;
  std::unique_ptr<double[]> weights;  // of candidates, as the keys are
  std::unique_ptr<uint64_t[]> keys;
  std::unique_ptr<int32_t[]> places;
};

// A token for a row of raw logits after `num_tokens` ≥ num_prompt tokens of prompt and answer, accepted
// drafts included. `mask`: a grammar mask of `mask_bytes`, or null. Threads may share everything but the
// scratch, which is of the row's vocabulary.
SampleOutcome sample_row(const float* logits, const RowSampling& row, const int32_t* token_ids,
                         int32_t num_tokens, const uint8_t* mask, int64_t mask_bytes,
                         SampleScratch& scratch) noexcept;

// The log-probability of a given token, and of the `count` ≤ kMaxLogprobs likeliest.
SampleOutcome score_row(const float* logits, int32_t token, int32_t count, SampleScratch& scratch) noexcept;

}  // namespace headrace
