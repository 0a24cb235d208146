// Products of matrices, for one instruction set: see product.h.
//
// Both operands are packed by panels of 16 lanes. So whatever their strides and types, the innermost loop reads two
// streams: at every step of the depth some vectors of b, and numbers of a that each is multiplied with. The sums of a
// tile stay in registers, a's panel in the first-level cache, b's panels in the second.
//
// A sum is taken in the order of the depth, by blocks of kWordsInARow: it depends on nothing but its two lanes.
#include "product.h"

#include <algorithm>

#include "matrix_unit.h"
#include "simd.h"
#include "transpose.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int kPanel = 16;                    // lanes
constexpr int NV = kPanel / VW;               // vectors in a panel
constexpr int PANELS = VW == 16 ? 2 : 1;      // of b in a tile
constexpr int TILE_COLUMNS = PANELS * kPanel;
constexpr int TILE_ROWS = VW == 16 ? 14 : VW == 8 ? 6 : 4;       // as many sums as the register file holds
constexpr int PANEL_ROWS = kPanel / TILE_ROWS * TILE_ROWS;       // of a, that a panel of it has for its tiles
constexpr int MAX_TILE_ROWS = 2 * kPanel;                        // of any format
constexpr int64_t kWords = 512;               // of 32 bits, of the depth at once
constexpr int64_t kWordsInARow = 128;         // whose sum is taken one by one: longer rows round more often than eager's

static_assert(kColumnsAtOnce % TILE_COLUMNS == 0, "b's panels fill whole tiles");

// The smallest multiple of `unit` that is not below x.
constexpr int64_t multiple(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// -- packing ------------------------------------------------------------------------------------------------------------
// A word of a panel is a float. Or, for the dot product of bfloat16, two neighbours in the depth. Or, where only one of
// the operands is bfloat16, a float of the other as two that it is the sum of, to a relative 2^-16, and in the bfloat16
// one every element twice.

DF_INLINE void store_words(Word* p, const Words& x) { *reinterpret_cast<UnalignedWords*>(p) = x; }

struct Whole {
    static DF_INLINE_MEMBER Vec word(Vec x) { return x; }
};
#if defined(DF_AMX)
struct Halves {
    static DF_INLINE_MEMBER Vec word(Vec x) {
        // Cut off, not rounded, so that the upper half stays finite; infinity has no lower one, which would be NaN.
        const WordVec bits = (WordVec)x, upper = bits & 0xffff0000u;
        const WordVec lower = (WordVec)(x - (Vec)upper) + 0x8000u;
        const IntVec finite = (bits & 0x7f800000u) != 0x7f800000u;
        return (Vec)(upper >> 16 | (lower & 0xffff0000u & (WordVec)finite));
    }
};
struct Twice {
    static DF_INLINE_MEMBER Vec word(Vec x) { return (Vec)((WordVec)x >> 16 | ((WordVec)x & 0xffff0000u)); }
};
#endif

template <class Make, class T>
DF_INLINE void load_words(const T* p, Words* words) {
    Vec x[NV];
    for (int v = 0; v < NV; ++v) x[v] = Make::word(load_as_float(p + v * VW));
    std::memcpy(words, x, sizeof(*words));
}

// A panel's words from depth d on -> (depth, 16); lanes that the operand does not have are 0.
template <class Make, class T>
DF_NOINLINE void pack_words(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    const T* p = static_cast<const T*>(x.data) + lane * x.stride_lane + d * x.stride_depth;
    const int64_t lanes = std::min<int64_t>(kPanel, x.lanes - lane);
    int64_t i = 0;
    if (x.stride_depth == 1 && lanes > 0) {
        for (; i + 16 <= depth; i += 16) {
            Words rows[16];
#pragma GCC unroll 16
            for (int l = 0; l < 16; ++l) load_words<Make>(p + (l < lanes ? l : 0) * x.stride_lane + i, &rows[l]);
            transpose(rows);
#pragma GCC unroll 16
            for (int l = 0; l < 16; ++l) store_words(out + (i + l) * kPanel, rows[l]);
        }
    } else if (x.stride_lane == 1 && lanes == kPanel) {
        Words words;
        for (; i < depth; ++i) {
            load_words<Make>(p + i * x.stride_depth, &words);
            store_words(out + i * kPanel, words);
        }
    }
    for (; i < depth; ++i) {
        T some[kPanel] = {};
        for (int64_t l = 0; l < lanes; ++l) some[l] = p[l * x.stride_lane + i * x.stride_depth];
        Words words;
        load_words<Make>(some, &words);
        store_words(out + i * kPanel, words);
    }
}

typedef void (*Pack)(const Operand&, int64_t lane, int64_t d, int64_t depth, Word* out);

Pack pack_as_floats(CodebookDType dtype) {
    switch (dtype) {
        case CodebookDType::float16: return pack_words<Whole, Half>;
        case CodebookDType::bfloat16: return pack_words<Whole, BFloat16>;
        default: return pack_words<Whole, float>;
    }
}

// -- tiles --------------------------------------------------------------------------------------------------------------

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

typedef void (*TileProduct)(const Word* a, const Word* b, int64_t words, float* out, int64_t stride, bool add);

// How words are made of the operands, and multiplied.
struct Format {
    int64_t elements;    // of the depth in a word
    int64_t words_unit;  // words of a panel are a multiple of it, behind the depth 0
    int64_t panel_rows;  // of a, packed at once
    int64_t tile_rows;
    Pack pack_a, pack_b;
    TileProduct product;
    void (*begin)(), (*end)();  // of work with it on a thread; may be null
};

#if defined(__AVX512BF16__) || defined(DF_AMX)
// As pack_words; the elements of a lane lie side by side. Behind an odd depth there is a 0.
DF_NOINLINE void pack_pairs(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + lane * x.stride_lane + d;
    const int64_t lanes = std::min<int64_t>(kPanel, x.lanes - lane);
    int64_t i = 0;
    if (lanes > 0)
        for (; i + 32 <= depth; i += 32) {
            Words rows[16];
#pragma GCC unroll 16
            for (int l = 0; l < 16; ++l) std::memcpy(&rows[l], p + (l < lanes ? l : 0) * x.stride_lane + i, 64);
            transpose(rows);
#pragma GCC unroll 16
            for (int l = 0; l < 16; ++l) store_words(out + (i / 2 + l) * kPanel, rows[l]);
        }
    for (; i < depth; i += 2)
        for (int64_t l = 0; l < kPanel; ++l) {
            const uint16_t* pair = p + l * x.stride_lane + i;
            const uint32_t low = l < lanes ? pair[0] : 0, high = l < lanes && i + 1 < depth ? pair[1] : 0;
            out[i / 2 * kPanel + l] = int32_t(low | high << 16);
        }
}
#endif

#if defined(__AVX512BF16__)
struct PairDot {
    static DF_INLINE_MEMBER Vec add(Vec sum, Vec b, const Word* a) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(*a));
    }
};
#endif

