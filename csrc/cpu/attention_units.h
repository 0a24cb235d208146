// Forward attention with Intel's matrix unit: see matrix_unit.h, and parts.h for what is not bfloat16.
//
// A unit is 32 queries, two registers' rows, and a group is 32 keys: two panels, and the depth of a product of
// probabilities and values. So every register that is loaded is used twice. A unit goes through its groups by chunks
// whose scores stay near; what earlier chunks have added up is rescaled where a later one has a larger score. All of it is
// in float32, but the products' factors.
//
// A word of these is a pair: of keys x and x + 16 of a group's, and of elements x and x + 16 of 32 of a head, or, as they lie
// in memory, 2 x and 2 x + 1 where they are bfloat16.
//
// Products and exponentials take turns chunk by chunk: interleaved more finely, both are slower (measured on Sapphire
// Rapids).
//
// D head size, Dp = D rounded up to whole depths of 32.
#pragma once

#include <type_traits>

#include "../gumbel.h"
#include "attention_tiles.h"
#include "matrix_unit.h"
#include "pairs.h"
#include "parts.h"

#if defined(__AMX_BF16__)
namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int kDepth = 2 * kUnit;      // elements of a sum that one product takes
constexpr int kUnitQueries = kUnitBlocks * kBlock, kGroupKeys = kGroupPanels * kPanel;
constexpr int kGroupsAtOnce = 12;      // a chunk
constexpr int kGroupsAwake = 4;        // whose exponentials take less time than the unit needs to fall asleep
static_assert(kUnitQueries == 2 * kUnit && kPanel == kUnit && kGroupKeys == kDepth && VW == kUnit, "of whole registers");

// Groups of the text stay packed, those of the image share a ring as long as a unit looks back.
DF_INLINE int64_t num_group_slots(const AttentionLayout& layout) {
    const int32_t image = layout.num_groups - layout.num_text_groups;
    return layout.num_text_groups + (image < layout.group_window ? image : layout.group_window);
}
DF_INLINE int64_t group_slot(const AttentionLayout& layout, int32_t group) {
    const int32_t image = group - layout.num_text_groups;
    return image < 0 ? group : layout.num_text_groups + image % layout.group_window;
}

// Registers in which 16 queries have a group's scores, and then the parts of its probabilities.
constexpr int tiles_of_scores(int parts) { return parts > kGroupPanels ? parts : kGroupPanels; }

// A group that a unit attends to.
struct ActiveGroup {
    const Word *keys, *values;  // packed
    const GroupBits* bits;      // null where every pair attends
};

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

// Lane r of the result is v[r]'s lanes put together.
template <int w, class Join>
DF_INLINE void join_step(Vec* v) {
    Words first, second;
    for (int x = 0; x < 16; ++x) {
        first[x] = x & w ? 16 + x - w : x;
        second[x] = x & w ? 16 + x : x + w;
    }
#pragma GCC unroll 8
    for (int x = 0; x < w; ++x)
        v[x] = Join::join(__builtin_shuffle(v[x], v[x + w], first), __builtin_shuffle(v[x], v[x + w], second));
}
template <class Join>
DF_INLINE Vec join_lanes(Vec (&v)[kUnit]) {
    join_step<8, Join>(v);
    join_step<4, Join>(v);
    join_step<2, Join>(v);
    join_step<1, Join>(v);
    return v[0];
}
struct Maximum {
    static DF_INLINE_MEMBER Vec join(Vec a, Vec b) { return max(a, b); }
};
struct Sum {
    static DF_INLINE_MEMBER Vec join(Vec a, Vec b) { return a + b; }
};

// The unit falls asleep after half a microsecond without a product, and takes a quarter of one to wake up (measured on
// Sapphire Rapids). This product's result is not used.
DF_NOINLINE void keep_awake() { _tile_dpbf16ps(0, 4, 6); }

