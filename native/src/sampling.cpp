#include "sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "philox.h"

namespace headrace {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kMost = std::numeric_limits<float>::max();

// A temperature this low is greedy: dividing by it would leave nothing but the largest logit.
constexpr double kGreedyBelow = 1e-5;

// A little more than the largest gumbel of a 32-bit uniform, 22.874.
constexpr double kMostGumbel = 22.9;

// The largest guess at how many ids are too unlikely to be in a nucleus; guesses are this and its halves.
constexpr int32_t kMostGuessed = 8192;

// Of two rough sums, one that is less by this share is less in truth.
constexpr double kRoughly = 2.5 * kRoughError;

// Values in ascending order of their ids.
struct Items {
  const float* values;
  const int32_t* ids;  // null: 0, 1, 2 …
  int32_t count;

  int32_t id(int32_t place) const { return ids == nullptr ? place : ids[place]; }
};

// A float at or below the number; finite, so that -inf is never at or above it.
float rounded_down(double number) {
  const float nearest = static_cast<float>(std::clamp<double>(number, -kMost, kMost));
  return nearest <= number ? nearest : std::max(std::nextafter(nearest, -kInfinity), -kMost);
}

SampleOutcome failed(SampleFault fault, int64_t detail = 0) {
  SampleOutcome outcome;
  outcome.fault = fault;
  outcome.detail = detail;
  return outcome;
}

// ---------------------------------------------------------------- the order of things

// Ascends as the value falls; one key for both zeros.
uint64_t falling(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value + 0.0f);
  return (bits >> 31) != 0 ? bits : 0x7FFFFFFFu - bits;
}

float rank_among(float* values, int32_t count, int32_t rank) {
  std::nth_element(values, values + rank - 1, values + count,
                   [](float one, float other) { return one > other; });
  return values[rank - 1];
}

// The value of this rank, 1 the largest; `space` has room for count + 64 floats, `ids` for count.
float value_of_rank(const SamplingKernels& kernels, const float* values, int32_t count, int32_t rank,
                    float* space, int32_t* ids) {
  constexpr int32_t kLanes = 16;
  constexpr int32_t kTile = kLanes * kMaximaGroup;
  const int32_t groups = (count + kTile - 1) / kTile * kLanes;
  if (count < 4 * kTile || rank > groups / 2) {
    std::memcpy(space, values, sizeof(float) * static_cast<size_t>(count));
    return rank_among(space, count, rank);
  }
  // `rank` groups have a maximum of at least the floor: so many values at least are above it.
  kernels.group_maxima(values, count, space);
  const float floor = value_of_rank(kernels, space, groups, rank, space + groups, ids);
  return rank_among(space, kernels.collect(values, nullptr, count, floor, ids, space), rank);
}

// Those of a lower key, and those of the same key up to place `last`.
struct Prefix {
  uint64_t key;
  int32_t last;

  bool holds(uint64_t other, int32_t place) const { return other < key || (other == key && place <= last); }
};

// The shortest prefix of (lowest key first, lowest place first) that weighs `goal`, of the scratch's keys and
// weights; everything where all together are lighter. Buckets of keys are narrowed down to the one in which
// the goal is.
Prefix shortest_prefix(SampleScratch& scratch, int32_t count, double goal) {
  constexpr int32_t kFew = 64;
  constexpr int32_t kBucketBits = 10;
  const uint64_t* keys = scratch.keys.get();
  const double* weights = scratch.weights.get();
  int32_t* places = scratch.places.get();
  for (int32_t i = 0; i < count; ++i) places[i] = i;
  double sum = 0.0;
  bool alike = false;
  while (count > kFew && !alike) {
    uint64_t low = keys[places[0]];
    uint64_t high = low;
    for (int32_t i = 1; i < count; ++i) {
      low = std::min(low, keys[places[i]]);
      high = std::max(high, keys[places[i]]);
    }
    alike = low == high;
    const int32_t shift = std::max(0, static_cast<int32_t>(std::bit_width(high - low)) - kBucketBits);
    std::array<double, 1 << kBucketBits> sums{};
    for (int32_t i = 0; i < count; ++i) sums[(keys[places[i]] - low) >> shift] += weights[places[i]];
    uint64_t bucket = 0;
    while (bucket < (high - low) >> shift && sum + sums[bucket] < goal) sum += sums[bucket++];
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i) {
      const int32_t place = places[i];
      places[kept] = place;
      kept += static_cast<int32_t>((keys[place] - low) >> shift == bucket);
    }
    count = kept;
  }
  if (!alike) {
    std::sort(places, places + count, [keys](int32_t one, int32_t other) {
      return keys[one] != keys[other] ? keys[one] < keys[other] : one < other;
    });
  }
  int32_t last = 0;
  for (sum += weights[places[0]]; last + 1 < count && sum < goal;) sum += weights[places[++last]];
  return {keys[places[last]], places[last]};
}

