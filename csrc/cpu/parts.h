// Numbers that are not bfloat16 as sums of several that are, their parts, for Intel's matrix unit: it multiplies bfloat16
// and adds up in float32.
//
// Each part is at most 2^-8 of the one before. A float16 is exactly a sum of two and a float32 of three; beside bfloat16, a
// float32 counts to 16 bits, two parts. Of the products of parts those that are above 2^-24 of the whole are taken. So even
// a product of float32 matrices, which takes six, is faster than with float32's own instructions. Measured, its error is not
// larger, though its sums are rounded six times as often.
//
// Numbers below 2^-126, parts among them, are 0 in the unit, and an infinite one times a part of 0 is NaN.
//
// Everything has internal linkage: each instruction set must keep its own copy.
#pragma once

#include "matrix_unit.h"
#include "transpose.h"

#if defined(__AMX_BF16__)
namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int kTile = kUnit * kUnit;  // words of a register

// Which parts of two numbers are multiplied: the small ones first, and so that most registers are used twice.
constexpr int kProductsOfParts[][2] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};

// For the two below.
template <int parts_a, int parts_b, bool lower>
DF_INLINE void add_product(const Word* a, const Word* b, int64_t stride) {
    int loaded_a = -1, loaded_b = lower && parts_b == 1 ? 0 : -1;
#pragma GCC unroll 8
    for (const auto& product : kProductsOfParts) {
        if (product[0] >= parts_a || product[1] >= parts_b) continue;
        if (product[1] != loaded_b && parts_b == 1) _tile_stream_loadd(3, b, kUnit * 4);  // past the first-level cache
        else if (product[1] != loaded_b) _tile_loadd(3, b + product[1] * kTile, kUnit * 4);
        if (product[0] != loaded_a) _tile_loadd(2, a + product[0] * kTile, stride);
        loaded_a = product[0];
        loaded_b = product[1];
        if (lower) _tile_dpbf16ps(1, 2, 3);
        else _tile_dpbf16ps(0, 2, 3);
    }
}

// Adds the product of a (16, 32) and b (32, 16) to the upper sum; and then that of 16 other rows and the same b to the lower
// one. A part is a register's words, and the next part's are behind them; `stride` bytes lie between a's rows.
template <int parts_a, int parts_b>
DF_INLINE void add_upper_product(const Word* a, const Word* b, int64_t stride = kUnit * 4) {
    add_product<parts_a, parts_b, false>(a, b, stride);
}
template <int parts_a, int parts_b>
DF_INLINE void add_lower_product(const Word* a, const Word* b, int64_t stride = kUnit * 4) {
    add_product<parts_a, parts_b, true>(a, b, stride);
}

// Parts of a number, each in the upper half of a word.
template <int count>
struct Parts { WordVec of[count]; };

// Returns what is left of x after all parts but the last. It is not finite where x is not, or is rounded up to infinity.
template <int count>
DF_INLINE Vec split_parts(Vec x, Parts<count>& parts) {
    for (int part = 0; part < count - 1; ++part) {
        parts.of[part] = ((WordVec)x + 0x8000u) & 0xffff0000u;
        x -= (Vec)parts.of[part];
    }
    parts.of[count - 1] = (WordVec)x + 0x8000u;
    return x;
}

// The same for any x: of what would be rounded up to infinity the parts are cut off, and infinity and NaN have no other
// parts. All other numbers' are the same: a lane's parts must not depend on its neighbours.
template <int count>
DF_INLINE void split_any(Vec x, Parts<count>& parts) {
    const WordVec bits = (WordVec)x, magnitude = bits & 0x7fffffffu;
    const auto large = magnitude >= 0x7f7f8000u;
    const WordVec cut = magnitude > 0x7f800000u ? WordVec{} + 0x7fc00000u : bits & 0xffff0000u;
    parts.of[0] = large ? cut : (bits + 0x8000u) & 0xffff0000u;
    Vec rest = magnitude >= 0x7f800000u ? Vec{} : x - (Vec)parts.of[0];
    for (int part = 1; part < count; ++part) {
        parts.of[part] = ((WordVec)rest + (large ? WordVec{} : WordVec{} + 0x8000u)) & 0xffff0000u;
        rest -= (Vec)parts.of[part];
    }
}

template <int count>
DF_INLINE void store_pairs(const Parts<count>& low, const Parts<count>& high, Word* out) {
    for (int part = 0; part < count; ++part)
        store_words(out + part * kTile, (Words)(low.of[part] >> 16 | (high.of[part] & 0xffff0000u)));
}

template <int count>
DF_NOINLINE void store_register_of_any(const Words (&low)[16], const Words (&high)[16], Word* out) {
    for (int r = 0; r < kUnit; ++r) {
        Parts<count> of_low, of_high;
        split_any((Vec)low[r], of_low);
        split_any((Vec)high[r], of_high);
        store_pairs(of_low, of_high, out + r * kUnit);
    }
}

// The registers of parts of floats (row, 16), paired, one behind the other.
template <int count>
DF_INLINE void store_register(const Words (&low)[16], const Words (&high)[16], Word* out) {
    Vec left{};
#pragma GCC unroll 2
    for (int r = 0; r < kUnit; ++r) {
        Parts<count> of_low, of_high;
        left += split_parts((Vec)low[r], of_low);
        left += split_parts((Vec)high[r], of_high);
        store_pairs(of_low, of_high, out + r * kUnit);
    }
    if constexpr (count > 1)
        if (_mm512_cmp_ps_mask((__m512)(left - left), (__m512)left, _CMP_UNORD_Q))
            store_register_of_any<count>(low, high, out);
}

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
