// Products of tiles with Intel's matrix unit: see matrix_unit.h.
//
// The unit multiplies bfloat16 numbers and adds up in float32. What is not bfloat16 goes through it as a sum of several of
// them, its parts, of which each is at most 2^-8 of the one before. A float16 is one of two and a float32 one of three,
// exactly; beside bfloat16, a float32 counts to 16 bits, two parts. Of the products of parts those that are above 2^-24 of
// the whole are taken. So even a product of float32 matrices, which takes six, is faster than with float32's own
// instructions, and not less exact: in the unit it is rounded as often, and the parts' products are exact.
//
// Numbers below 2^-126, parts among them, are 0 in the unit, and an infinite one times a part of 0 is NaN.
//
// A register of b is 16 words of a panel, one of a the same words of 16 lanes, a lane in a row. A tile of the result takes
// four of them. A word is a pair: elements of the depth, x and x + 16 of 32.
#pragma once

#include "matrix_unit.h"
#include "product_format.h"

#if defined(__AMX_BF16__)
namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int kUnitRows = 2 * kUnit;   // of a tile
constexpr int kTile = kUnit * kUnit;   // words of a register
constexpr int kUnitDepth = 2 * kUnit;  // that a register spans
static_assert(PANELS == 2 && kPanel == kUnit, "as many panels as registers of b");

// -- parts --------------------------------------------------------------------------------------------------------------

// Parts of a number, each in the upper half of a word.
template <int count>
struct Parts { WordVec of[count]; };

// Returns what is left of x after all parts but the last. It is not finite where x is not, or is rounded up to infinity.
template <int count>
DF_INLINE Vec split(Vec x, Parts<count>& parts) {
    for (int part = 0; part < count - 1; ++part) {
        parts.of[part] = ((WordVec)x + 0x8000u) & 0xffff0000u;
        x -= (Vec)parts.of[part];
    }
    parts.of[count - 1] = (WordVec)x + (count > 1 ? 0x8000u : 0u);
    return x;
}

// The same for any x: what would be rounded up to infinity is cut off, and infinity and NaN have no other parts.
template <int count>
DF_INLINE void split_any(Vec x, Parts<count>& parts) {
    const WordVec bits = (WordVec)x, magnitude = bits & 0x7fffffffu;
    const WordVec cut = magnitude > 0x7f800000u ? WordVec{} + 0x7fc00000u : bits & 0xffff0000u;
    const WordVec first = magnitude >= 0x7f7f8000u ? cut : (bits + 0x8000u) & 0xffff0000u;
    Parts<count - 1> others;
    split(magnitude >= 0x7f800000u ? Vec{} : x - (Vec)first, others);
    parts.of[0] = first;
    for (int part = 1; part < count; ++part) parts.of[part] = others.of[part - 1];
}

template <int count>
DF_INLINE void store_pairs(const Parts<count>& low, const Parts<count>& high, int64_t distance, Word* out) {
    for (int part = 0; part < count; ++part)
        store_words(out + part * distance, (Words)(low.of[part] >> 16 | (high.of[part] & 0xffff0000u)));
}

template <int count>
DF_NOINLINE void store_register_of_any(const Words (&low)[16], const Words (&high)[16], int64_t distance, Word* out) {
    for (int r = 0; r < kUnit; ++r) {
        Parts<count> of_low, of_high;
        split_any((Vec)low[r], of_low);
        split_any((Vec)high[r], of_high);
        store_pairs(of_low, of_high, distance, out + r * kUnit);
    }
}

// The registers of parts of floats (row, 16), paired, `distance` words from one another.
template <int count>
DF_INLINE void store_register(const Words (&low)[16], const Words (&high)[16], int64_t distance, Word* out) {
    Vec left{};
#pragma GCC unroll 2
    for (int r = 0; r < kUnit; ++r) {
        Parts<count> of_low, of_high;
        left += split((Vec)low[r], of_low);
        left += split((Vec)high[r], of_high);
        store_pairs(of_low, of_high, distance, out + r * kUnit);
    }
    if constexpr (count > 1)
        if (_mm512_cmp_ps_mask((__m512)(left - left), (__m512)left, _CMP_UNORD_Q))
            store_register_of_any<count>(low, high, distance, out);
}

// -- packing ------------------------------------------------------------------------------------------------------------

template <class T>
DF_INLINE void load_block(const T* p, int64_t stride, bool transposed, Words (&rows)[16]) {
#pragma GCC unroll 16
    for (int r = 0; r < kUnit; ++r) rows[r] = (Words)load_as_float(p + r * stride);
    if (transposed) transpose(rows);
}

// The registers of 16 lanes from `lane` on times kUnitDepth from d on. A row is a lane, or else depths of all lanes. What
// the operand does not have is 0.
template <bool rows_are_lanes, int count, class T>
DF_INLINE void pack_register(const Operand& x, int64_t lane, int64_t d, int64_t depth, int64_t distance, Word* out) {
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
    const bool by_lane = stride_depth == 1;
    const int64_t stride = by_lane ? stride_lane : stride_depth;
    Words low[16], high[16];
    load_block(p, stride, by_lane != rows_are_lanes, low);
    load_block(p + kUnit * stride_depth, stride, by_lane != rows_are_lanes, high);
    store_register<count>(low, high, distance, out);
}

// -> (units of depth, part, kUnitRows, 16)
template <int count, class T>
DF_NOINLINE void pack_a(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    for (int64_t i = 0; i < depth; i += kUnitDepth, out += count * kUnitRows * kUnit)
        for (int64_t l = 0; l < kUnitRows; l += kUnit)
            pack_register<true, count, T>(x, lane + l, d + i, depth - i, kUnitRows * kUnit, out + l * kUnit);
}

