// Backward attention with Intel's matrix unit.
//
// With P the probabilities, O the output, dO its gradient and dL that of lse:
//   dV = P^T dO;  dS = scale * P * (dO V^T - delta), delta = rowsum(dO * O) - dL;  dQ = dS K;  dK = dS^T Q.
// All scores are made as S^T = K Q^T, a key in a row. Then P^T and dS^T are factors of dV, dK and of dQ^T = K^T dS^T as they
// lie, and what differs from query to query, lse and delta, is a vector.
//
// Units are the outer loop, so what belongs to a query is packed once. dK and dV of a group grow in memory, in the order of
// the units, as long as units see it: a text's group sees all of them, and sums of sums keep the rounding of such long sums
// small. A task may make only dQ of some units or only dK, dV of some groups: the same sums in the same order, so splitting
// a head between threads does not change a bit.
#pragma once

#include <initializer_list>

#include "attention_units.h"

#if defined(__AMX_BF16__)
namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int kGroupsOfBackward = 3;  // a chunk
constexpr int kUnitsPerSum = 8;       // whose shares of dK and dV are summed on their own

// bit r of [x][half][k]: query r of the unit's blocks 2 x and 2 x + 1 attends to key k of that panel of the group
struct KeyBits { uint16_t of[2][kGroupPanels][kUnit]; };

DF_INLINE KeyBits transposed(const GroupBits& bits) {
    KeyBits keys;
    for (int which = 0; which < 2; ++which)
        for (int half = 0; half < kGroupPanels; ++half) {
            __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits[which][half]));
            for (int k = kUnit - 1; k >= 0; --k) {
                keys.of[which][half][k] = uint16_t(_mm256_movepi16_mask(rows));
                rows = _mm256_slli_epi16(rows, 1);
            }
        }
    return keys;
}

// What is different for each of a unit's queries.
struct OfQueries { float shift[kUnitQueries], delta[kUnitQueries]; };

