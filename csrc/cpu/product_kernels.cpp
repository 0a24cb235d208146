// Products of matrices, for one instruction set: see product.h.
//
// A sum is taken in the order of the depth, by blocks of a fixed length: it depends on nothing but its two lanes.
#include "product.h"

#include <algorithm>

#include "product_format.h"
#include "product_units.h"
#include "simd.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

#if defined(__AMX_BF16__)
Format format_of(const Operand& a, const Operand& b) { return unit_format(a, b); }
#else
constexpr int64_t kWords = 512;        // of 32 bits, of the depth at once
constexpr int64_t kWordsInARow = 128;  // whose sum is taken one by one: longer rows round more often than eager's
static_assert(kWords <= kMaxWords, "there is memory for them");

template <class T>
DF_INLINE void load_words(const T* p, Words* words) {
    Vec x[NV];
    for (int v = 0; v < NV; ++v) x[v] = load_as_float(p + v * VW);
    std::memcpy(words, x, sizeof(*words));
}

// A panel's words from depth d on -> (depth, 16); lanes that the operand does not have are 0.
template <class T>
DF_NOINLINE void pack_words(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    const T* p = static_cast<const T*>(x.data) + lane * x.stride_lane + d * x.stride_depth;
    const int64_t lanes = std::min<int64_t>(kPanel, x.lanes - lane);
    int64_t i = 0;
    if (x.stride_depth == 1 && lanes > 0) {
        for (; i + 16 <= depth; i += 16) {
            Words rows[16];
#pragma GCC unroll 16
            for (int l = 0; l < 16; ++l) load_words(p + (l < lanes ? l : 0) * x.stride_lane + i, &rows[l]);
            transpose(rows);
#pragma GCC unroll 16
            for (int l = 0; l < 16; ++l) store_words(out + (i + l) * kPanel, rows[l]);
        }
    } else if (x.stride_lane == 1 && lanes == kPanel) {
        Words words;
        for (; i < depth; ++i) {
            load_words(p + i * x.stride_depth, &words);
            store_words(out + i * kPanel, words);
        }
    }
    for (; i < depth; ++i) {
        T some[kPanel] = {};
        for (int64_t l = 0; l < lanes; ++l) some[l] = p[l * x.stride_lane + i * x.stride_depth];
        Words words;
        load_words(some, &words);
        store_words(out + i * kPanel, words);
    }
}

struct FloatDot {
    static DF_INLINE_MEMBER Vec add(Vec sum, Vec b, const Word* a) {
        return sum + b * *reinterpret_cast<const float*>(a);
    }
};

// out (TILE_ROWS, TILE_COLUMNS) = or += rows of a's panel times PANELS panels of b, all of `words` words.
template <class Dot>
DF_NOINLINE void tile_product(const Word* a, const Word* b, int64_t words, float* out, int64_t stride, bool add) {
    for (int64_t from = 0; from == 0 || from < words; from += kWordsInARow) {
        const int64_t to = std::min(from + kWordsInARow, words);
        Vec sum[TILE_ROWS][PANELS * NV] = {};
        for (int64_t w = from; w < to; ++w) {
            Vec columns[PANELS * NV];
#pragma GCC unroll 4
            for (int v = 0; v < PANELS * NV; ++v)
                columns[v] = load(reinterpret_cast<const float*>(b + (v / NV * words + w) * kPanel + v % NV * VW));
#pragma GCC unroll 16
            for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < PANELS * NV; ++v) sum[r][v] = Dot::add(sum[r][v], columns[v], a + w * kPanel + r);
        }
#pragma GCC unroll 16
        for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < PANELS * NV; ++v) {
                float* total = out + r * stride + v * VW;
                store(total, add || from ? load(total) + sum[r][v] : sum[r][v]);
            }
    }
}

#if defined(__AVX512BF16__)
struct PairDot {
    static DF_INLINE_MEMBER Vec add(Vec sum, Vec b, const Word* a) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(*a));
    }
};
#endif

Pack pack_as_floats(DType dtype) {
    return with_type(dtype, [](auto zero) -> Pack { return pack_words<decltype(zero)>; });
}

