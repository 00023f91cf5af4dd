// The sampler as Python sees it: what an admitted request asks for, and, for tests, rows sampled one by one.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>

#include "bindings.h"
#include "sampling.h"
#include "table.h"

namespace nb = nanobind;
using namespace headrace;

namespace {

using LogitRows = nb::ndarray<const float, nb::shape<-1, -1>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<const float, nb::shape<-1>, nb::c_contig, nb::device::cpu>;
using TokenIds = nb::ndarray<const int32_t, nb::shape<-1>, nb::c_contig, nb::device::cpu>;

// A Python integer, held within 64 bits.
int64_t integer(nb::handle value) {
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow != 0) {
    return overflow > 0 ? std::numeric_limits<int64_t>::max() : std::numeric_limits<int64_t>::min();
  }
  if (number == -1 && PyErr_Occurred() != nullptr) throw nb::python_error();
  return number;
}

int64_t integer(nb::handle object, const char* name) { return integer(object.attr(name)); }

// None is -1.
int32_t count_or_none(nb::handle object, const char* name) {
  const nb::object value = object.attr(name);
  return value.is_none() ? -1 : static_cast<int32_t>(std::min<int64_t>(integer(value), kMaxLogprobs));
}

// Ids as they are read, each inside the vocabulary.
class Ids {
 public:
  explicit Ids(int32_t vocab) : vocab_(vocab) {}

  // 0 for an id outside the vocabulary, which `check` then names.
  int32_t read(nb::handle value) {
    const int64_t id = integer(value);
    if (id >= 0 && id < vocab_) return static_cast<int32_t>(id);
    if (!foreign_.is_valid() || integer(foreign_) < id) foreign_ = nb::borrow(value);
    return 0;
  }

  // Raises EngineError.
  void check() const {
    if (!foreign_.is_valid()) return;
    const nb::object kind = nb::module_::import_("headrace.core.errors").attr("EngineError");
    const std::string message = "token id " + std::string(nb::str(foreign_).c_str()) +
                                " reached the backend; the vocabulary has " + std::to_string(vocab_);
    PyErr_SetString(kind.ptr(), message.c_str());
    throw nb::python_error();
  }

 private:
  int32_t vocab_;
  nb::object foreign_;  // the largest one
};

// As `headrace.backends.sampling.RowSampling`: a `SamplingParams`, already checked. Raises EngineError on an
// id outside the vocabulary; such stop ids are never met.
RowSampling row_sampling_of(nb::handle sampling, int32_t num_prompt, nb::handle stop_ids, int32_t vocab) {
  const auto number = [&](const char* name) { return nb::cast<double>(sampling.attr(name)); };
  Ids token_ids(vocab);
  RowSampling row;
  row.vocab = vocab;
  row.num_prompt = num_prompt;
  row.temperature = number("temperature");
  row.top_k = static_cast<int32_t>(std::clamp<int64_t>(integer(sampling, "top_k"), 0, vocab));
  row.top_p = number("top_p");
  row.min_p = number("min_p");
  row.typical_p = number("typical_p");
  row.repetition_penalty = number("repetition_penalty");
  row.frequency_penalty = number("frequency_penalty");
  row.presence_penalty = number("presence_penalty");
  row.min_tokens = integer(sampling, "min_tokens");
  row.logprobs = count_or_none(sampling, "logprobs");
  row.prompt_logprobs = count_or_none(sampling, "prompt_logprobs");
  for (nb::handle pair : sampling.attr("logit_bias")) {
    row.biases.emplace_back(token_ids.read(pair[0]), static_cast<float>(nb::cast<double>(pair[1])));
  }
  const nb::object allowed = sampling.attr("allowed_token_ids");
  if (!allowed.is_none()) {
    row.allowed = TokenBits(vocab, false);
    for (nb::handle id : allowed) row.allowed.set(token_ids.read(id), true);
  }
  for (nb::handle sequence : sampling.attr("bad_words_ids")) {
    std::vector<int32_t> ids;
    for (nb::handle id : sequence) ids.push_back(token_ids.read(id));
    const int32_t last = ids.back();
    ids.pop_back();
    if (!ids.empty()) {
      row.bad_sequences.push_back({std::move(ids), last});
      continue;
    }
    if (row.allowed.empty()) row.allowed = TokenBits(vocab, true);
    row.allowed.set(last, false);
  }
  token_ids.check();
  for (nb::handle id : stop_ids) {
    const int64_t stop = integer(id);
    if (stop >= 0 && stop < vocab) row.stop_ids.push_back(static_cast<int32_t>(stop));
  }
  const nb::object seed = sampling.attr("seed");
  row.has_seed = !seed.is_none();
  if (row.has_seed) row.seed = static_cast<uint64_t>(integer(seed));
  return row;
}

nb::object logprobs_as_python(const Logprobs& logprobs) {
  nb::list top;
  for (int32_t i = 0; i < logprobs.top_count; ++i) {
    top.append(nb::make_tuple(logprobs.top[i].id, logprobs.top[i].logprob));
  }
  return nb::make_tuple(logprobs.logprob, nb::tuple(top));
}

// (code, message, token, logprobs or None)
nb::object as_python(const SampleOutcome& outcome, int32_t vocab) {
  const nb::object logprobs = outcome.has_logprobs ? logprobs_as_python(outcome.logprobs) : nb::none();
  return nb::make_tuple(fault_code(outcome.fault), fault_message(outcome.fault, outcome.detail, vocab),
                        outcome.token, logprobs);
}

void require(bool holds, const char* what) {
  if (!holds) throw nb::value_error(what);
}

}  // namespace

