"""What decoding keeps of the tokens so far: for each layer no more keys and values than its mask can still look at.

P prompts, N images of each, B = P * N samples, H heads, D head size, T text positions, C slots of an image cache, n image
tokens known at the start.
"""

from __future__ import annotations

import torch

from dalle_fast.nn import functional as F
from dalle_fast.nn.checks import check_masks, check_size
from dalle_fast.ops.attention import attention_append
from dalle_fast.ops.attention.decode import waits_for_device
from dalle_fast.ops.attention.op import check_text_lengths
from dalle_fast.ops.blocks import BlockCaches


class LayerCache:
    """One layer's keys and values: text (P, H, T, D), which the images of a prompt share, and image (B, H, C, D).

    Image tokens lie where the mask says (`AttentionMask.cache_slot`): a ring as long as the reach of a row or conv
    layer, columns one after another for a column layer. A view: the cache holds no layers, so that no cycle of
    references keeps its memory.
    """

    def __init__(self, cache, mask, tensors):
        self.cache, self.mask, self.tensors = cache, mask, tensors
        self.text_key, self.text_value, self.image_key, self.image_value = tensors

    def prefill(self, key, value):
        """Take the first T + n tokens of the stream, (P, H, T + n, D), the n image tokens for all images of a prompt.

        Raises:
            ValueError: the keys are of another number of prompts, heads or head size, or more than the stream has.
        """
        T, C = self.mask.text_len, self.mask.cache_slots
        P, H, _, D = self.text_key.shape
        if key.shape[:2] != (P, H) or key.shape[2] < T or key.shape[3] != D:
            shape = f"({P}, {H}, {T} + n, {D})"
            raise ValueError(f"key must have shape {shape} for this cache of {P} prompts, got {tuple(key.shape)}")
        n = key.shape[2] - T
        if n > self.mask.image_len:
            raise ValueError(f"key must have at most {T} + {self.mask.image_len} tokens, got {key.shape[2]}")
        first = max(0, n - C)  # what was before is out of reach
        slots = self.mask.cache_slot(torch.arange(first, n, device=key.device))
        for new, text, image in ((key, self.text_key, self.image_key), (value, self.text_value, self.image_value)):
            new = new.detach()  # steps have no gradient, and a cache keeps no graph
            text.copy_(new[:, :, :T])
            image[:, :, slots] = new[:, :, T + first :].repeat_interleave(self.cache.num_images, 0).to(image.dtype)

    def append(self, key, value, *, impl="auto"):
        """Take the next image token, (B, H, D); `impl` as in `attend`: "reference" is torch's way on a GPU too.

        Raises:
            ValueError: the image is complete, or the key is of another shape.
        """
        B, H, _, D = self.image_key.shape
        if key.shape != (B, H, D):
            raise ValueError(f"key must have shape ({B}, {H}, {D}), got {tuple(key.shape)}")
        self.cache.check_room()
        if self.image_key.device.type == "cpu" and not torch.compiler.is_compiling():  # no tensor for the position
            slot = self.mask.cache_slot(self.cache.length)
            self.image_key.select(2, slot).copy_(key)
            self.image_value.select(2, slot).copy_(value)
            return
        attention_append(self.image_key, self.image_value, key, value, self.mask, self.cache.position, impl=impl)

    def attend(self, query, *, impl="auto"):
        """Attention of the token that was appended last, query (B, H, D) -> (B, H, D)."""
        return F.sparse_attention_decode(
            query, *self.tensors, self.mask, self.cache.position, text_lengths=self.cache.text_lengths, impl=impl
        )

    def waits_for_device(self, *, impl="auto") -> bool:
        """Whether `attend` off the CPU waits for the device, so that no CUDA graph can hold it."""
        return waits_for_device(impl, self.text_key, self.text_value, self.mask)


