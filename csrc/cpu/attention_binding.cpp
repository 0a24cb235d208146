// The attention kernels as Python sees them: addresses and strides in, nothing out. Plain calls hand over their tensors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "../bindings.h"
#include "../dlpack.h"
#include "attention.h"
#include "attention_layout.h"
#include "dispatch.h"
#include "tensor_numbers.h"

namespace py = pybind11;

namespace dalle_fast {
namespace {

using MaskNumbers = std::array<int32_t, 6>;  // AttentionMask.encode()

Mask to_mask(const MaskNumbers& n) { return {static_cast<Rule>(n[0]), n[1], n[2], n[3], n[4], n[5]}; }

AttentionArgs make_args(const AttentionLayoutStorage& layout, const std::array<int64_t, 3>& sizes, int dtype,
                        float scale, int64_t text_lengths, const std::vector<TensorNumbers>& tensors) {
    AttentionArgs a{};
    a.layout = layout.view();
    a.B = sizes[0];
    a.H = sizes[1];
    a.D = sizes[2];
    a.dtype = static_cast<DType>(dtype);
    a.scale = scale;
    a.text_lengths = reinterpret_cast<const int32_t*>(text_lengths);
    Strided* const fields[] = {&a.query,    &a.key,      &a.value,      &a.out,      &a.lse,
                               &a.grad_out, &a.grad_lse, &a.grad_query, &a.grad_key, &a.grad_value};
    for (size_t x = 0; x < tensors.size(); ++x) *fields[x] = to_strided(tensors[x]);
    return a;
}

bool to_dtype(DLDataType dlpack, DType& dtype) {
    if (dlpack.lanes != 1) return false;
    if (dlpack.code == kDLBfloat && dlpack.bits == 16) dtype = DType::bfloat16;
    else if (dlpack.code == kDLFloat && dlpack.bits == 16) dtype = DType::float16;
    else if (dlpack.code == kDLFloat && dlpack.bits == 32) dtype = DType::float32;
    else return false;
    return true;
}

Strided to_strided(const DLTensor& x) {
    return {static_cast<char*>(x.data) + x.byte_offset, x.strides[0], x.strides[1], x.strides[2], x.strides[3]};
}

// Of the layout's whole sequences: (B, H, S, D), and alike.
bool are_sequences(const DLTensor (&tensors)[3], int64_t seq_len, int64_t max_head_dim) {
    const DLTensor& first = tensors[0];
    if (first.ndim != 4 || first.shape[2] != seq_len || first.shape[3] < 1 || first.shape[3] > max_head_dim) return false;
    for (const DLTensor& x : tensors)
        if (x.device.device_type != kDLCPU || !x.strides || x.ndim != 4 || !std::equal(x.shape, x.shape + 4, first.shape) ||
            x.dtype.code != first.dtype.code || x.dtype.bits != first.dtype.bits)
            return false;
    return true;
}

// attention_forward of tensors, at a scale of D^-1/2: their result, made by empty_like. None where they are not what the
// kernels take as it is, or cannot be asked.
py::object forward_at_once(py::handle capsule, const AttentionLayoutStorage& layout, py::handle query, py::handle key,
                           py::handle value, int64_t max_head_dim, py::handle empty_like, int threads) {
    const DLPackExchangeAPI* api = exchange_api(capsule);
    AttentionArgs a{};
    a.layout = layout.view();
    DLTensor of_inputs[3], of_out;
    if (!api || !describe(*api, query, of_inputs[0]) || !describe(*api, key, of_inputs[1]) ||
        !describe(*api, value, of_inputs[2]) || !are_sequences(of_inputs, a.layout.seq_len, max_head_dim) ||
        !to_dtype(of_inputs[0].dtype, a.dtype))
        return py::none();
    py::object out = empty_like(query);
    if (!describe(*api, out, of_out)) return py::none();
    a.B = of_out.shape[0];
    a.H = of_out.shape[1];
    a.D = of_out.shape[3];
    a.scale = float(std::pow(double(a.D), -0.5));
    a.query = to_strided(of_inputs[0]);
    a.key = to_strided(of_inputs[1]);
    a.value = to_strided(of_inputs[2]);
    a.out = to_strided(of_out);
    {
        py::gil_scoped_release release;
        attention_forward(attention_kernels(), a, threads);
    }
    return out;
}

py::array_t<bool> dense_mask(const MaskNumbers& numbers, int32_t seq_len) {
    const Mask mask = to_mask(numbers);
    py::array_t<bool> out({seq_len, seq_len});
    auto view = out.mutable_unchecked<2>();
    for (int32_t q = 0; q < seq_len; ++q)
        for (int32_t k = 0; k < seq_len; ++k) view(q, k) = allows(mask, q, k);
    return out;
}

}  // namespace

void bind_attention(py::module_& m) {
    py::class_<AttentionLayoutStorage>(m, "AttentionLayout")
        .def(py::init([](const MaskNumbers& mask, int32_t seq_len) {
                 return AttentionLayoutStorage(to_mask(mask), seq_len);
             }),
             py::arg("mask"), py::arg("seq_len"), py::call_guard<py::gil_scoped_release>());
    m.def("dense_mask", &dense_mask, py::arg("mask"), py::arg("seq_len"));
    // tensors: query, key, value, out, lse and for the backward grad_out, grad_lse, grad_query, grad_key, grad_value
    m.def("attention_forward",
          [](const AttentionLayoutStorage& layout, const std::array<int64_t, 3>& sizes, int dtype, float scale,
             int64_t text_lengths, bool exact_lse, const std::array<TensorNumbers, 5>& tensors, int threads) {
              AttentionArgs a = make_args(layout, sizes, dtype, scale, text_lengths, {tensors.begin(), tensors.end()});
              a.exact_lse = exact_lse;
              attention_forward(attention_kernels(), a, threads);
          },
          py::call_guard<py::gil_scoped_release>());
    m.def("attention_forward_at_once", &forward_at_once);
    m.def("attention_backward",
          [](const AttentionLayoutStorage& layout, const std::array<int64_t, 3>& sizes, int dtype, float scale,
             int64_t text_lengths, const std::array<TensorNumbers, 10>& tensors, int threads) {
              attention_backward(attention_kernels(), make_args(layout, sizes, dtype, scale, text_lengths,
                                                                {tensors.begin(), tensors.end()}), threads);
          },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace dalle_fast
