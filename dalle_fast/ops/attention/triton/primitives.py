"""What the forward and the backward kernels share: the rule, the walk, and the windows computed from them.

B batch, H heads, S sequence, D head size, T text, (MASK.H, MASK.W) image grid, N = S - T image tokens present;
q, k sequence positions, i = q - T, j = k - T image positions in raster order, t a walk position.

A kernel meets the image tokens in the order of a *walk*, cut into tiles of consecutive walk positions:

======  =====================================================================  =====================================
walk    walk position t is image token                                         used for
======  =====================================================================  =====================================
raster  t                                                                      every rule but column
column  (t % rows) * W + t // rows                                             column: its keys become neighbours
patch   u = t % P**2 of patch t // P**2, patches and tokens in raster order     conv on wide grids: P x P query tiles
======  =====================================================================  =====================================

`rows` is the number of grid rows that the sequence's prefix reaches, so that a short prefix walks a short grid. Tokens
past the prefix in the last row (or patch row) are masked. Nothing is copied: a walk only decides addresses.

`window` turns a tile of queries into its range of key tiles and, with REVERSE, a tile of keys into its range of query
tiles. Forward, dQ and dK/dV call the same function, so they cannot drift, and since it is integer arithmetic only,
`configs.cover` calls its Python body (`window.fn`) to count the pairs that the kernels compute.

In Triton, as in C, // and % round towards zero: no operand below is negative where the result is used.
"""

import triton
import triton.language as tl

__all__ = [
    "clamped_length",
    "head_base",
    "image_allows",
    "image_count",
    "in_elements",
    "load_tile",
    "query_tile",
    "store_tile",
    "text_allows",
    "text_keys",
    "text_queries",
    "tile_counts",
    "tile_pointers",
    "tile_start",
    "visible_text",
    "walk_tokens",
    "window",
    "window_allows",
]

# exp2 and log2 are the hardware's instructions: scores are kept in units of log2.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# The numbers of RULES in dalle_fast/masks.py and of Rule in csrc/mask.h.
CAUSAL = tl.constexpr(0)
ROW = tl.constexpr(1)
AXIAL_ROW = tl.constexpr(2)
COLUMN = tl.constexpr(3)
CONV_FLAT = tl.constexpr(4)
CONV_CLIP = tl.constexpr(5)
CONV_TORUS = tl.constexpr(6)

# The numbers of configs.WALKS.
RASTER_WALK = tl.constexpr(0)
COLUMN_WALK = tl.constexpr(1)
PATCH_WALK = tl.constexpr(2)


# -- the rule --------------------------------------------------------------------------------------------------------


