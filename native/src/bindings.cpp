#include "bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "table.h"

namespace {

std::vector<std::string> names(const std::vector<const headrace::Kernels*>& kernels) {
  std::vector<std::string> found;
  for (const headrace::Kernels* one : kernels) found.emplace_back(one->name);
  return found;
}

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "headrace's CPU kernels.";
  m.def(
      "built_instruction_sets", [] { return names(headrace::built_kernels()); },
      "What the library was built with, the fastest last.");
  m.def(
      "instruction_sets", [] { return names(headrace::usable_kernels()); },
      "What this machine can run of it.");
  bind_weights(m);
  bind_rows(m);
  bind_attention(m);
  bind_sampling(m);
  bind_program(m);
  bind_session(m);
}
