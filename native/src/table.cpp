#include "table.h"

#include <stdexcept>

namespace headrace {

std::vector<const Kernels*> built_kernels() {
  std::vector<const Kernels*> found;
  for (const Kernels* one : {portable_kernels(), avx2_kernels(), avx512_kernels()}) {
    if (one != nullptr) found.push_back(one);
  }
  return found;
}

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> found{portable_kernels()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  if (avx2 && avx2_kernels() != nullptr) found.push_back(avx2_kernels());
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && avx512_kernels() != nullptr) found.push_back(avx512_kernels());
#endif
  return found;
}

const Kernels& kernels_named(const std::string& name) {
  std::string known;
  for (const Kernels* one : usable_kernels()) {
    if (name == one->name) return *one;
    known += (known.empty() ? "" : ", ") + std::string(one->name);
  }
  throw std::invalid_argument("no kernels named " + name + " on this machine; there are: " + known);
}

}  // namespace headrace
