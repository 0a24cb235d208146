// Forward attention with Intel's matrix unit.
//
// The softmax of a unit runs from chunk to chunk of its groups: what earlier ones have added up is rescaled where a later one
// has a larger score.
#pragma once

#include "../gumbel.h"
#include "attention_units.h"

#if defined(__AMX_BF16__)
namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int kGroupsAtOnce = 12;  // a chunk
constexpr int kGroupsAwake = 4;    // whose exponentials take less time than the unit needs to fall asleep

// Registers in which 16 queries have a group's scores, and then the parts of its probabilities.
constexpr int tiles_of_scores(int parts) { return parts > kGroupPanels ? parts : kGroupPanels; }

// A group that a unit attends to.
struct ActiveGroup {
    const Word *keys, *values;  // packed
    const GroupBits* bits;      // null where every pair attends
};

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
            store_pairs(of_first, of_second, reinterpret_cast<Word*>(s) + r * kUnit);
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
struct UnitForward : UnitHead<T> {
    using UnitHead<T>::a, UnitHead<T>::t, UnitHead<T>::layout, UnitHead<T>::Dp, UnitHead<T>::kParts;

    const int64_t num_slots;
    Word *keys, *values;  // of each slot
    int32_t* packed;      // (slot) which group is packed there, or -1
    ActiveGroup* groups;
    float *scores, *out;  // (group of a chunk, 2, tiles_of_scores, 16, 16); (32, Dp)
    Word* query;

    UnitForward(const AttentionArgs& args, const AttentionTask& task, Arena& arena)
        : UnitHead<T>(args, task, arena), num_slots(num_group_slots(layout)) {
        keys = arena.take<Word>(num_slots * this->words());
        values = arena.take<Word>(num_slots * this->words());
        packed = arena.take<int32_t>(num_slots);
        groups = arena.take<ActiveGroup>(layout.num_groups);
        scores = arena.take<float>(kGroupsAtOnce * 2 * tiles_of_scores(kParts) * kTile);
        out = arena.take<float>(kUnitQueries * Dp);
        query = arena.take<Word>(this->words());
    }

    void pack(int32_t group, int64_t slot) {
        keep_awake();
        this->find_keys(a.key, group);
        this->store_columns(keys + slot * this->words());
        keep_awake();
        this->find_keys(a.value, group);
        this->store_sum_columns(values + slot * this->words());
        packed[slot] = group;
    }

    // Finds the groups that a unit attends to, and packs them.
    int32_t activate_groups(int32_t unit) {
        int32_t count = 0;
        for (int32_t x = layout.unit_visits[unit]; x < layout.unit_visits[unit + 1]; ++x) {
            const GroupVisit visit = layout.groups_of_unit[x];
            const int64_t slot = group_slot(layout, visit.group);
            if (!this->find_bits(visit, &groups[count].bits)) continue;
            groups[count].keys = keys + slot * this->words();
            groups[count++].values = values + slot * this->words();
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
        const int32_t* tokens = this->tokens_of_unit(unit);
        const float scale = a.scale > 0 ? a.scale * LOG2E : 1;
        this->find_queries(a.query, unit);
        this->store_rows(query);
        keep_awake();
        const int32_t count = activate_groups(unit);
        constexpr int kQueryScores = tiles_of_scores(kParts) * kTile;
        RunningSoftmax<kParts> softmax[2];
        for (int32_t x = 0; x == 0 || x < count; x += kGroupsAtOnce) {
            const int32_t some = count - x < kGroupsAtOnce ? count - x : kGroupsAtOnce;
            Factors factors_of[kGroupsAtOnce];
            for (int32_t y = 0; y < some; ++y) factors_of[y] = {query, groups[x + y].keys};
            chunk_products<kParts>(factors_of, some, Dp, kQueryScores, scores);
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
            for (int32_t y = 0; y < some; ++y)
                factors_of[y] = {reinterpret_cast<const Word*>(scores) + y * 2 * kQueryScores, groups[x + y].values};
            sum_products<kParts>(factors_of, some, Dp, kQueryScores, out, x > 0);
        }
        float inverse[kUnitQueries], lse[kUnitQueries];
        for (int which = 0; which < 2; ++which) {
            store(inverse + which * kUnit, softmax[which].inverse());
            store(lse + which * kUnit, softmax[which].lse());
        }
        for (int r = 0; r < this->queries_of_unit(unit); ++r) {
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

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