Format format_of(const Operand& a, const Operand& b) {
#if defined(__AVX512BF16__)
    if (are_pairs(a, b))
        return {2 * kWords, 2, 1, 1, PANEL_ROWS, TILE_ROWS, pack_pairs, pack_pairs, tile_product<PairDot>, nullptr, nullptr};
#endif
    return {kWords, 1, 1, 1, PANEL_ROWS, TILE_ROWS, pack_as_floats(a.dtype), pack_as_floats(b.dtype), tile_product<FloatDot>,
            nullptr, nullptr};
}
#endif

constexpr int64_t kDepthOfPanels = 256;  // of all panels of b, packed at once
constexpr int64_t kMaxColumns = 4 * kColumnsAtOnce;  // for which b is packed, where few words leave room
constexpr int64_t kSumsAtOnce = 64;                  // a cache line of their lower bits, two of the upper

// -- packed sums --------------------------------------------------------------------------------------------------------
// Plain loops: compilers make vectors of them.

template <bool add>
DF_INLINE float sum_of(uint16_t upper, uint8_t lower, float x) {
    return add ? bits_to_float(uint32_t(upper) << 16 | uint32_t(lower) << 8) + x : x;
}

// Sums of 24 bits, rounded to nearest, ties to even. A NaN's lower bits are dropped, lest it rounds up to 0.
template <bool add>
DF_INLINE void keep_sums(const float* __restrict x, int64_t count, uint16_t* __restrict upper, uint8_t* __restrict lower) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = float_to_bits(sum_of<add>(upper[i], lower[i], x[i]));
        const uint32_t rounded = bits + 0x7f + (bits >> 8 & 1);
        const uint32_t kept = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : rounded;
        upper[i] = uint16_t(kept >> 16);
        lower[i] = uint8_t(kept >> 8);
    }
}

// The results, where the upper 16 bits were.
template <bool add, class T>
DF_INLINE void finish_sums(const float* x, int64_t count, uint16_t* upper, const uint8_t* lower) {
    float sums[kSumsAtOnce] = {};
    T results[kSumsAtOnce];
    for (int64_t i = 0; i < count; ++i) sums[i] = sum_of<add>(upper[i], lower[i], x[i]);
    for (int64_t i = 0; i < kSumsAtOnce; i += VW) store_from_float(results + i, load(sums + i));
    std::memcpy(upper, results, size_t(count) * sizeof(T));
}

template <bool add>
DF_INLINE void put_sums(const float* x, int64_t count, const PackedSums& sums, bool last) {
    if (!last) keep_sums<add>(x, count, sums.upper, sums.lower);
    else if (sums.dtype == DType::bfloat16) finish_sums<add, BFloat16>(x, count, sums.upper, sums.lower);
    else finish_sums<add, Half>(x, count, sums.upper, sums.lower);
}

// x (rows, columns) of kMaxColumns. The sums come from memory: they are asked for two rows ahead, as rows are too short for
// caches to foresee them.
DF_NOINLINE void put_rows(const float* x, int64_t rows, int64_t columns, const PackedSums& sums, int64_t stride, bool add,
                          bool last) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; c += kSumsAtOnce) {
            if (r + 2 < rows) {
                const PackedSums ahead = sums.from((r + 2) * stride + c);
                prefetch_for_write(ahead.upper);
                prefetch_for_write(ahead.upper + kSumsAtOnce / 2);
                prefetch_for_write(ahead.lower);
            }
            const float* from = x + r * kMaxColumns + c;
            const PackedSums to = sums.from(r * stride + c);
            const int64_t count = std::min(kSumsAtOnce, columns - c);
            if (add) put_sums<true>(from, count, to, last);
            else put_sums<false>(from, count, to, last);
        }
}

// -- tiles --------------------------------------------------------------------------------------------------------------

