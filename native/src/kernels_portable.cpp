#define HEADRACE_ISA portable
#include "isa/all.h"

namespace headrace {

const Kernels* portable_kernels() { return &portable::kTable; }

}  // namespace headrace
