// Samples and losses straight from hidden and weight: logits live in registers only. For 16-bit inputs and small I; for
// larger I the vendor's product is the better one, see ../codebook.h for what follows it.
//
// A block keeps 64 rows of hidden in shared memory and streams over tiles of 64 codes, a warp having 16 of the rows. Of
// a tile it takes 64 columns at a time, the next of which are on their way while the last are used. 64 codes are also
// what 16 counters of Philox serve: a lane of the product has exactly the 16 codes of a row that 4 counters serve.
#include <stdexcept>
#include <string>

#include "check.cuh"
#include "codebook_row.cuh"
#include "kernels.h"
#include "mma.cuh"

namespace dalle_fast {
namespace {

constexpr int kThreads = 128, kRows = kThreads / kWarp * 16, kTile = kNoiseBlock, kDepth = 64;
constexpr int kPad = 8;  // elements after a row in shared memory, so that the 8 rows a warp reads at once share no bank
constexpr int kMaxDin = 512;
constexpr int64_t kMaxStreamedK = int64_t(1) << 30;

// 8 elements, one load or store.
struct alignas(16) Piece {
    uint32_t word[4];
};
constexpr int kPieceSize = 8, kDepthPieces = kDepth / kPieceSize;
constexpr int kLoads = kTile * kDepthPieces / kThreads;  // pieces of a tile that a thread loads
constexpr int kWeightStride = (kDepth + kPad) / kPieceSize;

int hidden_stride(int64_t I) { return int((I + kDepth - 1) / kDepth * kDepth + kPad) / kPieceSize; }

size_t shared_bytes(int64_t I) { return sizeof(Piece) * size_t(kRows * hidden_stride(I) + 2 * kTile * kWeightStride); }

// Zeros beyond the matrix (rows, I).
__device__ Piece load_piece(const void* matrix, int64_t row, int64_t rows, int64_t I, int column) {
    if (row >= rows || column >= I) return {};
    return static_cast<const Piece*>(matrix)[(row * I + column) / kPieceSize];
}

// Two elements of a row in shared memory, `column` even.
__device__ uint32_t load_pair(const Piece* row, int column) {
    return row[column / kPieceSize].word[column % kPieceSize / 2];
}

// -- what becomes of the logits of a row: a lane has two rows, and of each a quarter of the codes --------------------

template <class T, class Combine>
__device__ T quad_reduce(T x, Combine combine) {
    for (int bits = 1; bits < 4; bits *= 2) x = combine(x, exchange(x, bits));
    return x;
}

struct Sample {
    float temperature;
    RowNoise noise;
    Best best;

    __device__ static Sample begin(const StreamingRows& a, int64_t row) {
        const bool noisy = a.temperature && row < a.N;
        return {noisy ? *a.temperature : 0.0f, noisy ? noise_of_row(a.noise, row) : RowNoise{0, 0},
                {-INFINITY, kNoCode}};
    }
    __device__ void take(const StreamingRows& a, unsigned counter, Four t) {
        if (a.temperature) {
            const Four g = noise_of(noise, counter);
            for (int w = 0; w < kCodes; ++w) t.of[w] += temperature * g.of[w];
        }
        // Not in ascending order from call to call.
        for (int w = 0; w < kCodes; ++w) {
            const Best other = {t.of[w], code_of(counter, w)};
            if (other.code < a.K && other.value > -INFINITY) best = Better()(best, other);
        }
    }
    __device__ void end(const StreamingRows& a, int64_t row) {
        best = quad_reduce(best, Better());
        if (row < a.N && threadIdx.x % 4 == 0) a.codes[row] = found_code(best.code, a.K);
    }
};

struct Loss {
    int64_t target;
    float target_logit;
    RunningSum sum;

