"""`torch.nn.MultiheadAttention` with a sparse mask.

B batch, S sequence, E embedding, H heads, D head size, T text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_F

from dalle_fast.masks import AttentionMask
from dalle_fast.nn.checks import check_fits, check_size, is_looked_at
from dalle_fast.ops import attention
from dalle_fast.ops.attention.op import IMPLS, MAX_HEAD_DIM, warn_of_layout
from dalle_fast.ops.choice import check_impl
from dalle_fast.ops.dtypes import check_tensor


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose attention may be an `AttentionMask`.

    Constructor, parameters, initialisation and state dict are torch's, so checkpoints load both ways. Without a mask
    it behaves as torch's module. With one, the output is that of torch's module with `attn_mask=~mask.to_dense()`, and
    self-attention reads query, key and value in place from one packed projection.

    Args:
        embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype: as of torch's module.
        dropout: as of torch's module; with a mask it must be 0 while training, since attention weights that could be
            dropped are never made.
        add_bias_kv, add_zero_attn: as of torch's module; they add positions to the keys and so go with no mask.
        mask: an `AttentionMask`, which takes heads of at most 128 channels, or None. Also an attribute that may be set
            later.
        impl: who computes with a mask, as in `dalle_fast.nn.functional.sparse_attention`. An attribute too.

    Raises:
        TypeError: mask is not an `AttentionMask`; a size is no integer.
        ValueError: a size below 1; embed_dim is no multiple of num_heads; an argument that does not go with a mask; impl
            is none.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        dropout=0.0,
        bias=True,
        add_bias_kv=False,
        add_zero_attn=False,
        kdim=None,
        vdim=None,
        batch_first=False,
        device=None,
        dtype=None,
        *,
        mask=None,
        impl="auto",
    ):
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads}
        sizes |= {name: size for name, size in (("kdim", kdim), ("vdim", vdim)) if size is not None}
        for name, size in sizes.items():
            check_size(name, size)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        check_impl(impl, IMPLS)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.mask, self.impl = mask, impl

    _mask = None  # what torch's constructor sees before ours has set it

    @property
    def mask(self) -> AttentionMask | None:
        return self._mask

    @mask.setter
    def mask(self, mask):
        if mask is not None:
            self._check_mask("mask", mask)
        self._mask = mask

    def _check_mask(self, name, mask):
        if not isinstance(mask, AttentionMask):
            raise TypeError(
                f"{name} must be an AttentionMask (see dalle_fast.masks) or None, got {type(mask).__name__}"
            )
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"embed_dim must be at most {MAX_HEAD_DIM} * num_heads with an AttentionMask, got {self.embed_dim} and "
                f"{self.num_heads} heads"
            )
        if self.bias_k is not None or self.add_zero_attn:
            which = "add_zero_attn" if self.bias_k is None else "add_bias_kv"
            raise ValueError(f"{which} must be False with an AttentionMask, which knows no added positions; got True")

    # torch.nn.TransformerEncoder and its layer take a fast path in eval mode that reads this module's parameters and
    # computes dense attention itself, if this is True. It is no longer with a mask, so that they call `forward`.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self._packed and self._mask is None

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, packed):
        self._packed = packed

    def reset_parameters(self):
        """As of a new module, after `to_empty`: with one seed the same numbers."""
        self.out_proj.reset_parameters()
        self._reset_parameters()

    def _reset_parameters(self):
        mask, self._mask = self._mask, None  # torch's asks `_qkv_same_embed_dim` which parameters there are
        try:
            super()._reset_parameters()
        finally:
            self._mask = mask

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.pop("_qkv_same_embed_dim", None)  # put there by torch's, where the property is to be asked

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=None,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
        *,
        text_lengths=None,
    ):
        """torch's `forward`, with `attn_mask` an `AttentionMask` too.

        Args:
            query, key, value: (S, B, E), or (B, S, E) with batch_first, or (S, E); with a mask all of one length.
            key_padding_mask: as of torch's module; with a mask it may hide the last text positions of each sample, as
                text_lengths do, and nothing else, in booleans or in 0 and -inf. That is checked on a CPU; where a look
                would wait for the device, and in a compiled graph, a sample's output is NaN if it is not so.
            need_weights: return the attention weights. None means torch's default True without a mask and False with
                one, where they cost the S x S memory and time that the mask saves.
            attn_mask: a tensor as torch takes it, where there is no mask; or an `AttentionMask`, which then takes the
                place of `self.mask`.
            average_attn_weights: average the returned weights over heads.
            is_causal: as of torch's module; with a mask it says nothing new, and both values are accepted.
            text_lengths: (B,) integers (one integer tensor of shape () or (1,) for unbatched inputs): text positions
                from text_lengths[b] on are hidden as keys. Needs a mask.

        Returns:
            (out, weights): out like query; weights None or (B, S, S), with one H before S x S where they are not
            averaged, and without B for unbatched inputs.

        Raises:
            TypeError, ValueError: as `dalle_fast.nn.functional.sparse_attention`, and for what does not go with a mask.
        """
        mask = attn_mask if isinstance(attn_mask, AttentionMask) else self.mask
        if mask is None:
            if text_lengths is not None:
                raise ValueError("text_lengths needs an AttentionMask, got none; without one use key_padding_mask")
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=True if need_weights is None else need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        self._check_mask("attn_mask", mask)
        if attn_mask is not None and attn_mask is not mask:
            raise ValueError(
                f"attn_mask must be None or an AttentionMask where the module has mask={mask!r}, got "
                f"{type(attn_mask).__name__}; to hide padded text use text_lengths"
            )
        if key_padding_mask is not None and text_lengths is not None:
            raise ValueError("key_padding_mask must be None where text_lengths say the same, got both")
        if self.training and self.dropout > 0:
            raise ValueError(
                f"dropout must be 0 for training with an AttentionMask, got {self.dropout}; attention weights are never "
                "made, so none can be dropped"
            )
        self._check_inputs(query, key, value)
        self._check_layout(query, mask)
        batched = query.dim() == 3
        if not batched and isinstance(text_lengths, torch.Tensor):
            text_lengths = text_lengths[None] if text_lengths.dim() == 0 else text_lengths
        q, k, v = self._project(query, key, value)
        wrong = None
        if key_padding_mask is not None:
            text_lengths, wrong = _lengths_of_padding(key_padding_mask, mask.text_len, q, batched)
        out = attention.sparse_attention(q, k, v, mask, text_lengths=text_lengths, impl=self.impl)
        if wrong is not None:
            out = out.masked_fill(wrong[:, None, None, None], torch.nan)
        weights = None
        if need_weights:
            weights = attention.attention_weights(q, k, mask, scale=self.head_dim**-0.5, text_lengths=text_lengths)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        out = out.transpose(1, 2).flatten(-2)  # (B, S, E)
        if not batched:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return self.out_proj(out), weights

    def extra_repr(self) -> str:
        parts = [] if self.mask is None else [f"mask={self.mask!r}"]
        return ", ".join(parts if self.impl == "auto" else [*parts, f"impl={self.impl!r}"])

    def _check_inputs(self, query, key, value):
        for name, tensor, size, weight in (
            ("query", query, self.embed_dim, self.q_proj_weight),
            ("key", key, self.kdim, self.k_proj_weight),
            ("value", value, self.vdim, self.v_proj_weight),
        ):
            if isinstance(tensor, torch.Tensor) and tensor.is_nested:
                raise TypeError(
                    f"{name} must be a dense tensor with an AttentionMask, got a nested one; TransformerEncoder makes them "
                    "from src_key_padding_mask unless enable_nested_tensor=False; to hide padded text use text_lengths"
                )
            check_tensor(name, tensor)
            if name == "query" and tensor.dim() not in (2, 3):
                raise ValueError(f"query must have 2 or 3 dimensions, got {tuple(tensor.shape)}")
            if tensor.shape != (*query.shape[:-1], size):
                expected = (*query.shape[:-1], size)
                raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")
            check_fits(name, tensor, self.in_proj_weight if weight is None else weight)

    def _check_layout(self, query, mask):
        """A batch_first that was forgotten, as most sequences are as long as the mask."""
        if query.dim() != 3 or torch.compiler.is_compiling():
            return
        B, S = query.shape[:2] if self.batch_first else query.shape[1::-1]
        if B == mask.seq_len != S:
            axes = "(batch, sequence, channels)" if self.batch_first else "(sequence, batch, channels)"
            warn_of_layout(query, f"{axes}: {S} positions of {B} samples", f"use batch_first={not self.batch_first}")

    def _project(self, query, key, value):
        """The projected query, key and value, (B, H, S, D) each: strided views of what the projections wrote."""
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return self._heads(torch_F.linear(query, self.in_proj_weight, self.in_proj_bias), 3)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        each = zip((query, key, value), weights, biases, strict=True)
        return tuple(self._heads(torch_F.linear(*arguments), 1)[0] for arguments in each)

    def _heads(self, x, parts):
        """x holds `parts` embeddings side by side; returns as many (B, H, S, D) views of it."""
        x = x.unflatten(-1, (parts, self.num_heads, self.head_dim))
        if x.dim() == 4:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.permute(2, 0, 3, 1, 4).unbind()  # from (B, S, parts, H, D)


def _lengths_of_padding(padding, T, query, batched):
    """`key_padding_mask` as text_lengths (B,), and which samples it hides something else from, None if it was looked at.

    torch's encoder layers turn booleans into 0 and -inf.
    """
    B, _, S, _ = query.shape
    if not isinstance(padding, torch.Tensor) or not (padding.dtype == torch.bool or padding.is_floating_point()):
        got = padding.dtype if isinstance(padding, torch.Tensor) else type(padding).__name__
        raise TypeError(f"key_padding_mask must be a tensor of booleans or of 0 and -inf, got {got}")
    shape = (B, S) if batched else (S,)
    if padding.shape != shape:
        raise ValueError(f"key_padding_mask must have shape {shape}, got {tuple(padding.shape)}")
    if padding.device != query.device:
        raise ValueError(f"key_padding_mask must be on query's device {query.device}, got {padding.device}")
    padding = padding.detach().view(B, S)
    hidden = padding if padding.dtype == torch.bool else padding == -torch.inf
    lengths = (~hidden[:, :T]).sum(1)
    position = torch.arange(S, device=padding.device)
    wrong = (hidden != ((position < T) & (position >= lengths[:, None]))) | (hidden != padding.bool())
    if not is_looked_at(padding):
        return lengths, wrong.any(1)
    if wrong.any():
        sample, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"key_padding_mask may hide the last of the {T} text positions with an AttentionMask (as text_lengths, (B,) "
            "numbers of valid ones) and nothing else, in booleans or in 0 and -inf; it is not so in sample "
            f"{sample}, got {padding[sample, place].item()} at position {place} and {lengths[sample]} text positions "
            "that are not hidden"
        )
    return lengths, None
