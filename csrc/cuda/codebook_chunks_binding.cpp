// The codebook operation by chunks as Python sees it: device addresses (0 for none), sizes and torch's cuBLAS handle
// in, nothing out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "codebook_chunks.h"
#include "numbers.h"

namespace py = pybind11;

namespace dalle_fast {
namespace {

using MatrixNumbers = std::array<int64_t, 3>;    // address, stride, transposed?
using GradientNumbers = std::array<int64_t, 5>;  // addresses of those of hidden, weight, bias; count, bias totals

Matrix to_matrix(const MatrixNumbers& n, DType dtype) { return {address<void>(n[0]), dtype, n[1], n[2] != 0}; }

ProductGradients to_gradients(const GradientNumbers& n) {
    return {address<void>(n[0]), address<float>(n[1]), address<void>(n[2]), n[3], address<float>(n[4])};
}

// What ChunkedRows holds: sizes N, K, I, step; hidden, weight; dtype, bias, logits, blas, stream.
using RowNumbers = std::tuple<std::array<int64_t, 4>, MatrixNumbers, MatrixNumbers, std::array<int64_t, 5>>;

ChunkedRows to_rows(const RowNumbers& numbers) {
    const auto& [sizes, hidden, weight, rest] = numbers;
    const DType dtype = DType(rest[0]);
    return {sizes[0], sizes[1], sizes[2], sizes[3], to_matrix(hidden, dtype), to_matrix(weight, dtype),
            address<const float>(rest[1]), address<float>(rest[2]), address<void>(rest[3]), address<void>(rest[4])};
}

}  // namespace

void bind_cuda_codebook_chunks(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> no_gil;
    m.def(
        "cuda_gumbel_chunks",
        [](const RowNumbers& x, const NoiseNumbers& noise, int64_t tau, int64_t D, const MatrixNumbers& codebook,
           int64_t sums, int64_t embeddings, int64_t stats, int64_t kl, int64_t codes) {
            const ChunkedRows rows = to_rows(x);
            cuda_gumbel_chunks({rows, to_noise(noise), address<const float>(tau), D,
                                to_matrix(codebook, rows.hidden.dtype), address<float>(sums), address<void>(embeddings),
                                address<GumbelStats>(stats), address<float>(kl), address<int64_t>(codes)});
        },
        py::arg("x"), py::arg("noise"), py::arg("tau"), py::arg("D"), py::arg("codebook"), py::arg("sums"),
        py::arg("embeddings"), py::arg("stats"), py::arg("kl"), py::arg("codes"), no_gil);
    m.def(
        "cuda_gumbel_backward_chunks",
        [](const RowNumbers& x, const NoiseNumbers& noise, int64_t tau, int64_t D, const MatrixNumbers& codebook,
           const MatrixNumbers& grad_embedding, int64_t stats, int64_t kl, int64_t grad_kl, int64_t grad_weights,
           int64_t of_codebook, const GradientNumbers& gradients) {
            const ChunkedRows rows = to_rows(x);
            const DType dtype = rows.hidden.dtype;
            cuda_gumbel_backward_chunks({rows, to_noise(noise), address<const float>(tau), D,
                                         to_matrix(codebook, dtype), to_matrix(grad_embedding, dtype),
                                         address<const GumbelStats>(stats), address<const float>(kl),
                                         address<const float>(grad_kl), address<void>(grad_weights),
                                         address<float>(of_codebook), to_gradients(gradients)});
        },
        py::arg("x"), py::arg("noise"), py::arg("tau"), py::arg("D"), py::arg("codebook"), py::arg("grad_embedding"),
        py::arg("stats"), py::arg("kl"), py::arg("grad_kl"), py::arg("grad_weights"), py::arg("of_codebook"),
        py::arg("gradients"), no_gil);
    m.def(
        "cuda_sample_chunks",
        [](const RowNumbers& x, const NoiseNumbers& noise, int64_t temperature, int64_t codes) {
            cuda_sample_chunks(
                {to_rows(x), to_noise(noise), address<const float>(temperature), address<int64_t>(codes)});
        },
        py::arg("x"), py::arg("noise"), py::arg("temperature"), py::arg("codes"), no_gil);
    m.def(
        "cuda_cross_entropy_chunks",
        [](const RowNumbers& x, int64_t target, int64_t ignore_index, int64_t loss, int64_t row_weight,
           bool weight_per_row, const GradientNumbers& gradients) {
            cuda_cross_entropy_chunks({to_rows(x), address<const int64_t>(target), ignore_index, address<float>(loss),
                                       address<const float>(row_weight), weight_per_row, to_gradients(gradients)});
        },
        py::arg("x"), py::arg("target"), py::arg("ignore_index"), py::arg("loss"), py::arg("row_weight"),
        py::arg("weight_per_row"), py::arg("gradients"), no_gil);
}

}  // namespace dalle_fast
