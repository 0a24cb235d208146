// Sparse attention on the CPU: what the layout, the per-instruction-set kernels and the driver share.
//
// B batch, H heads, S sequence, D head size, T text. Plain structures only: this header is compiled once per instruction
// set, and an inline function here would be linked from whichever of them the linker meets first.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtype.h"

namespace dalle_fast {

constexpr int kBlock = 8;   // queries that one tile holds
constexpr int kPanel = 16;  // keys that one tile holds
// For a matrix unit, which wants more at once:
constexpr int kUnitBlocks = 4;   // blocks of queries in a unit
constexpr int kGroupPanels = 2;  // panels of keys in a group

// A run of neighbouring panels (of a block) or blocks (of a panel). `bits` is -1 where every pair of the run attends,
// else an index into AttentionLayout::bits, and then the run has length 1.
struct Visit {
    int32_t first, count, bits;
};

// A group of panels that a unit of blocks visits. `bits` is -1 where every pair attends, else an index into
// AttentionLayout::group_bits.
struct GroupVisit {
    int32_t group, bits;
};

// bit k of [x][half][r]: row r of the unit's blocks 2 x and 2 x + 1 attends to key k of that panel of the group
typedef uint16_t GroupBits[kUnitBlocks / 2][kGroupPanels][2 * kBlock];

// Which tiles of 8 queries x 16 keys a mask touches, for one prefix of the sequence. Text and image begin blocks and
// panels, units and groups of their own; a slot without a token holds -1. Borrowed pointers: see AttentionLayoutStorage.
struct AttentionLayout {
    int32_t seq_len, num_text_blocks, num_blocks, num_text_panels, num_panels;
    int32_t image_window;         // the most image panels from the first to the last that a block visits, at least 1
    int64_t num_tiles;            // of 8 x 16 pairs that are computed, for one head
    const int32_t* query_token;   // (num_blocks * kBlock) token of a query slot
    const int32_t* key_token;     // (num_panels * kPanel) token of a key slot
    const int32_t* block_visits;  // (num_blocks + 1) where a block's visits begin
    const Visit* panels_of_block;
    const int32_t* panel_visits;  // (num_panels + 1) where a panel's visits begin
    const Visit* blocks_of_panel;
    const uint16_t (*bits)[kBlock];  // bit k of bits[x][r]: row r attends to key k
    int32_t num_text_groups, num_groups, num_units;
    int32_t group_window;        // as many neighbouring image groups have all that a unit or a later one still visits, up to
                                 // the unit's last
    const int32_t* unit_block;   // (num_units + 1) where a unit's blocks begin
    const int32_t* unit_visits;  // (num_units + 1) where a unit's visits begin
    const GroupVisit* groups_of_unit;
    const GroupBits* group_bits;
};

// A (B, H, S, D) or (B, H, S) tensor: strides count elements.
struct Strided {
    char* data;
    int64_t stride_b, stride_h, stride_s, stride_d;
};

struct AttentionArgs {
    AttentionLayout layout;
    int64_t B, H, D;
    float scale;
    DType dtype;
    const int32_t* text_lengths;  // (B,) or null
    bool exact_lse;               // or the logarithm of the sum that out was divided by, where this is sooner made
    Strided query, key, value, out, lse;  // lse.data may be null in the forward pass
    // The rest is for the backward pass. grad_lse.data may be null.
    Strided grad_out, grad_lse, grad_query, grad_key, grad_value;
};

struct BlocksLeft;  // see attention.cpp

// Part of one head's work. Forward: the blocks from the first that are left. Backward: the tiles where the blocks and the
// panels meet.
struct AttentionTask {
    int64_t batch, head;
    int32_t block_begin, block_end, panel_begin, panel_end;
    bool for_query, for_key;  // backward: which gradients to make
    BlocksLeft* left = nullptr;
    int64_t next_batch = 0, next_head = -1;  // where the thread most likely goes on, with the first block; -1 for nowhere
};

// Takes some blocks of a forward task, if the first of them is still the task's: an idle thread may have taken it over.
bool take_blocks(const AttentionTask&, int32_t begin, int32_t end);

struct AttentionKernels {
    size_t (*forward_scratch)(const AttentionArgs&);   // bytes that one thread needs
    void (*forward)(const AttentionArgs&, const AttentionTask&, char* scratch);
    size_t (*backward_scratch)(const AttentionArgs&);
    void (*backward)(const AttentionArgs&, const AttentionTask&, char* scratch);
};

namespace portable { extern const AttentionKernels attention_kernels; }
namespace avx2 { extern const AttentionKernels attention_kernels; }
namespace avx512 { extern const AttentionKernels attention_kernels; }
namespace avx512_bf16 { extern const AttentionKernels attention_kernels; }
namespace avx512_amx { extern const AttentionKernels attention_kernels; }

// Run over heads and parts of them. Results do not depend on `threads`.
void attention_forward(const AttentionKernels&, const AttentionArgs&, int threads);
void attention_backward(const AttentionKernels&, const AttentionArgs&, int threads);

}  // namespace dalle_fast
