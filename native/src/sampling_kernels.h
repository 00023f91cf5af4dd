// The sampler's loops over a vocabulary, compiled once an instruction set (isa/sampling.h). Each works on
// plain arrays and knows nothing of requests; "weight" is e^((value - peak) / temperature), 1 for the
// likeliest.
#pragma once

#include <cstdint>

namespace headrace {

// Ids whose noise is made and tested together.
constexpr int32_t kNoiseChunk = 256;

// Values of which `group_maxima` takes one maximum.
constexpr int32_t kMaximaGroup = 16;

// The most by which `sum_roughly` errs, as a share of the sum.
constexpr double kRoughError = 2e-4;

struct Peak {
  float value;    // the largest; -inf where all are
  int32_t index;  // its lowest index
  bool finite;    // no NaN, no +inf; value and index mean nothing where there is one
};

struct SamplingKernels {
  Peak (*find_peak)(const float* values, int32_t count);

  // The largest of at least one value, none of them NaN.
  float (*largest)(const float* values, int32_t count);

  // ceil(count / 256) × 16 maxima, each over at most 16 of the values, every value in one of them; -inf over
  // none.
  void (*group_maxima)(const float* values, int32_t count, float* maxima);

  // The values at or above the floor, in order, with their ids; `ids` null: these are indices. Returns how many.
  // The outputs have room for `count`, and may be the inputs.
  int32_t (*collect)(const float* values, const int32_t* ids, int32_t count, float floor, int32_t* found_ids,
                     float* found);

  // -inf for each value whose bit (little-endian within a byte) is 0.
  void (*apply_mask)(float* values, const uint8_t* bits, int32_t count);

  // Float64 weights, to within 2 units in the last place where they are above 1e-307; 3e-308 below.
  double (*sum_weights)(const float* values, int32_t count, double peak, double inverse_temperature);
  void (*weights)(const float* values, int32_t count, double peak, double inverse_temperature, double* out);

  // The sum of the weights of the values at or above the floor, the peak among them, to within kRoughError of it,
  // in a fraction of the time. The inverse temperature is 1e5 at most.
  double (*sum_roughly)(const float* values, int32_t count, float floor, float peak,
                        double inverse_temperature);

  // The random words of kNoiseChunk ids, from `first_id` on, a multiple of 4.
  void (*noise_words)(uint64_t seed, uint64_t position, int32_t first_id, uint32_t* words);

  // The same of any ids, at four times the price for each.
  void (*noise_words_of)(uint64_t seed, uint64_t position, const int32_t* ids, int32_t count,
                         uint32_t* words);

  // Indices of the values that may reach a score; all that do are among them. count ≤ kNoiseChunk; `lead` is
  // e^(score - peak / temperature). Returns how many.
  int32_t (*contenders)(const float* values, const uint32_t* words, int32_t count, float peak,
                        float inverse_temperature, float lead, int32_t* indices);
};

}  // namespace headrace
