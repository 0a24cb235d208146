"""One token of each sample through a transformer's blocks as one torch operation: on a CPU one native call for all of them.

Called one by one, the operations of a block leave the processor to Python for longer than they take: after weights have
gone through the caches, each of torch's costs ten times what it does alone.

`dalle_fast::blocks_step` is registered as in attention/op.py. It has no gradient. CPU kernels are in csrc/cpu/blocks.cpp.

B samples, P prompts, W width, H heads, D head size, T text, C slots of an image cache, F width of the perceptron.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch.autograd.graph import increment_version
from torch.overrides import has_torch_function

from dalle_fast import _extension
from dalle_fast.masks import AttentionMask
from dalle_fast.ops.attention.cpu import MAX_HEAD_DIM, numbers_of
from dalle_fast.ops.attention.decode import check_position
from dalle_fast.ops.attention.op import canonical_lengths, check_text_lengths
from dalle_fast.ops.calls import is_any_autocast_on, is_plain, is_transformed, needs_grad
from dalle_fast.ops.dtypes import DTYPES, address
from dalle_fast.ops.registry import register

# The most samples for which one call is faster than one operation after another, by the instruction set in use, in the dtypes'
# order. Measured on an Intel Sapphire Rapids with each (MKL and oneDNN held to it), 12 layers of width 512 and 3 of width
# 1,536, against torch's layers: 1 sample 1.3 to 2.6 times as fast, 16 in float32 1.05 to 1.4, 64 with AMX in bfloat16 1.5.
MOST_SAMPLES = {
    "portable": (4, 4, 4),
    "avx2": (16, 16, 16),
    "avx512": (16, 16, 16),
    "avx512_bf16": (16, 16, 16),
    "avx512_amx": (16, 4, 64),
}

_TYPES = {torch.Tensor, torch.nn.Parameter}


class BlockCaches:
    """The caches of all blocks, and what a native call wants to know of them.

    masks: an `AttentionMask` for each block. tensors: for each text_key, text_value, image_key and image_value as
    `dalle_fast.nn.functional.sparse_attention_decode` takes them.
    """

    def __init__(self, masks, tensors):
        self.masks, self.tensors = tuple(masks), tuple(tensors)
        self._kinds = tuple(dict.fromkeys(self.masks))
        self._kind_of_block = [self._kinds.index(mask) for mask in self.masks]
        self._known, self._read = None, ((), [], None)

    def __getstate__(self):
        return self.__dict__ | {"_known": None, "_read": ((), [], None)}  # a copy's tensors lie elsewhere

    def numbers(self):
        """Addresses and strides of the tensors, and the tables of visible slots as `attention/cpu.py` hands them over."""
        addresses = [tensor.data_ptr() for tensors in self.tensors for tensor in tensors]
        if self._known is None or self._known[0] != addresses:  # a tensor's data may be another's now
            tables = [mask.visible_slots() for mask in self.masks]
            self._known = (
                addresses,
                [tuple(numbers_of(tensor) for tensor in tensors) for tensors in self.tensors],
                [(slots.data_ptr(), slots.stride(0), counts.data_ptr()) for slots, counts in tables],
                tables,  # which stay where they are
            )
        return self._known[1:3]

    def addresses(self, parameters, x):
        """Of parameters that a native call for x (B, W) reads as they are; None where it would misread one.

        Those that were read before and lie where they lay are not looked at again.
        """
        read, addresses, kind = self._read
        kind_of_x = x.shape[1], x.dtype
        same = kind == kind_of_x and len(read) == len(parameters) and all(map(operator.is_, read, parameters))
        if same and [parameter.data_ptr() for parameter in parameters] == addresses:
            return addresses
        if not self._reads(parameters, *kind_of_x):
            return None
        self._read = parameters, [parameter.data_ptr() for parameter in parameters], kind_of_x
        return self._read[1]

    def _reads(self, parameters, W, dtype):
        if not {type(parameter) for parameter in parameters} <= _TYPES:  # None, quantized, distributed
            return False
        if {parameter.layout for parameter in parameters} != {torch.strided}:
            return False
        _, H, _, D = self.tensors[0][0].shape
        F = parameters[8].shape[0]
        row, inside, heads = (W,), (F,), (H * D,)
        of_block = [row, row, (3 * H * D, W), (3 * H * D,), (W, *heads), row, row, row, (F, W), inside, (W, F), row]
        return (
            D <= MAX_HEAD_DIM
            and [parameter.shape for parameter in parameters] == of_block * len(self.masks) + [row, row]
            and {parameter.dtype for parameter in parameters} == {dtype}
            and all(
                parameter.is_cpu and parameter.is_contiguous() and not parameter.is_neg() for parameter in parameters
            )
        )

    def slots(self, position):
        """Where the token at `position` goes in each block's image cache."""
        of_kind = [mask.cache_slot(position) for mask in self._kinds]
        return [of_kind[kind] for kind in self._kind_of_block]


