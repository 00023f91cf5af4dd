// The parts of the Python module `headrace.backends.native._kernels`.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "kernels.h"

// By its name in a ModelSpec. Throws std::invalid_argument.
headrace::Activation activation_named(const std::string& name);

void bind_weights(nanobind::module_& m);
void bind_rows(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);
void bind_program(nanobind::module_& m);
void bind_session(nanobind::module_& m);
void bind_stream(nanobind::module_& m);