class KVCache:
    """Keys and values of every layer for generating N images for each of P captions, allocated once.

    First `layer(l).prefill(...)` for each layer, then for each image token `layer(l).append(...)` and `.attend(...)`,
    and after each of the two `advance(count)`: what `Transformer.forward` and `Transformer.step` do.

    Args:
        masks: an `AttentionMask` for each layer, all over one stream.
        num_prompts: P. num_images: N. num_heads: H. head_dim: D.
        text_lengths: (P,) or None, as in `dalle_fast.nn.functional.sparse_attention`.
        device, dtype: as of torch.empty. On device "meta" there are only sizes.

    Attributes:
        masks: as given. length: number of image tokens that all layers hold; position: the same as an int64 tensor on the
            device. has_text: whether all layers hold a text; a cache is for one.
    """

    def __init__(
        self, masks, *, num_prompts, num_images, num_heads, head_dim, text_lengths=None, device=None, dtype=None
    ):
        sizes = {"num_prompts": num_prompts, "num_images": num_images, "num_heads": num_heads, "head_dim": head_dim}
        sizes = {name: check_size(name, size) for name, size in sizes.items()}
        masks = tuple(masks)
        check_masks(masks)
        self.num_prompts, self.num_images, self.num_heads, self.head_dim = sizes.values()
        if text_lengths is not None:  # on which device they are matters in a step alone: sizes need none
            check_text_lengths(text_lengths, self.num_prompts, getattr(text_lengths, "device", None))
            text_lengths = text_lengths.clone()  # the caller may change theirs
        self.text_lengths = text_lengths
        self.device, self.dtype = device, dtype
        self.length, self.has_text = 0, False
        self.plan = None  # of `Transformer.step`: what it need not look at again
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self._layers = [(mask, self._allocate(mask)) for mask in masks]
        self.masks, self.of_blocks = masks, BlockCaches(masks, [tensors for _, tensors in self._layers])
        if self.position.is_cuda:  # what a captured step reads is made before, and stays as long as the cache
            self._tables = [mask.visible_slots(self.position.device) for mask in masks]

    def _allocate(self, mask):
        text = (self.num_prompts, self.num_heads, mask.text_len, self.head_dim)
        image = (self.num_prompts * self.num_images, self.num_heads, mask.cache_slots, self.head_dim)
        key, *others = (
            torch.empty(shape, device=self.device, dtype=self.dtype) for shape in (text, text, image, image)
        )
        if key.device.type == "cpu":  # as its kernel reads them: positions beside each other in memory
            key = key.view(*text[:2], text[3], text[2]).mT
        return key, *others

    def __getstate__(self):
        return self.__dict__ | {"plan": None}  # a copy's need not hold a copy of the model

    def layer(self, index) -> LayerCache:
        """What attention of that layer fills and reads."""
        return LayerCache(self, *self._layers[index])

    def check_room(self):
        """Raise ValueError where the image is complete."""
        mask, _ = self._layers[0]
        if not 0 <= self.length < mask.image_len:
            full = f"the cache holds {self.length} image tokens, all of a grid of {mask.grid[0]} x {mask.grid[1]}"
            raise ValueError(f"{full}: no more can be appended")

    def advance(self, count=1):
        """Another `count` image tokens are in all layers, and so is the text before them."""
        self.has_text = True  # only now: an exception on the way leaves some layers without it
        self.length += count
        self.position += count

    def reset(self):
        """Hold nothing again, in the same memory: for another text with the same text_lengths."""
        self.length, self.has_text, self.plan = 0, False, None
        self.position.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for _, tensors in self._layers for tensor in tensors)

    @property
    def nbytes_read(self) -> float:
        """Bytes of the keys and values that one step reads: those its masks allow, the mean over an image's G steps.

        The text of a prompt is read once for all its images.
        """
        total = 0
        for mask, (text, _, image, _) in self._layers:
            G, T = mask.image_len, mask.text_len
            image_pairs = mask.num_pairs - T * (T + 1) // 2 - G * T
            per_key = 2 * self.num_heads * self.head_dim * image.element_size()
            total += per_key * (text.shape[0] * T + image.shape[0] * image_pairs / G)
        return total
