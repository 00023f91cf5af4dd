#define HEADRACE_ISA avx2
#if defined(__AVX2__)
#include "isa/all.h"
#else
#include "table.h"
#endif

namespace headrace {

const Kernels* avx2_kernels() {
#if defined(__AVX2__)
  return &avx2::kTable;
#else
  return nullptr;
#endif
}

}  // namespace headrace
