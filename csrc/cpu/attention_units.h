// Attention with Intel's matrix unit: what its forward and backward passes share. See matrix_unit.h, and parts.h for what
// is not bfloat16.
//
// A unit is 32 queries, two registers' rows, and a group is 32 keys: two panels, and the depth of a product of
// probabilities and values. A unit goes through its groups by chunks whose scores stay near. All of it is in float32, but
// the products' factors.
//
// Products and exponentials take turns chunk by chunk: while the unit works, wide floating point has half of its rate, so
// that mixing them gains nothing (measured on Sapphire Rapids, see benchmarks/NOTES.md).
//
// A word of a factor is a pair: of keys or queries x and x + 16 of 32, and of elements x and x + 16 of 32 of a head, or, as
// they lie in memory, 2 x and 2 x + 1 where they are bfloat16.
//
// D head size, Dp = D rounded up to whole depths of 32.
#pragma once

#include <type_traits>

#include "attention_tiles.h"
#include "matrix_unit.h"
#include "pairs.h"
#include "parts.h"

#if defined(__AMX_BF16__)
namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int kDepth = 2 * kUnit;  // elements of a sum that one product takes
constexpr int kUnitQueries = kUnitBlocks * kBlock, kGroupKeys = kGroupPanels * kPanel;
static_assert(kUnitQueries == kDepth && kPanel == kUnit && kGroupKeys == kDepth && VW == kUnit, "of whole registers");

// A token's elements d to d + 15, with zeros behind the last one.
DF_INLINE __mmask16 first_lanes(int64_t count) { return count >= VW ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }
DF_INLINE Vec load_some(const float* p, int64_t d, int64_t D) {
    return (Vec)_mm512_maskz_loadu_ps(first_lanes(D - d), p + d);
}
DF_INLINE Vec load_some(const Half* p, int64_t d, int64_t D) {
    return (Vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(D - d), p + d));
}
DF_INLINE Vec load_some(const BFloat16* p, int64_t d, int64_t D) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(D - d), p + d));
    return (Vec)_mm512_slli_epi32(wide, 16);
}

// The unit falls asleep after half a microsecond without a product, and takes a quarter of one to wake up (measured on
// Sapphire Rapids). This product's result is not used.
DF_NOINLINE void keep_awake() { _tile_dpbf16ps(0, 2, 3); }

// -- products -----------------------------------------------------------------------------------------------------------

// Factors of 32 rows and of 32 columns or more, packed: registers (.., 2, part, 16, 16) of a's rows, (.., part, 16, 16) of b's
// columns.
struct Factors { const Word *a, *b; };

// Where a's registers lie: the bytes between their rows, and the words from the upper 16 rows' register to the lower ones',
// and to that of the next depth.
template <int parts>
struct PackedRows { static constexpr int64_t stride = kUnit * 4, lower = parts * kTile, next = 2 * parts * kTile; };
struct RowsInPlace {
    int64_t stride, lower;
    static constexpr int64_t next = kUnit;
};

// What is called between products, for what they leave idle.
constexpr auto kNothing = [] {};

// For each of the factors a (Dp / 32, 2, part, 16, 16) @ b (2, Dp / 32, part, 16, 16) -> out (factors, 2, 2, 16, 16), with
// `distance` floats between the upper and the lower rows. Sums are stored when the next ones need their registers: so the
// products do not wait. `ahead` is called for each of the factors.
template <int parts, class Rows, class Ahead>
DF_NOINLINE void chunk_products(const Factors* factors, Rows rows, int32_t count, int64_t Dp, int64_t distance, float* out,
                                const Ahead& ahead) {
    __asm__ volatile("" : : : "memory");  // what the registers are loaded from is written
    float* previous = nullptr;
    zero_sums();
    for (int32_t x = 0; x < count; ++x) {
        const Word* b = factors[x].b;
        ahead();
        for (int half = 0; half < 2; ++half) {
            const Word* a = factors[x].a;
            for (int64_t d = 0; d < Dp; d += kDepth) {
                const bool store = d == 0 && previous;
                if (store) store_upper_sum(previous, kUnit * 4);
                add_upper_product<parts, parts>(a, b, rows.stride);
                if (store) store_lower_sum(previous + distance, kUnit * 4);
                add_lower_product<parts, parts>(a + rows.lower, b, rows.stride);
                a += rows.next;
                b += parts * kTile;
            }
            previous = out + int64_t(x) * 2 * distance + half * kTile;
        }
    }
    if (!previous) return;
    store_upper_sum(previous, kUnit * 4);
    store_lower_sum(previous + distance, kUnit * 4);
}