    __device__ static Loss begin(const StreamingRows& a, int64_t row) {
        return {row < a.N ? a.target[row] : 0, -INFINITY, {-INFINITY, 0}};
    }
    __device__ void take(const StreamingRows& a, unsigned counter, const Four& z) {
        add_exponentials(sum, z, kLog2e);
        for (int w = 0; w < kCodes; ++w)
            if (code_of(counter, w) == target) target_logit = z.of[w];
    }
    __device__ void end(const StreamingRows& a, int64_t row) {
        const float max = quad_reduce(sum.max, Larger());
        const float total = quad_reduce(rescaled_sum(sum, max, kLog2e), Plus());
        const float logit = quad_reduce(target_logit, Larger());
        if (row >= a.N || threadIdx.x % 4 != 0) return;
        if (target == a.ignore_index) {
            a.loss[row] = 0;
        } else {
            a.loss[row] = target < 0 || target >= a.K ? NAN : logf(total) - (logit - max);
        }
    }
};

template <class T, class Task>
__global__ void __launch_bounds__(kThreads) streaming_kernel(StreamingRows a, int stride) {
    DALLE_FAST_DYNAMIC_SHARED(Piece, hidden);  // (kRows, stride), then (2, kTile, kWeightStride)
    Piece* const weights = hidden + kRows * stride;
    const int64_t first_row = int64_t(blockIdx.x) * kRows;
    const int depths = (stride - 1) / kDepthPieces, tiles = int((a.K + kTile - 1) / kTile);

    for (int p = threadIdx.x; p < kRows * depths * kDepthPieces; p += kThreads) {
        const int row = p / (depths * kDepthPieces), piece = p % (depths * kDepthPieces);
        hidden[row * stride + piece] = load_piece(a.hidden, first_row + row, a.N, a.I, piece * kPieceSize);
    }
    const auto load_weights = [&](Piece(&pieces)[kLoads], int tile, int depth) {
        for (int n = 0; n < kLoads; ++n) {
            const int p = n * kThreads + threadIdx.x, column = depth * kDepth + p % kDepthPieces * kPieceSize;
            pieces[n] = load_piece(a.weight, int64_t(tile) * kTile + p / kDepthPieces, a.K, a.I, column);
        }
    };
    const auto keep_weights = [&](const Piece(&pieces)[kLoads], int64_t step) {
        Piece* const place = weights + step % 2 * (kTile * kWeightStride);
        for (int n = 0; n < kLoads; ++n) {
            const int p = n * kThreads + threadIdx.x;
            place[p / kDepthPieces * kWeightStride + p % kDepthPieces] = pieces[n];
        }
    };
    Piece pieces[kLoads];
    load_weights(pieces, 0, 0);
    keep_weights(pieces, 0);
    __syncthreads();

    const int group = threadIdx.x % kWarp / 4, pair = threadIdx.x % 4 * 2;
    const int warp_row = threadIdx.x / kWarp * 16 + group;
    const int64_t row = first_row + warp_row;
    Task tasks[2] = {Task::begin(a, row), Task::begin(a, row + 8)};
    float logits[kTile / 8][4] = {};

    const int64_t steps = int64_t(tiles) * depths;
    for (int64_t step = 0; step < steps; ++step) {
        const int tile = int(step / depths), depth = int(step % depths);
        const bool more = step + 1 < steps;
        if (more) load_weights(pieces, int((step + 1) / depths), int((step + 1) % depths));

        const Piece* const rows = hidden + warp_row * stride + depth * kDepthPieces;
        const Piece* const codes = weights + step % 2 * (kTile * kWeightStride) + group * kWeightStride;
        for (int k = 0; k < kDepth; k += 16) {
            const uint32_t x[4] = {load_pair(rows, k + pair), load_pair(rows + 8 * stride, k + pair),
                                   load_pair(rows, k + pair + 8), load_pair(rows + 8 * stride, k + pair + 8)};
            for (int n = 0; n < kTile / 8; ++n) {
                const Piece* const code = codes + n * 8 * kWeightStride;
                const uint32_t y[2] = {load_pair(code, k + pair), load_pair(code, k + pair + 8)};
                mma_16x8x16<T>(logits[n], x, y);
            }
        }

        if (depth == depths - 1) {
            // 8 times 4 codes: of 2 rows, and of the 16 codes that are two products wide the even and odd ones of both.
            // Unrolled, or the logits would have to have addresses.
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const int lower = n % 2, odd = n / 2 % 2, half = n / 4;
                const unsigned counter = unsigned(tile) * kNoiseLanes + half * 8 + pair + odd;
                Four z;
                for (int w = 0; w < kCodes; ++w) {
                    const unsigned code = code_of(counter, w);
                    const float logit = logits[2 * w + half][2 * lower + odd];
                    z.of[w] = code < a.K ? logit + (a.bias ? a.bias[code] : 0.0f) : -INFINITY;
                }
                tasks[lower].take(a, counter, z);
            }
            for (auto& part : logits)
                for (float& logit : part) logit = 0;
        }
        // The other place was read in the last step, before the barrier.
        if (more) keep_weights(pieces, step + 1);
        __syncthreads();
    }
    tasks[0].end(a, row);
    tasks[1].end(a, row + 8);
}

template <class T, class Task>
void launch(const StreamingRows& a, void* stream) {
    StreamingRows rows = a;
    int stride = hidden_stride(a.I);
    const size_t shared = shared_bytes(a.I);
    const auto kernel = streaming_kernel<T, Task>;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
               "allowing streaming_kernel its shared memory");
    void* args[] = {&rows, &stride};
    check_cuda(cudaLaunchKernel(kernel, dim3(unsigned((a.N + kRows - 1) / kRows)), dim3(kThreads), args, shared,
                                static_cast<cudaStream_t>(stream)),
               "launching streaming_kernel");
}

template <class Task>
void launch_task(const StreamingRows& a, void* stream) {
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % alignof(Piece) == 0; };
    if (a.N < 0 || a.K < 1 || a.K > kMaxStreamedK) throw std::invalid_argument("N must be at least 0, K 1 to 2^30");
    if (a.I < 1 || a.I > kMaxDin || a.I % kPieceSize)
        throw std::invalid_argument("Din must be a multiple of 8 up to 512, got " + std::to_string(a.I));
    if (!aligned(a.hidden) || !aligned(a.weight))
        throw std::invalid_argument("hidden and weight must begin at multiples of 16 bytes");
    if (a.N == 0) return;
    switch (a.dtype) {
        case CodebookDType::float16: return launch<__half, Task>(a, stream);
        case CodebookDType::bfloat16: return launch<__nv_bfloat16, Task>(a, stream);
        default: throw std::invalid_argument("only float16 and bfloat16 are streamed");
    }
}

}  // namespace

void cuda_codebook_sample_streaming(const StreamingRows& a, void* stream) {
    launch_task<Sample>(a, stream);
}

void cuda_codebook_cross_entropy_streaming(const StreamingRows& a, void* stream) {
    launch_task<Loss>(a, stream);
}

}  // namespace dalle_fast
