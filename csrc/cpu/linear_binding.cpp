// A linear layer of few rows as Python sees it: addresses and strides in, nothing out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../bindings.h"
#include "dispatch.h"
#include "linear.h"

namespace py = pybind11;

namespace dalle_fast {

void bind_linear(py::module_& m) {
    // sizes: R, N, K; dtype: of weight and bias
    // addresses: x, weight, bias (0: none), out; x and out are float32
    m.def("linear",
          [](const std::array<int64_t, 3>& sizes, int dtype, const std::array<int64_t, 4>& addresses,
             int64_t stride_weight, bool gelu, int threads) {
              LinearArgs a{};
              a.R = sizes[0];
              a.N = sizes[1];
              a.K = sizes[2];
              a.dtype = static_cast<DType>(dtype);
              a.x = reinterpret_cast<const float*>(addresses[0]);
              a.weight = reinterpret_cast<const void*>(addresses[1]);
              a.stride_weight = stride_weight;
              a.bias = reinterpret_cast<const void*>(addresses[2]);
              a.out = reinterpret_cast<float*>(addresses[3]);
              a.gelu = gelu;
              linear(linear_kernels(), a, threads);
          },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace dalle_fast