// out (32, columns) = or += the sum of the factors' products a (2, part, 16, 16) @ b (columns / 16, part, 16, 16), with
// `distance` words between a's upper and lower rows. `ahead` is called for each 16 columns.
template <int parts, class Ahead>
DF_NOINLINE void sum_products(const Factors* factors, int32_t count, int64_t columns, int64_t distance, float* out,
                              bool add, const Ahead& ahead) {
    __asm__ volatile("" : : : "memory");  // what the registers are loaded from is written
    zero_sums();
    for (int64_t c = 0; c < columns; c += kUnit) {
        float *upper = out + c, *lower = upper + kUnit * columns;
        ahead();
        if (add) load_sums(upper, lower, columns * 4);
        for (int32_t x = 0; x < count; ++x) {
            const Word* b = factors[x].b + c / kUnit * parts * kTile;
            add_upper_product<parts, parts>(factors[x].a, b);
            add_lower_product<parts, parts>(factors[x].a + distance, b);
        }
        store_upper_sum(upper, columns * 4);
        store_lower_sum(lower, columns * 4);
    }
}

// -- a head's units and groups ------------------------------------------------------------------------------------------

// Groups of the text have a slot each, those of the image share a ring: none leaves it that a later unit visits.
DF_INLINE int64_t num_group_slots(const AttentionLayout& layout) {
    const int32_t image = layout.num_groups - layout.num_text_groups;
    return layout.num_text_groups + (image < layout.group_window ? image : layout.group_window);
}
DF_INLINE int64_t group_slot(const AttentionLayout& layout, int32_t group) {
    const int32_t image = group - layout.num_text_groups;
    return image < 0 ? group : layout.num_text_groups + image % layout.group_window;
}
DF_INLINE int32_t first_panel_of(const AttentionLayout& layout, int32_t group) {
    const int32_t image = group - layout.num_text_groups;
    return image < 0 ? group * kGroupPanels : layout.num_text_panels + image * kGroupPanels;
}

// Part of a head, and its rows as factors.
template <class T>
struct UnitHead {
    static constexpr int kParts = sizeof(T) == 4 ? 3 : std::is_same<T, Half>::value ? 2 : 1;

    const AttentionArgs& a;
    const AttentionTask& t;
    const AttentionLayout& layout;
    const int64_t Dp, text_length;
    TokenRows<kDepth, T> rows;  // those found last
    GroupBits* visible;         // of the group where a text ends

    UnitHead(const AttentionArgs& args, const AttentionTask& task, Arena& arena)
        : a(args), t(task), layout(args.layout), Dp((args.D + kDepth - 1) / kDepth * kDepth),
          text_length(a.text_lengths ? a.text_lengths[t.batch] : int64_t(layout.num_text_panels) * kPanel),
          rows(a.D, arena) {
        visible = arena.take<GroupBits>(1);
    }

    // Words of 32 rows as factors.
    int64_t words() const { return kUnit * Dp * kParts; }

    const int32_t* tokens_of_unit(int32_t unit) const {
        return layout.query_token + int64_t(layout.unit_block[unit]) * kBlock;
    }
    int queries_of_unit(int32_t unit) const { return (layout.unit_block[unit + 1] - layout.unit_block[unit]) * kBlock; }
    void find_queries(const Strided& x, int32_t unit) {
        rows.find(x, t, tokens_of_unit(unit), queries_of_unit(unit), layout.seq_len);
    }

    const int32_t* tokens_of_group(int32_t group) const {
        return layout.key_token + int64_t(first_panel_of(layout, group)) * kPanel;
    }
    int keys_of_group(int32_t group) const {
        const int32_t end = group < layout.num_text_groups ? layout.num_text_panels : layout.num_panels;
        return (first_panel_of(layout, group) + 1 < end ? kGroupPanels : 1) * kPanel;
    }
    void find_keys(const Strided& x, int32_t group) {
        // Weights of hidden keys are 0, which only a number keeps at 0.
        const int64_t end_of_tokens = group < layout.num_text_groups ? text_length : layout.seq_len;
        rows.find(x, t, tokens_of_group(group), keys_of_group(group), end_of_tokens);
    }

