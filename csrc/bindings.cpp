// The one file that knows Python. Shapes are checked here, the GIL is released around every op.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "ops.h"

namespace nb = nanobind;

namespace {

using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void rms_norm(Matrix x, Vector weight, OutMatrix y, float eps) {
  if (y.shape(0) != x.shape(0) || y.shape(1) != x.shape(1))
    throw nb::value_error("rms_norm: y must have the shape of x");
  if (weight.shape(0) != x.shape(1))
    throw nb::value_error("rms_norm: weight must have as many elements as x has columns");
  nb::gil_scoped_release release;
  octavo::rms_norm(x.data(), weight.data(), y.data(), x.shape(0), x.shape(1), eps);
}

}  // namespace

NB_MODULE(_C, m) {
  m.doc() = "C++ kernels of the cpu backend.";
  m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("y"), nb::arg("eps"),
        "RMS normalisation of the rows of x [rows, columns] (float32) into y.");
}