// In place: leaves the candidates for which `stays(place)`.
template <class Stays>
Items leave(const SampleScratch::Candidates& candidates, int32_t count, Stays stays) {
  int32_t kept = 0;
  for (int32_t i = 0; i < count; ++i) {
    const bool one_more = stays(i);
    candidates.values[kept] = candidates.values[i];
    candidates.ids[kept] = candidates.ids[i];
    kept += static_cast<int32_t>(one_more);
  }
  return {candidates.values.get(), candidates.ids.get(), kept};
}

// ---------------------------------------------------------------- log-probabilities

// Log-softmax of the raw logits, in float64.
Logprobs logprobs_of(SampleScratch& scratch, const float* logits, float peak, int32_t token, int32_t count) {
  const SamplingKernels& kernels = *scratch.kernels;
  const double total = peak + std::log(kernels.sum_weights(logits, scratch.vocab, peak, 1.0));
  Logprobs out;
  out.logprob = logits[token] - total;
  count = std::min(count, scratch.vocab);
  if (count <= 0) return out;
  const float least =
      value_of_rank(kernels, logits, scratch.vocab, count, scratch.selection.get(), scratch.places.get());
  const SampleScratch::Candidates& found = scratch.candidates[0];
  const int32_t size =
      kernels.collect(logits, nullptr, scratch.vocab, least, found.ids.get(), found.values.get());
  int32_t ties = count;
  for (int32_t i = 0; i < size; ++i) ties -= static_cast<int32_t>(found.values[i] > least);
  std::array<float, kMaxLogprobs> values;
  for (int32_t i = 0; i < size; ++i) {
    const float value = found.values[i];
    if (value == least && ties-- <= 0) continue;
    int32_t at = out.top_count++;
    for (; at > 0 && values[at - 1] < value; --at) {
      values[at] = values[at - 1];
      out.top[at] = out.top[at - 1];
    }
    values[at] = value;
    out.top[at] = {found.ids[i], value - total};
  }
  return out;
}

// ---------------------------------------------------------------- one row

class Sampler {
 public:
  Sampler(SampleScratch& scratch, const RowSampling& row, const int32_t* token_ids, int32_t num_tokens)
      : scratch_(scratch),
        kernels_(*scratch.kernels),
        row_(row),
        token_ids_(token_ids),
        num_tokens_(num_tokens),
        answer_(token_ids + row.num_prompt),
        answered_(num_tokens - row.num_prompt),
        early_(answered_ < row.min_tokens && !row.stop_ids.empty()),
        inverse_temperature_(1.0 / row.temperature) {}

  SampleOutcome sample(const float* logits, const uint8_t* mask, int64_t mask_bytes) {
    const Peak raw = kernels_.find_peak(logits, scratch_.vocab);
    if (!raw.finite) return failed(SampleFault::not_finite);
    Peak peak = raw;
    const float* values = logits;
    if (changes(mask)) {
      const SampleOutcome changed = change(logits, mask, mask_bytes);
      if (changed.fault != SampleFault::none) return changed;
      values = scratch_.changed.get();
      peak = kernels_.find_peak(values, scratch_.vocab);
    }
    if (peak.value == -kInfinity) return failed(SampleFault::nothing_allowed);
    SampleOutcome outcome;
    if (row_.temperature < kGreedyBelow) {
      outcome.token = peak.index;
    } else {
      if (!row_.has_seed) return failed(SampleFault::no_seed);
      best_ = peak.index;
      outcome.token = choose(values, peak.value);
    }
    outcome.has_logprobs = row_.logprobs >= 0;
    if (outcome.has_logprobs) {
      outcome.logprobs = logprobs_of(scratch_, logits, raw.value, outcome.token, row_.logprobs);
    }
    return outcome;
  }