// out (group, 2, tiles_of_scores, 16, 16) = query (Dp / 32, part, 2, 16, 16) @ keys of the groups. Registers are stored when
// the next group needs them: so the products do not wait.
template <int parts>
DF_NOINLINE void chunk_scores(const Word* query, int64_t Dp, const ActiveGroup* groups, int32_t count, float* out) {
    if (count == 0) return;
    constexpr int kQueries = tiles_of_scores(parts) * kTile;  // words from 16 queries' scores to the others'
    float* previous = nullptr;
    __asm__ volatile("" : : : "memory");  // what the registers are loaded from is written
    for (int32_t x = 0; x < count; ++x) {
        const Word* q = query;
        const Word* first = groups[x].keys;
        const Word* second = first + parts * kPanel * Dp / 2;
        bool begins = true;
        for (int64_t d = 0; d < Dp; d += kDepth) {
            int loaded_q = -1, loaded_k = -1;
#pragma GCC unroll 8
            for (const auto& product : kProductsOfParts) {
                if (product[0] >= parts || product[1] >= parts) continue;
                const bool load_q = product[0] != loaded_q, load_k = product[1] != loaded_k;
                loaded_q = product[0];
                loaded_k = product[1];
                if (load_q) _tile_loadd(4, q + 2 * loaded_q * kTile, kUnit * 4);
                if (load_k) _tile_loadd(6, first + loaded_k * kTile, kUnit * 4);
                if (begins && previous) _tile_stored(0, previous, kUnit * 4);
                if (begins) _tile_zero(0);
                _tile_dpbf16ps(0, 4, 6);
                if (load_k) _tile_loadd(7, second + loaded_k * kTile, kUnit * 4);
                if (begins && previous) _tile_stored(1, previous + kTile, kUnit * 4);
                if (begins) _tile_zero(1);
                _tile_dpbf16ps(1, 4, 7);
                if (load_q) _tile_loadd(5, q + (2 * loaded_q + 1) * kTile, kUnit * 4);
                if (begins && previous) _tile_stored(2, previous + kQueries, kUnit * 4);
                if (begins) _tile_zero(2);
                _tile_dpbf16ps(2, 5, 6);
                if (begins && previous) _tile_stored(3, previous + kQueries + kTile, kUnit * 4);
                if (begins) _tile_zero(3);
                _tile_dpbf16ps(3, 5, 7);
                begins = false;
            }
            q += 2 * parts * kTile;
            first += parts * kTile;
            second += parts * kTile;
        }
        previous = out + int64_t(x) * 2 * kQueries;
    }
    _tile_stored(0, previous, kUnit * 4);
    _tile_stored(1, previous + kTile, kUnit * 4);
    _tile_stored(2, previous + kQueries, kUnit * 4);
    _tile_stored(3, previous + kQueries + kTile, kUnit * 4);
}

// out (32, Dp) = or += probabilities @ values of the groups. The probabilities' parts (16, 32) stand where the scores stood.
template <int parts>
DF_NOINLINE void chunk_outputs(const float* probabilities, int64_t Dp, const ActiveGroup* groups, int32_t count,
                               float* out, bool add) {
    constexpr int kQueries = tiles_of_scores(parts) * kTile;
    __asm__ volatile("" : : : "memory");  // what the registers are loaded from is written
    for (int64_t d = 0; d < Dp; d += kDepth) {
        float* above = out + d;
        float* below = above + kUnit * Dp;
        if (add) {
            _tile_loadd(0, above, Dp * 4);
            _tile_loadd(1, above + kUnit, Dp * 4);
            _tile_loadd(2, below, Dp * 4);
            _tile_loadd(3, below + kUnit, Dp * 4);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int32_t x = 0; x < count; ++x) {
            const float* p = probabilities + int64_t(x) * 2 * kQueries;
            const Word* values = groups[x].values + d / kUnit * parts * kTile;
            int loaded_p = -1, loaded_v = -1;
#pragma GCC unroll 8
            for (const auto& product : kProductsOfParts) {
                if (product[0] >= parts || product[1] >= parts) continue;
                const bool load_p = product[0] != loaded_p, load_v = product[1] != loaded_v;
                loaded_p = product[0];
                loaded_v = product[1];
                if (load_p) _tile_loadd(4, p + loaded_p * kTile, kUnit * 4);
                if (load_v) _tile_loadd(6, values + loaded_v * kTile, kUnit * 4);
                _tile_dpbf16ps(0, 4, 6);
                if (load_v) _tile_loadd(7, values + (parts + loaded_v) * kTile, kUnit * 4);
                _tile_dpbf16ps(1, 4, 7);
                if (load_p) _tile_loadd(5, p + kQueries + loaded_p * kTile, kUnit * 4);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, above, Dp * 4);
        _tile_stored(1, above + kUnit, Dp * 4);
        _tile_stored(2, below, Dp * 4);
        _tile_stored(3, below + kUnit, Dp * 4);
    }
}

// The largest scores of 16 queries, the unit's first or second ones. Those of pairs that do not attend become -inf.
template <int parts>
DF_INLINE Vec chunk_maxima(const ActiveGroup* groups, int32_t count, int which, float* scores) {
    Vec highest[kUnit];
#pragma GCC unroll 16
    for (int r = 0; r < kUnit; ++r) highest[r] = splat(minus_infinity());
    for (int32_t x = 0; x < count; ++x) {
        float* s = scores + int64_t(x) * 2 * tiles_of_scores(parts) * kTile;
        if (!groups[x].bits) {
#pragma GCC unroll 16
            for (int r = 0; r < kUnit; ++r)
                highest[r] = max(load(s + r * kUnit), max(load(s + kTile + r * kUnit), highest[r]));
        } else {
            const auto& bits = (*groups[x].bits)[which];
#pragma GCC unroll 16
            for (int r = 0; r < kUnit; ++r)
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    float* p = s + half * kTile + r * kUnit;
                    const Vec seen = select(bits[half][r], 0, load(p), splat(minus_infinity()));
                    store(p, seen);
                    highest[r] = max(seen, highest[r]);
                }
        }
    }
    return join_lanes<Maximum>(highest);
}

