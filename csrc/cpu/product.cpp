// Shares a product of matrices between threads.
#include "product.h"

#include <algorithm>

#include "parallel.h"

namespace dalle_fast {
namespace {

constexpr int64_t kSerialWork = 1 << 18;  // multiply-adds: some 10 microseconds of one core
constexpr int64_t kPackingCost = 12;      // of one element, in multiply-adds

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

}  // namespace

Grid cut(const ProductKernels& kernels, int64_t M, int64_t N, int threads, int64_t column_step) {
    Grid best{};
    int64_t least = -1;
    for (int64_t rows = 1; rows <= threads; ++rows)
        for (int64_t columns = 1; columns <= 4 * threads / rows; ++columns) {
            const int64_t width = column_step ? column_step : round_up((N + columns - 1) / columns, kernels.tile_columns);
            const Grid grid{M, N, round_up((M + rows - 1) / rows, kernels.tile_rows), width};
            const int64_t rounds = (grid.size() + threads - 1) / threads;
            const int64_t blocks = (width + kColumnsAtOnce - 1) / kColumnsAtOnce;
            const int64_t cost = rounds * (grid.row_step * width + kPackingCost * (width + grid.row_step * blocks));
            if (least >= 0 && cost > least) continue;  // of equals the smaller pieces: a late thread costs less
            least = cost;
            best = grid;
        }
    return best;
}

bool is_small(int64_t M, int64_t N, int64_t depth) {
    return (M + kPackingCost) * N * std::max<int64_t>(1, depth) < kSerialWork;
}

Operand part(const Operand& x, int64_t lane, int64_t end_lane) {
    const int64_t bytes = x.dtype == DType::float32 ? 4 : 2;
    return {static_cast<const char*>(x.data) + lane * x.stride_lane * bytes, x.dtype, end_lane - lane, x.stride_lane,
            x.stride_depth};
}

void multiply(const ProductKernels& kernels, const Product& p, int threads) {
    const int64_t M = p.a.lanes, N = p.b.lanes;
    if (M == 0 || N == 0) return;
    if (is_small(M, N, p.depth)) threads = 1;
    const Grid grid = cut(kernels, M, N, threads);
    for_each(grid.size(), threads, kernels.scratch_bytes, [&](int64_t x, void* scratch) {
        const Piece piece = grid[x];
        Product of_piece = p;
        of_piece.a = part(p.a, piece.row, piece.end_row);
        of_piece.b = part(p.b, piece.column, piece.end_column);
        const int64_t first = piece.row * p.stride_out + piece.column;
        if (p.out) of_piece.out += first;
        else of_piece.sums = p.sums.from(first);
        kernels.multiply(of_piece, scratch);
    });
}

}  // namespace dalle_fast