 private:
  // ---------------------------------------------------------------- masks, biases, penalties

  bool banned(const RowSampling::BadSequence& bad) const {
    const int32_t length = static_cast<int32_t>(bad.before.size());
    return length <= answered_ &&
           std::equal(bad.before.begin(), bad.before.end(), answer_ + answered_ - length);
  }

  bool changes(const uint8_t* mask) const {
    return mask != nullptr || early_ || !row_.allowed.empty() || !row_.biases.empty() || row_.penalises() ||
           std::any_of(row_.bad_sequences.begin(), row_.bad_sequences.end(),
                       [this](const RowSampling::BadSequence& bad) { return banned(bad); });
  }

  SampleOutcome change(const float* logits, const uint8_t* mask, int64_t mask_bytes) {
    const int32_t vocab = scratch_.vocab;
    if (mask != nullptr && mask_bytes != (int64_t{vocab} + 7) / 8) {
      return failed(SampleFault::mask_size, mask_bytes);
    }
    float* values = scratch_.changed.get();
    std::memcpy(values, logits, sizeof(float) * static_cast<size_t>(vocab));
    for (const auto& [id, bias] : row_.biases) values[id] += bias;
    if (!row_.allowed.empty()) kernels_.apply_mask(values, row_.allowed.data(), vocab);
    for (const RowSampling::BadSequence& bad : row_.bad_sequences) {
      if (banned(bad)) values[bad.last] = -kInfinity;
    }
    if (early_) {
      for (const int32_t id : row_.stop_ids) values[id] = -kInfinity;
    }
    if (mask != nullptr) kernels_.apply_mask(values, mask, vocab);
    return row_.penalises() ? penalise(values) : SampleOutcome{};
  }

  // Repetition: of ids in prompt or answer; frequency and presence: of ids in the answer. One rounding an
  // operation.
  SampleOutcome penalise(float* values) {
    const bool repetition = row_.repetition_penalty != 1.0;
    for (const int32_t* id = repetition ? token_ids_ : answer_; id != token_ids_ + num_tokens_; ++id) {
      if (*id < 0 || *id >= scratch_.vocab) return failed(SampleFault::foreign_token, *id);
    }
    if (repetition) penalise_repetition(values);
    if (row_.frequency_penalty != 0.0 || row_.presence_penalty != 0.0) penalise_answer(values);
    return {};
  }

  // The penalty and what it makes of a logit are held within the finite float32.
  void penalise_repetition(float* values) {
    constexpr float kLeast = std::numeric_limits<float>::min();
    const float penalty = static_cast<float>(std::clamp<double>(row_.repetition_penalty, kLeast, kMost));
    int32_t* counts = scratch_.counts.get();
    for (int32_t i = 0; i < num_tokens_; ++i) {
      const int32_t id = token_ids_[i];
      const float value = values[id];
      if (counts[id]++ != 0 || value == -kInfinity) continue;
      values[id] = std::clamp(value > 0 ? value / penalty : value * penalty, -kMost, kMost);
    }
    for (int32_t i = 0; i < num_tokens_; ++i) counts[token_ids_[i]] = 0;
  }

  void penalise_answer(float* values) {
    const float frequency = static_cast<float>(row_.frequency_penalty);
    const float presence = static_cast<float>(row_.presence_penalty);
    int32_t* counts = scratch_.counts.get();
    for (int32_t i = 0; i < answered_; ++i) ++counts[answer_[i]];
    for (int32_t i = 0; i < answered_; ++i) {
      const int32_t id = answer_[i];
      if (counts[id] == 0) continue;
      values[id] -= frequency * static_cast<float>(counts[id]);
      values[id] -= presence;
      counts[id] = 0;
    }
  }

  // ---------------------------------------------------------------- filters

  int32_t choose(const float* values, float top) {
    Items items{values, nullptr, scratch_.vocab};
    if (row_.top_k > 0 && row_.top_k < scratch_.vocab) items = keep_top(items);
    if (row_.typical_p < 1.0) {
      items = keep_typical(items, top);
      top = kernels_.largest(items.values, items.count);
    }
    return row_.top_p < 1.0 ? draw_from_nucleus(items, top) : items.id(draw(items, top));
  }