// scores of 16 queries -> parts of exp2(scores * scale - shift), where the scores were; their sums. `ahead` is called for
// each group.
template <int parts, class Ahead>
DF_INLINE Vec chunk_probabilities(int32_t count, float scale, const float* shift, float* scores, const Ahead& ahead) {
    Vec total[kUnit] = {};
    for (int32_t x = 0; x < count; ++x) {
        float* s = scores + int64_t(x) * 2 * tiles_of_scores(parts) * kTile;
        ahead(x);
#pragma GCC unroll 16
        for (int r = 0; r < kUnit; ++r) {
            const Vec first = exp2(load(s + r * kUnit) * scale - shift[r]);
            const Vec second = exp2(load(s + kTile + r * kUnit) * scale - shift[r]);
            total[r] += first + second;
            Parts<parts> of_first, of_second;
            split_parts(first, of_first);
            split_parts(second, of_second);
            store_pairs(of_first, of_second, kTile, reinterpret_cast<Word*>(s) + r * kUnit);
        }
    }
    return join_lanes<Sum>(total);
}

DF_INLINE __mmask16 rows_with_bits(const uint16_t (&bits)[kGroupPanels][kUnit]) {
    const auto of = [&](int half) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits[half])); };
    const __m256i any = _mm256_or_si256(of(0), of(1));
    return _mm256_test_epi16_mask(any, any);
}

struct VecLanes {
    typedef Vec Float;
    typedef IntVec Int;
    static DF_INLINE_MEMBER Vec from_int(IntVec x) { return __builtin_convertvector(x, Vec); }
    static DF_INLINE_MEMBER IntVec bits_of(Vec x) { return (IntVec)x; }
    static DF_INLINE_MEMBER Vec of_bits(IntVec x) { return (Vec)x; }
};

// The softmax of 16 queries, chunk by chunk.
template <int parts>
struct RunningSoftmax {
    Vec highest = splat(minus_infinity()), shift = {}, total = {};
    __mmask16 seeing = 0;  // which queries attend to any key

    // Scores become probabilities. What the outputs so far have to be multiplied with is written to `factors`.
    template <class Ahead>
    __attribute__((noinline)) void add_chunk(const ActiveGroup* groups, int32_t count, int which, float scale,
                                             float* scores, float* factors, const Ahead& ahead) {
        const Vec before = highest * scale;
        highest = max(chunk_maxima<parts>(groups, count, which, scores), highest);
        shift = highest == minus_infinity() ? Vec{} : highest * scale;  // no key so far: keeps infinity from infinity
        const Vec factor = exp2(before - shift);
        float each[kUnit];
        store(each, shift);
        total = total * factor + chunk_probabilities<parts>(count, scale, each, scores, ahead);
        store(factors, factor);
        for (int32_t x = 0; x < count; ++x) seeing |= groups[x].bits ? rows_with_bits((*groups[x].bits)[which]) : 0xffff;
    }
    // Where all scores that a query sees are -inf, both are NaN, as in dense attention.
    Vec inverse() const { return total == 0 ? of_empty_sum(0) : 1 / total; }
    Vec lse() const {
        const Vec log = log_of<VecLanes>(split<VecLanes>(total)), none = of_empty_sum(minus_infinity());
        const Vec empty_or_nan = total == 0 ? none : total;
        return total > 0 ? shift * LN2 + log : empty_or_nan;
    }

private:
    Vec of_empty_sum(float blind) const {
        return (Vec)_mm512_mask_mov_ps((__m512)splat(blind), seeing, (__m512)splat(__builtin_nanf("")));
    }
};

