// One step of decoding for some samples of one prompt and one head. Compiled once per instruction set.
//
// Up to 8 samples go through the text together, so that its keys and values are read once for all of them: their scores
// are a product of small matrices whose rows are the samples. The image keys of a sample are its own. All scores of a
// sample lie in one row, text first, and softmax is exact and in two passes. How many samples share a product changes
// which registers hold their sums, never the order of the sums: a sample's result does not depend on the others.
//
// D head size, Dp = D rounded up to whole panels of 16; L visible text keys, Lp = L rounded up to whole panels.
#include <initializer_list>
#include <type_traits>

#include "decode.h"
#include "rows.h"
#include "simd.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int NV = kPanel / VW;           // vectors in a panel
constexpr int ACCS = VW == 16 ? 16 : 8;   // accumulators that the register file holds beside operands
constexpr int MAX_ROWS = VW == 16 ? 8 : 4;
constexpr int MAX_COLS = 8;

// -- products of small matrices ----------------------------------------------------------------------------------------

// out (R, C vectors) = sign * rows (R, D) @ keys (D, C vectors): vector c of key row d lies at columns[c] + d * stride
template <int R, int C, class K>
DF_NOINLINE void score_tile(const float* rows, int64_t row_stride, const K* const* columns, int64_t stride, int64_t D,
                            float sign, float* out, int64_t out_stride) {
    Vec acc[R][C] = {};
    const K* column[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) column[c] = columns[c];
    for (int64_t d = 0; d < D; ++d) {
        Vec key[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) key[c] = load_as_float(column[c] + d * stride);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) acc[r][c] += key[c] * rows[r * row_stride + d];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) store(out + r * out_stride + c * VW, acc[r][c] * sign);
}

// out (R, C vectors) = weights (R, n) @ values (n, C vectors), rows of values `stride` apart
template <int R, int C, class V>
DF_NOINLINE void value_tile(const float* weights, int64_t weight_stride, int64_t n, const V* values, int64_t stride,
                            float* out, int64_t out_stride) {
    Vec acc[R][C] = {};
    for (int64_t k = 0; k < n; ++k) {
        Vec value[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) value[c] = load_as_float(values + k * stride + c * VW);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) acc[r][c] += value[c] * weights[r * weight_stride + k];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) store(out + r * out_stride + c * VW, acc[r][c]);
}

// -- one head ---------------------------------------------------------------------------------------------------------

// Rows of D elements of type T whose vectors are read where they lie (InPlace), or from padded copies as floats.
template <class T, bool InPlace>
struct Decoder {
    typedef typename std::conditional<InPlace, T, float>::type Stored;

    const DecodeArgs& a;
    const ScoreScale by;
    int64_t Dp, row;                     // row: room for the scores of a sample
    float *query, *scores, *out;         // of a block of samples: (8, Dp), (8, row), (8, Dp)
    float *copy, *values, *rows, *keys;  // (Dp), (T, Dp), (16, Dp) and panels (Dp, 16), of what is not read in place

    Decoder(const DecodeArgs& args, Arena& arena) : a(args), by(args.scale), Dp(padded(args.D)) {
        row = padded(a.T) + padded(a.num_slots);
        query = arena.take<float>(kBlock * Dp);
        scores = arena.take<float>(kBlock * row);
        out = arena.take<float>(kBlock * Dp);
        copy = arena.take<float>(Dp);
        values = arena.take<float>(InPlace ? 0 : a.T * Dp);
        rows = arena.take<float>(kPanel * Dp);
        keys = arena.take<float>(padded(a.T) * Dp);
    }