  // Those at or above a floor.
  Items cut_out(const Items& items, float floor, const SampleScratch::Candidates& into) {
    const int32_t count =
        kernels_.collect(items.values, items.ids, items.count, floor, into.ids.get(), into.values.get());
    return {into.values.get(), into.ids.get(), count};
  }

  Items keep_top(const Items& items) {
    const float least = value_of_rank(kernels_, items.values, items.count, row_.top_k,
                                      scratch_.selection.get(), scratch_.places.get());
    const SampleScratch::Candidates& candidates = scratch_.candidates[0];
    const Items found = cut_out(items, std::max(least, -kMost), candidates);
    int32_t ties = row_.top_k;
    for (int32_t i = 0; i < found.count; ++i) ties -= static_cast<int32_t>(found.values[i] > least);
    return leave(candidates, found.count, [&](int32_t i) { return found.values[i] > least || ties-- > 0; });
  }

  // Locally typical sampling (arXiv 2202.00666, eq. 8): the shortest prefix of (surprise closest to the
  // entropy first, lowest id first) whose share is at least typical_p.
  Items keep_typical(Items items, float top) {
    const SampleScratch::Candidates& candidates = scratch_.candidates[0];
    if (items.ids == nullptr) items = cut_out(items, -kMost, candidates);
    double* shares = scratch_.weights.get();
    uint64_t* keys = scratch_.keys.get();
    kernels_.weights(items.values, items.count, top, inverse_temperature_, shares);
    const double whole = kernels_.sum_weights(items.values, items.count, top, inverse_temperature_);
    const double log_whole = std::log(whole);
    const auto logprob = [&](int32_t i) {
      return (static_cast<double>(items.values[i]) - top) / row_.temperature - log_whole;
    };
    double entropy = 0.0;
    for (int32_t i = 0; i < items.count; ++i) {
      shares[i] /= whole;
      entropy -= shares[i] * logprob(i);
    }
    for (int32_t i = 0; i < items.count; ++i) {
      // The bits of numbers that are not negative ascend as they do.
      keys[i] = std::bit_cast<uint64_t>(std::fabs(-logprob(i) - entropy));
    }
    const Prefix prefix = shortest_prefix(scratch_, items.count, row_.typical_p);
    return leave(candidates, items.count, [&](int32_t i) { return prefix.holds(keys[i], i); });
  }

  // ---------------------------------------------------------------- nucleus

  // The draw from the nucleus: the shortest prefix of (likeliest first, lowest id first) whose share of the
  // whole is at least top_p. It need not be known: who wins among more than it is its winner too, if inside,
  // and one outside takes all behind it out of the race. A winner is inside if those ahead of it weigh less than
  // the goal: rough sums tell, but for one draw in a thousand.
  int32_t draw_from_nucleus(const Items& items, float top) {
    const double whole = weigh(items, -kInfinity, top);
    const double goal = row_.top_p * whole;
    for (Items able = likely(items, top, whole);;) {
      const int32_t winner = draw(able, top);
      const int32_t id = able.id(winner);
      // With all of its own value it may still be light enough: then nobody need be sorted out.
      if (weigh(able, able.values[winner], top) < goal * (1.0 - kRoughly)) return id;
      able = ahead(able, winner);
      const double weight = weigh(able, -kInfinity, top);
      if (able.count == 0 || weight < goal * (1.0 - kRoughly)) return id;
      if (weight < goal * (1.0 + kRoughly)) {
        const Items nucleus = keep_nucleus(items, top);
        return nucleus.id(draw(nucleus, top));
      }
    }
  }

  // The weight of those at or above a floor, roughly.
  double weigh(const Items& items, float floor, float top) const {
    return kernels_.sum_roughly(items.values, items.count, floor, top, inverse_temperature_);
  }

