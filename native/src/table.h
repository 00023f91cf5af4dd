// The functions of one instruction set.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "kv.h"
#include "sampling_kernels.h"

namespace headrace {

struct Kernels {
  const char* name;
  int32_t tile;  // rows of int8 activations that lie interleaved
  void (*linear)(const LinearArgs&, int32_t begin, int32_t end);
  void (*norm_row)(const NormArgs&, const float* x, float* y);
  void (*activate_row)(Activation, const float* gate, const float* up, int32_t width, float* y);
  void (*quantise_row)(const float* x, const QuantRows& out, int64_t row, int32_t begin, int32_t end);
  void (*add_row)(const float* x, float scale, int32_t width, float* y);
  void (*scale_row)(float scale, float cap, int32_t width, float* x);
  void (*rotate_and_store)(const RotateArgs&, int32_t begin, int32_t end);
  void (*attend)(const AttentionArgs&, const AttentionWork&, int32_t begin, int32_t end, float* scratch);
  SamplingKernels sampling;
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where the library was built without them
const Kernels* avx512_kernels();  // with VNNI

// What the library was built with, the fastest last.
std::vector<const Kernels*> built_kernels();

// Of these, what this machine can run.
std::vector<const Kernels*> usable_kernels();

// By name. Throws std::invalid_argument.
const Kernels& kernels_named(const std::string& name);

}  // namespace headrace