    void run(const DecodeTask& t) {
        const int64_t L = a.text_lengths ? a.text_lengths[t.prompt] : a.T;
        const bool keys_in_place = a.text_key.stride_s == 1;
        for (int64_t key = keys_in_place ? L / kPanel * kPanel : 0; key < L; key += kPanel) pack_keys(t, key, L);
        if (!InPlace)
            for (int64_t k = 0; k < L; ++k)
                load_row(row_of<const T>(a.text_value, t.prompt, t.head, k), a.text_value.stride_d, a.D, Dp,
                         values + k * Dp);
        for (int64_t sample = t.sample_begin; sample < t.sample_end; sample += kBlock) {
            const int64_t left = t.sample_end - sample, count = left < kBlock ? left : kBlock;
            const int64_t first = t.prompt * (a.B / a.P) + sample;
            for (int64_t r = 0; r < count; ++r)
                load_row(row_of<const T>(a.query, first + r, t.head, 0), a.query.stride_d, a.D, Dp, query + r * Dp);
            for (int64_t r = 0; r < count; ++r) prefetch_image(first + r, t.head);
            text_scores(t, L, keys_in_place ? L / kPanel * kPanel : 0, count);
            float sum[kBlock];
            for (int64_t r = 0; r < count; ++r) {
                float* s = scores + r * row;
                for (int64_t k = L; k < padded(L); ++k) s[k] = minus_infinity();
                image_scores(first + r, t.head, query + r * Dp, s + padded(L));
                sum[r] = softmax(s, padded(L) + padded(a.num_slots));
            }
            text_output(t, L, count);
            for (int64_t r = 0; r < count; ++r) {
                image_output(first + r, t.head, scores + r * row + padded(L), out + r * Dp);
                store_row(out + r * Dp, 1 / sum[r], row_of<T>(a.out, first + r, t.head, 0), a.out.stride_d, a.D);
            }
        }
    }

    // Text keys [key, key + 16), transposed, zeros from L on.
    void pack_keys(const DecodeTask& t, int64_t key, int64_t L) {
        for (int64_t k = 0; k < kPanel; ++k) {
            const T* p = row_of<const T>(a.text_key, t.prompt, t.head, key + k);
            load_row(p, a.text_key.stride_d, key + k < L ? a.D : 0, Dp, rows + k * Dp);
        }
        transpose_panel(rows, Dp, keys + key * Dp);
    }

    // scores (count, Lp) of the text; the keys before `in_place` lie in panels of the tensor itself.
    void text_scores(const DecodeTask& t, int64_t L, int64_t in_place, int64_t count) {
        const T* tensor = row_of<const T>(a.text_key, t.prompt, t.head, 0);
        const auto of_tensor = [&](int64_t vector) { return tensor + vector * VW; };
        const auto of_copy = [&](int64_t vector) { return keys + vector / NV * kPanel * Dp + vector % NV * VW; };
        by_rows(count, [&](auto R, int64_t r) DF_INLINE_LAMBDA {
            score_columns<R.value, T>(of_tensor, 0, in_place / VW, a.text_key.stride_d, r);
            score_columns<R.value, float>(of_copy, in_place / VW, padded(L) / VW, kPanel, r);
        });
    }

    template <int R, class K, class Column>
    void score_columns(Column column, int64_t begin, int64_t end, int64_t stride, int64_t r) {
        constexpr int C = ACCS / R < MAX_COLS ? ACCS / R : MAX_COLS;
        const float* rows = query + r * Dp;
        float* out = scores + r * row;
        const K* columns[C];
        int64_t c = begin;
        for (; c + C <= end; c += C) {
            for (int x = 0; x < C; ++x) columns[x] = column(c + x);
            score_tile<R, C, K>(rows, Dp, columns, stride, a.D, by.sign, out + c * VW, row);
        }
        for (; c < end; ++c) {
            columns[0] = column(c);
            score_tile<R, 1, K>(rows, Dp, columns, stride, a.D, by.sign, out + c * VW, row);
        }
    }

    // out (count, Dp) = probabilities (count, L) @ text values
    void text_output(const DecodeTask& t, int64_t L, int64_t count) {
        const void* first = values;
        if (InPlace) first = row_of<const T>(a.text_value, t.prompt, t.head, 0);
        const Stored* base = static_cast<const Stored*>(first);
        const int64_t stride = InPlace ? a.text_value.stride_s : Dp, end = InPlace ? a.D : Dp;
        by_rows(count, [&](auto R, int64_t r) DF_INLINE_LAMBDA {
            constexpr int C = ACCS / R.value < 4 ? ACCS / R.value : 4;
            int64_t d = 0;
            for (; d + C * VW <= end; d += C * VW)
                value_tile<R.value, C>(scores + r * row, row, L, base + d, stride, out + r * Dp + d, Dp);
            for (; d < end; d += VW)
                value_tile<R.value, 1>(scores + r * row, row, L, base + d, stride, out + r * Dp + d, Dp);
        });
    }

