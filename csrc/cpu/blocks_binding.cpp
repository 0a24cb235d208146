// A step through a transformer's blocks as Python sees it: addresses and strides in, nothing out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "../bindings.h"
#include "blocks.h"
#include "dispatch.h"
#include "tensor_numbers.h"

namespace py = pybind11;

namespace dalle_fast {
namespace {

using CacheNumbers = std::array<TensorNumbers, 4>;  // text_key, text_value, image_key, image_value
using TableNumbers = std::array<int64_t, 3>;        // as decode_binding.cpp's

constexpr size_t kParameters = 12;  // of a block: weight and bias of the attention's norm, qkv, out, the perceptron's norm, up, down

const void* at(int64_t address) { return reinterpret_cast<const void*>(address); }

}  // namespace

void bind_blocks(py::module_& m) {
    // sizes: R, P, W, H, D, T, F
    // parameters: addresses of kParameters for each block, and of the last norm's two; epsilons: of the norms, in order
    // tables, slots: of each block, for `position`
    // x, out: addresses of float32 (R, W)
    m.def("blocks_step",
          [](const std::array<int64_t, 7>& sizes, int dtype, float scale, int64_t text_lengths,
             const std::vector<int64_t>& parameters, const std::vector<float>& epsilons,
             const std::vector<CacheNumbers>& caches, const std::vector<TableNumbers>& tables,
             const std::vector<int64_t>& slots, int64_t position, int64_t x, int64_t out, int threads) {
              const size_t count = caches.size();
              if (parameters.size() != count * kParameters + 2 || epsilons.size() != 2 * count + 1 ||
                  tables.size() != count || slots.size() != count)
                  throw std::invalid_argument("parameters, epsilons, caches, tables and slots must be of as many blocks");
              std::vector<Block> blocks(count);
              for (size_t n = 0; n < blocks.size(); ++n) {
                  const int64_t* p = &parameters[n * kParameters];
                  Block& b = blocks[n];
                  b.attention_norm = {at(p[0]), at(p[1]), epsilons[2 * n]};
                  b.qkv = {at(p[2]), at(p[3])};
                  b.out = {at(p[4]), at(p[5])};
                  b.mlp_norm = {at(p[6]), at(p[7]), epsilons[2 * n + 1]};
                  b.up = {at(p[8]), at(p[9])};
                  b.down = {at(p[10]), at(p[11])};
                  Strided* const fields[] = {&b.text_key, &b.text_value, &b.image_key, &b.image_value};
                  for (size_t f = 0; f < caches[n].size(); ++f) *fields[f] = to_strided(caches[n][f]);
                  b.slot = slots[n];
                  b.slots = static_cast<const int32_t*>(at(tables[n][0])) + position * tables[n][1];
                  b.num_slots = static_cast<const int32_t*>(at(tables[n][2]))[position];
              }
              BlocksArgs a{};
              a.R = sizes[0];
              a.P = sizes[1];
              a.W = sizes[2];
              a.H = sizes[3];
              a.D = sizes[4];
              a.T = sizes[5];
              a.F = sizes[6];
              a.dtype = static_cast<DType>(dtype);
              a.scale = scale;
              a.text_lengths = static_cast<const int32_t*>(at(text_lengths));
              a.blocks = blocks.data();
              a.num_blocks = int64_t(blocks.size());
              const int64_t* last = &parameters[blocks.size() * kParameters];
              a.norm = {at(last[0]), at(last[1]), epsilons[2 * blocks.size()]};
              a.x = static_cast<const float*>(at(x));
              a.out = reinterpret_cast<float*>(out);
              blocks_step(blocks_kernels(), linear_kernels(), decode_kernels(), a, threads);
          },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace dalle_fast