#if defined(DF_AMX)
// A register of b is 16 words of a panel, one of a the same words of 16 lanes, a lane in a row. A tile of the result takes
// four of them.
constexpr int kUnitRows = 2 * kUnit;

// -> (units of words, kUnitRows, 16), behind the depth 0
DF_NOINLINE void pack_rows(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + lane * x.stride_lane + d;
    const int64_t lanes = std::min<int64_t>(kUnitRows, x.lanes - lane), words = multiple((depth + 1) / 2, kUnit);
    if (lanes < kUnitRows || words * 2 > depth) std::memset(out, 0, size_t(kUnitRows * words) * sizeof(Word));
    int64_t i = 0;
    for (; i + 2 * kUnit <= depth; i += 2 * kUnit, out += kUnitRows * kUnit)
        for (int64_t l = 0; l < lanes; ++l) std::memcpy(out + l * kUnit, p + l * x.stride_lane + i, 4 * kUnit);
    for (int64_t l = 0; l < lanes; ++l) std::memcpy(out + l * kUnit, p + l * x.stride_lane + i, size_t(depth - i) * 2);
}

// The same of words of another kind.
template <class Make, class T>
DF_NOINLINE void pack_word_rows(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    for (int64_t i = 0; i < depth; i += kUnit, out += kUnitRows * kUnit)
        for (int64_t l = 0; l < kUnitRows; l += kUnit) {
            Words rows[kUnit] = {};
            if (x.stride_depth == 1 && i + kUnit <= depth && lane + l + kUnit <= x.lanes) {
                const T* p = static_cast<const T*>(x.data) + (lane + l) * x.stride_lane + d + i;
#pragma GCC unroll 16
                for (int r = 0; r < kUnit; ++r) load_words<Make>(p + r * x.stride_lane, &rows[r]);
            } else {
                pack_words<Make, T>(x, lane + l, d + i, std::min<int64_t>(kUnit, depth - i),
                                    reinterpret_cast<Word*>(rows));
                transpose(rows);
            }
#pragma GCC unroll 16
            for (int r = 0; r < kUnit; ++r) store_words(out + (l + r) * kUnit, rows[r]);
        }
}