  // At least the nucleus. Items lighter than 1 - top_p of the whole over their number can all be left out; so can
  // those lighter by a guess at the number, if what is left reaches the goal.
  Items likely(const Items& items, float top, double whole) {
    const double goal = row_.top_p * whole * (1.0 + kRoughly);
    const auto floor_of = [&](int32_t guess) {
      return rounded_down(top + row_.temperature * std::log((1.0 - row_.top_p) * whole / guess));
    };
    int32_t guess = kMostGuessed;
    if (items.count <= guess) return items;
    const Items found = cut_out(items, floor_of(guess), scratch_.candidates[1]);
    if (weigh(found, -kInfinity, top) < goal) return items;
    while (guess > 1 && weigh(found, floor_of(guess / 2), top) >= goal) guess /= 2;
    return cut_out(found, floor_of(guess), scratch_.candidates[1]);
  }

  // Those before one of them in the order of (likeliest first, lowest id first).
  Items ahead(const Items& items, int32_t place) {
    const SampleScratch::Candidates& candidates = scratch_.candidates[1];
    const float value = items.values[place];
    const int32_t id = items.id(place);
    const Items found = cut_out(items, value, candidates);
    return leave(candidates, found.count, [&](int32_t i) {
      return found.values[i] > value || (found.values[i] == value && found.ids[i] < id);
    });
  }

  // The nucleus, by sums in float64.
  Items keep_nucleus(const Items& items, float top) {
    const SampleScratch::Candidates& candidates = scratch_.candidates[1];
    const Items found = cut_out(items, -kMost, candidates);
    kernels_.weights(found.values, found.count, top, inverse_temperature_, scratch_.weights.get());
    uint64_t* keys = scratch_.keys.get();
    for (int32_t i = 0; i < found.count; ++i) keys[i] = falling(found.values[i]);
    const double whole = kernels_.sum_weights(items.values, items.count, top, inverse_temperature_);
    const Prefix prefix = shortest_prefix(scratch_, found.count, row_.top_p * whole);
    return leave(candidates, found.count, [&](int32_t i) { return prefix.holds(keys[i], i); });
  }

  // ---------------------------------------------------------------- the draw

  // The random words of `count` ≤ kNoiseChunk items.
  void noise(const Items& items, int32_t start, int32_t count, uint32_t* words) const {
    const uint64_t position = static_cast<uint64_t>(answered_);
    if (items.ids == nullptr) return kernels_.noise_words(row_.seed, position, start, words);
    const int32_t* ids = items.ids + start;
    const int32_t first = ids[0] / 4 * 4;
    const int32_t chunks = (ids[count - 1] - first) / kNoiseChunk + 1;
    // One id alone costs as much as four in a row.
    if (count <= chunks * (kNoiseChunk / 4)) {
      return kernels_.noise_words_of(row_.seed, position, ids, count, words);
    }
    std::array<uint32_t, 4 * kNoiseChunk> all;
    for (int32_t i = 0; i < chunks * kNoiseChunk; i += kNoiseChunk) {
      kernels_.noise_words(row_.seed, position, first + i, all.data() + i);
    }
    for (int32_t i = 0; i < count; ++i) words[i] = all[ids[i] - first];
  }

  double score(float value, uint32_t word) const { return value / row_.temperature + gumbel(word); }

  int32_t place_of(const Items& items, float value) const {
    return static_cast<int32_t>(std::find(items.values, items.values + items.count, value) - items.values);
  }

  // The place of the largest of value / temperature + gumbel among ids that are at least min_p times as likely as
  // the likeliest, whose value is `highest`; the lowest id on a tie.
  int32_t draw(const Items& items, float highest) const {
    const uint64_t position = static_cast<uint64_t>(answered_);
    const double top = highest;
    const double peak = top / row_.temperature;
    int32_t best = items.ids == nullptr ? best_ : place_of(items, highest);
    const double least = row_.min_p > 0.0 ? std::log(row_.min_p) - 1e-3 : -1e300;
    double most = score(items.values[best], uniform_word(row_.seed, position, items.id(best)));
    std::array<uint32_t, kNoiseChunk> words;
    std::array<int32_t, kNoiseChunk> found;
    for (int32_t start = 0; start < items.count; start += kNoiseChunk) {
      const int32_t count = std::min(items.count - start, kNoiseChunk);
      const float* values = items.values + start;
      // Nothing below this wins, with the largest gumbel there is.
      const double floor = top + row_.temperature * std::max(most - peak - kMostGumbel, least);
      if (kernels_.largest(values, count) < floor) continue;
      noise(items, start, count, words.data());
      const int32_t able = kernels_.contenders(values, words.data(), count, static_cast<float>(top),
                                               static_cast<float>(inverse_temperature_),
                                               static_cast<float>(std::exp(most - peak)), found.data());
      for (int32_t i = 0; i < able; ++i) {
        const int32_t place = start + found[i];
        if (std::exp((items.values[place] - top) / row_.temperature) < row_.min_p) continue;
        const double reached = score(items.values[place], words[found[i]]);
        if (reached > most || (reached == most && place < best)) {
          most = reached;
          best = place;
        }
      }
    }
    return best;
  }

