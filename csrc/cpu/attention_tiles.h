// Which pairs of queries and keys attend, tile by tile: what the attention kernels share.
//
// Everything has internal linkage: each instruction set must keep its own copy.
#pragma once

#include "attention.h"
#include "rows.h"
#include "simd.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

// The tiles of one block of queries, in the order of their keys, as the softmax needs them.
struct ActiveTile {
    int32_t panel;
    int64_t slot;      // of the panel's packed keys
    uint32_t columns;  // bit k: some row attends to key k
    bool full;
    uint16_t rows[kBlock];
};

// bits of keys of a text panel that text_length leaves visible
DF_INLINE uint32_t visible_text(int64_t panel, int64_t text_length) {
    const int64_t left = text_length - panel * kPanel;
    return left >= kPanel ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
}

// Turns one tile of a visit into its bits; false where no pair is left.
DF_INLINE bool activate(const AttentionLayout& layout, int32_t panel, int32_t bits, int64_t text_length,
                        ActiveTile* tile) {
    const uint32_t visible = panel < layout.num_text_panels ? visible_text(panel, text_length) : 0xffff;
    tile->panel = panel;
    tile->full = bits < 0 && visible == 0xffff;
    tile->columns = visible;
    if (tile->full) return true;
    uint32_t columns = 0;
    for (int r = 0; r < kBlock; ++r) {
        tile->rows[r] = uint16_t((bits < 0 ? 0xffff : layout.bits[bits][r]) & visible);
        columns |= tile->rows[r];
    }
    tile->columns = columns;
    return columns != 0;
}

// x where the row attends, `otherwise` where not
DF_INLINE Vec select(uint32_t row_bits, [[maybe_unused]] int v, Vec x, Vec otherwise) {
#if defined(__AVX512F__)
    return (Vec)_mm512_mask_mov_ps((__m512)otherwise, __mmask16(row_bits), (__m512)x);
#else
    IntVec lane;
    for (int l = 0; l < VW; ++l) lane[l] = 1 << l;
    const IntVec set = (IntVec{} + int32_t(row_bits >> (v * VW))) & lane;
    return set != 0 ? x : otherwise;
#endif
}

// delta (num_blocks * 8) of the task's queries: rowsum(dO * O) - dL. `x` and `y` are memory for a row each.
template <class T>
void compute_delta(const AttentionArgs& a, const AttentionTask& t, float* delta, float* x, float* y) {
    const int64_t Dp = padded(a.D);
    for (int32_t slot = t.block_begin * kBlock; slot < t.block_end * kBlock; ++slot) {
        const int32_t token = a.layout.query_token[slot];
        delta[slot] = 0;
        if (token < 0) continue;
        load_row(row_of<const T>(a.grad_out, t.batch, t.head, token), a.grad_out.stride_d, a.D, Dp, x);
        load_row(row_of<const T>(a.out, t.batch, t.head, token), a.out.stride_d, a.D, Dp, y);
        Vec total = Vec{};
        for (int64_t d = 0; d < Dp; d += VW) total += load(x + d) * load(y + d);
        delta[slot] = horizontal_sum(total);
        if (a.grad_lse.data) delta[slot] -= *row_of<const float>(a.grad_lse, t.batch, t.head, token);
    }
}

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
