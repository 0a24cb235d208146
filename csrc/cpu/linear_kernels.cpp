// A linear layer of few rows. Compiled once per instruction set.
//
// A tile's sums, some rows times some columns, stay in registers while a row of weights goes by; the rows of x stay in
// the cache. Weights are asked for some rows ahead: on two cores of a Sapphire Rapids the layers of a 12-layer model of
// width 512, 151 MB, took 10.4 ms for 8 rows if left to the hardware, 6.9 so, and 15.0 in MKL (without what Python adds).
// How many rows share a tile changes which registers hold their sums, never the order of the sums. They are taken in
// parts, so that rounding stays that of MKL where a vector has few lanes: the root mean square error of sums of 2,048
// terms over 4 lanes was 1.9 times that of MKL with AVX-512, in parts 0.8 times.
#include "linear.h"

#include <algorithm>
#include <type_traits>

#include "gelu.h"
#include "linear_units.h"
#include "simd.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int SUMS = VW == 16 ? 24 : 8;  // that the register file holds beside operands
constexpr int MAX_ROWS = VW == 16 ? 8 : 4;
constexpr int64_t AHEAD = 8192;          // bytes
constexpr int64_t PART = 64 * VW;        // terms of a sum

// out (ROWS, COLUMNS) of rows of x and, from `column` on, of weight
template <int ROWS, int COLUMNS, class T>
DF_NOINLINE void tile(const LinearArgs& a, int64_t row, int64_t column) {
    const float* x = a.x + row * a.K;
    const T* weight = static_cast<const T*>(a.weight) + column * a.stride_weight;
    Vec total[ROWS][COLUMNS] = {};
    int64_t k = 0;
    while (k + VW <= a.K) {
        Vec part[ROWS][COLUMNS] = {};
        for (const int64_t end = std::min(k + PART, a.K); k + VW <= end; k += VW) {
            Vec w[COLUMNS];
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; ++c) {
                w[c] = load_as_float(weight + c * a.stride_weight + k);
                __builtin_prefetch(reinterpret_cast<const char*>(weight + c * a.stride_weight + k) + AHEAD, 0, 2);
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const Vec of_row = load(x + r * a.K + k);
#pragma GCC unroll 4
                for (int c = 0; c < COLUMNS; ++c) part[r][c] += of_row * w[c];
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; ++c) total[r][c] += part[r][c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) {
            float sum = horizontal_sum(total[r][c]);
            for (int64_t rest = k; rest < a.K; ++rest)
                sum += x[r * a.K + rest] * to_float(weight[c * a.stride_weight + rest]);
            if (a.bias) sum += to_float(static_cast<const T*>(a.bias)[column + c]);
            a.out[(row + r) * a.N + column + c] = sum;
        }
}

// All rows of some columns, in tiles whose sizes are compiled.
template <int COLUMNS, class T>
void rows(const LinearArgs& a, int64_t row, int64_t end_row, int64_t column) {
    for (; MAX_ROWS >= 8 && row + 8 <= end_row; row += 8) tile<MAX_ROWS, COLUMNS, T>(a, row, column);
    for (; row + 4 <= end_row; row += 4) tile<4, COLUMNS, T>(a, row, column);
    for (; row + 2 <= end_row; row += 2) tile<2, COLUMNS, T>(a, row, column);
    for (; row < end_row; ++row) tile<1, COLUMNS, T>(a, row, column);
}

template <class T>
void columns_of(const LinearArgs& a, int64_t begin, int64_t end) {
    constexpr int FEW = SUMS / MAX_ROWS, MANY = 4;  // FEW beside MAX_ROWS rows; fewer rows leave room for MANY
    const int64_t step = a.R >= MAX_ROWS ? FEW : MANY;
    int64_t column = begin;
    for (; column + step <= end; column += step)
        if (step == FEW) rows<FEW, T>(a, 0, a.R, column);
        else rows<MANY, T>(a, 0, a.R, column);
    for (; column < end; ++column) rows<1, T>(a, 0, a.R, column);
}

void gelu_of(float* x, int64_t count) {
    int64_t k = 0;
    for (; k + VW <= count; k += VW) store(x + k, gelu(load(x + k)));
    for (; k < count; ++k) x[k] = gelu(splat(x[k]))[0];
}

void columns_of_bfloat16(const LinearArgs& a, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
    unit_columns(a, begin, end);
#else
    columns_of<BFloat16>(a, begin, end);
#endif
}

void columns(const LinearArgs& a, int64_t begin, int64_t end) {
    switch (a.dtype) {
        case DType::float32: columns_of<float>(a, begin, end); break;
        case DType::float16: columns_of<Half>(a, begin, end); break;
        default: columns_of_bfloat16(a, begin, end);
    }
    if (a.gelu)
        for (int64_t r = 0; r < a.R; ++r) gelu_of(a.out + r * a.N + begin, end - begin);
}

size_t packed_bytes([[maybe_unused]] const LinearArgs& a) {
#if defined(__AMX_BF16__)
    if (a.dtype == DType::bfloat16) return size_t(unit_groups(a) * unit_steps(a) * kUnitWords) * sizeof(Word);
#endif
    return 0;
}

void pack([[maybe_unused]] const LinearArgs& a, [[maybe_unused]] void* packed) {
#if defined(__AMX_BF16__)
    if (a.dtype == DType::bfloat16) pack_x(a, static_cast<Word*>(packed));
#endif
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {packed_bytes, pack, columns};

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
