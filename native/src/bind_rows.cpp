// Single kernels, for tests.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "pack.h"
#include "table.h"

namespace nb = nanobind;
using namespace headrace;

namespace {

using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out2 = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

template <class T>
nb::ndarray<nb::numpy, T, nb::ndim<2>> zeros(size_t rows, size_t columns) {
  T* values = new T[rows * columns]();
  nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T, nb::ndim<2>>(values, {rows, columns}, owner);
}

Out2 copy_of(const Floats2& x) {
  Out2 out = zeros<float>(x.shape(0), x.shape(1));
  std::memcpy(out.data(), x.data(), sizeof(float) * x.size());
  return out;
}

std::vector<uint8_t> quantise(const Kernels& kernels, const Floats2& x) {
  const auto rows = static_cast<int32_t>(x.shape(0)), width = static_cast<int32_t>(x.shape(1));
  if (width % kGroup) throw std::invalid_argument("only whole groups are quantised");
  std::vector<uint8_t> data(static_cast<size_t>(kGroupBytes) * x.shape(0) * x.shape(1) / kGroup);
  for (int32_t i = 0; i < rows; ++i) {
    kernels.quantise_row(x.data() + static_cast<size_t>(i) * x.shape(1), {data.data(), rows, width}, i, 0, width / kGroup);
  }
  return data;
}

// Out of the tiles: codes, scales, sums, counts, counts of the first halves.
nb::tuple unpack(const Kernels& kernels, const std::vector<uint8_t>& data, size_t rows, size_t width) {
  const size_t groups = width / kGroup, most = static_cast<size_t>(kernels.tile);
  auto codes = zeros<int8_t>(rows, width);
  Out2 figures[] = {zeros<float>(rows, groups), zeros<float>(rows, groups), zeros<float>(rows, groups),
                    zeros<float>(rows, groups)};
  for (size_t row = 0; row < rows; ++row) {
    const size_t first = row / most * most, lane = row - first, lanes = std::min(most, rows - first);
    for (size_t g = 0; g < groups; ++g) {
      const uint8_t* at = data.data() + static_cast<size_t>(kGroupBytes) * (first * groups + lanes * g) + 4 * lane;
      for (size_t step = 0; step < 8; ++step) {
        std::memcpy(codes.data() + row * width + kGroup * g + 4 * step, at + 4 * lanes * step, 4);
      }
      for (size_t i = 0; i < 4; ++i) {
        std::memcpy(figures[i].data() + row * groups + g, at + kGroup * lanes + 4 * lanes * i, sizeof(float));
      }
    }
  }
  return nb::make_tuple(codes, figures[0], figures[1], figures[2], figures[3]);
}

}  // namespace

