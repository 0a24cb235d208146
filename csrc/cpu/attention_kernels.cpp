// Sparse attention, forward and backward, of part of one head. Compiled once per instruction set.
//
// A tile is 8 queries x 16 keys. Keys are packed by panels of 16, so that one product of a tile is 8 accumulators, one
// vector load and 8 broadcast multiply-adds per element of the head. Softmax is exact and in two passes: all scores of
// 8 queries stay in cache, so no running rescale is needed. D head size, Dp = D rounded up to whole panels of 16.
#include "attention.h"
#include "attention_tiles.h"
#include "attention_units_backward.h"
#include "attention_units_forward.h"
#include "pairs.h"
#include "rows.h"
#include "simd.h"

#if defined(__AVX512BF16__)
#define DF_BF16_DOT 1
#endif

namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

#if !defined(__AMX_BF16__)  // whose kernels are in attention_units*.h

constexpr int NV = kPanel / VW;              // vectors in a panel
constexpr int PANELS = VW == 16 ? 2 : 1;     // panels whose scores of a block fit the register file at once
constexpr int ROWS = VW == 16 ? 8 : 4;       // rows of an accumulated product at once ...
constexpr int COLS = 2;                      // ... and its vectors
constexpr int kBlocksPerSum = 8;             // blocks of queries whose shares of dK and dV are summed on their own

// -- products of small matrices -------------------------------------------------------------------------------------------

// out[p] (8, 16) = rows (8, Dp) @ panels[p] (Dp, 16) for P panels at once: as many as the register file holds
// A function of its own, so that the compiler keeps all its pointers in registers.
template <int P>
DF_NOINLINE void tile_products(const float* const* rows, const float* const* panels, int64_t Dp, float* const* out) {
    constexpr int R = P * NV == 1 ? 8 : P * NV == 2 && VW == 16 ? 8 : 8 / (P * NV);
    for (int r0 = 0; r0 < kBlock; r0 += R) {
        Vec acc[R][P * NV] = {};
        const float* row[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) row[r] = rows[r0 + r];
        for (int64_t d = 0; d < Dp; ++d) {
            Vec key[P * NV];
#pragma GCC unroll 4
            for (int v = 0; v < P * NV; ++v) key[v] = load(panels[v / NV] + d * kPanel + v % NV * VW);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < P * NV; ++v) acc[r][v] += key[v] * row[r][d];
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < P * NV; ++v) store(out[v / NV] + (r0 + r) * kPanel + v % NV * VW, acc[r][v]);
    }
}

// A block of an accumulated product: acc (ROWS, C vectors) += weights (ROWS, 1) @ row (1, C vectors).
template <int C>
struct Accumulator {
    Vec acc[ROWS][C];

    DF_INLINE_MEMBER void clear() {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) acc[r][c] = Vec{};
    }
    DF_INLINE_MEMBER void read(float* const* rows, int64_t d) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) acc[r][c] = load(rows[r] + d + c * VW);
    }
    DF_INLINE_MEMBER void write(float* const* rows, int64_t d) const {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) store(rows[r] + d + c * VW, acc[r][c]);
    }
    template <class T>
    DF_INLINE_MEMBER void add(const float* weights, int64_t weight_stride, const T* row) {
        Vec x[C];
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) x[c] = load_as_float(row + c * VW);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) acc[r][c] += x[c] * weights[r * weight_stride];
    }
};

// -- forward --------------------------------------------------------------------------------------------------------------

// Where a panel's packed keys and values lie: text panels stay, image panels share a ring as long as a block looks back.
DF_INLINE int64_t panel_slot(const AttentionLayout& layout, int32_t panel) {
    const int32_t image = panel - layout.num_text_panels;
    return image < 0 ? panel : layout.num_text_panels + image % layout.image_window;
}

DF_INLINE int64_t num_slots(const AttentionLayout& layout) {
    const int32_t image = layout.num_panels - layout.num_text_panels;
    return layout.num_text_panels + (image < layout.image_window ? image : layout.image_window);
}