// S^T and dP^T (half of the keys, half of the queries, 16, 16) -> parts of P^T (2, part, 16, 16), of dS^T alike, and of dS^T
// with pairs of keys.
template <int parts>
DF_NOINLINE void chunk_gradients(const GroupBits* bits, float scale, const OfQueries& q, const float* scores,
                                 const float* grads, Word* probabilities, Word* gradients, Word* gradients_of_pairs) {
    KeyBits seen;
    if (bits) seen = transposed(*bits);
    Vec shift[2], delta[2];
    for (int which = 0; which < 2; ++which) {
        shift[which] = load(q.shift + which * kUnit);
        delta[which] = load(q.delta + which * kUnit);
    }
    for (int k = 0; k < kUnit; ++k) {
        Parts<parts> p[2][2], g[2][2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
            for (int which = 0; which < 2; ++which) {
                const int64_t at = (half * 2 + which) * kTile + k * kUnit;
                // At most 1, however a large score is rounded; one factor less would round lse once more.
                Vec probability = exp2(min((load(scores + at) * scale - shift[which]) * LOG2E, Vec{}));
                Vec gradient = probability * (load(grads + at) - delta[which]) * scale;
                if (bits) {
                    probability = select(seen.of[which][half][k], 0, probability, Vec{});
                    gradient = select(seen.of[which][half][k], 0, gradient, Vec{});
                }
                split_parts(probability, p[half][which]);
                split_parts(gradient, g[half][which]);
            }
#pragma GCC unroll 2
        for (int x = 0; x < 2; ++x) {
            const int64_t at = x * parts * kTile + k * kUnit;
            store_pairs(p[x][0], p[x][1], probabilities + at);
            store_pairs(g[x][0], g[x][1], gradients + at);
            store_pairs(g[0][x], g[1][x], gradients_of_pairs + at);
        }
    }
}

template <class T>
struct UnitBackward : UnitHead<T> {
    using UnitHead<T>::a, UnitHead<T>::t, UnitHead<T>::layout, UnitHead<T>::Dp, UnitHead<T>::kParts;

    // A group's packed keys and values, and its gradients.
    struct Slot {
        int32_t group;  // or -1
        int32_t units;  // that the sums are of
        bool totals;    // there are sums before these
        Word *keys, *values, *sum_keys;
        float *grad_key, *grad_value, *total_key, *total_value;  // (32, Dp)
    };
    struct Active {
        Slot* slot;
        const GroupBits* bits;
        Word *probabilities, *gradients, *gradients_of_pairs;
    };

    const int64_t num_slots;
    Slot* slots;
    bool* made;  // (group) its gradients are in the result
    Word *query, *grad_out, *sum_query, *sum_grad_out;
    float *products, *grad_query, *rows_of_grad_query, *delta;
    Word* factors;
    Active* active;

    UnitBackward(const AttentionArgs& args, const AttentionTask& task, Arena& arena)
        : UnitHead<T>(args, task, arena), num_slots(num_group_slots(layout)) {
        slots = arena.take<Slot>(num_slots);
        for (int64_t x = 0; x < num_slots; ++x) {
            Slot slot{};
            for (Word** packed : {&slot.keys, &slot.values, &slot.sum_keys}) *packed = arena.take<Word>(this->words());
            for (float** sums : {&slot.grad_key, &slot.grad_value, &slot.total_key, &slot.total_value})
                *sums = arena.take<float>(kGroupKeys * Dp);
            if (arena.base) slots[x] = slot;
        }
        made = arena.take<bool>(layout.num_groups);
        for (Word** packed : {&query, &grad_out, &sum_query, &sum_grad_out}) *packed = arena.take<Word>(this->words());
        products = arena.take<float>(kGroupsOfBackward * 8 * kTile);
        grad_query = arena.take<float>(kUnitQueries * Dp);
        rows_of_grad_query = arena.take<float>(kUnitQueries * Dp);
        delta = arena.take<float>(layout.num_blocks * kBlock);
        factors = arena.take<Word>(kGroupsOfBackward * 6 * kParts * kTile);
        active = arena.take<Active>(layout.num_groups);
    }

    bool is_mine(int32_t group) const {
        const int32_t panel = first_panel_of(layout, group);
        return panel >= t.panel_begin && panel < t.panel_end;
    }

    // -- groups --

    void write_grads(int32_t group, const float* grad_key, const float* grad_value) {
        const int32_t* tokens = this->tokens_of_group(group);
        for (int k = 0; k < this->keys_of_group(group); ++k) {
            if (tokens[k] < 0) continue;
            store_row(grad_key + k * Dp, 1, row_of<T>(a.grad_key, t.batch, t.head, tokens[k]), a.grad_key.stride_d, a.D);
            store_row(grad_value + k * Dp, 1, row_of<T>(a.grad_value, t.batch, t.head, tokens[k]), a.grad_value.stride_d,
                      a.D);
        }
        made[group] = true;
    }
    void add_to_totals(Slot& slot) {
        const auto add = [&](const float* sums, float* totals) {
            for (int64_t x = 0; x < kGroupKeys * Dp; x += VW)
                store(totals + x, slot.totals ? load(totals + x) + load(sums + x) : load(sums + x));
        };
        add(slot.grad_key, slot.total_key);
        add(slot.grad_value, slot.total_value);
        slot.totals = true;
        slot.units = 0;
    }
    void finish(Slot& slot) {
        if (slot.totals && slot.units > 0) add_to_totals(slot);
        if (slot.totals) write_grads(slot.group, slot.total_key, slot.total_value);
        else if (slot.units > 0) write_grads(slot.group, slot.grad_key, slot.grad_value);
        slot.totals = false;
        slot.units = 0;
    }
    void pack(Slot& slot, int32_t group) {
        finish(slot);
        slot.group = group;
        keep_awake();
        this->find_keys(a.value, group);
        this->store_rows(slot.values);
        keep_awake();
        this->find_keys(a.key, group);
        this->store_rows(slot.keys);
        keep_awake();
        if (t.for_query) this->store_sum_rows(slot.sum_keys);
    }
    // Finds the groups that a unit attends to and the task is about, and packs them.
    int32_t activate_groups(int32_t unit) {
        int32_t count = 0;
        for (int32_t x = layout.unit_visits[unit]; x < layout.unit_visits[unit + 1]; ++x) {
            const GroupVisit visit = layout.groups_of_unit[x];
            if (!t.for_query && !is_mine(visit.group)) continue;
            if (!this->find_bits(visit, &active[count].bits)) continue;
            Slot& slot = slots[group_slot(layout, visit.group)];
            if (slot.group != visit.group) pack(slot, visit.group);
            active[count++].slot = &slot;
        }
        return count;
    }

    // -- units --

    // Begins to fetch a share of what the next unit reads and writes, for one of `count` groups.
    void prefetch_share(int32_t unit, int32_t group, int32_t count) const {
        const int32_t begin = layout.unit_block[unit + 1] * kBlock, end = layout.num_blocks * kBlock;
        for (int32_t r = begin + group * kUnitQueries / count; r < begin + (group + 1) * kUnitQueries / count && r < end; ++r)
            if (const int32_t token = layout.query_token[r]; token >= 0) {
                const Strided* const inputs[] = {&a.query, &a.grad_out, &a.out, &a.key, &a.value};
                for (const Strided* x : inputs)
                    prefetch_row(row_of<const T>(*x, t.batch, t.head, token), x->stride_d, a.D);
                const Strided* const results[] = {&a.grad_query, &a.grad_key, &a.grad_value};
                for (const Strided* x : results)
                    prefetch_row_for_write(row_of<T>(*x, t.batch, t.head, token), x->stride_d, a.D);
            }
    }

    OfQueries find_queries_of(int32_t unit) {
        AttentionTask of_unit = t;
        of_unit.block_begin = layout.unit_block[unit];
        of_unit.block_end = layout.unit_block[unit + 1];
        compute_delta<T>(a, of_unit, delta, grad_query, rows_of_grad_query);
        OfQueries q;
        const int32_t* tokens = this->tokens_of_unit(unit);
        for (int r = 0; r < kUnitQueries; ++r) {
            q.shift[r] = q.delta[r] = 0;
            if (r >= this->queries_of_unit(unit) || tokens[r] < 0) continue;
            const float lse = *row_of<float>(a.lse, t.batch, t.head, tokens[r]);
            q.shift[r] = lse == minus_infinity() ? 0 : lse;
            q.delta[r] = delta[layout.unit_block[unit] * kBlock + r];
        }
        this->find_queries(a.query, unit);
        this->store_columns(query);
        if (t.for_key) this->store_sum_columns(sum_query);
        keep_awake();
        this->find_queries(a.grad_out, unit);
        this->store_columns(grad_out);
        if (t.for_key) this->store_sum_columns(sum_grad_out);
        return q;
    }

    void store_grad_query(int32_t unit, int32_t count) {
        const int32_t* tokens = this->tokens_of_unit(unit);
        for (int64_t d = 0; d < Dp; d += kUnit)
            for (int which = 0; which < 2; ++which) {
                Words block[16] = {};
                for (int r = 0; r < kUnit && count > 0; ++r)
                    block[r] = (Words)load(grad_query + (d + r) * kUnitQueries + which * kUnit);
                transpose(block);
                for (int r = 0; r < kUnit; ++r) store(rows_of_grad_query + (which * kUnit + r) * Dp + d, (Vec)block[r]);
            }
        for (int r = 0; r < this->queries_of_unit(unit); ++r)
            if (tokens[r] >= 0)
                store_row(rows_of_grad_query + r * Dp, 1, row_of<T>(a.grad_query, t.batch, t.head, tokens[r]),
                          a.grad_query.stride_d, a.D);
    }

    // Some of a unit's groups.
    template <class Ahead>
    void run_chunk(const OfQueries& q, Active* groups, int32_t count, bool add, const Ahead& ahead) {
        Factors of[2 * kGroupsOfBackward];
        for (int32_t x = 0; x < count; ++x) {
            of[x] = {groups[x].slot->keys, query};
            of[count + x] = {groups[x].slot->values, grad_out};
        }
        chunk_products<kParts>(of, PackedRows<kParts>(), count, Dp, 2 * kTile, products, kNothing);
        float* of_grads = products + int64_t(count) * 4 * kTile;
        chunk_products<kParts>(of + count, PackedRows<kParts>(), count, Dp, 2 * kTile, of_grads, kNothing);
        for (int32_t x = 0; x < count; ++x) {
            Active& group = groups[x];
            group.probabilities = factors + int64_t(x) * 6 * kParts * kTile;
            group.gradients = group.probabilities + 2 * kParts * kTile;
            group.gradients_of_pairs = group.gradients + 2 * kParts * kTile;
            chunk_gradients<kParts>(group.bits, a.scale, q, products + int64_t(x) * 4 * kTile,
                                    products + int64_t(count + x) * 4 * kTile, group.probabilities, group.gradients,
                                    group.gradients_of_pairs);
            ahead(x);
            keep_awake();
        }
        for (int64_t d = 0; t.for_query && d < Dp; d += kDepth) {
            for (int32_t x = 0; x < count; ++x)
                of[x] = {groups[x].slot->sum_keys + d / kUnit * kParts * kTile, groups[x].gradients_of_pairs};
            sum_products<kParts>(of, count, kUnitQueries, kParts * kTile, grad_query + d * kUnitQueries, add, kNothing);
        }
        if (!t.for_key) return;
        // Of all groups dV, then dK: so the unit's rows stay near.
        for (int32_t x = 0; x < count; ++x) {
            of[0] = {groups[x].probabilities, sum_grad_out};
            sum_products<kParts>(of, 1, Dp, kParts * kTile, groups[x].slot->grad_value, groups[x].slot->units > 0,
                                 kNothing);
        }
        for (int32_t x = 0; x < count; ++x) {
            of[0] = {groups[x].gradients, sum_query};
            sum_products<kParts>(of, 1, Dp, kParts * kTile, groups[x].slot->grad_key, groups[x].slot->units > 0,
                                 kNothing);
        }
        for (int32_t x = 0; x < count; ++x)
            if (++groups[x].slot->units == kUnitsPerSum) add_to_totals(*groups[x].slot);
    }

    void run() {
        for (int64_t x = 0; x < num_slots; ++x) slots[x].group = -1, slots[x].units = 0, slots[x].totals = false;
        for (int32_t group = 0; group < layout.num_groups; ++group) made[group] = false;
        for (int32_t unit = 0; unit < layout.num_units; ++unit) {
            if (layout.unit_block[unit] < t.block_begin || layout.unit_block[unit] >= t.block_end) continue;
            const int32_t count = activate_groups(unit);
            const OfQueries q = find_queries_of(unit);
            for (int32_t x = 0; x < count; x += kGroupsOfBackward)
                run_chunk(q, active + x, count - x < kGroupsOfBackward ? count - x : kGroupsOfBackward, x > 0,
                          [&](int32_t y) { prefetch_share(unit, x + y, count); });
            if (t.for_query) store_grad_query(unit, count);
        }
        if (!t.for_key) return;
        for (int64_t x = 0; x < num_slots; ++x) finish(slots[x]);
        for (int64_t x = 0; x < kGroupKeys * Dp; ++x) grad_query[x] = 0;
        for (int32_t group = 0; group < layout.num_groups; ++group)  // that nobody attends to
            if (is_mine(group) && !made[group]) write_grads(group, grad_query, grad_query);
    }
};

template <class T>
void backward_with_units(const AttentionArgs& a, const AttentionTask& t, char* scratch) {
    Arena arena{scratch, 0};
    UnitBackward<T> backward(a, t, arena);
    begin_tiles();
    backward.run();
    end_tiles();
}

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