// -> (units of depth, part, 16, 16)
template <int count, class T>
DF_NOINLINE void pack_b(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    for (int64_t i = 0; i < depth; i += kUnitDepth, out += count * kTile)
        pack_register<false, count, T>(x, lane, d + i, depth - i, kTile, out);
}

// Of bfloat16 whose pairs lie side by side, both operands': a pair is the elements 2 x and 2 x + 1 then.
DF_NOINLINE void pack_a_pairs(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + lane * x.stride_lane + d;
    const int64_t lanes = std::min<int64_t>(kUnitRows, x.lanes - lane), words = multiple((depth + 1) / 2, kUnit);
    if (lanes < kUnitRows || words * 2 > depth) std::memset(out, 0, size_t(kUnitRows * words) * sizeof(Word));
    int64_t i = 0;
    for (; i + kUnitDepth <= depth; i += kUnitDepth, out += kUnitRows * kUnit)
        for (int64_t l = 0; l < lanes; ++l) std::memcpy(out + l * kUnit, p + l * x.stride_lane + i, 4 * kUnit);
    for (int64_t l = 0; l < lanes; ++l) std::memcpy(out + l * kUnit, p + l * x.stride_lane + i, size_t(depth - i) * 2);
}
DF_NOINLINE void pack_b_pairs(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    const int64_t words = (depth + 1) / 2;
    pack_pairs(x, lane, d, depth, out);
    std::memset(out + words * kPanel, 0, size_t((multiple(words, kUnit) - words) * kPanel) * sizeof(Word));
}

// -- products -----------------------------------------------------------------------------------------------------------

// Of a's and b's parts: the small ones first, and so that most registers are used twice.
constexpr int kOrder[][2] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};

// Registers 0 to 3: sums, 4 and 5: of a, 6 and 7: of b.
template <int parts_a, int parts_b>
DF_NOINLINE void unit_product(const Word* a, const Word* b, int64_t words, float* out, int64_t stride, bool add) {
    const Word* second_b = b + words * kPanel;
    __asm__ volatile("" : : : "memory");  // what the registers are loaded from is written
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t w = 0; w < words; w += parts_b * kUnit) {
        int loaded_a = -1, loaded_b = -1;
#pragma GCC unroll 8
        for (const auto& parts : kOrder) {
            if (parts[0] >= parts_a || parts[1] >= parts_b) continue;
            if (parts[0] != loaded_a) {
                loaded_a = parts[0];
                _tile_loadd(4, a + 2 * loaded_a * kTile, kUnit * 4);
                _tile_loadd(5, a + (2 * loaded_a + 1) * kTile, kUnit * 4);
            }
            if (parts[1] != loaded_b) {
                loaded_b = parts[1];
                _tile_loadd(6, b + loaded_b * kTile, kUnit * 4);
                _tile_loadd(7, second_b + loaded_b * kTile, kUnit * 4);
            }
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        a += parts_a * 2 * kTile;
        b += parts_b * kTile;
        second_b += parts_b * kTile;
    }
    // Added to what is there at last: a long sum rounds more often than eager's.
    float sums[kUnitRows * TILE_COLUMNS];
    float* to = add ? sums : out;
    const int64_t row = add ? TILE_COLUMNS : stride;
    _tile_stored(0, to, row * 4);
    _tile_stored(1, to + kUnit, row * 4);
    _tile_stored(2, to + kUnit * row, row * 4);
    _tile_stored(3, to + kUnit * row + kUnit, row * 4);
    if (!add) return;
    for (int r = 0; r < kUnitRows; ++r)
        for (int v = 0; v < TILE_COLUMNS; v += VW) {
            float* total = out + r * stride + v;
            store(total, load(total) + load(sums + r * TILE_COLUMNS + v));
        }
}

template <int count, class T>
constexpr Pack kPack[2] = {pack_a<count, T>, pack_b<count, T>};

Pack pack_parts(CodebookDType dtype, int count, bool of_b) {
    switch (dtype) {
        case CodebookDType::bfloat16: return kPack<1, BFloat16>[of_b];
        case CodebookDType::float16: return kPack<2, Half>[of_b];
        default: return count == 2 ? kPack<2, float>[of_b] : kPack<3, float>[of_b];
    }
}

constexpr TileProduct kUnitProducts[3][3] = {
    {unit_product<1, 1>, unit_product<1, 2>, nullptr},
    {unit_product<2, 1>, unit_product<2, 2>, unit_product<2, 3>},
    {nullptr, unit_product<3, 2>, unit_product<3, 3>},
};

int parts_of(CodebookDType dtype, CodebookDType other) {
    if (dtype == CodebookDType::bfloat16) return 1;
    return dtype == CodebookDType::float16 || other == CodebookDType::bfloat16 ? 2 : 3;
}

Format unit_format(const Operand& a, const Operand& b) {
    const bool pairs = are_pairs(a, b);
    const int of_a = parts_of(a.dtype, b.dtype), of_b = parts_of(b.dtype, a.dtype);
    return {of_a == 1 && of_b == 1 ? 1024 : 512, 2, kUnit, of_b, kUnitRows, kUnitRows,
            pairs ? pack_a_pairs : pack_parts(a.dtype, of_a, false),
            pairs ? pack_b_pairs : pack_parts(b.dtype, of_b, true),
            kUnitProducts[of_a - 1][of_b - 1], begin_tiles, end_tiles};
}

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
