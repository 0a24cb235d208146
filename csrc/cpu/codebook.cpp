// Shares rows of logits between threads, or makes the logits itself, tile by tile.
#include "codebook.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace dalle_fast {
namespace {

constexpr int64_t kSerialWork = 1 << 14;  // logits: some 20 microseconds of one core
constexpr int64_t kRowsAtOnce = 4;        // that a thread takes

// Calls task(begin, end, scratch) for all rows.
template <class Task>
void for_rows(int64_t R, int64_t K, size_t scratch_bytes, int threads, Task&& task) {
    if (R == 0) return;
    if (R * K < kSerialWork) threads = 1;  // waking threads costs more
    const int64_t step = std::max<int64_t>(1, std::min(kRowsAtOnce, R / threads));
    for_each((R + step - 1) / step, threads, scratch_bytes, [&](int64_t x, void* scratch) {
        task(x * step, std::min(R, (x + 1) * step), static_cast<float*>(scratch));
    });
}

template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& a, int64_t R, int64_t K, int threads) {
    for_rows(R, K, size_t(K) * sizeof(float), threads,
             [&](int64_t begin, int64_t end, float* scratch) { kernel(a, begin, end, scratch); });
}

// -- tiles of logits ----------------------------------------------------------------------------------------------------

constexpr int64_t kTileCodes = kColumnsAtOnce;  // and never others: sums must not depend on the threads
constexpr int64_t kTileRows = 1024;             // at most: for each tile the weight is packed once

int64_t tiles_of_row(int64_t K) { return (K + kTileCodes - 1) / kTileCodes; }

// Calls visit(tile, results) for tiles that cover all logits, `results` being where the tile's rows begin among those of
// its codes, and then finish(row, results, stride) for every row, with the tiles_of_row(K) results of it.
template <class Result, class Visit, class Finish>
void for_tiles(const ProductKernels& kernels, const LogitFactors& x, int threads, Visit&& visit, Finish&& finish) {
    const int64_t R = x.hidden.lanes, K = x.weight.lanes, tiles = tiles_of_row(K);
    if (is_small(R, K, x.depth)) threads = 1;
    std::vector<Result> results(size_t(std::min(R, kTileRows) * tiles));
    for (int64_t first = 0; first < R; first += kTileRows) {
        const Operand hidden = part(x.hidden, first, std::min(R, first + kTileRows));
        const int64_t rows = hidden.lanes;
        const Grid grid = cut(kernels, rows, K, threads, kTileCodes);
        const size_t tile_bytes = size_t(grid.row_step * kTileCodes) * sizeof(float);
        for_each(grid.size(), threads, tile_bytes + kernels.scratch_bytes, [&](int64_t n, void* scratch) {
            const Piece piece = grid[n];
            float* logits = static_cast<float*>(scratch);
            kernels.multiply({part(hidden, piece.row, piece.end_row), part(x.weight, piece.column, piece.end_column),
                              x.depth, logits, kTileCodes, false},
                             static_cast<char*>(scratch) + tile_bytes);
            visit(LogitTile{{first + piece.row, first + piece.end_row, piece.column, piece.end_column}, logits, kTileCodes},
                  &results[size_t(piece.column / kTileCodes * rows + piece.row)]);
        });
        for_rows(rows, tiles, 0, threads, [&](int64_t begin, int64_t end, float*) {
            for (int64_t r = begin; r < end; ++r) finish(first + r, &results[size_t(r)], rows);
        });
    }
}

BestCode best_of(const BestCode* tiles, int64_t count, int64_t stride) {
    BestCode best = tiles[0];
    for (int64_t t = 1; t < count; ++t)
        if (tiles[t * stride].value > best.value) best = tiles[t * stride];
    return best;
}

// a.loss[r] holds the logit of the target.
float finished_loss(const CrossEntropyRows& a, int64_t r, const ExpSum* tiles, int64_t count, int64_t stride) {
    if (a.target[r] == a.ignore_index) return 0;
    float most = tiles[0].most;
    for (int64_t t = 1; t < count; ++t) most = std::max(most, tiles[t * stride].most);
    double sum = 0;
    for (int64_t t = 0; t < count; ++t) sum += double(tiles[t * stride].sum) * std::exp(tiles[t * stride].most - most);
    return float(std::log(sum) - double(a.loss[r] - most));
}

}  // namespace

void gumbel_forward(const CodebookKernels& kernels, const GumbelForward& a, int threads) {
    run(kernels.gumbel_forward, a, a.x.R, a.x.K, threads);
}
void gumbel_backward(const CodebookKernels& kernels, const GumbelBackward& a, int threads) {
    run(kernels.gumbel_backward, a, a.x.R, a.x.K, threads);
}
void gumbel_softmax(const CodebookKernels& kernels, const GumbelSoftmaxRows& a, int threads) {
    run(kernels.gumbel_softmax, a, a.R, a.K, threads);
}

void truncate(const CodebookKernels& kernels, const TruncatedRows& a, int threads) {
    run(kernels.truncate, a, a.R, a.K, threads);
}

void sample(const CodebookKernels& kernels, const SampleRows& a, int threads) {
    for_rows(a.x.R, a.x.K, 0, threads, [&](int64_t begin, int64_t end, float*) {
        for (int64_t r = begin; r < end; ++r) {
            BestCode best;
            kernels.best_codes(a, {{r, r + 1, 0, a.x.K}, a.x.logits + r * a.x.K, a.x.K}, &best);
            a.codes[r] = best.code;
        }
    });
}

void cross_entropy(const CodebookKernels& kernels, const CrossEntropyRows& a, int threads) {
    if (a.grad_logits) return run(kernels.cross_entropy, a, a.x.R, a.x.K, threads);
    for_rows(a.x.R, a.x.K, 0, threads, [&](int64_t begin, int64_t end, float*) {
        for (int64_t r = begin; r < end; ++r) {
            ExpSum sum;
            kernels.exp_sums(a, {{r, r + 1, 0, a.x.K}, a.x.logits + r * a.x.K, a.x.K}, &sum);
            a.loss[r] = finished_loss(a, r, &sum, 1, 0);
        }
    });
}

void sample_streaming(const CodebookKernels& kernels, const ProductKernels& product, const SampleRows& a,
                      const LogitFactors& x, int threads) {
    for_tiles<BestCode>(
        product, x, threads, [&](const LogitTile& tile, BestCode* of_rows) { kernels.best_codes(a, tile, of_rows); },
        [&](int64_t r, const BestCode* tiles, int64_t stride) {
            a.codes[r] = best_of(tiles, tiles_of_row(a.x.K), stride).code;
        });
}

void cross_entropy_streaming(const CodebookKernels& kernels, const ProductKernels& product, const CrossEntropyRows& a,
                             const LogitFactors& x, int threads) {
    for_tiles<ExpSum>(
        product, x, threads, [&](const LogitTile& tile, ExpSum* of_rows) { kernels.exp_sums(a, tile, of_rows); },
        [&](int64_t r, const ExpSum* tiles, int64_t stride) {
            a.loss[r] = finished_loss(a, r, tiles, tiles_of_row(a.x.K), stride);
        });
}

}  // namespace dalle_fast
