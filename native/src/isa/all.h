// The table of one instruction set.
#pragma once

#include "../table.h"
#include "attention.h"
#include "linear.h"
#include "rotate.h"
#include "rows.h"
#include "sampling.h"

namespace headrace::HEADRACE_ISA {

// A name for the namespace itself, as text.
#define HEADRACE_TEXT_OF(name) #name
#define HEADRACE_TEXT(name) HEADRACE_TEXT_OF(name)

constexpr Kernels kTable{
    HEADRACE_TEXT(HEADRACE_ISA), kTile, linear, norm_row, activate_row, quantise_row, add_row, scale_row, rotate_and_store,
    attend, kSamplingKernels,
};

}  // namespace headrace::HEADRACE_ISA
