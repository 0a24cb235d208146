// Rows of 16-bit elements in pairs, as products that take two neighbours of a sum at once want them: neighbouring head
// elements for scores, neighbouring keys for outputs.
//
// Everything has internal linkage: each instruction set must keep its own copy. D head size, Dp = D rounded up to a
// multiple of 16 at least.
#pragma once

#include <algorithm>

#include "rows.h"

#if defined(__AVX512BW__)
namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

typedef int16_t Shorts __attribute__((vector_size(64)));

DF_INLINE __mmask32 first_shorts(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

// For a shuffle: pairs of a lane of the first vector and the same lane of the second one.
struct LowerPairs {
    static constexpr int at(int x) { return x / 2 + x % 2 * 32; }
};
struct UpperPairs {
    static constexpr int at(int x) { return LowerPairs::at(x) + 16; }
};

// A token's elements d to d + 31, with zeros behind the last one.
DF_INLINE Shorts load_shorts(const uint16_t* p, int64_t d, int64_t D) {
    if (D - d >= 32) return (Shorts)_mm512_loadu_si512(p + d);  // the mask takes longer
    return (Shorts)_mm512_maskz_loadu_epi16(first_shorts(D - d), p + d);
}

// Some tokens' rows of a tensor: where they lie, or copied if their elements do not lie side by side.
template <int N, class T = uint16_t>
struct TokenRows {
    int64_t D;
    T *zeros, *copies;
    bool cleared = false;  // zeros are: not before there is memory
    const T* row[N];

    TokenRows(int64_t head_size, Arena& arena) : D(head_size) {
        zeros = arena.take<T>(D);
        copies = arena.take<T>(N * D);
    }
    // Of those below `count` and `end`; what else there is, and slots without a token, are zeros.
    void find(const Strided& x, const AttentionTask& t, const int32_t* tokens, int count, int64_t end) {
        if (!cleared) std::fill_n(zeros, D, T{});
        cleared = true;
        // As numbers, which are computed side by side.
        const uintptr_t first = uintptr_t(row_of<const T>(x, t.batch, t.head, 0)), nothing = uintptr_t(zeros);
        const int64_t stride = x.stride_s * int64_t(sizeof(T));
        for (int r = 0; r < count; ++r) {
            const int64_t token = tokens[r];
            row[r] = reinterpret_cast<const T*>(token < 0 || token >= end ? nothing : first + uintptr_t(token * stride));
        }
        for (int r = count; r < N; ++r) row[r] = zeros;
        for (int r = 0; x.stride_d != 1 && r < N; ++r) {
            if (row[r] == zeros) continue;
            T* copy = copies + r * D;
            for (int64_t d = 0; d < D; ++d) copy[d] = row[r][d * x.stride_d];
            row[r] = copy;
        }
    }
    // -> (N, Dp)
    void copy(int64_t Dp, uint16_t* out) const {
        for (int r = 0; r < N; ++r)
            for (int64_t d = 0; d < Dp; d += 32)
                _mm512_mask_storeu_epi16(out + r * Dp + d, first_shorts(Dp - d), (__m512i)load_shorts(row[r], d, D));
    }
};

// A panel's keys -> (Dp / 2, 16) pairs of elements
DF_INLINE void pair_elements(const TokenRows<kPanel>& rows, int64_t Dp, Word* out) {
    for (int64_t d = 0; d < Dp; d += 32) {
        Words x[16];
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) x[k] = (Words)load_shorts(rows.row[k], d, rows.D);
        transpose(x);
        const int64_t left = (Dp - d) / 2 < 16 ? (Dp - d) / 2 : 16;
        for (int64_t w = 0; w < left; ++w) *reinterpret_cast<UnalignedWords*>(out + (d / 2 + w) * 16) = x[w];
    }
}

// A panel's values -> (8, Dp) pairs of keys
DF_INLINE void pair_keys(const TokenRows<kPanel>& rows, int64_t Dp, Word* out) {
    for (int k = 0; k < kPanel; k += 2)
        for (int64_t d = 0; d < Dp; d += 32) {
            const Shorts even = load_shorts(rows.row[k], d, rows.D), odd = load_shorts(rows.row[k + 1], d, rows.D);
            Word* p = out + k / 2 * Dp + d;
            *reinterpret_cast<UnalignedWords*>(p) = (Words)shuffle<LowerPairs>(even, odd);
            if (d + 16 < Dp) *reinterpret_cast<UnalignedWords*>(p + 16) = (Words)shuffle<UpperPairs>(even, odd);
        }
}

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