// Two vectors as bfloat16, halves rounded away from 0. NaN stays NaN: bfloat16 ones and those that arithmetic makes have
// no lower bits that could overflow.
DF_INLINE void store_as_bfloat16(uint16_t* p, Vec a, Vec b) {
    Shorts upper;
    for (int x = 0; x < 32; ++x) upper[x] = int16_t(2 * x + 1);
    const WordVec half = WordVec{} + 0x8000u;
    const Shorts halves = __builtin_shuffle((Shorts)((WordVec)a + half), (Shorts)((WordVec)b + half), upper);
    std::memcpy(p, &halves, sizeof(halves));
}

// As store_row, 32 elements at once.
DF_INLINE void store_row_of_pairs(const float* x, float scale, BFloat16* p, int64_t stride, int64_t D) {
    int64_t d = 0;
    if (stride == 1)
        for (; d + kDepth <= D; d += kDepth)
            store_as_bfloat16(reinterpret_cast<uint16_t*>(p + d), load(x + d) * scale, load(x + d + VW) * scale);
    store_row(x + d, scale, p + d * stride, stride, D - d);
}

template <class T>
struct UnitForward {
    static constexpr int kParts = sizeof(T) == 4 ? 3 : std::is_same<T, Half>::value ? 2 : 1;

    const AttentionArgs& a;
    const AttentionTask& t;
    const AttentionLayout& layout;
    const int64_t Dp, num_slots, text_length;
    TokenRows<kGroupKeys, T> key_rows;
    TokenRows<kUnitQueries, T> query_rows;
    Word *keys, *values;  // (slot, half, Dp / 32, part, 16, 16), (slot, Dp / 16, part, 16, 16)
    int32_t* packed;      // (slot) which group is packed there, or -1
    ActiveGroup* groups;
    GroupBits* visible;   // of the group where a text ends
    float *scores, *out;  // (group of a chunk, 2, tiles_of_scores, 16, 16); (32, Dp)
    Word* query;          // (Dp / 32, part, 2, 16, 16)

    UnitForward(const AttentionArgs& args, const AttentionTask& task, Arena& arena)
        : a(args), t(task), layout(args.layout), Dp((args.D + kDepth - 1) / kDepth * kDepth),
          num_slots(num_group_slots(layout)),
          text_length(a.text_lengths ? a.text_lengths[t.batch] : int64_t(layout.num_text_panels) * kPanel),
          key_rows(a.D, arena), query_rows(a.D, arena) {
        keys = arena.take<Word>(num_slots * slot_words());
        values = arena.take<Word>(num_slots * slot_words());
        packed = arena.take<int32_t>(num_slots);
        groups = arena.take<ActiveGroup>(layout.num_groups);
        visible = arena.take<GroupBits>(1);
        scores = arena.take<float>(kGroupsAtOnce * 2 * tiles_of_scores(kParts) * kTile);
        out = arena.take<float>(kUnitQueries * Dp);
        query = arena.take<Word>(kUnit * Dp * kParts);
    }
    int64_t slot_words() const { return kUnit * Dp * kParts; }

    void load_queries(const int32_t* tokens, int count) {
        query_rows.find(a.query, t, tokens, count, layout.seq_len);
        for (int64_t d = 0; d < Dp; d += kDepth)
            for (int which = 0; which < 2; ++which) {
                Word* to = query + (d / kDepth * kParts * 2 + which) * kTile;
                store_elements<false>(query_rows.row + which * kUnit, d, 2 * kTile, to);
            }
    }

