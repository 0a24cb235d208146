// Forward attention with Intel's matrix unit.
//
// A unit goes through its groups in chunks: scores of a chunk, their probabilities, and what these add to the unit's outputs.
// The rows of the next unit are fetched meanwhile.
#pragma once

#include "attention_units_softmax.h"

#if defined(__AMX_BF16__)
namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

// Groups of a chunk. In bfloat16 all that a chunk takes stays in the first-level cache.
constexpr int groups_at_once(int parts) { return parts == 1 ? 5 : 8; }
constexpr int kGroupsAwake = 4;  // whose exponentials take less time than the unit needs to fall asleep
constexpr int64_t kNearBytes = 512;  // between queries: 32 of them fill a third of each set of a cache of 48 KB

// Of results in bfloat16: whether all are finite. Asked of what is stored, it takes two instructions for 32.
struct FiniteResults {
    __m512i largest = _mm512_setzero_si512();  // twice the bits: without their signs
    DF_INLINE_MEMBER void see(Shorts results) {
        largest = _mm512_max_epu16(largest, _mm512_slli_epi16((__m512i)results, 1));
    }
    explicit operator bool() const { return !_mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(int16_t(0xff00))); }
};

// x (padded D) * scale -> a row of D elements. Results below 2^-126 are 0, as the unit takes such factors to be.
DF_INLINE void store_row_of_pairs(const float* x, float scale, BFloat16* p, int64_t stride, int64_t D,
                                  FiniteResults& finite) {
    for (int64_t d = 0; d < D; d += kDepth) {
        const Shorts pairs = (Shorts)_mm512_cvtne2ps_pbh((__m512)(load(x + d + VW) * scale), (__m512)(load(x + d) * scale));
        finite.see(pairs);
        if (stride == 1 && D - d >= kDepth) {
            std::memcpy(p + d, &pairs, sizeof(pairs));
        } else {
            BFloat16 each[kDepth];
            std::memcpy(each, &pairs, sizeof(pairs));
            for (int64_t i = 0; i < kDepth && d + i < D; ++i) p[(d + i) * stride] = each[i];
        }
    }
}

DF_INLINE bool is_finite_row(const float* x, int64_t Dp) {
    Vec sum{};
    for (int64_t d = 0; d < Dp; d += VW) sum += load(x + d) - load(x + d);  // 0 or NaN
    return _mm512_cmp_ps_mask((__m512)sum, (__m512)sum, _CMP_UNORD_Q) == 0;
}

template <class T>
struct UnitForward : UnitHead<T> {
    using UnitHead<T>::a, UnitHead<T>::t, UnitHead<T>::layout, UnitHead<T>::Dp, UnitHead<T>::kParts;
    static constexpr int kAtOnce = groups_at_once(kParts), kQueryScores = tiles_of_scores(kParts) * kTile;

    const int64_t num_slots;
    const ScoreScale score_scale;
    const float scale;    // of scores, for powers of 2
    Word *keys, *values;  // of each slot
    int32_t* packed;      // (slot) which group is packed there, or -1
    ActiveGroup* groups;
    float *scores, *out;  // (group of a chunk, 2, tiles_of_scores, 16, 16); (32, Dp)
    Word* packed_queries;
    const Word* queries;  // a unit's, packed or where they lie
    struct Head {
        T* out;
        const T *query, *key, *value;
    } here, next;
    struct {
        const Head* head;
        int32_t query, end, rows;
    } fetch;  // what is still to be fetched, and how much at a time

    UnitForward(const AttentionArgs& args, const AttentionTask& task, Arena& arena)
        : UnitHead<T>(args, task, arena), num_slots(num_group_slots(layout)), score_scale(a.scale),
          scale(score_scale.size * LOG2E) {
        keys = arena.take<Word>(num_slots * this->words());
        values = arena.take<Word>(num_slots * this->words());
        packed = arena.take<int32_t>(num_slots);
        groups = arena.take<ActiveGroup>(layout.num_groups);
        scores = arena.take<float>(kAtOnce * 2 * kQueryScores);
        out = arena.take<float>(kUnitQueries * Dp);
        packed_queries = arena.take<Word>(this->words());
        here = rows_of_head(t.batch, t.head);
        next = t.next_head < 0 ? here : rows_of_head(t.next_batch, t.next_head);
    }
    Head rows_of_head(int64_t batch, int64_t head) const {
        return {row_of<T>(a.out, batch, head, 0), row_of<const T>(a.query, batch, head, 0),
                row_of<const T>(a.key, batch, head, 0), row_of<const T>(a.value, batch, head, 0)};
    }

