// The softmax of attention with Intel's matrix unit: scores become probabilities chunk by chunk, relative to that of a score
// near the largest, `base`. All of it depends on what a query sees alone: not on its neighbours, nor on keys hidden from it.
#pragma once

#include "../gumbel.h"
#include "attention_units.h"

#if defined(__AMX_BF16__)
namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr float kLargestPower = 8;  // of a probability, where the base is chosen again for each chunk
constexpr float kSmallestTotal = 0.5f, kLargestTotal = 0x1p64f;  // where it is that of the first keys

// Registers in which 16 queries have a group's scores, and then the parts of its probabilities.
constexpr int tiles_of_scores(int parts) { return parts > kGroupPanels ? parts : kGroupPanels; }

// A group that a unit attends to.
struct ActiveGroup {
    const Word *keys, *values;  // packed
    const GroupBits* bits;      // null where every pair attends
};

// Some groups, and which 16 of a unit's queries: those of `which`, 0 or 1. The scores are those of these queries.
struct Chunk {
    const ActiveGroup* groups;
    int32_t count;
    int which;
    float* scores;

    Chunk first(int32_t some) const { return {groups, some, which, scores}; }
    template <int parts>
    float* scores_of(int32_t x) const { return scores + int64_t(x) * 2 * tiles_of_scores(parts) * kTile; }
    const uint16_t (*bits_of(int32_t x) const)[kUnit] { return groups[x].bits ? (*groups[x].bits)[which] : nullptr; }
};

// Lane r of the result is v[r]'s lanes put together.
template <int w, class Join>
DF_INLINE void join_step(Vec* v) {
#pragma GCC unroll 8
    for (int x = 0; x < w; ++x)
        v[x] = Join::join(shuffle<FirstHalves<w>>(v[x], v[x + w]), shuffle<SecondHalves<w>>(v[x], v[x + w]));
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

// The largest scores of 16 queries; NaN is none.
template <int parts>
DF_NOINLINE Vec chunk_maxima(const Chunk& chunk) {
    Vec highest[kUnit];
#pragma GCC unroll 16
    for (int r = 0; r < kUnit; ++r) highest[r] = splat(minus_infinity());
    for (int32_t x = 0; x < chunk.count; ++x) {
        const float* s = chunk.scores_of<parts>(x);
        const auto* bits = chunk.bits_of(x);
        if (!bits) {
#pragma GCC unroll 16
            for (int r = 0; r < kUnit; ++r)
                highest[r] = max(load(s + r * kUnit), max(load(s + kTile + r * kUnit), highest[r]));
        } else {
#pragma GCC unroll 16
            for (int r = 0; r < kUnit; ++r)
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    const Vec seen = max(load(s + half * kTile + r * kUnit), highest[r]);
                    highest[r] = select(bits[half][r], 0, seen, highest[r]);
                }
        }
    }
    return join_lanes<Maximum>(highest);
}

// scores of 16 queries -> parts of exp2((scores - base) * scale), where the scores were; their sums. `ahead` is called for
// each group.
template <int parts, class Ahead>
DF_INLINE Vec chunk_probabilities(const Chunk& chunk, float scale, Vec base, const Ahead& ahead) {
    Vec total[kUnit] = {};
    float base_of[kUnit];
    store(base_of, base);
    for (int32_t x = 0; x < chunk.count; ++x) {
        float* s = chunk.scores_of<parts>(x);
        const auto* bits = chunk.bits_of(x);
        ahead(x);
        for (int r = 0; bits && r < kUnit; ++r)
            for (int half = 0; half < 2; ++half) {
                float* p = s + half * kTile + r * kUnit;
                store(p, select(bits[half][r], 0, load(p), splat(minus_infinity())));
            }
#pragma GCC unroll 16
        for (int r = 0; r < kUnit; ++r) {
            const Vec first = exp2((load(s + r * kUnit) - base_of[r]) * scale);
            const Vec second = exp2((load(s + kTile + r * kUnit) - base_of[r]) * scale);
            total[r] += first + second;
            Parts<parts> of_first, of_second;
            split_parts(first, of_first);
            split_parts(second, of_second);
            store_pairs(of_first, of_second, reinterpret_cast<Word*>(s) + r * kUnit);
        }
    }
    return join_lanes<Sum>(total);
}

// -- bfloat16 -----------------------------------------------------------------------------------------------------------

// The bits of 2^y in bfloat16, sign, exponent and mantissa, are those of (y + 127) * 128, but that the mantissa of 2^f is up
// to 11 units less than f. So steps = (y + 127) * 256 is rounded to a whole number, a table for its fraction's upper 6 bits
// is subtracted, and half of the rest taken. That is off by 0.19% in the mean (rounding alone by 0.17%) and by 0.61% at most
// (0.39%), on average by nothing, and takes a third of the instructions. No steps are a probability of 0, those of NaN NaN.
//
// One instruction does the last two steps, and sets the sign: these are probabilities times -1.
//
// Steps that no 32-bit integer holds, and NaN, must be kept from becoming none, which takes an instruction of ten. So at
// first it is left out, and whether there was such a score is what the processor's flag says (`Conversions`).
constexpr float kStepsPerPower = 256, kStepsOfOne = 127 * kStepsPerPower;
constexpr float kLargestSteps = 0xffff;  // which are NaN's
constexpr Word kPairOfMinusOnes = 0xbf80bf80;