    // The register of 32 elements of 16 rows, for each part: a row in a row of it or, transposed, in a column.
    template <bool transposed>
    void store_elements(const T* const* rows, int64_t d, int64_t distance, Word* to) {
        Words low[16], high[16];
        if constexpr (kParts == 1) {
#pragma GCC unroll 16
            for (int r = 0; r < kUnit; ++r)
                low[r] = (Words)load_shorts(reinterpret_cast<const uint16_t*>(rows[r]), d, a.D);
            if (transposed) transpose(low);
#pragma GCC unroll 16
            for (int r = 0; r < kUnit; ++r) store_words(to + r * kUnit, low[r]);
        } else {
            load_elements(rows, d, low);
            load_elements(rows, d + kUnit, high);
            if (transposed) {
                transpose(low);
                transpose(high);
            }
            store_register<kParts>(low, high, distance, to);
        }
    }
    void load_elements(const T* const* rows, int64_t d, Words (&out)[16]) {
#pragma GCC unroll 16
        for (int r = 0; r < kUnit; ++r) out[r] = (Words)load_some(rows[r], d, a.D);
    }

    // The registers of 32 rows, for each part: 16 elements in one.
    void store_keys(const T* const* rows, Word* to) {
        if constexpr (kParts == 1) {
            Shorts lower, upper;
            for (int x = 0; x < 32; ++x) {
                lower[x] = int16_t(x / 2 + x % 2 * 32);
                upper[x] = int16_t(lower[x] + 16);
            }
            for (int r = 0; r < kUnit; ++r)
                for (int64_t d = 0; d < Dp; d += kDepth) {
                    const auto elements = [&](int row) DF_INLINE_LAMBDA {
                        return load_shorts(reinterpret_cast<const uint16_t*>(rows[row]), d, a.D);
                    };
                    const Shorts first = elements(r), second = elements(r + kUnit);
                    Word* pairs = to + d / kUnit * kTile + r * kUnit;
                    store_words(pairs, (Words)__builtin_shuffle(first, second, lower));
                    store_words(pairs + kTile, (Words)__builtin_shuffle(first, second, upper));
                }
        } else {
            for (int64_t d = 0; d < Dp; d += kUnit) {
                Words low[16], high[16];
                load_elements(rows, d, low);
                load_elements(rows + kUnit, d, high);
                store_register<kParts>(low, high, kTile, to + d / kUnit * kParts * kTile);
            }
        }
    }

    void pack(int32_t group, int64_t slot) {
        const bool text = group < layout.num_text_groups;
        const int32_t first_group = text ? 0 : layout.num_text_groups, first_panel = text ? 0 : layout.num_text_panels;
        const int32_t panel = first_panel + (group - first_group) * kGroupPanels;
        const int32_t end = text ? layout.num_text_panels : layout.num_panels;
        // Weights of hidden keys are 0, which only a number keeps at 0.
        const int64_t end_of_tokens = text ? text_length : layout.seq_len;
        const int32_t* tokens = layout.key_token + int64_t(panel) * kPanel;
        const int count = (panel + 1 < end ? kGroupPanels : 1) * kPanel;
        keep_awake();
        key_rows.find(a.key, t, tokens, count, end_of_tokens);
        for (int half = 0; half < 2; ++half)
            for (int64_t d = 0; d < Dp; d += kDepth)
                store_elements<true>(key_rows.row + half * kUnit, d, kTile,
                                     keys + slot * slot_words() + (half * Dp / kDepth + d / kDepth) * kParts * kTile);
        keep_awake();
        key_rows.find(a.value, t, tokens, count, end_of_tokens);
        store_keys(key_rows.row, values + slot * slot_words());
        packed[slot] = group;
    }

    // Finds the groups that a unit attends to, and packs them.
    int32_t activate_groups(int32_t unit) {
        int32_t count = 0;
        for (int32_t x = layout.unit_visits[unit]; x < layout.unit_visits[unit + 1]; ++x) {
            const GroupVisit visit = layout.groups_of_unit[x];
            const int64_t slot = group_slot(layout, visit.group);
            const bool text = visit.group < layout.num_text_groups;
            const int64_t left = text ? text_length - visit.group * kGroupKeys : kGroupKeys;  // visible ones
            if (left <= 0) continue;
            ActiveGroup& group = groups[count++];
            group = {keys + slot * slot_words(), values + slot * slot_words(),
                     visit.bits < 0 ? nullptr : layout.group_bits + visit.bits};
            if (left < kGroupKeys) {
                for (int x = 0; x < 2; ++x)
                    for (int half = 0; half < 2; ++half)
                        for (int r = 0; r < kUnit; ++r)
                            (*visible)[x][half][r] = (group.bits ? (*group.bits)[x][half][r] : 0xffff) &
                                                     ((1u << left) - 1) >> half * kPanel;
                group.bits = visible;
            }
            if (packed[slot] != visit.group) pack(visit.group, slot);
        }
        return count;
    }

