// Products of tiles with Intel's matrix unit: see matrix_unit.h and parts.h.
//
// A register of b is 16 words of a panel, one of a the same words of 16 lanes, a lane in a row. A tile of the result takes
// four of them. A word is a pair: elements of the depth, x and x + 16 of 32.
#pragma once

#include "matrix_unit.h"
#include "parts.h"
#include "product_format.h"

#if defined(__AMX_BF16__)
namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int kUnitRows = 2 * kUnit;   // of a tile
constexpr int kUnitDepth = 2 * kUnit;  // that a register spans
constexpr int64_t kDepthOfBFloat16 = 1024, kDepthOfParts = 512;  // at once
constexpr int64_t kDepthsNear = 12;  // registers of two panels of a: 24 KB
static_assert(kDepthOfBFloat16 / 2 <= kMaxWords && 3 * kDepthOfParts / 2 <= kMaxWords, "there is memory for them");
static_assert(PANELS == 2 && kPanel == kUnit, "as many panels as registers of b");

// -- packing ------------------------------------------------------------------------------------------------------------

template <class T>
DF_INLINE void load_block(const T* p, int64_t stride, bool transposed, Words (&rows)[16]) {
#pragma GCC unroll 16
    for (int r = 0; r < kUnit; ++r) rows[r] = (Words)load_as_float(p + r * stride);
    if (transposed) transpose(rows);
}