// How scores and outputs are computed from a head's packed keys: once in float, once with bfloat16's dot product.
template <class T>
struct FloatEngine {
    const AttentionArgs& a;
    int64_t Dp;
    bool values_in_place;
    float *rows, *keys, *values, *query;
    const float* query_row[kBlock];

    FloatEngine(const AttentionArgs& args, Arena& arena) : a(args), Dp(padded(args.D)) {
        values_in_place = sizeof(T) == 4 && a.value.stride_d == 1 && Dp == a.D;
        rows = arena.take<float>(kPanel * Dp);
        keys = arena.take<float>(num_slots(a.layout) * kPanel * Dp);
        values = arena.take<float>(values_in_place ? 0 : num_slots(a.layout) * kPanel * Dp);
        query = arena.take<float>(kBlock * Dp);
    }
    void pack(const AttentionTask& t, int32_t panel) {
        if (panel + 1 < a.layout.num_panels)
            for (int k = 0; k < kPanel; ++k)
                if (const int32_t next = a.layout.key_token[(panel + 1) * kPanel + k]; next >= 0) {
                    prefetch_row(row_of<const T>(a.key, t.batch, t.head, next), a.key.stride_d, a.D);
                    prefetch_row(row_of<const T>(a.value, t.batch, t.head, next), a.value.stride_d, a.D);
                }
        const int64_t slot = panel_slot(a.layout, panel);
        for (int k = 0; k < kPanel; ++k) {
            const int32_t token = a.layout.key_token[panel * kPanel + k];
            float* value = values + (slot * kPanel + k) * Dp;
            if (token < 0) {
                for (int64_t d = 0; d < Dp; ++d) rows[k * Dp + d] = 0;
                for (int64_t d = 0; d < Dp && !values_in_place; ++d) value[d] = 0;
                continue;
            }
            load_row(row_of<const T>(a.key, t.batch, t.head, token), a.key.stride_d, a.D, Dp, rows + k * Dp);
            if (!values_in_place)
                load_row(row_of<const T>(a.value, t.batch, t.head, token), a.value.stride_d, a.D, Dp, value);
        }
        transpose_panel(rows, Dp, keys + slot * kPanel * Dp);
    }
    void load_queries(const AttentionTask& t, const int32_t* tokens) {
        for (int r = 0; r < kBlock; ++r) {
            const T* p = row_of<const T>(a.query, t.batch, t.head, tokens[r]);
            if (sizeof(T) == 4 && a.query.stride_d == 1 && Dp == a.D) {
                query_row[r] = reinterpret_cast<const float*>(p);
                continue;
            }
            load_row(p, a.query.stride_d, a.D, Dp, query + r * Dp);
            query_row[r] = query + r * Dp;
        }
    }
    // scores (count, 8, 16) of the tiles
    void scores(const ActiveTile* tiles, int32_t count, float* out) {
        const auto panel = [&](int32_t x) { return keys + tiles[x].slot * kPanel * Dp; };
        int32_t x = 0;
        for (; x + PANELS <= count; x += PANELS) {
            const float* panels[PANELS];
            float* outs[PANELS];
            for (int p = 0; p < PANELS; ++p) {
                panels[p] = panel(x + p);
                outs[p] = out + int64_t(x + p) * kBlock * kPanel;
            }
            tile_products<PANELS>(query_row, panels, Dp, outs);
        }
        for (; x < count; ++x) {
            const float* last = panel(x);
            float* last_out = out + int64_t(x) * kBlock * kPanel;
            tile_products<1>(query_row, &last, Dp, &last_out);
        }
    }

