#include "bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "table.h"

namespace {

std::vector<std::string> names(const std::vector<const headrace::Kernels*>& kernels) {
  std::vector<std::string> found;
  for (const headrace::Kernels* one : kernels) found.emplace_back(one->name);
  return found;
}

}  // namespace

headrace::Activation activation_named(const std::string& name) {
  if (name == "silu") return headrace::Activation::silu;
  if (name == "gelu") return headrace::Activation::gelu;
  if (name == "gelu_tanh") return headrace::Activation::gelu_tanh;
  if (name == "relu") return headrace::Activation::relu;
  throw std::invalid_argument("no activation named " + name);
}

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
  bind_stream(m);
}
