"""The decoder-only transformer over [text | image grid] tokens, one attention mask for each layer (Ramesh et al. 2021).

B batch, S sequence, W width, H heads, D head size.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dalle_fast.nn import functional as F
from dalle_fast.nn.checks import check_masks, check_size
from dalle_fast.nn.kv_cache import KVCache
from dalle_fast.ops.attention.op import IMPLS
from dalle_fast.ops.blocks import blocks_step
from dalle_fast.ops.calls import has_global_hooks, is_hooked
from dalle_fast.ops.choice import check_impl
from dalle_fast.ops.norm import add_norm

INIT_STD = 0.02  # GPT-2's
# A gradient scale of a residual block: the paper starts at 2^13 and keeps it from 2^7 to 2^24. It grows by 2^(1/1000)
# an update; here it doubles after 1,000, as multiplying by a power of two rounds nothing.
FIRST_SCALE, MIN_SCALE, MAX_SCALE = 2.0**13, 2.0**7, 2.0**24
UPDATES_TO_DOUBLE = 1000


class Linear(nn.Linear):
    """torch's, through `dalle_fast.nn.functional.linear`: faster where one token comes after another.

    impl: as of the attention beside it, but only "reference" means something here. std: of the weights when they are
    reset, with biases of 0; None, as while torch's constructor runs, means torch's initialisation.
    """

    std = None

    def __init__(self, in_features, out_features, impl, bias=True):
        super().__init__(in_features, out_features, bias)
        self.impl = impl

    def reset_parameters(self):
        if self.std is None:
            super().reset_parameters()
            return
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x, activation=None):
        impl = "reference" if self.impl == "reference" else "auto"
        return F.linear(x, self.weight, self.bias, activation=activation, impl=impl)


class Attention(nn.Module):
    """Self-attention under an `AttentionMask`; the packed projection is read in place."""

    def __init__(self, width, num_heads, head_dim, mask, impl):
        super().__init__()
        self.num_heads, self.head_dim, self.mask, self.impl = num_heads, head_dim, mask, impl
        self.qkv = Linear(width, 3 * num_heads * head_dim, impl)
        self.out = Linear(num_heads * head_dim, width, impl)

    def forward(self, x, text_lengths=None, cache=None):
        """x (B, S, W) -> (B, S, W); keys and values also go into `cache`, a `KVCache.layer`."""
        q, k, v = self._heads(x).permute(2, 0, 3, 1, 4).unbind()  # three views (B, H, S, D)
        if cache is not None:
            cache.prefill(k, v)
        out = F.sparse_attention(q, k, v, self.mask, text_lengths=text_lengths, impl=self.impl)
        return self.out(out.transpose(1, 2).flatten(2))

    def step(self, x, cache):
        """x (B, W) of the image token that comes next -> (B, W), as `forward` gives for it."""
        q, k, v = self._heads(x).unbind(1)  # three views (B, H, D)
        cache.append(k, v, impl=self.impl)
        return self.out(cache.attend(q, impl=self.impl).flatten(1))

    def _heads(self, x):
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))


class Block(nn.Module):
    """Two residual blocks, attention and a perceptron, each behind a layer norm."""

    def __init__(self, width, num_heads, head_dim, mask, impl):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, head_dim, mask, impl)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("up", Linear(width, 4 * width, impl))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("down", Linear(4 * width, width, impl))

    def forward(self, x, text_lengths=None, cache=None, scales=None):
        if scales is None:
            x = x + self.attention(self.attention_norm(x), text_lengths, cache)
            return x + self.mlp(self.mlp_norm(x))
        # The identity path is float32. Only after its gradient has been scaled may it become float16.
        of_attention, of_mlp = scales
        inner = self.attention_norm(_Unscale.apply(x, of_attention))
        x = x + _Scale.apply(self.attention(inner, text_lengths, cache).float(), of_attention)
        inner = self.mlp_norm(_Unscale.apply(x, of_mlp))
        return x + _Scale.apply(self.mlp(inner).float(), of_mlp)

    def step(self, x, update, cache):
        """x and update (B, W), whose sum, or x alone, is the block's input -> two whose sum is its output.

        The last sum is left to the norm that comes next.
        """
        x, inner = add_norm(x, update, self.attention_norm, impl=self.attention.impl)
        x, inner = add_norm(x, self.attention.step(inner, cache), self.mlp_norm, impl=self.attention.impl)
        if not self._has_mlp_as_made():
            return x, self.mlp(inner)
        return x, self.mlp.down(self.mlp.up(inner, activation="gelu"))  # on a GPU with GELU in the product's kernel

    def _has_mlp_as_made(self):
        """Whether GELU may be left to the perceptron's first layer: nothing else happens between the two, nor around."""
        mlp = self._modules.get("mlp")
        if type(mlp) is not nn.Sequential or tuple(mlp._modules) != ("up", "gelu", "down"):
            return False
        up, gelu, _ = mlp._modules.values()
        if type(gelu) is not nn.GELU or gelu.approximate != "none" or type(up).forward is not Linear.forward:
            return False
        return not (has_global_hooks() or is_hooked(mlp) or is_hooked(up) or is_hooked(gelu))

    def residual_blocks(self):
        """The parameters of each residual block."""
        yield [*self.attention_norm.parameters(), *self.attention.parameters()]
        yield [*self.mlp_norm.parameters(), *self.mlp.parameters()]