    // out (8, Dp) = probabilities (8, keys of the tiles) @ values, by columns of C vectors from d
    template <int C, class V>
    void output_columns(const ActiveTile* tiles, int32_t count, const float* probabilities, const V* base, int64_t stride,
                        bool by_token, int64_t d, float* out) {
        for (int r0 = 0; r0 < kBlock; r0 += ROWS) {
            Accumulator<C> acc;
            acc.clear();
            float* out_rows[ROWS];
            for (int r = 0; r < ROWS; ++r) out_rows[r] = out + (r0 + r) * Dp;
            for (int32_t x = 0; x < count; ++x) {
                const float* p = probabilities + (int64_t(x) * kBlock + r0) * kPanel;
                const int64_t slot = tiles[x].slot * kPanel;
                const int32_t* token = a.layout.key_token + int64_t(tiles[x].panel) * kPanel;
                if (tiles[x].full) {
                    for (int k = 0; k < kPanel; ++k)
                        acc.add(p + k, kPanel, base + (by_token ? token[k] : slot + k) * stride + d);
                } else {
                    for (uint32_t left = tiles[x].columns; left; left &= left - 1) {
                        const int k = __builtin_ctz(left);
                        acc.add(p + k, kPanel, base + (by_token ? token[k] : slot + k) * stride + d);
                    }
                }
            }
            acc.write(out_rows, d);
        }
    }
    template <class V>
    void output_from(const ActiveTile* tiles, int32_t count, const float* probabilities, const V* base, int64_t stride,
                     bool by_token, float* out) {
        int64_t d = 0;
        for (; d + COLS * VW <= Dp; d += COLS * VW)
            output_columns<COLS>(tiles, count, probabilities, base, stride, by_token, d, out);
        for (; d < Dp; d += VW) output_columns<1>(tiles, count, probabilities, base, stride, by_token, d, out);
    }
    void output(const AttentionTask& t, const ActiveTile* tiles, int32_t count, float* probabilities, float* out) {
        if (values_in_place)
            output_from(tiles, count, probabilities, row_of<const T>(a.value, t.batch, t.head, 0), a.value.stride_s, true,
                        out);
        else
            output_from(tiles, count, probabilities, values, Dp, false, out);
    }
};

#if defined(DF_BF16_DOT)
// vdpbf16ps multiplies pairs: of neighbouring head elements for scores, of neighbouring keys for outputs.
struct BFloat16Engine {
    const AttentionArgs& a;
    int64_t Dp;
    TokenRows<kPanel> panel_rows;
    TokenRows<kBlock> query_rows;
    Word *keys, *values, *query;