    // Calls f(number of rows, first row) until `count` rows are done, with numbers that products are compiled for.
    template <class F>
    static DF_INLINE_MEMBER void by_rows(int64_t count, F f) {
        int64_t r = 0;
        for (; MAX_ROWS >= 8 && r + 8 <= count; r += 8) f(std::integral_constant<int, MAX_ROWS>(), r);
        for (; r + 4 <= count; r += 4) f(std::integral_constant<int, 4>(), r);
        for (; r + 2 <= count; r += 2) f(std::integral_constant<int, 2>(), r);
        for (; r < count; ++r) f(std::integral_constant<int, 1>(), r);
    }

    const Stored* stored_row(const Strided& x, int64_t b, int64_t h, int64_t slot) {
        const T* p = row_of<const T>(x, b, h, slot);
        if (InPlace) return reinterpret_cast<const Stored*>(p);
        load_row(p, x.stride_d, a.D, Dp, copy);
        return reinterpret_cast<const Stored*>(copy);
    }

    // Begins to fetch a sample's image keys and values, which the products of the text give time to arrive.
    void prefetch_image(int64_t b, int64_t h) {
        if (!InPlace) return;
        for (int64_t k = 0; k < a.num_slots; ++k)
            for (const Strided* x : {&a.image_key, &a.image_value}) {
                const char* p = reinterpret_cast<const char*>(row_of<const T>(*x, b, h, a.slots[k]));
                for (int64_t byte = 0; byte < a.D * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(p + byte, 0, 2);
            }
    }

    void image_scores(int64_t b, int64_t h, const float* q, float* out_scores) {
        const int64_t end = InPlace ? a.D : Dp;
        for (int64_t k = 0; k < a.num_slots; ++k) {
            const Stored* key = stored_row(a.image_key, b, h, a.slots[k]);
            Vec acc = Vec{};
            for (int64_t d = 0; d < end; d += VW) acc += load_as_float(key + d) * load(q + d);
            out_scores[k] = horizontal_sum(acc) * by.sign;
        }
        for (int64_t k = a.num_slots; k < padded(a.num_slots); ++k) out_scores[k] = minus_infinity();
    }

    // scores s (n) -> exp(scale * (s - max)), and their sum; n is a multiple of 16
    DF_INLINE_MEMBER float softmax(float* s, int64_t n) const {
        const float power = by.size * LOG2E;
        Vec highest = splat(minus_infinity()), total = Vec{};
        for (int64_t k = 0; k < n; k += VW) highest = max(load(s + k), highest);
        const float top = horizontal_max(highest);
        for (int64_t k = 0; k < n; k += VW) {
            const Vec e = exp2((load(s + k) - top) * power);
            store(s + k, e);
            total += e;
        }
        return horizontal_sum(total);
    }

    void image_output(int64_t b, int64_t h, const float* weights, float* row_out) {
        const int64_t vectors = (InPlace ? a.D : Dp) / VW;
        Vec acc[128 / VW];
        for (int64_t v = 0; v < vectors; ++v) acc[v] = load(row_out + v * VW);
        for (int64_t k = 0; k < a.num_slots; ++k) {
            const Stored* value = stored_row(a.image_value, b, h, a.slots[k]);
            for (int64_t v = 0; v < vectors; ++v) acc[v] += load_as_float(value + v * VW) * weights[k];
        }
        for (int64_t v = 0; v < vectors; ++v) store(row_out + v * VW, acc[v]);
    }
};

// -- one of the types -------------------------------------------------------------------------------------------------

// f(Decoder of the arguments' dtype and layout, made in `arena`)
template <class F>
void with_decoder(const DecodeArgs& a, Arena& arena, F f) {
    const bool in_place = a.D % VW == 0 && a.text_value.stride_d == 1 && a.image_key.stride_d == 1 &&
                          a.image_value.stride_d == 1;
    with_type(a.dtype, [&](auto zero) {
        typedef decltype(zero) T;
        if (in_place) f(Decoder<T, true>(a, arena));
        else f(Decoder<T, false>(a, arena));
    });
}

size_t decode_scratch(const DecodeArgs& a) {
    Arena arena{nullptr, 0};
    with_decoder(a, arena, [](const auto&) {});
    return arena.used;
}

void decode(const DecodeArgs& a, const DecodeTask& t, char* scratch) {
    Arena arena{scratch, 0};
    with_decoder(a, arena, [&](auto decoder) { decoder.run(t); });
}

}  // namespace

extern const DecodeKernels decode_kernels;
const DecodeKernels decode_kernels = {decode_scratch, decode};

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