DF_INLINE void clear_behind(int64_t words, Word* panel) {
    std::memset(panel + words * kPanel, 0, size_t((multiple(words, kUnit) - words) * kPanel) * sizeof(Word));
}

template <class Make, class T>
DF_NOINLINE void pack_whole_words(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    pack_words<Make, T>(x, lane, d, depth, out);
    clear_behind(depth, out);
}

DF_NOINLINE void pack_whole_pairs(const Operand& x, int64_t lane, int64_t d, int64_t depth, Word* out) {
    pack_pairs(x, lane, d, depth, out);
    clear_behind((depth + 1) / 2, out);
}

// Registers 0 to 3: sums, 4 and 5: of a, 6 and 7: of b.
DF_AMX void unit_product(const Word* a, const Word* b, int64_t words, float* out, int64_t stride, bool add) {
    static_assert(PANELS == 2, "as many as registers of b");
    float* below = out + kUnit * stride;
    __asm__ volatile("" : : : "memory");  // what the registers are loaded from is written
    if (add) {
        _tile_loadd(0, out, stride * 4);
        _tile_loadd(1, out + kPanel, stride * 4);
        _tile_loadd(2, below, stride * 4);
        _tile_loadd(3, below + kPanel, stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t w = 0; w < words; w += kUnit) {
        _tile_loadd(4, a + w * kUnitRows, kUnit * 4);
        _tile_loadd(5, a + w * kUnitRows + kUnit * kUnit, kUnit * 4);
        _tile_loadd(6, b + w * kPanel, kPanel * 4);
        _tile_loadd(7, b + (words + w) * kPanel, kPanel * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, stride * 4);
    _tile_stored(1, out + kPanel, stride * 4);
    _tile_stored(2, below, stride * 4);
    _tile_stored(3, below + kPanel, stride * 4);
}

// Of anything but two float32 operands, if there is a unit and no float16.
Format unit_format(const Operand& a, const Operand& b, bool pairs) {
    Pack pack_a = pack_rows, pack_b = pack_whole_pairs;
    if (!pairs) {
        const bool float_a = a.dtype == CodebookDType::float32;
        pack_a = float_a ? pack_word_rows<Halves, float> : pack_word_rows<Twice, BFloat16>;
        pack_b = b.dtype == CodebookDType::float32 ? pack_whole_words<Halves, float>
                 : float_a                         ? pack_whole_words<Twice, BFloat16>
                                                   : pack_whole_words<Halves, BFloat16>;
    }
    return {pairs ? 2 : 1, kUnit, kUnitRows, kUnitRows, pack_a, pack_b, unit_product, begin_tiles, end_tiles};
}
#endif

Format format_of(const Operand& a, const Operand& b) {
    const auto is_any = [&](CodebookDType dtype) { return a.dtype == dtype || b.dtype == dtype; };
    const bool pairs = is_any(CodebookDType::bfloat16) && a.dtype == b.dtype && a.stride_depth == 1 && b.stride_depth == 1;
#if defined(__AVX512BF16__)
    if (pairs) return {2, 1, PANEL_ROWS, TILE_ROWS, pack_pairs, pack_pairs, tile_product<PairDot>, nullptr, nullptr};
#elif defined(DF_AMX)
    if (is_any(CodebookDType::bfloat16) && !is_any(CodebookDType::float16) && has_matrix_unit())
        return unit_format(a, b, pairs);
#endif
    (void)pairs;
    return {1, 1, PANEL_ROWS, TILE_ROWS, pack_as_floats(a.dtype), pack_as_floats(b.dtype), tile_product<FloatDot>, nullptr,
            nullptr};
}

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
    const int64_t elements = kWords * format.elements;
    Word* b_panels = static_cast<Word*>(scratch);
    Word* a_panel = b_panels + kColumnsAtOnce * kWords;
    if (format.begin) format.begin();
    for (int64_t column = 0; column < p.b.lanes; column += kColumnsAtOnce) {
        const int64_t columns = std::min(kColumnsAtOnce, p.b.lanes - column);
        for (int64_t d = 0; d == 0 || d < p.depth; d += elements) {
            const int64_t depth = std::min(elements, p.depth - d);
            const int64_t words = multiple(multiple(depth, format.elements) / format.elements, format.words_unit);
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
const ProductKernels product_kernels = {(kColumnsAtOnce + MAX_TILE_ROWS) * kWords * sizeof(Word), PANEL_ROWS, TILE_COLUMNS,
                                        multiply, unpack_sums, pack_sums};

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