    BFloat16Engine(const AttentionArgs& args, Arena& arena) : a(args), Dp(padded(args.D)), panel_rows(a.D, arena), query_rows(a.D, arena) {
        keys = arena.take<Word>(num_slots(a.layout) * kPanel * Dp / 2);
        values = arena.take<Word>(num_slots(a.layout) * kPanel * Dp / 2);
        query = arena.take<Word>(kBlock * Dp / 2);
    }
    void pack(const AttentionTask& t, int32_t panel) {
        const int32_t* tokens = a.layout.key_token + panel * kPanel;
        const int64_t begin = panel_slot(a.layout, panel) * kPanel * Dp / 2;
        panel_rows.find(a.key, t, tokens, kPanel, a.layout.seq_len);
        pair_elements(panel_rows, Dp, keys + begin);
        panel_rows.find(a.value, t, tokens, kPanel, a.layout.seq_len);
        pair_keys(panel_rows, Dp, values + begin);
    }
    void load_queries(const AttentionTask& t, const int32_t* tokens) {
        query_rows.find(a.query, t, tokens, kBlock, a.layout.seq_len);
        query_rows.copy(Dp, reinterpret_cast<uint16_t*>(query));
    }
    void scores(const ActiveTile* tiles, int32_t count, float* out) {
        for (int32_t x = 0; x < count; ++x) tile_scores(keys + tiles[x].slot * kPanel * Dp / 2, out + int64_t(x) * kBlock * kPanel);
    }
    void tile_scores(const Word* p, float* out) {
        const int64_t stride = Dp / 2;
        __m512 acc[kBlock];
#pragma GCC unroll 8
        for (int r = 0; r < kBlock; ++r) acc[r] = _mm512_setzero_ps();
        for (int64_t d = 0; d < stride; ++d) {
            const __m512bh key = (__m512bh)_mm512_loadu_si512(p + d * kPanel);
#pragma GCC unroll 8
            for (int r = 0; r < kBlock; ++r)
                acc[r] = _mm512_dpbf16_ps(acc[r], key, (__m512bh)_mm512_set1_epi32(query[r * stride + d]));
        }
#pragma GCC unroll 8
        for (int r = 0; r < kBlock; ++r) _mm512_storeu_ps(out + r * kPanel, acc[r]);
    }
    template <int C>
    void output_columns(const ActiveTile* tiles, int32_t count, const Word* probabilities, int64_t d, float* out) {
        __m512 acc[kBlock][C];
#pragma GCC unroll 8
        for (int r = 0; r < kBlock; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) acc[r][c] = _mm512_setzero_ps();
        for (int32_t x = 0; x < count; ++x) {
            const Word* p = probabilities + int64_t(x) * kBlock * kPanel;  // the tile's first half holds the pairs
            const Word* base = values + tiles[x].slot * kPanel / 2 * Dp + d;
            // bit k: some row attends to key 2 k or 2 k + 1
            uint32_t pairs = (tiles[x].columns | tiles[x].columns >> 1) & 0x5555;
            for (; pairs; pairs &= pairs - 1) {
                const int k = __builtin_ctz(pairs) / 2;
                __m512bh value[C];
#pragma GCC unroll 2
                for (int c = 0; c < C; ++c) value[c] = (__m512bh)_mm512_loadu_si512(base + k * Dp + c * 16);
#pragma GCC unroll 8
                for (int r = 0; r < kBlock; ++r) {
                    const __m512bh weight = (__m512bh)_mm512_set1_epi32(p[r * kPanel / 2 + k]);
#pragma GCC unroll 2
                    for (int c = 0; c < C; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], weight, value[c]);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kBlock; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) _mm512_storeu_ps(out + r * Dp + d + c * 16, acc[r][c]);
    }
    void output(const AttentionTask&, const ActiveTile* tiles, int32_t count, float* probabilities, float* out) {
        for (int32_t x = 0; x < count; ++x) {  // to bfloat16 in place
            float* p = probabilities + int64_t(x) * kBlock * kPanel;
            for (int r = 0; r < kBlock; ++r)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(p) + r * kPanel),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p + r * kPanel)));
        }
        const Word* pairs = reinterpret_cast<const Word*>(probabilities);
        int64_t d = 0;
        for (; d + 32 <= Dp; d += 32) output_columns<2>(tiles, count, pairs, d, out);
        for (; d < Dp; d += 16) output_columns<1>(tiles, count, pairs, d, out);
    }
};
#endif

template <class T>
struct EngineOf { typedef FloatEngine<T> type; };
#if defined(DF_BF16_DOT)
template <>
struct EngineOf<BFloat16> { typedef BFloat16Engine type; };
#endif

struct ForwardScratch {
    float *scores, *out;
    ActiveTile* tiles;
    int32_t* packed;  // (num_slots) which panel is packed there, or -1
};

DF_INLINE ForwardScratch forward_arrays(const AttentionLayout& layout, int64_t Dp, Arena& arena) {
    ForwardScratch s;
    s.scores = arena.take<float>(int64_t(layout.num_panels) * kPanel * kBlock);
    s.out = arena.take<float>(kBlock * Dp);
    s.tiles = arena.take<ActiveTile>(layout.num_panels);
    s.packed = arena.take<int32_t>(num_slots(layout));
    return s;
}

// scores (8, keys) -> exp(scale * (scores - max)), their sums and lse
DF_INLINE void softmax(const ActiveTile* tiles, int32_t count, float scale, float* scores, float* sum, float* lse) {
    const ScoreScale by(scale);
    const float power = by.size * LOG2E;
    for (int64_t x = 0; by.sign != 1 && x < int64_t(count) * kBlock * kPanel; x += VW)  // rare
        store(scores + x, load(scores + x) * by.sign);
    float row_max[kBlock];
    for (int r = 0; r < kBlock; ++r) {
        Vec highest = splat(minus_infinity());
        for (int32_t x = 0; x < count; ++x)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                Vec s = load(scores + (int64_t(x) * kBlock + r) * kPanel + v * VW);
                if (!tiles[x].full) s = select(tiles[x].rows[r], v, s, splat(minus_infinity()));
                highest = max(s, highest);
            }
        row_max[r] = horizontal_max(highest);
    }
    for (int r = 0; r < kBlock; ++r) {
        Vec total = Vec{};
        for (int32_t x = 0; x < count; ++x)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                float* p = scores + (int64_t(x) * kBlock + r) * kPanel + v * VW;
                Vec e = exp2((load(p) - row_max[r]) * power);
                if (!tiles[x].full) e = select(tiles[x].rows[r], v, e, Vec{});
                store(p, e);
                total += e;
            }
        sum[r] = horizontal_sum(total);
    }
    for (int r = 0; r < kBlock; ++r)
        lse[r] = sum[r] == 0 ? minus_infinity() : row_max[r] * by.size + __builtin_logf(sum[r]);
}