void bind_rows(nb::module_& m) {
  m.def(
      "quantise_rows",
      [](const std::string& isa, const Floats2& x) {
        const Kernels& kernels = kernels_named(isa);
        return unpack(kernels, quantise(kernels, x), x.shape(0), x.shape(1));
      },
      nb::arg("isa"), nb::arg("x"), "(T, K) -> codes, scales, sums, counts, counts of the first halves.");
  m.def(
      "linear",
      [](const std::string& isa, const PackedWeight& packed, const Floats2& x, const std::optional<Floats>& bias,
         const std::optional<Floats2>& y, float scale, int32_t begin, int32_t end) {
        const Kernels& kernels = kernels_named(isa);
        const Weight& weight = packed.weight;
        const size_t tokens = x.shape(0), rows = static_cast<size_t>(weight.rows);
        const int32_t panels = (weight.rows + kPanel - 1) / kPanel;
        if (static_cast<int32_t>(x.shape(1)) != weight.columns || (bias && bias->shape(0) != rows) ||
            (y && (y->shape(0) != tokens || y->shape(1) != rows)) || begin < 0 || begin > end) {
          throw std::invalid_argument("x, bias or y do not fit the weight");
        }
        Out2 out = zeros<float>(tokens, rows);
        if (y) std::memcpy(out.data(), y->data(), sizeof(float) * tokens * rows);
        std::vector<uint8_t> quantised;
        if (weight.scales != Scales::none) quantised = quantise(kernels, x);
        kernels.linear({&weight, bias ? bias->data() : nullptr, x.data(), weight.columns,
                        {quantised.data(), static_cast<int32_t>(tokens), weight.columns}, out.data(),
                        weight.rows, static_cast<int32_t>(tokens), y ? Store::add : Store::put, scale},
                       begin, end < panels ? end : panels);
        return out;
      },
      nb::arg("isa"), nb::arg("weight"), nb::arg("x"), nb::arg("bias").none() = nb::none(),
      nb::arg("y").none() = nb::none(), nb::arg("scale") = 1.0f, nb::arg("begin") = 0, nb::arg("end") = 1 << 30,
      "x (T, K) -> x wᵀ + bias (T, N), or y + scale × that; of the panels [begin, end).");
  m.def(
      "norm_rows",
      [](const std::string& isa, const std::string& kind, const Floats2& x, const Floats& weight,
         const std::optional<Floats>& bias, float eps) {
        const size_t width = x.shape(1);
        if (weight.shape(0) != width || (bias && bias->shape(0) != width)) throw std::invalid_argument("widths differ");
        if (kind != "rms" && kind != "layer") throw std::invalid_argument("no norm named " + kind);
        const NormArgs args{kind == "layer" ? NormKind::layer : NormKind::rms, weight.data(),
                            bias ? bias->data() : nullptr, eps, static_cast<int32_t>(width)};
        Out2 out = zeros<float>(x.shape(0), width);
        const Kernels& kernels = kernels_named(isa);
        for (size_t i = 0; i < x.shape(0); ++i) kernels.norm_row(args, x.data() + i * width, out.data() + i * width);
        return out;
      },
      nb::arg("isa"), nb::arg("kind"), nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("eps"));
  m.def(
      "activate_rows",
      [](const std::string& isa, const std::string& activation, const Floats2& gate, const std::optional<Floats2>& up) {
        const size_t width = gate.shape(1);
        if (up && (up->shape(0) != gate.shape(0) || up->shape(1) != width)) throw std::invalid_argument("shapes differ");
        Out2 out = zeros<float>(gate.shape(0), width);
        const Kernels& kernels = kernels_named(isa);
        for (size_t i = 0; i < gate.shape(0); ++i) {
          kernels.activate_row(activation_named(activation), gate.data() + i * width,
                               up ? up->data() + i * width : nullptr, static_cast<int32_t>(width),
                               out.data() + i * width);
        }
        return out;
      },
      nb::arg("isa"), nb::arg("activation"), nb::arg("gate"), nb::arg("up").none());
  m.def(
      "add_rows",
      [](const std::string& isa, const Floats2& x, float scale, const Floats2& y) {
        if (x.shape(0) != y.shape(0) || x.shape(1) != y.shape(1)) throw std::invalid_argument("shapes differ");
        const size_t rows = y.shape(0), width = y.shape(1);
        Out2 out = copy_of(y);
        const Kernels& kernels = kernels_named(isa);
        for (size_t i = 0; i < rows; ++i) {
          kernels.add_row(x.data() + i * width, scale, static_cast<int32_t>(width), out.data() + i * width);
        }
        return out;
      },
      nb::arg("isa"), nb::arg("x"), nb::arg("scale"), nb::arg("y"), "y + scale × x.");
  m.def(
      "scale_rows",
      [](const std::string& isa, float scale, float cap, const Floats2& x) {
        Out2 out = copy_of(x);
        const Kernels& kernels = kernels_named(isa);
        for (size_t i = 0; i < x.shape(0); ++i) {
          kernels.scale_row(scale, cap, static_cast<int32_t>(x.shape(1)), out.data() + i * x.shape(1));
        }
        return out;
      },
      nb::arg("isa"), nb::arg("scale"), nb::arg("cap"), nb::arg("x"),
      "x × scale, then cap × tanh(x / cap) unless cap is 0.");
}