def blocks_step(x, parameters, epsilons, caches, position, text_lengths):
    """The last norm of what the blocks make of the token at `position`, (B, W) in x's dtype; its keys and values go into
    `caches`. None where this cannot serve: then nothing has been done.

    Args:
        x: (B, W).
        parameters: twelve for each block, weight and bias of the attention's norm, qkv, out, the perceptron's norm, up and
            down; and the last norm's weight and bias.
        epsilons: of a block's two norms, and the last one's.
        caches: a `BlockCaches`.
        position: an integer, in the image.
        text_lengths: (P,) or None.
    """
    addresses = _addresses_if_served(x, parameters, caches)
    if addresses is None:
        return None
    if text_lengths is not None:
        check_text_lengths(text_lengths, len(caches.tensors[0][0]), x.device)
    text_lengths = canonical_lengths(text_lengths, caches.masks[0].text_len)
    if is_plain((x,)):
        return _step(x, parameters, addresses, epsilons, caches, position, text_lengths)
    flat = [tensor for tensors in caches.tensors for tensor in tensors]
    masks = [number for mask in caches.masks for number in mask.encode()]
    return _blocks_op(x, parameters, epsilons, flat, masks, position, text_lengths)


def _addresses_if_served(x, parameters, caches):
    if torch.compiler.is_compiling() or not x.is_cpu or x.dtype not in DTYPES or x.dim() != 2 or type(x) not in _TYPES:
        return None
    if is_transformed() or is_any_autocast_on():
        return None
    if x.shape[0] > _most_samples()[DTYPES[x.dtype]] or has_torch_function((x,)):
        return None
    image_key = caches.tensors[0][2]
    if image_key.is_inference() and not torch.is_inference_mode_enabled():
        return None
    if image_key.dtype != x.dtype or not image_key.is_cpu or len(image_key) != x.shape[0]:
        return None
    return None if needs_grad((x, *parameters)) else caches.addresses(parameters, x)


@functools.cache
def _most_samples():
    return (0,) * len(DTYPES) if _extension.why_missing() else MOST_SAMPLES[_extension.native().instruction_set()]


# -- the operation -----------------------------------------------------------------------------------------------------


def _blocks_kernel(x, parameters, epsilons, caches, masks, position, text_lengths):
    size = len(masks) // (len(caches) // 4)
    masks = [AttentionMask.decode(masks[n : n + size]) for n in range(0, len(masks), size)]
    caches = BlockCaches(masks, [caches[n : n + 4] for n in range(0, len(caches), 4)])
    addresses = [parameter.data_ptr() for parameter in parameters]
    return _step(x, parameters, addresses, epsilons, caches, position, text_lengths)


def _step(x, parameters, addresses, epsilons, caches, position, text_lengths):
    for mask in caches.masks:
        check_position(position, mask)
    P, H, T, D = caches.tensors[0][0].shape
    B, W = x.shape
    rows = x.to(torch.float32).contiguous()
    out = torch.empty_like(rows)
    numbers, tables = caches.numbers()
    # Autograd would not notice that they are written.
    increment_version([tensor for _, _, *image in caches.tensors for tensor in image])
    _extension.native().blocks_step(
        (B, P, W, H, D, T, parameters[8].shape[0]),
        DTYPES[x.dtype],
        D**-0.5,
        address(text_lengths),
        addresses,
        epsilons,
        numbers,
        tables,
        caches.slots(position),
        position,
        rows.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(x.dtype)


def _blocks_fake(x, parameters, epsilons, caches, masks, position, text_lengths):
    return x.new_empty(x.shape)


_blocks_op = register(
    "blocks_step(Tensor x, Tensor[] parameters, float[] epsilons, Tensor(a!)[] caches, int[] masks, int position, "
    "Tensor? text_lengths) -> Tensor",
    _blocks_kernel,
    _blocks_fake,
)