template <class T>
void forward_of(const AttentionArgs& a, const AttentionTask& t, char* scratch) {
    const AttentionLayout& layout = a.layout;
    Arena arena{scratch, 0};
    typename EngineOf<T>::type engine(a, arena);
    const int64_t Dp = engine.Dp;
    const ForwardScratch s = forward_arrays(layout, Dp, arena);
    const int64_t text_length = a.text_lengths ? a.text_lengths[t.batch] : int64_t(layout.num_text_panels) * kPanel;
    for (int64_t slot = 0; slot < num_slots(layout); ++slot) s.packed[slot] = -1;

    for (int32_t block = t.block_begin; block < t.block_end && take_blocks(t, block, block + 1); ++block) {
        const int32_t* tokens = layout.query_token + block * kBlock;
        int32_t rows[kBlock], count = 0;
        for (int r = 0; r < kBlock; ++r) {
            rows[r] = tokens[r] < 0 ? tokens[0] : tokens[r];
            prefetch_row_for_write(row_of<T>(a.out, t.batch, t.head, rows[r]), a.out.stride_d, a.D);
            if (block + 1 < t.block_end && tokens[kBlock + r] >= 0)
                prefetch_row(row_of<const T>(a.query, t.batch, t.head, tokens[kBlock + r]), a.query.stride_d, a.D);
        }
        engine.load_queries(t, rows);
        for (int32_t x = layout.block_visits[block]; x < layout.block_visits[block + 1]; ++x) {
            const Visit visit = layout.panels_of_block[x];
            for (int32_t panel = visit.first; panel < visit.first + visit.count; ++panel) {
                if (!activate(layout, panel, visit.bits, text_length, s.tiles + count)) continue;
                const int64_t slot = s.tiles[count++].slot = panel_slot(layout, panel);
                if (s.packed[slot] != panel) {
                    engine.pack(t, panel);
                    s.packed[slot] = panel;
                }
            }
        }
        engine.scores(s.tiles, count, s.scores);
        float sum[kBlock], lse[kBlock];
        softmax(s.tiles, count, a.scale, s.scores, sum, lse);
        engine.output(t, s.tiles, count, s.scores, s.out);
        for (int r = 0; r < kBlock && tokens[r] >= 0; ++r) {
            if (sum[r] == 0)
                for (int64_t d = 0; d < Dp; ++d) s.out[r * Dp + d] = 0;
            store_row(s.out + r * Dp, sum[r] == 0 ? 0 : 1 / sum[r], row_of<T>(a.out, t.batch, t.head, tokens[r]),
                      a.out.stride_d, a.D);
            if (a.lse.data) *row_of<float>(a.lse, t.batch, t.head, tokens[r]) = lse[r];
        }
    }
}

// -- backward ---------------------------------------------------------------------------------------------------------------

// With P the probabilities, O the output, dO its gradient and dL that of lse:
//   dV = P^T dO;  dS = scale * P * (dO V^T - delta), delta = rowsum(dO * O) - dL;  dQ = dS K;  dK = dS^T Q.
// Panels of keys are the outer loop, so dK and dV of a panel stay in the first-level cache; dQ grows in memory, always in
// the order of the panels. A task may make only dQ of some blocks or only dK, dV of some panels: the same sums in the
// same order, so splitting a head between threads does not change a bit.
template <class T>
struct BackwardScratch {
    float *delta, *keys, *values, *key_rows, *grad_key, *grad_value, *total_key, *total_value, *query, *grad_out, *tile_p,
        *tile_ds, *grad_query;