    // Which pairs of a unit and a group attend: null where all do. False where none does.
    bool find_bits(const GroupVisit& visit, const GroupBits** bits) {
        const bool text = visit.group < layout.num_text_groups;
        const int64_t left = text ? text_length - visit.group * kGroupKeys : kGroupKeys;  // visible keys
        if (left <= 0) return false;
        *bits = visit.bits < 0 ? nullptr : layout.group_bits + visit.bits;
        if (left >= kGroupKeys) return true;
        for (int x = 0; x < 2; ++x)
            for (int half = 0; half < 2; ++half)
                for (int r = 0; r < kUnit; ++r)
                    (*visible)[x][half][r] =
                        (*bits ? (**bits)[x][half][r] : 0xffff) & ((1u << left) - 1) >> half * kPanel;
        *bits = visible;
        return true;
    }

    // A sum over elements: -> (Dp / 32, 2, part, 16, 16), a row in a row.
    void store_rows(Word* to) const {
        for (int64_t d = 0; d < Dp; d += kDepth)
            for (int half = 0; half < 2; ++half)
                store_elements<false>(half, d, to + (d / kDepth * 2 + half) * kParts * kTile);
    }
    // The same: -> (2, Dp / 32, part, 16, 16), a row in a column.
    void store_columns(Word* to) const {
        for (int half = 0; half < 2; ++half)
            for (int64_t d = 0; d < Dp; d += kDepth)
                store_elements<true>(half, d, to + (half * Dp + d) / kDepth * kParts * kTile);
    }

    // A sum over the rows: -> (Dp / 16, part, 16, 16), an element in a column.
    void store_sum_columns(Word* to) const {
        if constexpr (kParts == 1) {
            for (int r = 0; r < kUnit; ++r)
                for (int64_t d = 0; d < Dp; d += kDepth) {
                    const Shorts first = elements(r, d), second = elements(r + kUnit, d);
                    Word* pairs = to + d / kUnit * kTile + r * kUnit;
                    store_words(pairs, (Words)shuffle<LowerPairs>(first, second));
                    store_words(pairs + kTile, (Words)shuffle<UpperPairs>(first, second));
                }
        } else {
            for (int64_t d = 0; d < Dp; d += kUnit) {
                Words low[16], high[16];
                load_elements(0, d, low);
                load_elements(kUnit, d, high);
                store_register<kParts>(low, high, to + d / kUnit * kParts * kTile);
            }
        }
    }
    // The same: -> (Dp / 16, part, 16, 16), an element in a row.
    void store_sum_rows(Word* to) const {
        for (int64_t d = 0; d < Dp; d += kUnit) {
            Words low[16], high[16];
            load_elements(0, d, low);
            load_elements(kUnit, d, high);
            transpose(low);
            transpose(high);
            store_register<kParts>(low, high, to + d / kUnit * kParts * kTile);
        }
    }

private:
    Shorts elements(int row, int64_t d) const {
        return load_shorts(reinterpret_cast<const uint16_t*>(rows.row[row]), d, a.D);
    }
    DF_INLINE_MEMBER void load_elements(int row, int64_t d, Words (&out)[16]) const {
#pragma GCC unroll 16
        for (int r = 0; r < kUnit; ++r) out[r] = (Words)load_some(rows.row[row + r], d, a.D);
    }
    template <bool transposed>
    void store_elements(int half, int64_t d, Word* to) const {
        Words low[16];
        if constexpr (kParts == 1) {
#pragma GCC unroll 16
            for (int r = 0; r < kUnit; ++r) low[r] = (Words)elements(half * kUnit + r, d);
            if (transposed) transpose(low);
#pragma GCC unroll 16
            for (int r = 0; r < kUnit; ++r) store_words(to + r * kUnit, low[r]);
        } else {
            Words high[16];
            load_elements(half * kUnit, d, low);
            load_elements(half * kUnit, d + kUnit, high);
            if (transposed) {
                transpose(low);
                transpose(high);
            }
            store_register<kParts>(low, high, to);
        }
    }
};

// Bytes that Work, a UnitForward or a UnitBackward, takes of a thread's memory.
template <class Work>
size_t unit_scratch(const AttentionArgs& args) {
    AttentionArgs a = args;
    a.text_lengths = nullptr;
    Arena arena{nullptr, 0};
    Work work(a, AttentionTask{}, arena);
    return arena.used;
}

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