@triton.jit
def _unsigned(x):
    """As an unsigned number a negative one is larger than every position; and division takes fewer instructions."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _up_to(x, largest):
    """0 <= x <= largest in one comparison"""
    return _unsigned(x) <= largest


@triton.jit
def _in_steps(x, steps, d):
    """x in {0, d, ..., steps * d}"""
    return _up_to(x, steps * d) & (x % d == 0)


@triton.jit
def _in_steps_either_way(x, steps, d):
    return (tl.abs(x) <= steps * d) & (x % d == 0)


@triton.jit
def _in_steps_around(x, steps, d, size):
    """x or -x, modulo size, in {0, d, ..., steps * d}, for abs(x) < size"""
    x = tl.where(x < 0, x + size, x)
    return _in_steps(x, steps, d) | _in_steps(size - x, steps, d)  # x = 0 is in the first


@triton.jit
def image_allows(q, k, MASK: tl.constexpr):
    """The port of AttentionMask.allows between image tokens, at sequence positions q and k; integer blocks, broadcast.

    It is evaluated for every pair of a masked tile, where it takes as long as the softmax does: hence its few comparisons.
    """
    h: tl.constexpr = MASK.K // 2
    i = q - MASK.T
    j = k - MASK.T
    delta = i - j
    dr = i // MASK.W - j // MASK.W
    dc = i % MASK.W - j % MASK.W
    if MASK.RULE == CAUSAL:
        seen = delta >= 0
    elif MASK.RULE == ROW:
        seen = _up_to(delta, MASK.W)
    elif MASK.RULE == AXIAL_ROW:
        seen = (delta >= 0) & (dr == 0)
    elif MASK.RULE == COLUMN:
        seen = (delta >= 0) & (dc == 0)
    elif MASK.RULE == CONV_FLAT:
        # Whole rows back, and up to h tokens to either side: r * W - h <= steps <= r * W + h for an r from 0 to h.
        steps = _unsigned(delta) // MASK.DILATION
        seen = _up_to(delta, h * (MASK.W + 1) * MASK.DILATION) & ((steps + h) % MASK.W <= 2 * h)
        if MASK.DILATION > 1:
            seen = seen & (delta % MASK.DILATION == 0)
    elif MASK.RULE == CONV_CLIP:
        seen = _in_steps_either_way(dr, h, MASK.DILATION) & _in_steps_either_way(dc, h, MASK.DILATION) & (delta >= 0)
    elif MASK.RULE == CONV_TORUS:
        down = _in_steps_around(dr, h, MASK.DILATION, MASK.H)
        seen = down & _in_steps_around(dc, h, MASK.DILATION, MASK.W) & (delta >= 0)
    else:  # conv_corner, whose steps are never negative
        seen = _in_steps(dr, MASK.K - 1, MASK.DILATION) & _in_steps(dc, MASK.K - 1, MASK.DILATION)
    return seen


@triton.jit
def text_allows(q, k, text_len):
    """The rule between any queries and text keys, of which those from text_len on are seen by none: (len(q), len(k))."""
    return k[None, :] <= tl.minimum(q, text_len - 1)[:, None]


@triton.jit
def window_allows(q, k, k_valid, MASK: tl.constexpr):
    """`image_allows` in a window of keys, of which those not `k_valid` are seen by no query."""
    seen = image_allows(q[:, None], k[None, :], MASK)
    # In raster order what is past the sequence is past every query too. Positions past another walk's end are not.
    if MASK.WALK != RASTER_WALK:
        seen = seen & k_valid[None, :]
    return seen


# -- the walk --------------------------------------------------------------------------------------------------------


@triton.jit
def image_count(seq_len, MASK: tl.constexpr):
    """(N, rows, length): image tokens present, grid rows they reach, walk positions that meet them all."""
    count = max(seq_len - MASK.T, 0)
    rows = max((count + MASK.W - 1) // MASK.W, 1)
    length = count
    if MASK.WALK == COLUMN_WALK:
        length = (count + MASK.W - 1) // MASK.W * MASK.W
    if MASK.WALK == PATCH_WALK:
        length = (count + MASK.PATCH * MASK.W - 1) // (MASK.PATCH * MASK.W) * (MASK.PATCH * MASK.W)
    return count, rows, length


@triton.jit
def tile_counts(seq_len, length, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """(text tiles, image tiles) of BLOCK positions; no tile mixes text and image."""
    text = min(seq_len, MASK.T)
    return (text + BLOCK - 1) // BLOCK, (length + BLOCK - 1) // BLOCK


@triton.jit
def walk_tokens(t, seq_len, rows, length, MASK: tl.constexpr):
    """(positions, valid): sequence positions of the walk positions t, and which of them exist in the sequence."""
    image = t
    if MASK.WALK == COLUMN_WALK:
        image = (t % rows) * MASK.W + t // rows
    if MASK.WALK == PATCH_WALK:
        patch = t // (MASK.PATCH * MASK.PATCH)
        within = t % (MASK.PATCH * MASK.PATCH)
        per_row: tl.constexpr = MASK.W // MASK.PATCH
        row = patch // per_row * MASK.PATCH + within // MASK.PATCH
        column = patch % per_row * MASK.PATCH + within % MASK.PATCH
        image = row * MASK.W + column
    position = MASK.T + image
    return position, (t < length) & (position < seq_len)


# -- the windows -----------------------------------------------------------------------------------------------------


@triton.jit
def text_keys(first_query, text_len, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """(full, end): a tile of BLOCK queries sees all text keys before `full`, some of those in [full, end), no more.

    `full` is a multiple of STEP. For a tile of image queries, first_query is T.
    """
    return min(text_len, first_query + 1) // STEP * STEP, min(text_len, first_query + BLOCK)


@triton.jit
def text_queries(first_key, text_len, seq_len, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """(start, full, end): a tile of BLOCK text keys is seen by some queries in [start, full), all in [full, end).

    full - start is a multiple of STEP, so that tiles of STEP queries meet each query once.
    Queries are in the sequence's own order here, text and image alike: every walk's image queries see all text keys.
    The range is empty where every key of the tile is hidden by text_len.
    """
    end = seq_len
    if first_key >= text_len:
        end = first_key
    return first_key, min(first_key + (BLOCK + STEP - 1) // STEP * STEP, end), end


@triton.jit
def window(t0, rows, length, MASK: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, REVERSE: tl.constexpr):
    """The image tiles that a tile of BLOCK image tokens must meet, computed from the mask's numbers.

    Args:
        t0: first walk position of the tile.
        rows, length: from `image_count`.
        STEP: size of the tiles met.
        REVERSE: False: t0 is a tile of queries, the window holds keys; True: the other way round.

    Returns:
        (start, count, column, columns): `count` tiles, whose walk positions `tile_start` gives.
    """
    column = 0
    columns = 1
    if MASK.WALK == PATCH_WALK:
        per_row = MASK.W // MASK.PATCH
        patch = t0 // (MASK.PATCH * MASK.PATCH)
        patch_row = patch // per_row
        patch_column = patch % per_row
        if REVERSE:
            start = patch_row
            last = min(patch_row + MASK.UP, length // (MASK.PATCH * MASK.W) - 1)
            before = MASK.RIGHT
            after = MASK.LEFT
        else:
            start = max(patch_row - MASK.UP, 0)
            last = patch_row
            before = MASK.LEFT
            after = MASK.RIGHT
        if MASK.RULE == CONV_FLAT:  # wraps at the ends of rows, and the row it lands in is inside UP
            columns = min(before + after + 1, per_row)
            column = patch_column + per_row - before
        else:
            column = max(patch_column - before, 0)
            columns = min(patch_column + after, per_row - 1) + 1 - column
        count = (last - start + 1) * columns * (MASK.PATCH * MASK.PATCH // STEP)
    else:
        end = min(t0 + BLOCK, length)
        if REVERSE:
            start = t0
            if MASK.WALK == COLUMN_WALK:
                stop = ((end - 1) // rows + 1) * rows
            elif MASK.RULE == AXIAL_ROW:
                stop = ((end - 1) // MASK.W + 1) * MASK.W
            else:
                stop = end + MASK.REACH
            stop = min(stop, length)
        else:
            stop = end
            if MASK.WALK == COLUMN_WALK:
                start = t0 // rows * rows
            elif MASK.RULE == AXIAL_ROW:
                start = t0 // MASK.W * MASK.W
            else:
                start = max(t0 - MASK.REACH, 0)
        count = (stop - start + STEP - 1) // STEP
    return start, count, column, columns


@triton.jit
def tile_start(n, start, column, columns, MASK: tl.constexpr, STEP: tl.constexpr):
    """First walk position of the n-th tile of a window."""
    first = start + n * STEP
    if MASK.WALK == PATCH_WALK:
        per_row = MASK.W // MASK.PATCH
        parts: tl.constexpr = MASK.PATCH * MASK.PATCH // STEP  # a patch may be met in several tiles
        patch = n // parts
        first = ((start + patch // columns) * per_row + (column + patch % columns) % per_row) * parts * STEP
        first += n % parts * STEP
    return first


# -- programs ------------------------------------------------------------------------------------------------------


@triton.jit
def query_tile(program, seq_len, MASK: tl.constexpr, BLOCK_Q: tl.constexpr):
    """What a program of the forward or dQ kernel works on.

    Image tiles come first: they are longer than all but the last text tiles, which then run from long to short.

    Returns:
        (head index in B * H, is_image, first walk position, first query for `text_keys`, positions, valid).
    """
    _, rows, length = image_count(seq_len, MASK)
    text_tiles, image_tiles = tile_counts(seq_len, length, MASK, BLOCK_Q)
    tiles = text_tiles + image_tiles
    tile = program % tiles
    is_image = tile < image_tiles
    offsets = tl.arange(0, BLOCK_Q)
    t0 = tl.where(is_image, tile * BLOCK_Q, 0)
    first = tl.where(is_image, MASK.T, (tiles - 1 - tile) * BLOCK_Q)
    image_pos, image_valid = walk_tokens(t0 + offsets, seq_len, rows, length, MASK)
    text_pos = first + offsets
    positions = tl.where(is_image, image_pos, text_pos)
    valid = tl.where(is_image, image_valid, text_pos < min(seq_len, MASK.T))
    return program // tiles, is_image, t0, first, positions, valid


@triton.jit
def clamped_length(text_lengths_ptr, sample, most):
    """A sample's text length, from 0 to most, int32; in memory it is any, int32 or int64."""
    return tl.minimum(tl.maximum(tl.load(text_lengths_ptr + sample), 0), most).to(tl.int32)


