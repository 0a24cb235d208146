// The codebook's CUDA kernels as Python sees them: device addresses (0 for none), sizes and a stream in, nothing out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "numbers.h"

namespace py = pybind11;

namespace dalle_fast {
namespace {

using LogitNumbers = std::array<int64_t, 4>;  // R, K, address of logits, address of bias

LogitRows to_logits(const LogitNumbers& n) { return {n[0], n[1], address<float>(n[2]), address<const float>(n[3])}; }

}  // namespace

void bind_cuda_codebook(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> no_gil;
    m.def(
        "cuda_gumbel_forward",
        [](const LogitNumbers& x, const NoiseNumbers& noise, int64_t tau, int64_t weights, int dtype, int64_t stats,
           int64_t kl, int64_t codes, int64_t stream) {
            cuda_gumbel_forward({to_logits(x), to_noise(noise), address<const float>(tau), address<void>(weights),
                                 DType(dtype), address<GumbelStats>(stats), address<float>(kl),
                                 address<int64_t>(codes)},
                                address<void>(stream));
        },
        py::arg("x"), py::arg("noise"), py::arg("tau"), py::arg("weights"), py::arg("dtype"), py::arg("stats"),
        py::arg("kl"), py::arg("codes"), py::arg("stream"), no_gil);
    m.def(
        "cuda_gumbel_backward",
        [](const LogitNumbers& x, const NoiseNumbers& noise, int64_t tau, int64_t stats, int64_t kl, int64_t grad_kl,
           int64_t grad_weights, int64_t weights, int64_t grad_logits, int dtype, int64_t stream) {
            cuda_gumbel_backward({to_logits(x), to_noise(noise), address<const float>(tau),
                                  address<const GumbelStats>(stats), address<const float>(kl),
                                  address<const float>(grad_kl), address<const void>(grad_weights), address<void>(weights),
                                  address<void>(grad_logits), DType(dtype)},
                                 address<void>(stream));
        },
        py::arg("x"), py::arg("noise"), py::arg("tau"), py::arg("stats"), py::arg("kl"), py::arg("grad_kl"),
        py::arg("grad_weights"), py::arg("weights"), py::arg("grad_logits"), py::arg("dtype"), py::arg("stream"),
        no_gil);
    m.def(
        "cuda_sample",
        [](const LogitNumbers& x, const NoiseNumbers& noise, int64_t temperature, int64_t codes, int64_t stream) {
            cuda_sample({to_logits(x), to_noise(noise), address<const float>(temperature), address<int64_t>(codes)},
                        address<void>(stream));
        },
        py::arg("x"), py::arg("noise"), py::arg("temperature"), py::arg("codes"), py::arg("stream"), no_gil);
    m.def(
        "cuda_cross_entropy",
        [](const LogitNumbers& x, int64_t target, int64_t ignore_index, int64_t loss, int64_t row_weight,
           bool weight_per_row, int64_t grad_logits, int dtype, int64_t stream) {
            cuda_cross_entropy({to_logits(x), address<const int64_t>(target), ignore_index, address<float>(loss),
                                address<const float>(row_weight), weight_per_row, address<void>(grad_logits),
                                DType(dtype)},
                               address<void>(stream));
        },
        py::arg("x"), py::arg("target"), py::arg("ignore_index"), py::arg("loss"), py::arg("row_weight"),
        py::arg("weight_per_row"), py::arg("grad_logits"), py::arg("dtype"), py::arg("stream"), no_gil);
    m.def(
        "cuda_gumbel_softmax",
        [](int64_t R, int64_t K, int64_t logits, int64_t out, int dtype, const NoiseNumbers& noise, float tau,
           int64_t codes, int64_t stream) {
            cuda_gumbel_softmax({R, K, address<const void>(logits), address<void>(out), DType(dtype),
                                 to_noise(noise), tau, address<int64_t>(codes)},
                                address<void>(stream));
        },
        py::arg("R"), py::arg("K"), py::arg("logits"), py::arg("out"), py::arg("dtype"), py::arg("noise"),
        py::arg("tau"), py::arg("codes"), py::arg("stream"), no_gil);
    m.def(
        "cuda_add_columns",
        [](int64_t R, int64_t K, int64_t rows, int dtype, int64_t count, int64_t totals, bool begun, int64_t stream) {
            cuda_add_columns(
                {R, K, address<void>(rows), DType(dtype), count, address<float>(totals), begun},
                address<void>(stream));
        },
        py::arg("R"), py::arg("K"), py::arg("rows"), py::arg("dtype"), py::arg("count"), py::arg("totals"),
        py::arg("begun"), py::arg("stream"), no_gil);
    m.def(
        "cuda_sum_totals",
        [](int64_t count, int64_t K, int64_t totals, int64_t out, int dtype, int64_t stream) {
            cuda_sum_totals({count, K, address<const float>(totals), address<void>(out), DType(dtype)},
                            address<void>(stream));
        },
        py::arg("count"), py::arg("K"), py::arg("totals"), py::arg("out"), py::arg("dtype"), py::arg("stream"), no_gil);
}

}  // namespace dalle_fast