    static bool in_place(const AttentionArgs& a) { return sizeof(T) == 4 && a.D == padded(a.D); }

    BackwardScratch(const AttentionArgs& a, Arena& arena) {
        const int64_t Dp = padded(a.D);
        delta = arena.take<float>(a.layout.num_blocks * kBlock);
        keys = arena.take<float>(kPanel * Dp);
        values = arena.take<float>(kPanel * Dp);
        key_rows = arena.take<float>(kPanel * Dp);
        grad_key = arena.take<float>(kPanel * Dp);
        grad_value = arena.take<float>(kPanel * Dp);
        total_key = arena.take<float>(kPanel * Dp);
        total_value = arena.take<float>(kPanel * Dp);
        query = arena.take<float>(kBlock * Dp);
        grad_out = arena.take<float>(kBlock * Dp);
        tile_p = arena.take<float>(kBlock * kPanel);
        tile_ds = arena.take<float>(kBlock * kPanel);
        grad_query = arena.take<float>(in_place(a) ? 0 : a.layout.num_blocks * kBlock * Dp);
    }
};

// out (8 or 16 rows, Dp) += weights^T or weights (rows, n) @ in (n, Dp), where bit k of `which` says that row k of `in`
// takes part. weight(r, k) = weights[r * row_stride + k * k_stride].
template <int C>
DF_INLINE void add_product_columns(float* const* out, int rows, const float* weights, int64_t row_stride,
                                   int64_t k_stride, const float* const* in, uint32_t which, int64_t d) {
    for (int r0 = 0; r0 < rows; r0 += ROWS) {
        Accumulator<C> acc;
        acc.read(out + r0, d);
        for (uint32_t left = which; left; left &= left - 1) {
            const int k = __builtin_ctz(left);
            acc.add(weights + r0 * row_stride + k * k_stride, row_stride, in[k] + d);
        }
        acc.write(out + r0, d);
    }
}

DF_INLINE void add_product(float* const* out, int rows, const float* weights, int64_t row_stride, int64_t k_stride,
                           const float* const* in, uint32_t which, int64_t Dp) {
    int64_t d = 0;
    for (; d + COLS * VW <= Dp; d += COLS * VW)
        add_product_columns<COLS>(out, rows, weights, row_stride, k_stride, in, which, d);
    for (; d < Dp; d += VW) add_product_columns<1>(out, rows, weights, row_stride, k_stride, in, which, d);
}

// Rows of a block as floats: where they lie, or copied. Slots without a token point at zeros.
template <class T>
DF_INLINE void block_rows(const Strided& x, const AttentionTask& t, const int32_t* tokens, int64_t D, int64_t Dp,
                          float* copy, const float** rows) {
    for (int r = 0; r < kBlock; ++r) {
        rows[r] = copy + r * Dp;
        if (tokens[r] < 0) {
            for (int64_t d = 0; d < Dp; ++d) copy[r * Dp + d] = 0;
            continue;
        }
        const T* p = row_of<const T>(x, t.batch, t.head, tokens[r]);
        if (sizeof(T) == 4 && x.stride_d == 1 && D == Dp) rows[r] = reinterpret_cast<const float*>(p);
        else load_row(p, x.stride_d, D, Dp, copy + r * Dp);
    }
}