@triton.jit
def visible_text(text_lengths_ptr, batch, seq_len, MASK: tl.constexpr):
    """Number of text keys that queries of this sample may see."""
    text_len = min(seq_len, MASK.T)
    if text_lengths_ptr is not None:
        text_len = clamped_length(text_lengths_ptr, batch, text_len)
    return text_len


# -- memory ----------------------------------------------------------------------------------------------------------


@triton.jit
def in_elements(strides, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """The strides that `launch.in_units` divided by UNIT, (batch, head, position, head size) or without position.

    One that needs 64 bits may not need them divided. That of positions has them if WIDE, as in `tile_pointers`.
    """
    far = tl.full([], UNIT, tl.int64)
    near = far if WIDE else UNIT
    if len(strides) == 3:
        elements = (strides[0] * far, strides[1] * far, strides[2])
    else:
        elements = (strides[0] * far, strides[1] * far, strides[2] * near, strides[3])
    return elements


@triton.jit
def head_base(ptr, strides, batch, head):
    """Where one head's (S, D) matrix begins. 64-bit: a stride times an index may pass 2**31."""
    return ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def tile_pointers(base, strides, rows, columns, WIDE: tl.constexpr):
    """Addresses of one head's elements at (rows, columns). WIDE: their distances from `base` may pass 2**31.

    Addresses are what a loop carries along for each of its loads, and 32 bits instead of 64 leave registers free.
    """
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    return base + (rows[:, None] * strides[2] + columns[None, :] * strides[3])


@triton.jit
def load_tile(
    base,
    strides,
    rows,
    valid,
    MASK_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(len(rows), BLOCK_D) tile of one head's matrix; zero where not `valid` (if MASK_ROWS) and past HEAD_DIM."""
    columns = tl.arange(0, BLOCK_D)
    pointers = tile_pointers(base, strides, rows, columns, WIDE)
    if MASK_ROWS:
        tile = tl.load(pointers, mask=valid[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        tile = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(base, rows, valid, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Store a tile into one head's contiguous (S, D) matrix."""
    columns = tl.arange(0, BLOCK_D)
    pointers = tile_pointers(base, (0, 0, HEAD_DIM, 1), rows, columns, WIDE)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=valid[:, None] & (columns < HEAD_DIM)[None, :])
