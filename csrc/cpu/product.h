// Products of two matrices on the CPU: out (M, N) = a (M, depth) @ b (N, depth)^T, in float32 whatever a and b consist of.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../codebook.h"

namespace dalle_fast {

// (lanes, depth): a lane for every row of the result, or for every column. Strides in elements.
struct Operand {
    const void* data;
    DType dtype;
    int64_t lanes, stride_lane, stride_depth;
};

// Sums in the 24 upper bits of a float: a float32 sum that is still added to, in 3 bytes. The upper 16 bits lie where the
// result, in `dtype`, is going to be.
struct PackedSums {
    uint16_t* upper;
    uint8_t* lower;
    DType dtype;

    PackedSums from(int64_t x) const { return {upper + x, lower + x, dtype}; }
};

struct Product {
    Operand a, b;
    int64_t depth;
    float* out;  // (M, N); a row's elements lie side by side. Null: the result goes to `sums`, which lie alike
    int64_t stride_out;
    bool add;  // to what is there
    PackedSums sums = {};
    bool last = false;  // sums become their result
};

// Columns of the result for which a thread keeps b packed: more where the depth is short.
constexpr int64_t kColumnsAtOnce = 256;

struct ProductKernels {
    size_t scratch_bytes;             // that a thread needs
    int64_t tile_rows, tile_columns;  // what is no multiple of them is computed with more
    void (*multiply)(const Product&, void* scratch);
};

namespace portable { extern const ProductKernels product_kernels; }
namespace avx2 { extern const ProductKernels product_kernels; }
namespace avx512 { extern const ProductKernels product_kernels; }
namespace avx512_bf16 { extern const ProductKernels product_kernels; }
namespace avx512_amx { extern const ProductKernels product_kernels; }

// A piece of a result: rows and columns.
struct Piece {
    int64_t row, end_row, column, end_column;
};

// A result (M, N) in pieces of one size.
struct Grid {
    int64_t M, N, row_step, column_step;

    int64_t size() const { return row_steps() * ((N + column_step - 1) / column_step); }
    Piece operator[](int64_t x) const {
        const int64_t row = x % row_steps() * row_step, column = x / row_steps() * column_step;
        return {row, std::min(M, row + row_step), column, std::min(N, column + column_step)};
    }

private:
    int64_t row_steps() const { return (M + row_step - 1) / row_step; }
};

// Pieces that keep all threads busy and pack little more than once. With `column_step` that is their width.
Grid cut(const ProductKernels&, int64_t M, int64_t N, int threads, int64_t column_step = 0);

// Is a product so small that waking threads for it costs more than it does?
bool is_small(int64_t M, int64_t N, int64_t depth);

// Some of the lanes.
Operand part(const Operand&, int64_t lane, int64_t end_lane);

// Elements of the result do not depend on how many threads there are.
void multiply(const ProductKernels&, const Product&, int threads);

}  // namespace dalle_fast