template <class T>
void backward_of(const AttentionArgs& a, const AttentionTask& t, char* scratch) {
    const AttentionLayout& layout = a.layout;
    const int64_t D = a.D, Dp = padded(D);
    Arena arena{scratch, 0};
    BackwardScratch<T> s(a, arena);
    const bool in_place = BackwardScratch<T>::in_place(a);
    const int64_t text_length = a.text_lengths ? a.text_lengths[t.batch] : int64_t(layout.num_text_panels) * kPanel;
    // dQ of a query slot; a slot without a token adds zeros to the block's own first row, which no other thread has.
    const auto grad_query_row = [&](int32_t block, int r) -> float* {
        const int32_t* tokens = layout.query_token + block * kBlock;
        if (!in_place) return s.grad_query + (int64_t(block) * kBlock + r) * Dp;
        return reinterpret_cast<float*>(row_of<T>(a.grad_query, t.batch, t.head, tokens[r] < 0 ? tokens[0] : tokens[r]));
    };
    compute_delta<T>(a, t, s.delta, s.grad_out, s.query);
    if (t.for_query)
        for (int32_t block = t.block_begin; block < t.block_end; ++block)
            for (int r = 0; r < kBlock; ++r) {
                float* row = grad_query_row(block, r);
                for (int64_t d = 0; d < Dp; ++d) row[d] = 0;
            }

    float* grad_key_rows[kPanel];
    float* grad_value_rows[kPanel];
    const float* key_rows[kPanel];
    for (int k = 0; k < kPanel; ++k) {
        grad_key_rows[k] = s.grad_key + k * Dp;
        grad_value_rows[k] = s.grad_value + k * Dp;
        key_rows[k] = s.key_rows + k * Dp;
    }
    for (int32_t panel = t.panel_begin; panel < t.panel_end; ++panel) {
        const int32_t* key_tokens = layout.key_token + panel * kPanel;
        const auto load_panel = [&](const Strided& x, float* rows) {
            for (int k = 0; k < kPanel; ++k) {
                if (key_tokens[k] >= 0)
                    load_row(row_of<const T>(x, t.batch, t.head, key_tokens[k]), x.stride_d, D, Dp, rows + k * Dp);
                else
                    for (int64_t d = 0; d < Dp; ++d) rows[k * Dp + d] = 0;
            }
        };
        load_panel(a.value, s.key_rows);
        transpose_panel(s.key_rows, Dp, s.values);
        load_panel(a.key, s.key_rows);
        transpose_panel(s.key_rows, Dp, s.keys);
        // A text key is seen by every query after it: sums of sums keep the rounding of such long sums small.
        int blocks_summed = 0;
        const auto flush = [&] {
            for (int64_t x = 0; x < kPanel * Dp; x += VW) {
                store(s.total_key + x, load(s.total_key + x) + load(s.grad_key + x));
                store(s.total_value + x, load(s.total_value + x) + load(s.grad_value + x));
                store(s.grad_key + x, Vec{});
                store(s.grad_value + x, Vec{});
            }
            blocks_summed = 0;
        };
        for (int64_t x = 0; x < kPanel * Dp; ++x)
            s.grad_key[x] = s.grad_value[x] = s.total_key[x] = s.total_value[x] = 0;

        for (int32_t x = layout.panel_visits[panel]; x < layout.panel_visits[panel + 1]; ++x) {
            const Visit visit = layout.blocks_of_panel[x];
            ActiveTile tile;
            if (!activate(layout, panel, visit.bits, text_length, &tile)) continue;
            const int32_t begin = visit.first > t.block_begin ? visit.first : t.block_begin;
            const int32_t end = visit.first + visit.count < t.block_end ? visit.first + visit.count : t.block_end;
            for (int32_t block = begin; block < end; ++block) {
                const int32_t* tokens = layout.query_token + block * kBlock;
                const float* query[kBlock];
                const float* grad_out[kBlock];
                block_rows<T>(a.query, t, tokens, D, Dp, s.query, query);
                block_rows<T>(a.grad_out, t, tokens, D, Dp, s.grad_out, grad_out);
                tile_products<1>(query, &s.keys, Dp, &s.tile_p);
                tile_products<1>(grad_out, &s.values, Dp, &s.tile_ds);
                for (int r = 0; r < kBlock; ++r) {
                    float lse = 0;
                    if (tokens[r] >= 0) lse = *row_of<const float>(a.lse, t.batch, t.head, tokens[r]);
                    const float shift = lse == minus_infinity() ? 0 : lse, delta = s.delta[block * kBlock + r];
#pragma GCC unroll 4
                    for (int v = 0; v < NV; ++v) {
                        float* p = s.tile_p + r * kPanel + v * VW;
                        float* ds = s.tile_ds + r * kPanel + v * VW;
                        // At most 1, however a large score is rounded; one factor less would round lse once more.
                        Vec probability = exp2(min((load(p) * a.scale - shift) * LOG2E, Vec{}));
                        Vec gradient = probability * (load(ds) - delta) * a.scale;
                        if (!tile.full) {
                            probability = select(tile.rows[r], v, probability, Vec{});
                            gradient = select(tile.rows[r], v, gradient, Vec{});
                        }
                        store(p, probability);
                        store(ds, gradient);
                    }
                }
                if (t.for_query) {
                    float* grad_query[kBlock];
                    for (int r = 0; r < kBlock; ++r) grad_query[r] = grad_query_row(block, r);
                    if (in_place && tokens[kBlock - 1] < 0) {  // rows that share memory must not be added to together
                        for (int r = 0; r < kBlock; ++r)
                            if (tokens[r] < 0) grad_query[r] = s.query + r * Dp;
                        // s.query holds zeros there, and zero weights keep them zero
                    }
                    add_product(grad_query, kBlock, s.tile_ds, kPanel, 1, key_rows, tile.columns, Dp);
                }
                if (t.for_key) {
                    add_product(grad_key_rows, kPanel, s.tile_ds, 1, kPanel, query, 0xff, Dp);
                    add_product(grad_value_rows, kPanel, s.tile_p, 1, kPanel, grad_out, 0xff, Dp);
                    if (++blocks_summed == kBlocksPerSum) flush();
                }
            }
        }
        if (!t.for_key) continue;
        flush();
        for (int k = 0; k < kPanel; ++k)
            if (key_tokens[k] >= 0) {
                store_row(s.total_key + k * Dp, 1, row_of<T>(a.grad_key, t.batch, t.head, key_tokens[k]),
                          a.grad_key.stride_d, D);
                store_row(s.total_value + k * Dp, 1, row_of<T>(a.grad_value, t.batch, t.head, key_tokens[k]),
                          a.grad_value.stride_d, D);
            }
    }
    if (t.for_query && !in_place)
        for (int32_t slot = t.block_begin * kBlock; slot < t.block_end * kBlock; ++slot)
            if (layout.query_token[slot] >= 0)
                store_row(s.grad_query + int64_t(slot) * Dp, 1,
                          row_of<T>(a.grad_query, t.batch, t.head, layout.query_token[slot]), a.grad_query.stride_d, D);
}