    // Whether a unit's queries in bfloat16 can be loaded as they lie: one behind the other, each from a cache line on, and
    // near enough to stay in the first-level cache together.
    bool are_queries_in_place(int32_t unit) const {
        const int32_t* tokens = this->tokens_of_unit(unit);
        const int64_t bytes = a.query.stride_s * int64_t(sizeof(T));
        if (kParts > 1 || this->queries_of_unit(unit) != kUnitQueries || tokens[0] < 0) return false;
        if (a.D % kDepth != 0 || a.query.stride_d != 1 || bytes <= 0 || bytes > kNearBytes) return false;
        bool are = (bytes | int64_t(uintptr_t(here.query))) % 64 == 0;
        for (int r = 0; r < kUnitQueries; ++r) are &= tokens[r] == tokens[0] + r;
        return are;
    }
    void find_or_pack_queries(int32_t unit) {
        if (are_queries_in_place(unit)) {
            queries = reinterpret_cast<const Word*>(here.query + this->tokens_of_unit(unit)[0] * a.query.stride_s);
        } else {
            this->find_queries(a.query, unit);
            this->store_rows(packed_queries);
            queries = packed_queries;
        }
    }

    void pack(int32_t group, int64_t slot) {
        keep_awake();
        this->find_keys(a.key, group);
        this->store_columns(keys + slot * this->words());
        keep_awake();
        this->find_keys(a.value, group);
        if constexpr (kParts == 1) order_as_probabilities();
        this->store_sum_columns(values + slot * this->words());
        packed[slot] = group;
    }

