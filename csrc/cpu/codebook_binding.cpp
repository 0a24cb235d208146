// The codebook kernels as Python sees them: addresses in, nothing out. Also the noise itself, for tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "../bindings.h"
#include "../gumbel.h"
#include "../philox.h"
#include "codebook.h"
#include "dispatch.h"

namespace py = pybind11;

namespace dalle_fast {
namespace {

template <class T>
T* at(int64_t address) {
    return reinterpret_cast<T*>(address);
}

LogitRows logit_rows(int64_t R, int64_t K, int64_t logits, int64_t bias) {
    return {R, K, at<float>(logits), at<const float>(bias)};
}

NoiseRows noise_rows(int64_t seed, bool seed_per_row, int64_t first_row) {
    return {at<const int64_t>(seed), seed_per_row, first_row};
}

// A matrix: address, dtype, rows, columns, stride of the rows and of the columns.
typedef std::array<int64_t, 6> Matrix;

Operand operand(const Matrix& x) {
    return {at<const void>(x[0]), static_cast<DType>(x[1]), x[2], x[4], x[5]};
}

int64_t depth_of(const Matrix& a, const Matrix& b) {
    if (a[3] == b[3]) return a[3];
    throw std::invalid_argument("factors must have as many columns, got " + std::to_string(a[3]) + " and " +
                                std::to_string(b[3]));
}

LogitFactors logit_factors(const Matrix& hidden, const Matrix& weight) {
    return {operand(hidden), operand(weight), depth_of(hidden, weight)};
}

py::array_t<uint32_t> philox_counter_words(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
    const auto words = philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    py::array_t<uint32_t> out(4);
    for (int x = 0; x < 4; ++x) out.mutable_at(x) = uint32_t(words.word[x]);
    return out;
}

py::array_t<float> gumbel_of_words(const py::array_t<uint32_t, py::array::c_style | py::array::forcecast>& words) {
    py::array_t<float> out(words.size());
    for (py::ssize_t x = 0; x < words.size(); ++x) out.mutable_data()[x] = gumbel_noise<ScalarLanes>(words.data()[x]);
    return out;
}

}  // namespace

void bind_codebook(py::module_& m) {
    m.def("philox4x32_10", &philox_counter_words, py::arg("counter"), py::arg("key"),
          "The 4 words of one counter of 4 words under a key of 2.");
    m.def("gumbel_noise", &gumbel_of_words, py::arg("words"), "The noise that each 32-bit word becomes.");
    const py::call_guard<py::gil_scoped_release> released;
    m.def("gumbel_forward",
          [](int64_t R, int64_t K, int64_t logits, int64_t bias, int64_t seed, bool seed_per_row, int64_t first_row,
             int64_t tau, int64_t weights, int64_t stats, int64_t kl, int64_t codes, int threads) {
              gumbel_forward(codebook_kernels(),
                             {logit_rows(R, K, logits, bias), noise_rows(seed, seed_per_row, first_row),
                              at<const float>(tau), at<void>(weights), DType::float32, at<GumbelStats>(stats),
                              at<float>(kl), at<int64_t>(codes)},
                             threads);
          }, released);
    m.def("gumbel_backward",
          [](int64_t R, int64_t K, int64_t logits, int64_t bias, int64_t seed, bool seed_per_row, int64_t first_row,
             int64_t tau, int64_t stats, int64_t kl, int64_t grad_kl, int64_t grad_weights, int64_t weights,
             int64_t grad_logits, int dtype, int threads) {
              gumbel_backward(codebook_kernels(),
                              {logit_rows(R, K, logits, bias), noise_rows(seed, seed_per_row, first_row),
                               at<const float>(tau), at<const GumbelStats>(stats), at<const float>(kl),
                               at<const float>(grad_kl), at<const void>(grad_weights), at<void>(weights),
                               at<void>(grad_logits), static_cast<DType>(dtype)},
                              threads);
          }, released);
    m.def("sample",
          [](int64_t R, int64_t K, int64_t logits, int64_t bias, int64_t seed, bool seed_per_row, int64_t first_row,
             int64_t temperature, int64_t codes, int threads) {
              sample(codebook_kernels(),
                     {logit_rows(R, K, logits, bias), noise_rows(seed, seed_per_row, first_row),
                      at<const float>(temperature), at<int64_t>(codes)},
                     threads);
          }, released);
    m.def("cross_entropy",
          [](int64_t R, int64_t K, int64_t logits, int64_t bias, int64_t target, int64_t ignore_index, int64_t loss,
             int64_t row_weight, bool weight_per_row, int64_t grad_logits, int dtype, int threads) {
              cross_entropy(codebook_kernels(),
                            {logit_rows(R, K, logits, bias), at<const int64_t>(target), ignore_index, at<float>(loss),
                             at<const float>(row_weight), weight_per_row, at<void>(grad_logits),
                             static_cast<DType>(dtype)},
                            threads);
          }, released);
    m.def("truncate",
          [](int64_t R, int64_t K, int64_t logits, float temperature, int64_t top_k, float top_p, int threads) {
              truncate(codebook_kernels(), {R, K, at<float>(logits), temperature, top_k, top_p}, threads);
          }, released);
    m.def("product",
          [](const Matrix& a, const Matrix& b, int64_t out, int64_t stride_out, bool add, int threads) {
              multiply(product_kernels(), {operand(a), operand(b), depth_of(a, b), at<float>(out), stride_out, add}, threads);
          }, released);
    m.def("product_as_sums",  // (M, N), contiguous
          [](const Matrix& a, const Matrix& b, int64_t upper, int64_t lower, int dtype, bool add, bool last, int threads) {
              const PackedSums sums{at<uint16_t>(upper), at<uint8_t>(lower), static_cast<DType>(dtype)};
              multiply(product_kernels(), {operand(a), operand(b), depth_of(a, b), nullptr, b[2], add, sums, last}, threads);
          }, released);
    m.def("sample_streaming",
          [](const Matrix& hidden, const Matrix& weight, int64_t bias, int64_t seed, bool seed_per_row,
             int64_t temperature, int64_t codes, int threads) {
              sample_streaming(codebook_kernels(), product_kernels(),
                               {logit_rows(hidden[2], weight[2], 0, bias), noise_rows(seed, seed_per_row, 0),
                                at<const float>(temperature), at<int64_t>(codes)},
                               logit_factors(hidden, weight), threads);
          }, released);
    m.def("cross_entropy_streaming",
          [](const Matrix& hidden, const Matrix& weight, int64_t bias, int64_t target, int64_t ignore_index, int64_t loss,
             int threads) {
              cross_entropy_streaming(codebook_kernels(), product_kernels(),
                                      {logit_rows(hidden[2], weight[2], 0, bias), at<const int64_t>(target),
                                       ignore_index, at<float>(loss), nullptr, false, nullptr, DType::float32},
                                      logit_factors(hidden, weight), threads);
          }, released);
    m.def("gumbel_softmax",
          [](int64_t R, int64_t K, int64_t logits, int64_t out, int dtype, int64_t seed, float tau, int64_t codes,
             int threads) {
              gumbel_softmax(codebook_kernels(),
                             {R, K, at<const void>(logits), at<void>(out), static_cast<DType>(dtype),
                              noise_rows(seed, false, 0), tau, at<int64_t>(codes)},
                             threads);
          }, released);
}

}  // namespace dalle_fast