class Transformer(nn.Module):
    """Pre-norm residual blocks of sparse attention, and a last norm.

    Initialised as GPT-2: normal with standard deviation 0.02, smaller where a residual block ends, biases 0.

    With `gradient_scaling` every residual block scales the gradient that enters it by a power of two of its own and
    unscales the one that leaves it, setting what is not finite to 0 (the paper's appendix on mixed precision): what
    float16 needs in place of one scale for the whole loss, bfloat16 does not. Then call `unscale_gradients` after each
    backward pass.

    Args:
        masks: an `AttentionMask` for each layer.
        width: W. num_heads: H. head_dim: D, W / H if None.
        activation_checkpointing: keep each layer's input only and compute the layer again in the backward pass.
        gradient_scaling: see above.
        impl: as in `dalle_fast.nn.functional.sparse_attention`.

    Raises:
        TypeError: masks holds something else, or a size is no integer.
        ValueError: there are no masks, or of several streams; a size is wrong, or there is no such `impl`.
    """

    def __init__(
        self,
        masks,
        width,
        num_heads,
        head_dim=None,
        *,
        activation_checkpointing=False,
        gradient_scaling=False,
        impl="auto",
    ):
        super().__init__()
        check_impl(impl, IMPLS)
        masks = tuple(masks)
        check_masks(masks)
        for name, size in (("width", width), ("num_heads", num_heads), ("head_dim", head_dim)):
            if size is not None or name != "head_dim":
                check_size(name, size)
        if head_dim is None and width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads where head_dim is None, got {width}, {num_heads}")
        head_dim = width // num_heads if head_dim is None else head_dim
        self.activation_checkpointing, self.gradient_scaling = activation_checkpointing, gradient_scaling
        self.blocks = nn.ModuleList(Block(width, num_heads, head_dim, mask, impl) for mask in masks)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("gradient_scale", torch.full((len(masks), 2), FIRST_SCALE))
        self.register_buffer("updates_at_scale", torch.zeros(len(masks), 2, dtype=torch.int64))
        last = INIT_STD / math.sqrt(2 * len(masks))  # the sum over blocks does not grow with their number
        for linear, std in zip(self._linears(), (INIT_STD, last) * 2 * len(masks), strict=True):
            linear.std = std
        self._draw()

    @property
    def masks(self):
        """The layers' masks."""
        return tuple(block.attention.mask for block in self.blocks)

    def reset_parameters(self):
        """Parameters and buffers as of a new transformer: with one seed the same numbers, which this call alone gives.

        For `to_empty`. Where each module's own `reset_parameters` is called too the numbers are others, as right.
        """
        for linear in self._linears():
            nn.Linear.reset_parameters(linear)  # drawn over below: torch's constructor takes as many random numbers
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self.gradient_scale.fill_(FIRST_SCALE)
        self.updates_at_scale.zero_()
        self._draw()

    def _linears(self):
        """In the order in which they are made."""
        return [
            linear
            for block in self.blocks
            for linear in (block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down)
        ]

    def _draw(self):
        for linear in self._linears():
            linear.reset_parameters()

    def forward(self, x, text_lengths=None, cache=None):
        """x (B, S, W) -> (B, S, W).

        Args:
            text_lengths: (B,) or None, as in `dalle_fast.nn.functional.sparse_attention`.
            cache: a `KVCache` that takes the keys and values of these first S positions, or None.

        Raises:
            ValueError: the cache was made for other masks or text_lengths, or holds a text already.

        Warns:
            UserWarning: there is a cache, and a hook or a subclass's `forward` that `step` would not call.
        """
        if cache is not None:
            self._check_new(cache, text_lengths)
        scaled = self.gradient_scaling and torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            arguments = (
                text_lengths,
                None if cache is None else cache.layer(index),
                self.gradient_scale[index].unbind() if scaled else None,
            )
            # Not with a cache: a backward pass would compute the block again, and put these keys over later ones.
            if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, *arguments, use_reentrant=False)
            else:
                x = block(x, *arguments)
        if cache is not None:
            cache.advance(x.shape[1] - self.masks[0].text_len)
        return self.norm(x)

    def step(self, x, cache):
        """x (B, W) of the image token that comes next -> (B, W), as `forward` gives for it; `cache` takes the token.

        On a CPU one native call computes all blocks, where all modules are as they were made. Whether they are is looked
        at in a cache's first step: hooks, other modules or methods and another `impl` that come later are not noticed
        before `cache.reset()`, and functions put into the classes never. Other weights are at once, but for one that lies
        where it lay in another shape, as after `weight.data = weight.data.T`.

        Raises:
            ValueError: the cache was made for another batch, or its image is complete; it was made for other masks, or
                holds no text yet (which a compiled step does not look at).
        """
        self._check_masks(cache)
        if not torch.compiler.is_compiling() and not cache.has_text:
            raise ValueError("cache must hold the text before the first image token: call `forward` with it")
        out = self._step_at_once(x, cache)
        if out is not None:
            return out
        update = None
        for index, block in enumerate(self.blocks):
            x, update = block.step(x, update, cache.layer(index))
        cache.advance()
        return add_norm(x, update, self.norm, impl=self.blocks[-1].attention.impl)[1]

    def _check_masks(self, cache):
        if not torch.compiler.is_compiling() and cache.masks != self.masks:
            raise ValueError(f"cache must be made for the transformer's masks {self.masks}, got one for {cache.masks}")

    def _check_new(self, cache, text_lengths):
        self._check_masks(cache)
        if torch.compiler.is_compiling():
            return
        if cache.has_text:
            held = f"a text and {cache.length} image tokens"
            raise ValueError(f"cache must be new, or be reset, got one that holds {held}")
        given, own = text_lengths, cache.text_lengths
        differ = (
            given is not None and own is not None and given.is_cpu and own.is_cpu and given.tolist() != own.tolist()
        )
        if (given is None) != (own is None) or differ:
            raise ValueError(f"cache must be made with this call's text_lengths {given}, got one with {own}")
        for name, part in self.named_modules(remove_duplicate=False):
            kind = next((kind for kind in (Transformer, Block, Attention) if isinstance(part, kind)), None)
            if kind is None or "step" in part.__dict__ or type(part).step is not kind.step:
                continue  # no step, or one that was made to fit
            if is_hooked(part) or type(part).forward is not kind.forward:
                name = f"the transformer's {name}" if name else "the transformer"
                warnings.warn(
                    f"{name} has forward hooks, or a forward of its own, which image tokens that come one by one do "
                    "not go through: they take its `step`",
                    stacklevel=3,
                )

    def _step_at_once(self, x, cache):
        """`step` in one native call on a CPU; None, with nothing done, where that cannot serve."""
        operands = self._operands_of_step(x, cache)
        out = None if operands is None else blocks_step(*operands)
        if out is not None:
            cache.advance()
        return out

    def _operands_of_step(self, x, cache):
        """The arguments of `blocks_step`; None where something is not as it was made, and may do something else."""
        if not x.is_cpu or torch.compiler.is_compiling() or type(cache) is not KVCache:
            return None
        if cache.plan is None or cache.plan[0] is not self:
            cache.plan = self, self._parts_as_made(cache)
        parts = cache.plan[1]
        if parts is None:
            return None
        cache.check_room()
        return (
            x,
            [part._parameters.get(name) for part in parts for name in ("weight", "bias")],
            [part.eps for part in parts if type(part) is nn.LayerNorm],
            cache.of_blocks,
            cache.length,
            cache.text_lengths,
        )

    def _parts_as_made(self, cache):
        """What has the parameters of `blocks_step`, in their order; None where a module does not do what it was made for.

        A hundred modules take longer to look at than a small model's step, so once a text is enough.
        """
        parts = []
        for block in self.blocks:
            modules = dict(block.named_modules(remove_duplicate=False))
            if {name: type(module) for name, module in modules.items()} != _MODULES_OF_BLOCK:
                return None
            attention = modules["attention"]
            if (attention.num_heads, attention.head_dim) != (cache.num_heads, cache.head_dim):
                return None
            if any(map(_is_changed, modules.values())) or not block._has_mlp_as_made():
                return None
            parts += [modules[name] for name in _PARTS_OF_BLOCK]
        parts.append(self.norm)
        if type(self.norm) is not nn.LayerNorm or _is_changed(self.norm) or has_global_hooks():
            return None
        return parts if all(part._parameters.keys() == {"weight", "bias"} for part in parts) else None

    @torch.no_grad()
    def unscale_gradients(self):
        """Take the scales out of the parameters' gradients, and move the scales. After backward, before clipping.

        A residual block with a gradient that is not finite gets gradients of 0 and half its scale. The others' scales
        double after 1,000 calls. Nothing waits for the device.

        Returns:
            bool (layers, 2): the blocks (attention, perceptron) whose gradients were dropped.
        """
        dropped = torch.zeros_like(self.updates_at_scale, dtype=torch.bool)
        if not self.gradient_scaling:
            return dropped
        for index, block in enumerate(self.blocks):
            for part, parameters in enumerate(block.residual_blocks()):
                grads = [p.grad for p in parameters if p.grad is not None]
                if not grads:
                    continue
                bad = torch.stack([~grad.isfinite().all() for grad in grads]).any()
                dropped[index, part] = bad
                for grad in grads:
                    grad.div_(self.gradient_scale[index, part]).masked_fill_(bad, 0)
        self.updates_at_scale.add_(1).masked_fill_(dropped, 0)
        grows = self.updates_at_scale >= UPDATES_TO_DOUBLE
        self.updates_at_scale.masked_fill_(grows, 0)
        self.gradient_scale.mul_(1.0 - 0.5 * dropped).mul_(1.0 + 1.0 * grows).clamp_(MIN_SCALE, MAX_SCALE)
        return dropped