void bind_sampling(nb::module_& m) {
  nb::class_<RowSampling>(m, "RowSampling")
      .def(
          "__init__",
          [](RowSampling* self, nb::handle sampling, int32_t num_prompt, nb::handle stop_ids,
             int32_t vocab_size) {
            require(num_prompt >= 0 && vocab_size > 0, "num_prompt and vocab_size: too small");
            new (self) RowSampling(row_sampling_of(sampling, num_prompt, stop_ids, vocab_size));
          },
          nb::arg("sampling"), nb::arg("num_prompt"), nb::arg("stop_ids"), nb::arg("vocab_size"));

  nb::class_<SampleScratch>(m, "SampleScratch")
      .def(
          "__init__",
          [](SampleScratch* self, const std::string& kernels, int32_t vocab_size) {
            require(vocab_size > 0, "vocab_size: at least 1");
            new (self) SampleScratch(kernels_named(kernels).sampling, vocab_size);
          },
          nb::arg("kernels"), nb::arg("vocab_size"))
      .def(
          "sample",
          [](SampleScratch& scratch, LogitRows logits, const std::vector<const RowSampling*>& rows,
             const std::vector<TokenIds>& token_ids, const std::vector<nb::object>& masks) {
            const size_t count = logits.shape(0);
            require(static_cast<int32_t>(logits.shape(1)) == scratch.vocab, "logits: not of this vocabulary");
            require(rows.size() == count && token_ids.size() == count && masks.size() == count,
                    "rows, token_ids and masks: one for each row of logits");
            struct Mask {
              const uint8_t* bits;
              int64_t bytes;
            };
            std::vector<Mask> bits;
            for (size_t i = 0; i < count; ++i) {
              require(rows[i]->vocab == scratch.vocab, "rows: not of this vocabulary");
              require(static_cast<int64_t>(token_ids[i].size()) >= rows[i]->num_prompt,
                      "token_ids: shorter than the prompt");
              if (masks[i].is_none()) {
                bits.push_back({nullptr, 0});
                continue;
              }
              const nb::bytes mask = nb::cast<nb::bytes>(masks[i]);
              bits.push_back({static_cast<const uint8_t*>(mask.data()), static_cast<int64_t>(mask.size())});
            }
            std::vector<SampleOutcome> outcomes(count);
            {
              nb::gil_scoped_release release;
              for (size_t i = 0; i < count; ++i) {
                outcomes[i] = sample_row(logits.data() + i * logits.shape(1), *rows[i], token_ids[i].data(),
                                         static_cast<int32_t>(token_ids[i].size()), bits[i].bits,
                                         bits[i].bytes, scratch);
              }
            }
            nb::list found;
            for (const SampleOutcome& outcome : outcomes) found.append(as_python(outcome, scratch.vocab));
            return found;
          },
          nb::arg("logits"), nb::arg("rows"), nb::arg("token_ids"), nb::arg("masks"),
          "A tuple (code, message, token, logprobs or None) for each row; one thread at a time.")
      .def(
          "score",
          [](SampleScratch& scratch, LogitRows logits, const std::vector<int32_t>& token_ids, int32_t count) {
            require(static_cast<int32_t>(logits.shape(1)) == scratch.vocab, "logits: not of this vocabulary");
            require(token_ids.size() == logits.shape(0), "token_ids: one for each row of logits");
            require(count >= 0 && count <= kMaxLogprobs, "count: out of range");
            nb::list found;
            for (size_t i = 0; i < token_ids.size(); ++i) {
              require(token_ids[i] >= 0 && token_ids[i] < scratch.vocab, "token_ids: outside the vocabulary");
              const float* row = logits.data() + i * logits.shape(1);
              found.append(as_python(score_row(row, token_ids[i], count, scratch), scratch.vocab));
            }
            return found;
          },
          nb::arg("logits"), nb::arg("token_ids"), nb::arg("count"), "As `sample`, of given tokens.");

  m.def(
      "noise_words",
      [](const std::string& kernels, int64_t seed, int64_t position, int32_t first_id) {
        std::vector<uint32_t> words(kNoiseChunk);
        kernels_named(kernels).sampling.noise_words(static_cast<uint64_t>(seed),
                                                    static_cast<uint64_t>(position), first_id, words.data());
        return words;
      },
      nb::arg("kernels"), nb::arg("seed"), nb::arg("position"), nb::arg("first_id"),
      "The random words of 256 ids from a multiple of 4 on.");

  m.def(
      "noise_words_of",
      [](const std::string& kernels, int64_t seed, int64_t position, TokenIds ids) {
        std::vector<uint32_t> words(ids.size());
        kernels_named(kernels).sampling.noise_words_of(static_cast<uint64_t>(seed),
                                                       static_cast<uint64_t>(position), ids.data(),
                                                       static_cast<int32_t>(ids.size()), words.data());
        return words;
      },
      nb::arg("kernels"), nb::arg("seed"), nb::arg("position"), nb::arg("ids"), "The random words of ids ≥ 0.");

  m.def(
      "sum_roughly",
      [](const std::string& kernels, Logits values, float floor, float peak, double temperature) {
        return kernels_named(kernels).sampling.sum_roughly(values.data(), static_cast<int32_t>(values.size()), floor,
                                                           peak, 1.0 / temperature);
      },
      nb::arg("kernels"), nb::arg("values"), nb::arg("floor"), nb::arg("peak"), nb::arg("temperature"),
      "The sum of e^((value - peak) / temperature) over the values at or above the floor, roughly.");
}
