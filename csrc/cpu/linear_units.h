// A linear layer of few rows in bfloat16 with Intel's matrix unit: see matrix_unit.h.
//
// What is computed is the transpose of out, so that the larger factor is loaded from where it lies: 16 rows of the weight
// times 32 of K are a register. x, rounded to bfloat16, is packed once: a register has a pair of K in a row, and a row of x in
// a column.
#pragma once

#include <algorithm>
#include <cstring>

#include "linear.h"
#include "matrix_unit.h"
#include "transpose.h"

#if defined(__AMX_BF16__)
namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int64_t kUnitK = 2 * kUnit;         // of K, in a register
constexpr int64_t kUnitWords = kUnit * kUnit;  // of a register
constexpr int64_t kPartK = 1024;              // terms of a sum, which are added up in parts as in tile()

int64_t unit_groups(const LinearArgs& a) { return (a.R + kUnit - 1) / kUnit; }
int64_t unit_steps(const LinearArgs& a) { return (a.K + kUnitK - 1) / kUnitK; }

// -> (groups of 16 rows, steps of K, 16 pairs, 16 rows), zeros where x has nothing
void pack_x(const LinearArgs& a, Word* packed) {
    for (int64_t row = 0; row < a.R; row += kUnit)
        for (int64_t k = 0; k < a.K; k += kUnitK, packed += kUnitWords) {
            const int64_t left = a.K - k;
            const __mmask16 lower = left >= kUnit ? 0xffff : (1u << left) - 1;
            const __mmask16 upper = left >= kUnitK ? 0xffff : left <= kUnit ? 0 : (1u << (left - kUnit)) - 1;
            Words pairs[kUnit] = {};
            for (int64_t r = 0; r < std::min<int64_t>(kUnit, a.R - row); ++r) {
                const float* x = a.x + (row + r) * a.K + k;
                pairs[r] = (Words)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(upper, x + kUnit), _mm512_maskz_loadu_ps(lower, x));
            }
            transpose(pairs);
            for (int pair = 0; pair < kUnit; ++pair) *reinterpret_cast<UnalignedWords*>(packed + pair * kUnit) = pairs[pair];
        }
}

// out of 16 * GROUPS rows from `row` on, or what is left of them, and of 16 columns from `column` on, or those before `end`
template <int GROUPS>
DF_NOINLINE void unit_tile(const LinearArgs& a, int64_t row, int64_t column, int64_t end) {
    const int64_t steps = unit_steps(a), columns = std::min<int64_t>(kUnit, end - column);
    const BFloat16* weight = static_cast<const BFloat16*>(a.weight) + column * a.stride_weight;
    const Word* x = static_cast<const Word*>(a.packed) + row / kUnit * steps * kUnitWords;
    alignas(64) float sums[2][kUnit][kUnit];
    Vec totals[GROUPS][kUnit] = {};  // of a column, with a row of x in each lane
    zero_sums();
    for (int64_t step = 0; step < steps;) {
        for (const int64_t part = std::min(steps, step + kPartK / kUnitK); step < part; ++step) {
            const BFloat16* p = weight + step * kUnitK;
            const int64_t left = a.K - step * kUnitK;
            if (columns == kUnit && left >= kUnitK) {
                _tile_loadd(2, p, a.stride_weight * 2);
                for (int64_t c = kUnit; c < 2 * kUnit; ++c) __builtin_prefetch(p + c * a.stride_weight, 0, 2);  // the next tile's
            } else {
                alignas(64) BFloat16 copy[kUnit][kUnitK] = {};
                for (int64_t c = 0; c < columns; ++c)
                    std::memcpy(copy[c], p + c * a.stride_weight, size_t(std::min(left, kUnitK)) * sizeof(BFloat16));
                __asm__ volatile("" : : "r"(copy) : "memory");  // written before it is loaded
                _tile_loadd(2, copy, kUnitK * 2);
            }
            _tile_loadd(3, x + step * kUnitWords, kUnit * 4);
            _tile_dpbf16ps(0, 2, 3);
            if (GROUPS < 2) continue;
            _tile_loadd(3, x + (steps + step) * kUnitWords, kUnit * 4);
            _tile_dpbf16ps(1, 2, 3);
        }
        store_upper_sum(sums[0][0], kUnit * 4);
        if (GROUPS == 2) store_lower_sum(sums[1][0], kUnit * 4);
        for (int g = 0; g < GROUPS; ++g)
            for (int c = 0; c < kUnit; ++c) totals[g][c] += load(sums[g][c]);
    }
    const BFloat16* bias = static_cast<const BFloat16*>(a.bias);
    const __mmask16 used = columns == kUnit ? 0xffff : (1u << columns) - 1;
    const __m512i bias_bits = _mm512_cvtepu16_epi32(bias ? _mm256_maskz_loadu_epi16(used, bias + column) : _mm256_setzero_si256());
    const Vec of_bias = (Vec)_mm512_slli_epi32(bias_bits, 16);
    for (int g = 0; g < GROUPS; ++g) {
        Words rows[kUnit];
        for (int c = 0; c < kUnit; ++c) rows[c] = (Words)totals[g][c];
        transpose(rows);
        float* out = a.out + (row + g * kUnit) * a.N + column;
        for (int64_t r = 0; r < std::min<int64_t>(kUnit, a.R - row - g * kUnit); ++r)
            _mm512_mask_storeu_ps(out + r * a.N, used, (__m512)((Vec)rows[r] + of_bias));
    }
}

void unit_columns(const LinearArgs& a, int64_t begin, int64_t end) {
    begin_tiles();
    for (int64_t column = begin; column < end; column += kUnit) {
        int64_t row = 0;
        for (; row + kUnit < a.R; row += 2 * kUnit) unit_tile<2>(a, row, column, end);
        if (row < a.R) unit_tile<1>(a, row, column, end);
    }
    end_tiles();
}

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
