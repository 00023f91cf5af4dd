#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <span>
#include <stdexcept>

#include "bindings.h"
#include "pack.h"
#include "table.h"

namespace nb = nanobind;
using namespace headrace;

namespace {

using Bytes2 = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Mapped = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;

using WeightPtr = std::shared_ptr<PackedWeight>;

Codes number_type(const std::string& name) {
  if (name == "f32") return Codes::f32;
  if (name == "f16") return Codes::f16;
  if (name == "bf16") return Codes::bf16;
  throw std::invalid_argument("no numbers of type " + name);
}

const char* name_of(Codes codes) {
  constexpr const char* kNames[] = {"f32", "f16", "bf16", "q4", "q6", "q8"};
  return kNames[static_cast<int32_t>(codes)];
}

// Rows of plain numbers: (N, K), K contiguous.
Plane rows_of(const AnyArray& array, Codes type) {
  const int64_t bytes = type == Codes::f32 ? 4 : 2;
  if (array.ndim() != 2 || static_cast<int64_t>(array.itemsize()) != bytes ||
      (array.shape(1) > 1 && array.stride(1) != 1)) {
    throw std::invalid_argument("a weight must be (N, K) numbers of " + std::to_string(bytes) + " bytes, K contiguous");
  }
  return {static_cast<const uint8_t*>(array.data()), array.stride(0) * bytes, bytes};
}

// A plane of a GGUF tensor: (N, groups, …), contiguous within a group.
Plane plane_of(const AnyArray& array) {
  if (array.ndim() < 2) throw std::invalid_argument("a plane must be (N, groups, …)");
  const auto item = static_cast<int64_t>(array.itemsize());
  int64_t size = 1;
  for (size_t i = array.ndim(); i-- > 2; size *= static_cast<int64_t>(array.shape(i))) {
    if (array.shape(i) > 1 && array.stride(i) != size) {
      throw std::invalid_argument("a plane must be contiguous within a group");
    }
  }
  return {static_cast<const uint8_t*>(array.data()), array.stride(0) * item, array.stride(1) * item,
          static_cast<int64_t>(array.shape(0)), static_cast<int64_t>(array.shape(1)), size * item};
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> unpack(const PackedWeight& packed) {
  const auto rows = static_cast<size_t>(packed.weight.rows), columns = static_cast<size_t>(packed.weight.columns);
  auto* values = new float[rows * columns];
  nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  for (size_t n = 0; n < rows; ++n) unpack_row(packed.weight, static_cast<int32_t>(n), values + n * columns);
  return nb::ndarray<nb::numpy, float, nb::ndim<2>>(values, {rows, columns}, owner);
}

void finish(Packer& packer) {
  {
    nb::gil_scoped_release free;
    packer.finish();
  }
  packer.let_go();
}

}  // namespace

void bind_weights(nb::module_& m) {
  nb::class_<Packer>(m, "Packer", "Threads that pack weights, and the memory of these.")
      .def(nb::init<int32_t>(), nb::arg("threads"))
      .def("finish", &finish, "Returns when all is packed.");
  nb::class_<PackedWeight>(m, "Weight", "A weight in the layout that products read.")
      .def_prop_ro("rows", [](const PackedWeight& w) { return w.weight.rows; })
      .def_prop_ro("columns", [](const PackedWeight& w) { return w.weight.columns; })
      .def_prop_ro("nbytes", [](const PackedWeight& w) { return w.bytes.size(); })
      .def_prop_ro("codes", [](const PackedWeight& w) { return name_of(w.weight.codes); })
      .def_prop_ro("quantised", [](const PackedWeight& w) { return w.weight.scales != Scales::none; })
      .def_prop_ro("scheme", [](const PackedWeight& w) { return w.scheme; })
      .def("unpack", &unpack, "(N, K) float32: what the codes mean.");

  m.def(
      "pack_numbers",
      [](Packer& packer, const AnyArray& array, const std::string& from, const std::string& to) {
        const Codes source = number_type(from), target = number_type(to);
        const Plane data = rows_of(array, source);
        nb::gil_scoped_release free;
        return WeightPtr(pack_numbers(packer, source, target, data, static_cast<int32_t>(array.shape(0)),
                                      static_cast<int32_t>(array.shape(1))));
      },
      nb::arg("packer"), nb::arg("array"), nb::arg("source"), nb::arg("target"),
      "(N, K) f32, f16 or bf16 (uint16) numbers, kept as `target`.");
  m.def(
      "pack_blocks",
      [](Packer& packer, const std::string& scheme, const std::vector<AnyArray>& arrays, int32_t rows, int32_t columns,
         const std::optional<Indices>& order, bool behind, const std::optional<Mapped>& file) {
        std::vector<Plane> planes;
        for (const AnyArray& array : arrays) planes.push_back(plane_of(array));
        std::vector<int64_t> from;
        if (order) from.assign(order->data(), order->data() + order->shape(0));
        const std::span<const uint8_t> whole(file ? file->data() : nullptr, file ? file->shape(0) : 0);
        // Until the work is done, whatever becomes of the caller.
        packer.hold(std::make_shared<const std::vector<AnyArray>>(arrays));
        WeightPtr packed;
        {
          nb::gil_scoped_release free;
          packed = pack_blocks(packer, scheme, planes, from, rows, columns, whole);
        }
        if (!behind) finish(packer);
        return packed;
      },
      nb::arg("packer"), nb::arg("scheme"), nb::arg("planes"), nb::arg("rows"), nb::arg("columns"),
      nb::arg("order").none() = nb::none(), nb::arg("behind") = false, nb::arg("file").none() = nb::none(),
      "A GGUF tensor by its planes, in the order of the scheme's record; None where there is no kernel for it. "
      "`order`: the stored row that each row is, or None. `behind`: the packer goes on with it behind the caller; the "
      "planes must stay as they are until finish(). `file`: all of the file, mapped to be read, that they are views of: "
      "its pages are given back as they are packed.");
  m.def(
      "pack_scaled",
      [](Packer& packer, int32_t bits, const Bytes2& codes, const Floats2& scales,
         const std::optional<Floats2>& minima, int32_t zero) {
        const auto rows = static_cast<int32_t>(codes.shape(0)), columns = static_cast<int32_t>(codes.shape(1));
        const auto groups = static_cast<int32_t>(scales.shape(1));
        const bool fits = groups > 0 && columns % groups == 0 && columns / groups % kGroup == 0 &&
                          scales.shape(0) == codes.shape(0) && (bits == 4 || bits == 8) &&
                          (!minima || (minima->shape(0) == scales.shape(0) && minima->shape(1) == scales.shape(1)));
        if (!fits) throw std::invalid_argument("codes, scales and minima do not fit each other");
        nb::gil_scoped_release free;
        return WeightPtr(pack_scaled(packer, bits, codes.data(), scales.data(), minima ? minima->data() : nullptr, zero,
                                     columns / groups, rows, columns));
      },
      nb::arg("packer"), nb::arg("bits"), nb::arg("codes"), nb::arg("scales"), nb::arg("minima").none(), nb::arg("zero"),
      "(N, K) uint8 codes with (N, K / group) scales: scale × (code - zero) + minimum.");
  m.def(
      "quantise_numbers",
      [](Packer& packer, int32_t bits, const AnyArray& array, const std::string& from) {
        const Codes source = number_type(from);
        const Plane data = rows_of(array, source);
        if ((bits != 4 && bits != 8) || array.shape(1) % kGroup) {
          throw std::invalid_argument("only rows of whole groups are quantised, to 4 or 8 bits");
        }
        nb::gil_scoped_release free;
        return WeightPtr(quantise_numbers(packer, bits, source, data, static_cast<int32_t>(array.shape(0)),
                                          static_cast<int32_t>(array.shape(1))));
      },
      nb::arg("packer"), nb::arg("bits"), nb::arg("array"), nb::arg("source"),
      "(N, K) numbers rounded to groups of 32: 8 bits symmetric, 4 bits with a minimum.");
}
