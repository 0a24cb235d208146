"""DALL-E's prior over captions and image codes: one transformer over one stream (Ramesh et al. 2021, section 2.2).

The stream's T + G tokens are the caption's, padded to T, and the image's codes in raster order. The model's inputs are a
start token and all of the stream but its last token; the output at input s predicts the stream's token s. So the text
that masks and caches speak of has T + 1 positions, and image token i is an input at position T + 1 + i.

B batch, T text positions, h x w grid, G = h * w image positions, V text vocabulary, K image codes, W width, P prompts,
N images of a prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import NamedTuple

import torch
from torch import nn

from dalle_fast.masks import AttentionMask
from dalle_fast.nn import functional as F
from dalle_fast.nn import generation
from dalle_fast.nn.checks import check_integers, check_number, check_range, check_size
from dalle_fast.nn.kv_cache import KVCache
from dalle_fast.nn.transformer import INIT_STD, Linear, Transformer
from dalle_fast.ops.attention.op import MAX_HEAD_DIM
from dalle_fast.ops.calls import autocast_dtype


@dataclasses.dataclass(frozen=True)
class DALLEConfig:
    """What a `DALLE` is built from.

    Attributes:
        vocab_size: V. text_len: T. num_codes: K. grid: (h, w), or one integer for a square.
        layers, width, num_heads, head_dim: of the transformer.
        rules: a mask rule for each layer (see `AttentionMask`); None is the paper's schedule: layer l, counted from 1,
            is column where (l - 2) % 4 == 0, else row, and the last is conv_flat.
        kernel_size: of convolutional layers, at most the grid's smaller side (or the odd number below it).
        text_weight: of the text's loss; the image's has the rest of 1.
        hide_padding: hide padding positions as keys. The paper does not: it learns a padding token for each position.
    """

    vocab_size: int = 16384
    text_len: int = 256
    num_codes: int = 8192
    grid: tuple[int, int] = (32, 32)
    layers: int = 12
    width: int = 512
    num_heads: int = 8
    head_dim: int = 64
    rules: tuple[str, ...] | None = None
    kernel_size: int = 11
    text_weight: float = 1 / 8
    hide_padding: bool = False

    def __post_init__(self):
        sizes = ("vocab_size", "text_len", "num_codes", "layers", "width", "num_heads", "head_dim", "kernel_size")
        for name in sizes:
            object.__setattr__(self, name, check_size(name, getattr(self, name)))  # NumPy's are none for JSON
        object.__setattr__(self, "text_weight", check_number("text_weight", self.text_weight))
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM}, got {self.head_dim}")
        if not 0 <= self.text_weight <= 1:
            raise ValueError(f"text_weight must be from 0 to 1, got {self.text_weight!r}")
        if not isinstance(self.hide_padding, bool):
            raise TypeError(f"hide_padding must be a bool, got {self.hide_padding!r}")
        if isinstance(self.rules, str):  # whose letters are no rules
            raise TypeError(f"rules must be a sequence of a rule for each layer, got the string {self.rules!r}")
        if self.rules is not None:
            object.__setattr__(self, "rules", tuple(self.rules))  # JSON makes it a list
            if len(self.rules) != self.layers:
                raise ValueError(f"rules must name one for each of {self.layers} layers, got {len(self.rules)}")
        object.__setattr__(self, "grid", self.masks[0].grid)  # the masks check grid, rules and kernel_size

    @property
    def masks(self) -> tuple[AttentionMask, ...]:
        """The layers' masks, over T + 1 text positions: the start token's is the first."""
        rules = self.rules
        if rules is None:
            cycle = ["column" if (layer - 2) % 4 == 0 else "row" for layer in range(1, self.layers)]
            rules = (*cycle, "conv_flat")
        plain = AttentionMask("causal", self.text_len + 1, self.grid)
        kernel_size = min(self.kernel_size, (min(plain.grid) - 1) | 1)
        sizes = {True: kernel_size, False: 1}
        return tuple(
            dataclasses.replace(plain, rule=rule, kernel_size=sizes[str(rule).startswith("conv_")]) for rule in rules
        )

    @property
    def image_len(self) -> int:
        """G."""
        return self.grid[0] * self.grid[1]


PRESETS = {
    "12b": DALLEConfig(layers=64, width=3968, num_heads=62),
    "1b": DALLEConfig(layers=24, width=2048, num_heads=32),
    "medium": DALLEConfig(layers=24, width=1024, num_heads=16),
    "small": DALLEConfig(),
    "tiny": DALLEConfig(
        vocab_size=512, text_len=32, num_codes=512, grid=8, layers=4, width=128, num_heads=4, head_dim=32
    ),
}


class DALLEOutput(NamedTuple):
    """What `DALLE.forward` returns.

    loss: scalar, text_weight * text_loss + (1 - text_weight) * image_loss.
    text_loss, image_loss: scalars, the mean over the batch's caption tokens (padding does not count) and over its image
        tokens, in nats per token.
    """

    loss: torch.Tensor
    text_loss: torch.Tensor
    image_loss: torch.Tensor


class Embedding(nn.Embedding):
    """torch's, initialised as the transformer's weights."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=INIT_STD)