    // Those in bfloat16 are pairs of neighbouring keys, in the order of _mm512_packus_epi32.
    void order_as_probabilities() {
        const T* row[kGroupKeys];
        for (int r = 0; r < kUnit; ++r) {
            const int first = r / 2 % 2 * kUnit + r / 4 * 4 + r % 2 * 2;
            row[r] = this->rows.row[first];
            row[r + kUnit] = this->rows.row[first + 1];
        }
        for (int r = 0; r < kGroupKeys; ++r) this->rows.row[r] = row[r];
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

    static int32_t num_chunks(int32_t count) { return (count + kAtOnce - 1) / kAtOnce; }

    // What the next unit reads and writes is fetched a few rows at a time: beside the exponentials of the `count` groups of
    // this one, for each half of its queries, and in bfloat16, where they take less time, among the products too. How much
    // memory can be waited for at once is limited. Behind the last unit comes the first one of the next task.
    void plan_prefetches(int32_t unit, int32_t count) {
        const bool is_last = unit + 1 == layout.num_units;
        fetch.head = is_last ? &next : &here;
        fetch.query = is_last ? 0 : layout.unit_block[unit + 1] * kBlock;
        fetch.end = is_last && t.next_head < 0 ? 0 : std::min(fetch.query + kUnitQueries, layout.num_blocks * kBlock);
        const int64_t among_products = kParts == 1 ? count + Dp / kUnit * num_chunks(count) : 0;
        const int64_t times = 2 * count + among_products;
        fetch.rows = times > 0 ? int32_t((kUnitQueries + times - 1) / times) : 0;
    }
    void prefetch_among_products() {
        if (kParts == 1) prefetch_some();
    }
    void prefetch_some() {
        const int32_t begin = fetch.query, end = std::min(begin + fetch.rows, fetch.end);
        fetch.query = std::max(begin, end);
        if (a.D == 64) prefetch_rows(*fetch.head, begin, end, std::integral_constant<int64_t, 64>());  // half the instructions
        else prefetch_rows(*fetch.head, begin, end, a.D);
    }
    template <class Size>
    void prefetch_rows(const Head& head, int32_t query, int32_t stop, Size D) {
        for (; query < stop; ++query)
            if (const int32_t token = layout.query_token[query]; token >= 0) {
                prefetch_row_for_write(head.out + token * a.out.stride_s, a.out.stride_d, D);
                prefetch_row(head.query + token * a.query.stride_s, a.query.stride_d, D);
                prefetch_row(head.key + token * a.key.stride_s, a.key.stride_d, D);
                prefetch_row(head.value + token * a.value.stride_s, a.value.stride_d, D);
            }
    }

    void make_scores(const ActiveGroup* some, int32_t count) {
        Factors factors[kAtOnce];
        for (int32_t x = 0; x < count; ++x) factors[x] = {queries, some[x].keys};
        const auto ahead = [&] { prefetch_among_products(); };
        if (kParts > 1 || queries == packed_queries) {
            chunk_products<kParts>(factors, PackedRows<kParts>(), count, Dp, kQueryScores, scores, ahead);
        } else {
            const int64_t stride = a.query.stride_s * int64_t(sizeof(T));
            chunk_products<1>(factors, RowsInPlace{stride, kUnit * stride / 4}, count, Dp, kQueryScores, scores, ahead);
        }
        for (int64_t i = 0; score_scale.sign != 1 && i < int64_t(count) * 2 * kQueryScores; i += VW)  // rare
            store(scores + i, load(scores + i) * score_scale.sign);
    }

    // Adds up what a unit attends to, in `out`.
    //
    // In bfloat16 the base is the first group's if all queries see all of it, else the first chunk's, which is nearly always
    // near enough and saves reading most scores twice. With `again`, and in the other dtypes always, it is chosen again for
    // each chunk; with `again` it is subtracted from the scores first, as large products would be rounded. Returns false if
    // there are scores that take `any`.
    template <bool any>
    bool attend(int32_t count, bool again, RunningSoftmax (&softmax)[2]) {
        Conversions conversions;
        softmax[0] = softmax[1] = RunningSoftmax();
        for (int which = 0; which < 2; ++which) softmax[which].seeing = queries_seeing(Chunk{groups, count, which, nullptr});
        Vec totals[2][kUnit] = {};  // of bfloat16 probabilities, for each query: the lanes' sum
        const int32_t most = count > 0 ? (count - 1) / num_chunks(count) + 1 : 1;  // of a chunk: all are nearly as large
        for (int32_t x = 0; x == 0 || x < count; x += most) {
            const int32_t some = std::min(count - x, most);
            const Chunk chunks[2] = {{groups + x, some, 0, scores}, {groups + x, some, 1, scores + kQueryScores}};
            make_scores(groups + x, some);
            if (x == 0 || again || kParts > 1) {
                const bool is_enough = kParts == 1 && !again && !groups[0].bits;  // the first group
                float factors[kUnitQueries];
                for (int which = 0; which < 2; ++which) {
                    const Vec factor = softmax[which].raise<kParts>(chunks[which].first(is_enough ? 1 : some), scale);
                    softmax[which].total *= factor;
                    softmax[which].exact *= factor;
                    store(factors + which * kUnit, factor);
                }
                if (x > 0) rescale(factors, totals);
                if (!any) conversions.begin();  // behind the maxima, which ask for what is no number
            }
            for (int which = 0; which < 2; ++which) {
                const auto ahead = [&](int32_t y) {
                    prefetch_some();
                    if (y % kGroupsAwake == kGroupsAwake - 1) keep_awake();
                };
                if constexpr (kParts == 1) {
                    if (again) subtract(chunks[which], softmax[which].base);
                    const Vec base = again ? Vec{} : softmax[which].base;
                    if (a.exact_lse) softmax[which].exact += chunk_sums(chunks[which], scale, base);
                    chunk_of_bfloat16<any>(chunks[which], scale, base, totals[which], ahead);
                } else {
                    softmax[which].total += chunk_probabilities<kParts>(chunks[which], scale, softmax[which].base, ahead);
                }
                if (which == 0) keep_awake();
            }
            Factors factors[kAtOnce];
            for (int32_t y = 0; y < some; ++y)
                factors[y] = {reinterpret_cast<const Word*>(scores) + y * 2 * kQueryScores, groups[x + y].values};
            sum_products<kParts>(factors, some, Dp, kQueryScores, out, x > 0,
                                 [&] { prefetch_among_products(); });
        }
        for (int which = 0; kParts == 1 && which < 2; ++which) {
            softmax[which].total = join_lanes<Sum>(totals[which]);
            if (a.lse.data && !a.exact_lse && !again) softmax[which].find_excess(scale);
        }
        return any || conversions.end();
    }

    void rescale(const float* factors, Vec (&totals)[2][kUnit]) {
        for (int r = 0; r < kUnitQueries; ++r) {
            for (int64_t d = 0; d < Dp; d += VW) store(out + r * Dp + d, load(out + r * Dp + d) * factors[r]);
            if (kParts == 1) totals[r / kUnit][r % kUnit] *= factors[r];
        }
    }

    void run(int32_t unit) {
        find_or_pack_queries(unit);
        keep_awake();
        const int32_t count = activate_groups(unit);
        RunningSoftmax softmax[2];
        plan_prefetches(unit, count);
        if (!attend<(kParts > 1)>(count, false, softmax)) attend<true>(count, false, softmax);
        const bool finite = write(unit, ~0u, softmax);
        const uint32_t left = kParts == 1 ? out_of_range(softmax, finite) : 0;
        if (!left) return;
        attend<true>(count, true, softmax);
        write(unit, left, softmax);
    }

    uint32_t out_of_range(const RunningSoftmax (&softmax)[2], bool finite) const {
        uint32_t queries = softmax[0].out_of_range() | uint32_t(softmax[1].out_of_range()) << kUnit;
        for (int r = 0; !finite && r < kUnitQueries; ++r)  // as where values are large
            queries |= uint32_t(!is_finite_row(out + r * Dp, Dp)) << r;
        return queries;
    }

    // The results of some of a unit's queries. Returns whether those in bfloat16 are finite.
    bool write(int32_t unit, uint32_t queries, const RunningSoftmax (&softmax)[2]) {
        const int32_t* tokens = this->tokens_of_unit(unit);
        float inverse[kUnitQueries];
        FiniteResults finite;
        for (int which = 0; which < 2; ++which)
            store(inverse + which * kUnit, kParts == 1 ? -softmax[which].inverse() : softmax[which].inverse());
        for (int r = 0; r < this->queries_of_unit(unit); ++r) {
            if (tokens[r] < 0 || !(queries >> r & 1)) continue;
            T* row = here.out + tokens[r] * a.out.stride_s;
            if constexpr (kParts == 1) store_row_of_pairs(out + r * Dp, inverse[r], row, a.out.stride_d, a.D, finite);
            else store_row(out + r * Dp, inverse[r], row, a.out.stride_d, a.D);
        }
        if (a.lse.data) write_lse(unit, queries, softmax);
        return bool(finite);
    }

    void write_lse(int32_t unit, uint32_t queries, const RunningSoftmax (&softmax)[2]) {
        const int32_t* tokens = this->tokens_of_unit(unit);
        float lse[kUnitQueries];
        for (int which = 0; which < 2; ++which) {
            const RunningSoftmax& s = softmax[which];
            store(lse + which * kUnit, s.lse(kParts == 1 && a.exact_lse ? s.exact : s.total, score_scale.size));
        }
        for (int r = 0; r < this->queries_of_unit(unit); ++r)
            if (tokens[r] >= 0 && queries >> r & 1) *row_of<float>(a.lse, t.batch, t.head, tokens[r]) = lse[r];
    }

    void run() {
        for (int64_t slot = 0; slot < num_slots; ++slot) packed[slot] = -1;
        // Units are the same for every task, and so are the groups by which sums are taken.
        int32_t unit = 0;
        while (unit < layout.num_units && layout.unit_block[unit] < t.block_begin) ++unit;
        for (; unit < layout.num_units; ++unit) {
            if (!take_blocks(t, layout.unit_block[unit], layout.unit_block[unit + 1])) return;
            run(unit);
        }
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