// -- scratch memory ---------------------------------------------------------------------------------------------------------

template <class T>
size_t forward_scratch_of(const AttentionArgs& a) {
    Arena arena{nullptr, 0};
    typename EngineOf<T>::type engine(a, arena);
    forward_arrays(a.layout, engine.Dp, arena);
    return arena.used;
}

template <class T>
size_t backward_scratch_of(const AttentionArgs& a) {
    Arena arena{nullptr, 0};
    BackwardScratch<T> scratch(a, arena);
    return arena.used;
}

#else
template <class T>
size_t forward_scratch_of(const AttentionArgs& a) { return unit_scratch<UnitForward<T>>(a); }
template <class T>
void forward_of(const AttentionArgs& a, const AttentionTask& t, char* scratch) { forward_with_units<T>(a, t, scratch); }
template <class T>
size_t backward_scratch_of(const AttentionArgs& a) { return unit_scratch<UnitBackward<T>>(a); }
template <class T>
void backward_of(const AttentionArgs& a, const AttentionTask& t, char* scratch) { backward_with_units<T>(a, t, scratch); }
#endif

// -- what the driver calls ----------------------------------------------------------------------------------------------------

size_t forward_scratch(const AttentionArgs& a) {
    return with_type(a.dtype, [&](auto zero) { return forward_scratch_of<decltype(zero)>(a); });
}

void forward(const AttentionArgs& a, const AttentionTask& t, char* scratch) {
    with_type(a.dtype, [&](auto zero) { forward_of<decltype(zero)>(a, t, scratch); });
}

size_t backward_scratch(const AttentionArgs& a) {
    return with_type(a.dtype, [&](auto zero) { return backward_scratch_of<decltype(zero)>(a); });
}

void backward(const AttentionArgs& a, const AttentionTask& t, char* scratch) {
    with_type(a.dtype, [&](auto zero) { backward_of<decltype(zero)>(a, t, scratch); });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {forward_scratch, forward, backward_scratch, backward};

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
