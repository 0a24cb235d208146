// Products of tiles: what they are made of, common to all formats.
//
// Both operands are packed by panels of 16 lanes. So whatever their strides and types, the innermost loop reads two
// streams: at every step of the depth some vectors of b, and numbers of a that each is multiplied with. The sums of a
// tile stay in registers, a's panel in the first-level cache, b's panels in the second.
//
// Everything has internal linkage: each instruction set must keep its own copy.
#pragma once

#include <algorithm>

#include "product.h"
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
constexpr int64_t kMaxWords = 768;            // of 32 bits, that a lane's part of the depth takes in any format

static_assert(kColumnsAtOnce % TILE_COLUMNS == 0, "b's panels fill whole tiles");

// The smallest multiple of `unit` that is not below x.
constexpr int64_t multiple(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

typedef void (*Pack)(const Operand&, int64_t lane, int64_t d, int64_t depth, Word* out);
typedef void (*TileProduct)(const Word* a, const Word* b, int64_t words, float* out, int64_t stride, bool add);

// How words are made of the operands, and multiplied.
struct Format {
    int64_t depth;       // at once
    int64_t elements;    // of it in a word
    int64_t words_unit;  // words of a panel are a multiple of it, behind the depth 0
    int64_t parts;       // in so many words each is one of b's
    int64_t panel_rows;  // of a, packed at once
    int64_t tile_rows;
    Pack pack_a, pack_b;
    TileProduct product;
    void (*begin)(), (*end)();  // of work with it on a thread; may be null
};

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
bool are_pairs(const Operand& a, const Operand& b) {  // of bfloat16, neighbours in the depth side by side
    return a.dtype == DType::bfloat16 && b.dtype == a.dtype && a.stride_depth == 1 && b.stride_depth == 1;
}

// A panel's words from depth d on -> (depth / 2, 16), each of two neighbours; lanes that the operand does not have are 0.
// Behind an odd depth there is a 0.
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

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
