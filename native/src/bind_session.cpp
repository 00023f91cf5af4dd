#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>

#include "bindings.h"
#include "session.h"

namespace nb = nanobind;
using namespace headrace;
using namespace nb::literals;

namespace {

// (log-probability, ((id, log-probability), …))
nb::tuple tuple_of(const Logprobs& one) {
  nb::list top;
  for (int32_t i = 0; i < one.top_count; ++i) {
    const TokenLogprob& other = one.top[static_cast<size_t>(i)];
    top.append(nb::make_tuple(other.id, other.logprob));
  }
  return nb::make_tuple(one.logprob, nb::tuple(top));
}

nb::tuple tuple_of(const std::vector<Logprobs>& all) {
  nb::list list;
  for (const Logprobs& one : all) list.append(tuple_of(one));
  return nb::tuple(list);
}

template <class Number>
nb::object array_of(std::vector<Number>&& values, int32_t width) {
  auto* kept = new std::vector<Number>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<Number>*>(p); });
  const size_t columns = static_cast<size_t>(width);
  return nb::cast(
      nb::ndarray<nb::numpy, Number, nb::ndim<2>>(kept->data(), {kept->size() / columns, columns}, owner));
}

// [timings][operation, rows, begin, end]
nb::object array_of(const std::vector<Timing>& timings) {
  std::vector<int64_t> values;
  values.reserve(4 * timings.size());
  for (const Timing& one : timings) values.insert(values.end(), {one.operation, one.rows, one.begin, one.end});
  return array_of(std::move(values), 4);
}

// (tokens, accepted, logprobs, (code, message) or None, logits or None, prompt logprobs)
nb::tuple tuple_of(Answer&& answer, int32_t vocab) {
  nb::object error = nb::none(), logits = nb::none();
  if (answer.fault != SampleFault::none) {
    error = nb::make_tuple(fault_code(answer.fault), fault_message(answer.fault, answer.detail, vocab));
  }
  if (answer.has_logits) logits = array_of(std::move(answer.logits), vocab);
  nb::list tokens;
  for (const int32_t token : answer.tokens) tokens.append(token);
  return nb::make_tuple(nb::tuple(tokens), answer.accepted, tuple_of(answer.logprobs), error, logits,
                        tuple_of(answer.prompt_logprobs));
}

}  // namespace

void bind_session(nb::module_& m) {
  nb::class_<Session>(m, "Session", "The live requests of one engine. ValueError: a plan that breaks the protocol.")
      .def(
          "__init__",
          [](Session* self, std::shared_ptr<Program> program, std::shared_ptr<KvStore> kv, int32_t vocab,
             int32_t max_rows, int32_t max_tokens, int32_t max_model_len, int32_t threads, int32_t head,
             int32_t logits) {
            new (self) Session(std::move(program), std::move(kv), {vocab, max_rows, max_tokens, max_model_len}, threads,
                               head, logits);
          },
          "program"_a, "kv"_a, "vocab"_a, "max_rows"_a, "max_tokens"_a, "max_model_len"_a, "threads"_a, "head"_a,
          "logits"_a)
      .def("admit", &Session::admit, "row"_a, "tokens"_a, "num_prompt"_a, "sampling"_a, "adapter"_a)
      .def("release", &Session::release, "row"_a)
      .def("append_blocks", &Session::append_blocks, "row"_a, "blocks"_a)
      .def(
          "ask",
          [](Session& self, int32_t row, int32_t start, int32_t length, std::vector<int32_t> drafts, bool sample,
             bool logits, bool score_prompt, const std::optional<nb::bytes>& mask) {
            self.ask({row, start, length, std::move(drafts), sample, logits, score_prompt,
                      mask ? std::string(mask->c_str(), mask->size()) : std::string(), mask.has_value()});
          },
          "row"_a, "start"_a, "length"_a, "drafts"_a, "sample"_a, "logits"_a, "score_prompt"_a, "mask"_a.none())
      .def("cancel", &Session::cancel, "Forgets what was asked since the last run.")
      .def(
          "run",
          [](Session& self) {
            std::vector<Answer> answers;
            {
              nb::gil_scoped_release free;
              answers = self.run();
            }
            nb::list out;
            for (Answer& answer : answers) out.append(tuple_of(std::move(answer), self.vocab()));
            return out;
          },
          "(tokens, accepted, logprobs, (code, message) or None, logits or None, prompt logprobs) for each ask.")
      .def("profile", &Session::profile, "on"_a,
           "From now on, or no more, runs keep when each operation began and ended.")
      .def(
          "take_timings", [](Session& self) { return array_of(self.take_timings()); },
          "Rows of (operation, rows of activations, begin, end) since the last call, nanoseconds of the steady clock. "
          "Operation -1: arrays are made; -2: tokens are sampled.")
      .def_prop_ro("seconds",
                   [](const Session& self) { return nb::make_tuple(self.prepare_s, self.forward_s, self.sample_s); })
      .def_prop_ro(
          "cycles",
          [](const Session& self) {
            const std::vector<uint64_t>& all = self.workspace().cycles;
            const std::vector<int32_t>& firsts = self.program().first_phases();
            std::vector<uint64_t> out(firsts.size());
            for (size_t i = 0; i < firsts.size(); ++i) {
              const size_t end = i + 1 < firsts.size() ? static_cast<size_t>(firsts[i + 1]) : all.size();
              for (size_t p = static_cast<size_t>(firsts[i]); p < end; ++p) out[i] += all[p];
            }
            return out;
          },
          "Clock cycles spent in each operation so far.")
      .def_prop_ro("nbytes", &Session::bytes, "Of the workspace.");
}
