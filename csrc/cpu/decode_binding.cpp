// The decode kernels as Python sees them: addresses and strides in, nothing out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../bindings.h"
#include "decode.h"
#include "dispatch.h"
#include "tensor_numbers.h"

namespace py = pybind11;

namespace dalle_fast {

void bind_decode(py::module_& m) {
    // sizes: B, P, H, T, D
    // table: address of the slots of position 0, elements between positions, address of the counts
    // tensors: query, text_key, text_value, image_key, image_value, out
    m.def("attention_decode",
          [](const std::array<int64_t, 5>& sizes, int dtype, float scale, int64_t text_lengths,
             const std::array<int64_t, 3>& table, int64_t position, const std::array<TensorNumbers, 6>& tensors,
             int threads) {
              DecodeArgs a{};
              a.B = sizes[0];
              a.P = sizes[1];
              a.H = sizes[2];
              a.T = sizes[3];
              a.D = sizes[4];
              a.dtype = static_cast<DType>(dtype);
              a.scale = scale;
              a.text_lengths = reinterpret_cast<const int32_t*>(text_lengths);
              a.slots = reinterpret_cast<const int32_t*>(table[0]) + position * table[1];
              a.num_slots = reinterpret_cast<const int32_t*>(table[2])[position];
              Strided* const fields[] = {&a.query, &a.text_key, &a.text_value, &a.image_key, &a.image_value, &a.out};
              for (size_t x = 0; x < tensors.size(); ++x) *fields[x] = to_strided(tensors[x]);
              attention_decode(decode_kernels(), a, threads);
          },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace dalle_fast