// A tile of which only some rows and columns are in the result.
void part_of_tile(const Format& format, const Word* a, const Word* b, int64_t words, float* out, int64_t stride,
                  bool add, int64_t rows, int64_t columns) {
    float whole[MAX_TILE_ROWS * TILE_COLUMNS] = {};
    const size_t width = columns * sizeof(float);
    if (add)
        for (int64_t r = 0; r < rows; ++r) std::memcpy(whole + r * TILE_COLUMNS, out + r * stride, width);
    format.product(a, b, words, whole, TILE_COLUMNS, add);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * stride, whole + r * TILE_COLUMNS, width);
}

// out (rows, columns) = or += a's panel times b's panels.
void panel_product(const Format& format, const Word* a, const Word* b, int64_t words, float* out, int64_t stride,
                   bool add, int64_t rows, int64_t columns) {
    for (int64_t c = 0; c < columns; c += TILE_COLUMNS)
        for (int64_t r = 0; r < rows; r += format.tile_rows) {
            const Word* b_panels = b + c * words;
            float* tile = out + r * stride + c;
            if (r + format.tile_rows <= rows && c + TILE_COLUMNS <= columns)
                format.product(a + r, b_panels, words, tile, stride, add);
            else
                part_of_tile(format, a + r, b_panels, words, tile, stride, add, std::min(format.tile_rows, rows - r),
                             std::min<int64_t>(TILE_COLUMNS, columns - c));
        }
}

// Words of a lane's part of the depth.
int64_t words_of(const Format& format, int64_t depth) {
    return format.parts * multiple(multiple(depth, format.elements) / format.elements, format.words_unit);
}

// Panels of b. A step of the depth at a time for all of them: if lanes lie side by side, two panels share cache lines.
void pack_panels(const Format& format, const Operand& b, int64_t column, int64_t panels, int64_t d, int64_t depth, Word* out) {
    const int64_t words = words_of(format, depth);
    for (int64_t i = 0; i == 0 || i < depth; i += kDepthOfPanels)
        for (int64_t x = 0; x < panels; ++x)
            format.pack_b(b, column + x * kPanel, d + i, std::min(kDepthOfPanels, depth - i),
                          out + (x * words + words_of(format, i)) * kPanel);
}

void multiply(const Product& p, void* scratch) {
    const Format format = format_of(p.a, p.b);
    Word* b_panels = static_cast<Word*>(scratch);
    Word* a_panel = b_panels + kColumnsAtOnce * kMaxWords;
    float* panel = reinterpret_cast<float*>(a_panel + MAX_TILE_ROWS * kMaxWords);
    const int64_t most_words = std::max<int64_t>(1, words_of(format, std::min(format.depth, p.depth)));
    const int64_t columns_at_once = std::min(kColumnsAtOnce * (kMaxWords / most_words), kMaxColumns);
    if (format.begin) format.begin();
    for (int64_t column = 0; column < p.b.lanes; column += columns_at_once) {
        const int64_t columns = std::min(columns_at_once, p.b.lanes - column);
        for (int64_t d = 0; d == 0 || d < p.depth; d += format.depth) {
            const int64_t depth = std::min(format.depth, p.depth - d), words = words_of(format, depth);
            const int64_t tiles = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
            pack_panels(format, p.b, column, tiles * PANELS, d, depth, b_panels);
            for (int64_t row = 0; row < p.a.lanes; row += format.panel_rows) {
                format.pack_a(p.a, row, d, depth, a_panel);
                const int64_t rows = std::min(format.panel_rows, p.a.lanes - row), at = row * p.stride_out + column;
                const bool add = p.add || d > 0;
                if (p.out) {
                    panel_product(format, a_panel, b_panels, words, p.out + at, p.stride_out, add, rows, columns);
                } else {
                    panel_product(format, a_panel, b_panels, words, panel, kMaxColumns, false, rows, columns);
                    put_rows(panel, rows, columns, p.sums.from(at), p.stride_out, add, p.last && d + depth == p.depth);
                }
            }
        }
    }
    if (format.end) format.end();
}

}  // namespace

extern const ProductKernels product_kernels;
const ProductKernels product_kernels = {((kColumnsAtOnce + MAX_TILE_ROWS) * kMaxWords + MAX_TILE_ROWS * kMaxColumns) * 4,
                                        PANEL_ROWS, TILE_COLUMNS, multiply};

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
