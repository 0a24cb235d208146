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

Pack pack_as_floats(CodebookDType dtype) {
    switch (dtype) {
        case CodebookDType::float16: return pack_words<Half>;
        case CodebookDType::bfloat16: return pack_words<BFloat16>;
        default: return pack_words<float>;
    }
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

void multiply(const Product& p, void* scratch) {
    const Format format = format_of(p.a, p.b);
    Word* b_panels = static_cast<Word*>(scratch);
    Word* a_panel = b_panels + kColumnsAtOnce * kMaxWords;
    if (format.begin) format.begin();
    for (int64_t column = 0; column < p.b.lanes; column += kColumnsAtOnce) {
        const int64_t columns = std::min(kColumnsAtOnce, p.b.lanes - column);
        for (int64_t d = 0; d == 0 || d < p.depth; d += format.depth) {
            const int64_t depth = std::min(format.depth, p.depth - d);
            const int64_t words =
                format.parts * multiple(multiple(depth, format.elements) / format.elements, format.words_unit);
            const int64_t tiles = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
            for (int64_t x = 0; x < tiles * PANELS; ++x)
                format.pack_b(p.b, column + x * kPanel, d, depth, b_panels + x * words * kPanel);
            for (int64_t row = 0; row < p.a.lanes; row += format.panel_rows) {
                format.pack_a(p.a, row, d, depth, a_panel);
                panel_product(format, a_panel, b_panels, words, p.out + row * p.stride_out + column, p.stride_out,
                              p.add || d > 0, std::min(format.panel_rows, p.a.lanes - row), columns);
            }
        }
    }
    if (format.end) format.end();
}

// -- packed sums --------------------------------------------------------------------------------------------------------
// Plain loops: compilers make vectors of them.

void unpack_sums(const PackedSums& packed, int64_t begin, int64_t end, float* sums) {
    const uint16_t* __restrict upper = packed.upper;
    const uint8_t* __restrict lower = packed.lower;
    float* __restrict out = sums;
    for (int64_t i = begin; i < end; ++i) out[i] = bits_to_float(uint32_t(upper[i]) << 16 | uint32_t(lower[i]) << 8);
}

void pack_sums(const float* sums, int64_t begin, int64_t end, const PackedSums& packed) {
    uint16_t* __restrict upper = packed.upper;
    uint8_t* __restrict lower = packed.lower;
    const float* __restrict in = sums;
    for (int64_t i = begin; i < end; ++i) {
        const uint32_t bits = float_to_bits(in[i]), rounded = bits + 0x7f + (bits >> 8 & 1);
        const uint32_t kept = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : rounded;  // a NaN must not round up to -0
        upper[i] = uint16_t(kept >> 16);
        lower[i] = uint8_t(kept >> 8);
    }
}

}  // namespace

extern const ProductKernels product_kernels;
const ProductKernels product_kernels = {(kColumnsAtOnce + MAX_TILE_ROWS) * kMaxWords * sizeof(Word), PANEL_ROWS, TILE_COLUMNS,
                                        multiply, unpack_sums, pack_sums};

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