  SampleScratch& scratch_;
  const SamplingKernels& kernels_;
  const RowSampling& row_;
  const int32_t* token_ids_;
  int32_t num_tokens_;
  const int32_t* answer_;
  int32_t answered_;
  bool early_;
  double inverse_temperature_;
  int32_t best_ = 0;  // the likeliest id, if nothing is filtered out
};

}  // namespace

// ---------------------------------------------------------------- public

TokenBits::TokenBits(int32_t vocab, bool allowed)
    : bytes_((static_cast<size_t>(vocab) + 7) / 8, allowed ? uint8_t{0xFF} : uint8_t{0}) {}

void TokenBits::set(int32_t id, bool allowed) {
  const uint8_t bit = static_cast<uint8_t>(1u << (id % 8));
  uint8_t& byte = bytes_[static_cast<size_t>(id / 8)];
  byte = static_cast<uint8_t>(allowed ? byte | bit : byte & ~bit);
}

const char* fault_code(SampleFault fault) {
  switch (fault) {
    case SampleFault::none: return "";
    case SampleFault::not_finite: return "nan_logits";
    case SampleFault::nothing_allowed: return "no_token_allowed";
    case SampleFault::mask_size:
    case SampleFault::no_seed:
    case SampleFault::foreign_token: return "engine_fault";
  }
  return "engine_fault";
}

std::string fault_message(SampleFault fault, int64_t detail, int32_t vocab) {
  switch (fault) {
    case SampleFault::none: return "";
    case SampleFault::not_finite: return "the model's logits are not finite (NaN or infinity)";
    case SampleFault::nothing_allowed:
      return "no token is allowed here: every one is masked, or has no probability";
    case SampleFault::mask_size:
      return "a grammar mask of " + std::to_string(detail) + " bytes, " +
             std::to_string((int64_t{vocab} + 7) / 8) + " needed";
    case SampleFault::no_seed:
      return "seed: None reached the backend; the engine draws one for every request that samples";
    case SampleFault::foreign_token:
      return "token id " + std::to_string(detail) + " reached the backend; the vocabulary has " +
             std::to_string(vocab);
  }
  return "";
}

SampleScratch::SampleScratch(const SamplingKernels& table, int32_t size)
    : kernels(&table),
      vocab(size),
      changed(std::make_unique_for_overwrite<float[]>(static_cast<size_t>(size))),
      counts(std::make_unique<int32_t[]>(static_cast<size_t>(size))),
      selection(std::make_unique_for_overwrite<float[]>(static_cast<size_t>(size) + 64)),
      weights(std::make_unique_for_overwrite<double[]>(static_cast<size_t>(size))),
      keys(std::make_unique_for_overwrite<uint64_t[]>(static_cast<size_t>(size))),
      places(std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(size))) {
  for (Candidates& one : candidates) {
    one.ids = std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(size));
    one.values = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(size));
  }
}

SampleOutcome sample_row(const float* logits, const RowSampling& row, const int32_t* token_ids,
                         int32_t num_tokens, const uint8_t* mask, int64_t mask_bytes,
                         SampleScratch& scratch) noexcept {
  return Sampler(scratch, row, token_ids, num_tokens).sample(logits, mask, mask_bytes);
}

SampleOutcome score_row(const float* logits, int32_t token, int32_t count, SampleScratch& scratch) noexcept {
  const Peak peak = scratch.kernels->find_peak(logits, scratch.vocab);
  if (!peak.finite) return failed(SampleFault::not_finite);
  SampleOutcome outcome;
  outcome.token = token;
  outcome.has_logprobs = true;
  outcome.logprobs = logprobs_of(scratch, logits, peak.value, token, count);
  return outcome;
}

}  // namespace headrace