_NATIVE = ("auto", "cpu")  # values of `impl` that allow one native call for all blocks
_PARTS_OF_BLOCK = ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up", "mlp.down")
_MODULES_OF_BLOCK = {
    "": Block, "attention_norm": nn.LayerNorm, "attention": Attention, "attention.qkv": Linear, "attention.out": Linear,
    "mlp_norm": nn.LayerNorm, "mlp": nn.Sequential, "mlp.up": Linear, "mlp.gelu": nn.GELU, "mlp.down": Linear,
}  # fmt: skip


def _is_changed(module):
    """Whether an instance has more than its class gave it, or leaves its work to the reference."""
    if is_hooked(module) or not module.__dict__.keys().isdisjoint(("step", "_heads")):
        return True
    return type(module) in (Attention, Linear) and module.impl not in _NATIVE


class _Scale(torch.autograd.Function):
    """The identity; the gradient is multiplied by `scale` as it enters a residual block."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (scale,) = ctx.saved_tensors
        return grad * scale, None


class _Unscale(torch.autograd.Function):
    """The identity; the gradient is divided by `scale` as it leaves, and what is not finite set to 0.

    Else an overflow in one block would make the scales of all blocks before it drop.
    """

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (scale,) = ctx.saved_tensors
        return torch.nan_to_num(grad / scale, nan=0.0, posinf=0.0, neginf=0.0), None