class DALLE(nn.Module):
    """The autoregressive model of captions and image codes.

    Parameters are float32 and stay so: for 16-bit training use torch.autocast, which leaves gains, biases, embeddings
    and the residual stream alone. Logits are float32 always; their operands are too under float16, as the paper's.

    Of `head`, `start` and the embeddings of positions, rows and columns, `forward` and `hidden` read the weight and do not
    call the module (a `step` calls those of rows and columns): hooks on them are not noticed, nor what a module in their
    place does beside its `weight`. One that has none, as a LoRA wrapper that keeps the layer within, is an AttributeError.
    Parametrizations of the weights are noticed; `text_embedding` and `image_embedding` are called.

    Args:
        config: a `DALLEConfig` or the name of one of PRESETS: "12b", "1b", "medium", "small", "tiny".
        activation_checkpointing, gradient_scaling: as of `Transformer`.
        impl: of attention, as in `dalle_fast.nn.functional.sparse_attention`. Losses and samples, and all other layers,
            choose for themselves, but that "reference" is for them too.

    Attributes:
        trained_with: what is known of how it was trained, and goes with it into files: "caption_dropout", the share of
            captions that were hidden.

    Raises:
        ValueError: no such preset or `impl`.
    """

    def __init__(
        self, config: DALLEConfig | str, *, activation_checkpointing=False, gradient_scaling=False, impl: str = "auto"
    ):
        super().__init__()
        if isinstance(config, str):
            config = PRESETS.get(config, config)
        if not isinstance(config, DALLEConfig):
            raise ValueError(f"config must be a DALLEConfig or one of {', '.join(PRESETS)}, got {config!r}")  # noqa: TRY004
        self.config, self.impl, self.trained_with = config, impl, {}
        V, T, K, W = config.vocab_size, config.text_len, config.num_codes, config.width
        self.text_embedding = Embedding(V + T, W)  # token V + t is the padding of position t
        self.text_position = Embedding(T, W)
        self.start = Embedding(1, W)
        self.image_embedding = Embedding(K, W)
        self.row_embedding = Embedding(config.grid[0], W)
        self.column_embedding = Embedding(config.grid[1], W)
        self.transformer = Transformer(
            config.masks,
            W,
            config.num_heads,
            config.head_dim,
            activation_checkpointing=activation_checkpointing,
            gradient_scaling=gradient_scaling,
            impl=impl,
        )
        self.head = Linear(W, V + K, impl, bias=False)  # text tokens, then codes
        self.head.std = INIT_STD
        self._draw()

    def reset_parameters(self):
        """Parameters and buffers as of a new model: with one seed the same numbers, which this call alone gives.

        After `to_empty`, of a model made on the device "meta":

            with torch.device("meta"):
                model = DALLE("12b")
            model.to_empty(device="cuda").reset_parameters()

        Where each module's own `reset_parameters` is called too, as recipes for `fully_shard` do, the numbers are others,
        of the same distribution.
        """
        for module in self._embeddings():
            module.reset_parameters()  # as in its constructor; drawn again below
        self.transformer.reset_parameters()
        nn.Linear.reset_parameters(self.head)
        self._draw()

    def _draw(self):
        for module in (*self._embeddings(), self.head):
            module.reset_parameters()

    def forward(self, text, codes, *, text_lengths=None) -> DALLEOutput:
        """The training objective.

        Args:
            text: (B, T) int64, tokens from 0 to V - 1. From text_lengths on they are not looked at: each position has
                a padding token of its own.
            codes: (B, G) or (B, h, w) int64, from 0 to K - 1.
            text_lengths: (B,) int64 from 0 to T, the captions' lengths; None means T. 0 is the empty caption: set it
                for some of the captions to train for classifier-free guidance.

        Raises:
            TypeError, ValueError: an argument of another dtype, shape or device, or (on a CPU, where a look costs
                nothing) with values out of range.
        """
        T = self.config.text_len
        check_integers("text", text)
        codes = self.check_codes(codes, text.shape[0], least=self.config.image_len)
        hidden = self.hidden(text, codes[:, :-1], text_lengths=text_lengths)  # (B, T + G, W)
        padding = self._padding(text, text_lengths)
        text_target = text if padding is None else text.masked_fill(padding, -100)
        # Split, not sliced: one gradient is made of both parts.
        of_text, of_codes = self.head.weight.split((self.config.vocab_size, self.config.num_codes))
        with _no_float16(hidden.device.type):
            text_loss = self._mean_loss(hidden[:, :T], of_text, text_target)
            image_loss = self._mean_loss(hidden[:, T:], of_codes, codes)
        weight = self.config.text_weight
        return DALLEOutput(weight * text_loss + (1 - weight) * image_loss, text_loss, image_loss)

    def hidden(self, text, codes, *, text_lengths=None, cache=None):
        """What the output matrix takes, for the caption and the first n image tokens: row s predicts stream token s.

        Args:
            text, text_lengths: as in `forward`. codes: (B, n), n from 0 to G.
            cache: a `KVCache` of B prompts that takes the keys and values.

        Returns:
            (B, T + 1 + n, W)
        """
        self.check_text(text, text_lengths)
        codes = self.check_codes(codes, text.shape[0], least=0)
        inputs = self._embed(text, codes, self._padding(text, text_lengths))
        return self.transformer(inputs, self.attention_lengths(text_lengths), cache)

    def logits(self, text, codes, *, text_lengths=None):
        """Logits (B, T, V) of the caption's tokens and (B, min(n + 1, G), K) of the image's, after `hidden`; for tests,
        scores and small models: `forward` never makes them."""
        T, G = self.config.text_len, self.config.image_len
        hidden = self.hidden(text, codes, text_lengths=text_lengths)
        text_weight = self.head.weight[: self.config.vocab_size]
        return hidden[:, :T] @ text_weight.T, hidden[:, T : T + G] @ self.image_weight.T

    def new_cache(self, num_prompts, num_images=1, *, text_lengths=None, device=None):
        """A `KVCache` for `num_images` images of each of `num_prompts` captions, for a sampling loop of one's own:

            cache = model.new_cache(len(text), text_lengths=text_lengths)
            hidden = model.hidden(text, text[:, :0], text_lengths=text_lengths, cache=cache)[:, -1]  # no code yet
            for _ in range(model.config.image_len):
                codes = F.codebook_sample(hidden, model.image_weight)  # (B,), or what you choose
                if cache.length < model.config.image_len - 1:
                    hidden = model.step(codes, cache)

        Under torch.no_grad. Of several images of a caption, hidden is of the caption alone before the first step:
        `hidden.repeat_interleave(num_images, 0)`.

        Args:
            text_lengths: (P,) or None, those of the call of `hidden`. device: None means the model's.
        """
        own = self.head.weight
        return KVCache(
            self.config.masks,
            num_prompts=num_prompts,
            num_images=num_images,
            num_heads=self.config.num_heads,
            head_dim=self.config.head_dim,
            text_lengths=self.attention_lengths(text_lengths),
            device=own.device if device is None else device,
            dtype=autocast_dtype(own) or own.dtype,  # as its attention has them
        )

    def step(self, codes, cache):
        """What predicts the next image token, (B, W), after one more image token for each sample, codes (B,).

        Raises:
            TypeError, ValueError: codes of another dtype or shape, or (on a CPU) with values out of range; the cache
                holds no text, or a whole image.
        """
        check_integers("codes", codes)
        B = cache.num_prompts * cache.num_images
        if codes.dim() != 1 or codes.shape[0] != B:
            raise ValueError(
                f"codes must have shape ({B},), one for each of the cache's samples, got {tuple(codes.shape)}"
            )
        self._check_codes_range(codes)
        cache.check_room()
        row, column = cache.position // self.config.grid[1], cache.position % self.config.grid[1]
        x = self.image_embedding(codes) + self.row_embedding(row) + self.column_embedding(column)
        return self.transformer.step(x, cache)

    generate = generation.generate

    def decay_groups(self, weight_decay):
        """Parameter groups for an optimizer: matrices decay; gains, biases and embeddings do not."""
        plain = {id(p) for module in self._embeddings() for p in module.parameters()}
        decays = [p for p in self.parameters() if p.dim() > 1 and id(p) not in plain]
        others = [p for p in self.parameters() if p.dim() <= 1 or id(p) in plain]
        return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    def unscale_gradients(self):
        """See `Transformer.unscale_gradients`; does nothing without gradient_scaling."""
        return self.transformer.unscale_gradients()

    # -- parts -------------------------------------------------------------------------------------------------------

    def _embeddings(self):
        return [module for module in self.children() if isinstance(module, nn.Embedding)]

    @property
    def codebook_impl(self):
        """`impl` of losses and samples, in a loop of one's own too: not all that serve attention have them."""
        return "reference" if self.impl == "reference" else "auto"

    @property
    def image_weight(self):
        """The output matrix's rows of the codes, (K, W)."""
        return self.head.weight[self.config.vocab_size :]

    def _embed(self, text, codes, padding):
        """Inputs (B, T + 1 + n, W) of text (B, T) and codes (B, n)."""
        B, n = codes.shape
        position = torch.arange(self.config.text_len, device=text.device)
        if padding is not None:
            text = torch.where(padding, self.config.vocab_size + position, text)
        start = self.start.weight.expand(B, 1, -1)
        text = self.text_embedding(text) + self.text_position.weight
        of_grid = (self.row_embedding.weight[:, None] + self.column_embedding.weight).flatten(0, 1)  # (G, W)
        return torch.cat((start, text, self.image_embedding(codes) + of_grid[:n]), 1)

    def _padding(self, text, text_lengths):
        """Which positions (B, T) are padding; None means none."""
        if text_lengths is None:
            return None
        return torch.arange(self.config.text_len, device=text.device) >= text_lengths[:, None]

    def attention_lengths(self, text_lengths):
        """The text_lengths of attention, and of a `KVCache` that is not made by `new_cache`: the start token counts."""
        return text_lengths + 1 if self.config.hide_padding and text_lengths is not None else None

    def _mean_loss(self, hidden, weight, target):
        """Mean over the targets that are not ignored, 0 where there are none."""
        total = F.codebook_cross_entropy(hidden, weight, None, target, reduction="sum", impl=self.codebook_impl)
        return total / (target >= 0).sum().clamp(min=1)

    # -- checks ------------------------------------------------------------------------------------------------------

    def check_text(self, text, text_lengths, *, look=None):
        """Raise TypeError or ValueError where this model cannot take a caption. `look`: see `bounds` in checks.py."""
        T, V = self.config.text_len, self.config.vocab_size
        check_integers("text", text)
        self._check_device("text", text)
        if text.dim() != 2 or text.shape[1] != T:
            raise ValueError(f"text must have shape (B, {T}), the model's text_len, got {tuple(text.shape)}")
        if text_lengths is not None:
            check_integers("text_lengths", text_lengths)
            if text_lengths.shape != text.shape[:1] or text_lengths.device != text.device:
                got = f"{tuple(text_lengths.shape)} on {text_lengths.device}"
                raise ValueError(f"text_lengths must have shape ({len(text)},) and be on {text.device}, got {got}")
            check_range("text_lengths", text_lengths, T, "the model's text_len", look)
            text = text.masked_fill(self._padding(text, text_lengths), 0)
        check_range("text", text, V - 1, f"the last of the model's {V} text tokens", look)

    def check_codes(self, codes, batch, *, least, look=None):
        """Codes (B, n), n from `least` to G, of codes (B, n) or (B, rows, w); or TypeError or ValueError.

        Of a batch's size always shape[0], never len, which an exporter makes one number.
        """
        check_integers("codes", codes)
        self._check_device("codes", codes)
        (h, w), G = self.config.grid, self.config.image_len
        flat = codes.flatten(1) if codes.dim() == 3 and codes.shape[2] == w else codes
        if flat.dim() != 2 or flat.shape[0] != batch or not least <= flat.shape[1] <= G:
            shapes = f"({batch}, {G}) or ({batch}, {h}, {w})"
            if least < G:
                shapes = f"({batch}, n) with n from {least} to {G}, or ({batch}, rows, {w}) with at most {h} rows"
            raise ValueError(f"codes must have shape {shapes} for the model's grid {h} x {w}, got {tuple(codes.shape)}")
        self._check_codes_range(flat, look)
        return flat

    def _check_device(self, name, tensor):
        if tensor.device != self.start.weight.device:
            raise ValueError(f"{name} must be on the model's device {self.start.weight.device}, got {tensor.device}")

    def _check_codes_range(self, codes, look=None):
        K = self.config.num_codes
        check_range("codes", codes, K - 1, f"the last of the model's {K} codes", look)


def _no_float16(device_type):
    """Turns autocast to float16 off, in which the gradients of a mean over thousands of tokens would vanish."""
    if torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
