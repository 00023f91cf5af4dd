// The one loop of STREAM that numpy lacks, for `headrace plan probe`.
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "bindings.h"

namespace nb = nanobind;

namespace {

using Doubles = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstDoubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void triad(Doubles a, ConstDoubles b, double s, ConstDoubles c) {
  const size_t count = a.shape(0);
  if (b.shape(0) != count || c.shape(0) != count) throw std::invalid_argument("a, b and c must be of one length");
  double* __restrict out = a.data();
  const double* __restrict x = b.data();
  const double* __restrict y = c.data();
  nb::gil_scoped_release free;
  size_t i = 0;
  // Eight at a time: with the narrow vectors that every machine has, one at a time is not quite as fast as memory.
  for (; i + 8 <= count; i += 8) {
    for (size_t j = 0; j < 8; ++j) out[i + j] = x[i + j] + s * y[i + j];
  }
  for (; i < count; ++i) out[i] = x[i] + s * y[i];
}

}  // namespace

void bind_stream(nb::module_& m) {
  // A converted `a` would be a copy, and the result lost with it; b and c would be copied while they are timed.
  m.def("triad", &triad, nb::arg("a").noconvert(), nb::arg("b").noconvert(), nb::arg("s"), nb::arg("c").noconvert(),
        "a = b + s c of contiguous float64 arrays that do not overlap (STREAM), without the interpreter's lock. "
        "TypeError for others.");
}