    // Begins to fetch a share of what the next unit reads and writes: of 16 rows, for one of `count` groups.
    void prefetch_share(int32_t unit, int which, int32_t group, int32_t count) {
        const int32_t begin = layout.unit_block[unit + 1] * kBlock + which * kUnit;
        const int32_t end = layout.num_blocks * kBlock;
        for (int32_t r = begin + group * kUnit / count; r < begin + (group + 1) * kUnit / count && r < end; ++r)
            if (const int32_t token = layout.query_token[r]; token >= 0) {
                prefetch_row_for_write(row_of<T>(a.out, t.batch, t.head, token), a.out.stride_d, a.D);
                const Strided* const inputs[] = {&a.query, &a.key, &a.value};
                for (const Strided* x : inputs)
                    prefetch_row(row_of<const T>(*x, t.batch, t.head, token), x->stride_d, a.D);
            }
    }

    void run(int32_t unit) {
        const int32_t block = layout.unit_block[unit], num_queries = (layout.unit_block[unit + 1] - block) * kBlock;
        const int32_t* tokens = layout.query_token + int64_t(block) * kBlock;
        const float scale = a.scale > 0 ? a.scale * LOG2E : 1;
        load_queries(tokens, num_queries);
        keep_awake();
        const int32_t count = activate_groups(unit);
        constexpr int kQueryScores = tiles_of_scores(kParts) * kTile;
        RunningSoftmax<kParts> softmax[2];
        for (int32_t x = 0; x == 0 || x < count; x += kGroupsAtOnce) {
            const int32_t some = count - x < kGroupsAtOnce ? count - x : kGroupsAtOnce;
            chunk_scores<kParts>(query, Dp, groups + x, some, scores);
            for (int64_t i = 0; !(a.scale > 0) && i < int64_t(some) * 2 * kQueryScores; i += VW)  // rare, as in the other kernels
                store(scores + i, load(scores + i) * (a.scale * LOG2E));
            float factors[kUnitQueries];
            for (int which = 0; which < 2; ++which) {
                softmax[which].add_chunk(groups + x, some, which, scale, scores + which * kQueryScores, factors + which * kUnit,
                                         [&](int32_t y) {
                                             prefetch_share(unit, which, x + y, count);
                                             if (y % kGroupsAwake == kGroupsAwake - 1) keep_awake();
                                         });
                keep_awake();
            }
            for (int r = 0; x > 0 && r < kUnitQueries; ++r)
                for (int64_t d = 0; d < Dp; d += VW) store(out + r * Dp + d, load(out + r * Dp + d) * factors[r]);
            chunk_outputs<kParts>(scores, Dp, groups + x, some, out, x > 0);
        }
        float inverse[kUnitQueries], lse[kUnitQueries];
        for (int which = 0; which < 2; ++which) {
            store(inverse + which * kUnit, softmax[which].inverse());
            store(lse + which * kUnit, softmax[which].lse());
        }
        for (int r = 0; r < num_queries; ++r) {
            if (tokens[r] < 0) continue;
            T* row = row_of<T>(a.out, t.batch, t.head, tokens[r]);
            if constexpr (kParts == 1) store_row_of_pairs(out + r * Dp, inverse[r], row, a.out.stride_d, a.D);
            else store_row(out + r * Dp, inverse[r], row, a.out.stride_d, a.D);
            *row_of<float>(a.lse, t.batch, t.head, tokens[r]) = lse[r];
        }
    }

    void run() {
        for (int64_t slot = 0; slot < num_slots; ++slot) packed[slot] = -1;
        // Units are the same for every task, and so are the groups by which sums are taken.
        for (int32_t unit = 0; unit < layout.num_units; ++unit)
            if (layout.unit_block[unit] >= t.block_begin && layout.unit_block[unit] < t.block_end) run(unit);
    }
};

template <class T>
void forward_with_units(const AttentionArgs& a, const AttentionTask& t, char* scratch) {
    Arena arena{scratch, 0};
    UnitForward<T> forward(a, t, arena);
    begin_tiles();
    forward.run();
    end_tiles();
}

template <class T>
size_t unit_scratch(const AttentionArgs& args) {
    AttentionArgs a = args;
    a.text_lengths = nullptr;
    Arena arena{nullptr, 0};
    UnitForward<T> forward(a, AttentionTask{}, arena);
    return arena.used;
}

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