// Words of 16 bfloat16 below 16 others.
DF_INLINE Words pair_halves(const BFloat16* low, const BFloat16* high) {
    const auto widened = [](const BFloat16* p) DF_INLINE_LAMBDA {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
    return (Words)_mm512_or_si512(widened(low), _mm512_slli_epi32(widened(high), 16));
}

// The registers of 16 lanes from `lane` on times kUnitDepth from d on. A row is a lane, or else depths of all lanes. What
// the operand does not have is 0.
template <bool rows_are_lanes, int count, class T>
DF_INLINE void pack_register(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    const T* p = static_cast<const T*>(x.data) + lane * x.stride_lane + d * x.stride_depth;
    int64_t stride_lane = x.stride_lane, stride_depth = x.stride_depth;
    T copy[kPanel][kUnitDepth];
    if (x.lanes - lane < kPanel || depth < kUnitDepth || (stride_lane != 1 && stride_depth != 1)) {
        std::memset(copy, 0, sizeof(copy));
        for (int64_t l = 0; l < std::min<int64_t>(kPanel, x.lanes - lane); ++l)
            for (int64_t i = 0; i < std::min<int64_t>(kUnitDepth, depth); ++i)
                copy[l][i] = p[l * stride_lane + i * stride_depth];
        p = copy[0];
        stride_lane = kUnitDepth;
        stride_depth = 1;
    }
    const bool by_lane = stride_depth == 1, transposed = by_lane != rows_are_lanes;
    const int64_t stride = by_lane ? stride_lane : stride_depth;
    const int64_t to_second = kUnit * stride_depth;
    if constexpr (count == 1) {
        Words pairs[16];
#pragma GCC unroll 16
        for (int r = 0; r < kUnit; ++r) {
            pairs[r] = pair_halves(p, p + to_second);
            p += stride;  // products of r are worse: compilers make vectors of them
        }
        if (transposed) transpose(pairs);
#pragma GCC unroll 16
        for (int r = 0; r < kUnit; ++r) store_words(out + r * kUnit, pairs[r]);
    } else {
        Words low[16], high[16];
        load_block(p, stride, transposed, low);
        load_block(p + to_second, stride, transposed, high);
        store_register<count>(low, high, out);
    }
}

// -> (units of depth, 2, part, 16, 16)
template <int count, class T>
DF_NOINLINE void pack_a(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    for (int64_t i = 0; i < depth; i += kUnitDepth)
        for (int64_t l = 0; l < kUnitRows; l += kUnit, out += count * kTile)
            pack_register<true, count, T>(x, lane + l, d + i, depth - i, out);
}

// -> (units of depth, part, 16, 16)
template <int count, class T>
DF_NOINLINE void pack_b(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    for (int64_t i = 0; i < depth; i += kUnitDepth, out += count * kTile)
        pack_register<false, count, T>(x, lane, d + i, depth - i, out);
}

// Of bfloat16 whose pairs lie side by side, both operands': a pair is the elements 2 x and 2 x + 1 then.
DF_NOINLINE void pack_a_pairs(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + lane * x.stride_lane + d;
    const int64_t lanes = std::min<int64_t>(kUnitRows, x.lanes - lane), words = multiple((depth + 1) / 2, kUnit);
    if (lanes < kUnitRows || words * 2 > depth) std::memset(out, 0, size_t(kUnitRows * words) * sizeof(Word));
    int64_t i = 0;
    for (; i + kUnitDepth <= depth; i += kUnitDepth, out += kUnitRows * kUnit)
        for (int64_t l = 0; l < lanes; ++l) std::memcpy(out + l * kUnit, p + l * x.stride_lane + i, 4 * kUnit);
    for (int64_t l = 0; i < depth && l < lanes; ++l)
        std::memcpy(out + l * kUnit, p + l * x.stride_lane + i, size_t(depth - i) * 2);
}
DF_NOINLINE void pack_b_pairs(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    const int64_t words = (depth + 1) / 2;
    pack_pairs(x, lane, d, depth, out);
    std::memset(out + words * kPanel, 0, size_t((multiple(words, kUnit) - words) * kPanel) * sizeof(Word));
}

// -- products -----------------------------------------------------------------------------------------------------------

template <int parts_a, int parts_b>
DF_NOINLINE void unit_product(const Word* a, const Word* b, int64_t words, float* out, int64_t stride, bool add) {
    // Added to what is there at last: a long sum rounds more often than eager's.
    float sums[kUnitRows * TILE_COLUMNS];
    float* to = add ? sums : out;
    const int64_t row = add ? TILE_COLUMNS : stride;
    __asm__ volatile("" : : : "memory");  // what the registers are loaded from is written
    zero_sums();
    // As much of the depth at once as both panels find a's words near.
    const int64_t depths = words / (parts_b * kUnit);
    for (int64_t begin = 0; begin == 0 || begin < depths; begin += kDepthsNear / parts_a) {
        const int64_t end = std::min(depths, begin + kDepthsNear / parts_a);
        for (int64_t c = 0; c < PANELS; ++c) {
            float *upper = to + c * kUnit, *lower = upper + kUnit * row;
            if (begin > 0) load_sums(upper, lower, row * 4);
            for (int64_t d = begin; d < end; ++d) {
                const Word *rows = a + d * parts_a * 2 * kTile, *columns = b + c * words * kPanel + d * parts_b * kTile;
                add_upper_product<parts_a, parts_b>(rows, columns);
                add_lower_product<parts_a, parts_b>(rows + parts_a * kTile, columns);
            }
            store_upper_sum(upper, row * 4);
            store_lower_sum(lower, row * 4);
        }
    }
    if (!add) return;
    for (int r = 0; r < kUnitRows; ++r)
        for (int v = 0; v < TILE_COLUMNS; v += VW) {
            float* total = out + r * stride + v;
            store(total, load(total) + load(sums + r * TILE_COLUMNS + v));
        }
}

template <int count, class T>
constexpr Pack kPack[2] = {pack_a<count, T>, pack_b<count, T>};

Pack pack_parts(DType dtype, int count, bool of_b) {
    switch (dtype) {
        case DType::bfloat16: return kPack<1, BFloat16>[of_b];
        case DType::float16: return kPack<2, Half>[of_b];
        default: return count == 2 ? kPack<2, float>[of_b] : kPack<3, float>[of_b];
    }
}

constexpr TileProduct kUnitProducts[3][3] = {
    {unit_product<1, 1>, unit_product<1, 2>, nullptr},
    {unit_product<2, 1>, unit_product<2, 2>, unit_product<2, 3>},
    {nullptr, unit_product<3, 2>, unit_product<3, 3>},
};

int parts_of(DType dtype, DType other) {
    if (dtype == DType::bfloat16) return 1;
    return dtype == DType::float16 || other == DType::bfloat16 ? 2 : 3;
}

Format unit_format(const Operand& a, const Operand& b) {
    const bool pairs = are_pairs(a, b);
    const int of_a = parts_of(a.dtype, b.dtype), of_b = parts_of(b.dtype, a.dtype);
    return {of_a == 1 && of_b == 1 ? kDepthOfBFloat16 : kDepthOfParts, 2, kUnit, of_b, kUnitRows, kUnitRows,
            pairs ? pack_a_pairs : pack_parts(a.dtype, of_a, false),
            pairs ? pack_b_pairs : pack_parts(b.dtype, of_b, true),
            kUnitProducts[of_a - 1][of_b - 1], begin_tiles, end_tiles};
}

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