struct MantissaTable { uint8_t rest[64]; };  // 255 - what is subtracted
constexpr MantissaTable mantissa_table() {
    constexpr double kRoot = 1.0027112750502025;  // 2^(1 / 256)
    MantissaTable table{};
    double power = 0.9986471128909702;  // 2^f for f = -1/2 / 256, and on
    for (int x = 0; x < 64; ++x) {
        double less = 0;
        for (int step = 0; step < 4; ++step, power *= kRoot) less += (4 * x + step - 0.5 - 256 * (power - 1)) / 4;
        table.rest[x] = uint8_t(255 - int(less < 0 ? 0 : less + 0.5));
    }
    return table;
}

// What is added to a score's steps. Halves of steps are rounded up as often as down.
constexpr float kStepsOfBase = kStepsOfOne + 0.5f;
DF_INLINE Vec offset_of_steps(Vec base, float steps_per_score) { return kStepsOfBase - base * steps_per_score; }

// Whether all floats between begin and end could be converted, and no operation was invalid.
class Conversions {
public:
    void begin() {
        before_ = _mm_getcsr();
        _mm_setcsr(before_ & ~_MM_EXCEPT_INVALID);
    }
    bool end() const {  // leaves the flag as it would be
        const unsigned after = _mm_getcsr();
        _mm_setcsr(after | (before_ & _MM_EXCEPT_INVALID));
        return !(after & _MM_EXCEPT_INVALID);
    }

private:
    unsigned before_ = 0;
};

// The sums of 16 queries' probabilities before they are rounded, for an exact lse.
DF_NOINLINE Vec chunk_sums(const Chunk& chunk, float scale, Vec base) {
    Vec total[kUnit] = {};
    float base_of[kUnit];
    store(base_of, base);
    for (int32_t x = 0; x < chunk.count; ++x) {
        const float* s = chunk.scores_of<1>(x);
        const auto* bits = chunk.bits_of(x);
        for (int r = 0; r < kUnit; ++r)
            for (int half = 0; half < 2; ++half) {
                const Vec each = exp2((load(s + half * kTile + r * kUnit) - base_of[r]) * scale);
                total[r] += bits ? select(bits[half][r], 0, each, Vec{}) : each;
            }
    }
    return join_lanes<Sum>(total);
}

// Subtracts the base of each query from its scores, as products with both would be rounded.
DF_NOINLINE void subtract(const Chunk& chunk, Vec base) {
    float base_of[kUnit];
    store(base_of, base);
    for (int32_t x = 0; x < chunk.count; ++x)
        for (int r = 0; r < kUnit; ++r)
            for (int half = 0; half < 2; ++half) {
                float* s = chunk.scores_of<1>(x) + half * kTile + r * kUnit;
                store(s, load(s) - base_of[r]);
            }
}

