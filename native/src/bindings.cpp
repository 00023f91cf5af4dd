#include "bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "table.h"

NB_MODULE(_kernels, m) {
  m.doc() = "headrace's CPU kernels.";
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const headrace::Kernels* one : headrace::usable_kernels()) names.emplace_back(one->name);
        return names;
      },
      "What this machine can run of what was built, the fastest last.");
  bind_weights(m);
  bind_rows(m);
  bind_attention(m);
  bind_sampling(m);
  bind_program(m);
  bind_session(m);
}
