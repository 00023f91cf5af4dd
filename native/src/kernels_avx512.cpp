#define HEADRACE_ISA avx512
#if defined(__AVX512VNNI__)
#include "isa/all.h"
#else
#include "table.h"
#endif

namespace headrace {

const Kernels* avx512_kernels() {
#if defined(__AVX512VNNI__)
  return &avx512::kTable;
#else
  return nullptr;
#endif
}

}  // namespace headrace