// Scores of 16 queries -> bfloat16(-exp2((scores - base) * scale)), where the scores were: pairs of neighbouring keys, in the
// order of _mm512_packus_epi32. Their sums are those of `totals`' lanes. Of `any` scores, or of those that can be converted.
// `ahead` is called for each group.
template <bool any, class Ahead>
DF_NOINLINE void chunk_of_bfloat16(const Chunk& chunk, float scale, Vec base, Vec (&totals)[kUnit], const Ahead& ahead) {
    alignas(64) static constexpr MantissaTable table = mantissa_table();
    const __m512i rest = _mm512_load_si512(&table), all = _mm512_set1_epi32(-1);
    const __m512 steps_per_score = _mm512_set1_ps(scale * kStepsPerPower), largest = _mm512_set1_ps(kLargestSteps);
    const __m512bh minus_ones = (__m512bh)_mm512_set1_epi32(kPairOfMinusOnes);
    Vec total[kUnit];
#pragma GCC unroll 16
    for (int r = 0; r < kUnit; ++r) total[r] = totals[r];
    float offset[kUnit];
    store(offset, offset_of_steps(base, scale * kStepsPerPower));
    const auto steps_of = [&](const float* s, __mmask16 seen, float at) DF_INLINE_LAMBDA {
        const __m512 x = _mm512_fmadd_ps((__m512)load(s), steps_per_score, _mm512_set1_ps(at));
        // Of NaN and a number the minimum is the number.
        return _mm512_maskz_cvtps_epi32(seen, any ? _mm512_min_ps(x, largest) : x);
    };
    for (int32_t x = 0; x < chunk.count; ++x) {
        float* s = chunk.scores_of<1>(x);
        const auto* bits = chunk.bits_of(x);
        ahead(x);
        const auto row = [&](int r, __mmask16 first, __mmask16 second) DF_INLINE_LAMBDA {
            const __m512i steps = _mm512_packus_epi32(steps_of(s + r * kUnit, first, offset[r]),
                                                      steps_of(s + kTile + r * kUnit, second, offset[r]));
            const __m512i index = _mm512_srli_epi16(steps, 2);
            const __m512i less = _mm512_mask_permutexvar_epi8(all, 0x5555555555555555, index, rest);
            const __m512i pairs = _mm512_avg_epu16(steps, less);  // (2^16 + steps - less) / 2
            _mm512_storeu_si512(s + r * kUnit, pairs);
            total[r] = (Vec)_mm512_dpbf16_ps((__m512)total[r], (__m512bh)pairs, minus_ones);
        };
        if (!bits) {
#pragma GCC unroll 16
            for (int r = 0; r < kUnit; ++r) row(r, 0xffff, 0xffff);
        } else {
#pragma GCC unroll 16
            for (int r = 0; r < kUnit; ++r) row(r, bits[0][r], bits[1][r]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kUnit; ++r) totals[r] = total[r];
}

// -- 16 queries ---------------------------------------------------------------------------------------------------------

DF_INLINE __mmask16 rows_with_bits(const uint16_t (*bits)[kUnit]) {
    const auto of = [&](int half) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits[half])); };
    const __m256i any = _mm256_or_si256(of(0), of(1));
    return _mm256_test_epi16_mask(any, any);
}

// Which queries attend to any key.
inline __mmask16 queries_seeing(const Chunk& chunk) {
    __mmask16 seeing = 0;
    for (int32_t x = 0; x < chunk.count && seeing != 0xffff; ++x) {
        const auto* bits = chunk.bits_of(x);
        seeing |= bits ? rows_with_bits(bits) : 0xffff;
    }
    return seeing;
}

struct VecLanes {
    typedef Vec Float;
    typedef IntVec Int;
    static DF_INLINE_MEMBER Vec from_int(IntVec x) { return __builtin_convertvector(x, Vec); }
    static DF_INLINE_MEMBER IntVec bits_of(Vec x) { return (IntVec)x; }
    static DF_INLINE_MEMBER Vec of_bits(IntVec x) { return (Vec)x; }
};

struct RunningSoftmax {
    Vec largest = splat(minus_infinity());  // the base, if any score has been seen
    Vec base = {};
    Vec total = {}, exact = {};  // of probabilities as they are multiplied with values, and in bfloat16 as they were before
    Vec excess = {};  // each of those in `total` is 2^excess times too large
    __mmask16 seeing = 0;  // which queries attend to any key

    // The base, to a chunk's largest scores if they are above it. Returns the factor of what has been added up before.
    template <int parts>
    Vec raise(const Chunk& chunk, float scale) {
        const Vec highest = chunk_maxima<parts>(chunk), before = largest;
        largest = (highest - largest) * scale > kLargestPower ? highest : largest;
        base = largest == minus_infinity() ? Vec{} : largest;  // keeps infinity from infinity
        return exp2((before - base) * scale);
    }

    // Which queries' probabilities are NaN, or too large or too small to be added up.
    __mmask16 out_of_range() const {
        const __m512 sum = (__m512)total;
        return seeing & ~(_mm512_cmp_ps_mask(sum, _mm512_set1_ps(kSmallestTotal), _CMP_GE_OQ) &
                          _mm512_cmp_ps_mask(sum, _mm512_set1_ps(kLargestTotal), _CMP_LE_OQ));
    }

    // Of a sum: where all scores that a query sees are -inf, both are NaN, as in dense attention.
    Vec inverse() const { return total == 0 ? of_empty_sum(0) : 1 / total; }
    // In bfloat16 the offset of steps was rounded, for all of a query's scores alike.
    void find_excess(float scale) {
        const float steps_per_score = scale * kStepsPerPower;
        const __m512 offset = (__m512)offset_of_steps(base, steps_per_score);
        const Vec of_base = (Vec)_mm512_fmadd_ps((__m512)base, _mm512_set1_ps(steps_per_score), offset);
        excess = (of_base - kStepsOfBase) / kStepsPerPower;
    }

    Vec lse(Vec sum, float size) const {  // of scores times size
        const Vec log = log_of<VecLanes>(split<VecLanes>(sum)) - excess * LN2;
        const Vec empty_or_nan = sum == 0 ? of_empty_sum(minus_infinity()) : sum;
        return sum > 0 ? base * size + log : empty_or_nan;
    }

private:
    Vec of_empty_sum(float blind) const {
        return (Vec)_mm512_mask_mov_ps((__m512)splat(blind), seeing, (__m512)splat(__builtin_nanf("")));
    }
};

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
