"""The discrete VAE of stage 1 (Ramesh et al. 2021, section 2.1 and appendix A): images to codes and back.

Parameter names are OpenAI's (`blocks.group_1.block_1.res_path.conv_1.w`), so that their weights load.

B batch, C image channels, H x W pixels, h x w grid of codes, K codes, D size of an embedding, Din encoder features.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as torch_F
from torch import nn

from dalle_fast.nn import functional as F
from dalle_fast.nn.checks import bounds, check_fits, check_integers, check_number, check_range, check_size
from dalle_fast.ops.choice import check_impl
from dalle_fast.ops.codebook.op import IMPLS

LIKELIHOODS = ("logit_laplace", "l1", "l2")
PIXEL_MARGIN = 0.1  # the paper's epsilon: the logit-Laplace distribution lives on (0, 1), pixels go to (0.1, 0.9)
# How far beyond [0, 1] pixels may be, as bicubic resizing leaves them: up to here their logit-Laplace density is finite.
OVERSHOOT = PIXEL_MARGIN / (1 - 2 * PIXEL_MARGIN)  # 1/8


def map_pixels(images):
    """Pixels from [0, 1] to [0.1, 0.9], where the logit-Laplace density is finite."""
    return (1 - 2 * PIXEL_MARGIN) * images + PIXEL_MARGIN


def unmap_pixels(images):
    """The inverse of `map_pixels`, clamped to [0, 1]."""
    return ((images - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clamp(0, 1)


@dataclasses.dataclass(frozen=True)
class DVAEConfig:
    """What a `DiscreteVAE` is built from.

    Attributes:
        image_size: pixels of a side that it is trained at; any multiple of `downsampling` can be encoded.
        downsampling: pixels of a side per code, a power of two.
        num_codes: K. embedding_dim: D. hidden: channels of the first group; each further group has twice as many.
        blocks_per_group: residual blocks. channels: C.
        likelihood: of the pixels: "logit_laplace" (the paper), "l1" or "l2".
        min_log_scale: the smallest ln b of the logit-Laplace distribution. On flat drawings a small b would pay for
            every sharp edge that is lost, and on pictures with much of one colour, as of products on pure white, the
            loss falls without end on what is flat, with gradients that drown the object: -1 there, as in "tiny".
            Photographs full of detail need none.
        residual_gain: factor of the residual branches; None: the paper's 1 / (number of blocks)^2. It keeps a deep
            network calm at first; short runs of a shallow one do not have the time to outgrow it.
        hard: train on sampled codes (straight-through) instead of relaxed ones.
    """

    image_size: int = 256
    downsampling: int = 8
    num_codes: int = 8192
    embedding_dim: int = 128
    hidden: int = 256
    blocks_per_group: int = 2
    channels: int = 3
    likelihood: str = "logit_laplace"
    min_log_scale: float = -math.inf
    hard: bool = False
    residual_gain: float | None = None

    def __post_init__(self):
        for name in (
            "image_size",
            "downsampling",
            "num_codes",
            "embedding_dim",
            "hidden",
            "blocks_per_group",
            "channels",
        ):
            object.__setattr__(self, name, check_size(name, getattr(self, name)))
        if self.downsampling & (self.downsampling - 1):
            raise ValueError(f"downsampling must be a power of two, got {self.downsampling}")
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size must be a multiple of downsampling {self.downsampling}, got {self.image_size}"
            )
        if self.hidden % 4:
            raise ValueError(f"hidden must be a multiple of 4, got {self.hidden}")
        gain = self.residual_gain
        if gain is not None:
            object.__setattr__(self, "residual_gain", check_number("residual_gain", gain))
            if self.residual_gain <= 0:
                raise ValueError(f"residual_gain must be a positive number or None, got {gain!r}")
        if self.min_log_scale != -math.inf:
            object.__setattr__(self, "min_log_scale", check_number("min_log_scale", self.min_log_scale))
        if self.likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {self.likelihood!r}")

    @property
    def grid(self) -> int:
        """Codes of a side."""
        return self.image_size // self.downsampling

    @property
    def gain(self) -> float:
        """Factor of the residual branches."""
        num_blocks = self.downsampling.bit_length() * self.blocks_per_group
        return 1 / num_blocks**2 if self.residual_gain is None else self.residual_gain

    @property
    def widths(self) -> list[int]:
        """Channels of the encoder's groups; the decoder's are the same backwards."""
        return [self.hidden << group for group in range(self.downsampling.bit_length())]


PRESETS = {
    "openai": DVAEConfig(),
    "medium": DVAEConfig(image_size=128, num_codes=4096, hidden=128),
    "small": DVAEConfig(image_size=64, num_codes=1024, embedding_dim=64, hidden=64),
    "tiny": DVAEConfig(
        image_size=32,
        downsampling=4,
        num_codes=512,
        embedding_dim=32,
        hidden=32,
        blocks_per_group=1,
        min_log_scale=-1.0,
        residual_gain=1.0,
    ),
}


class DVAEOutput(NamedTuple):
    """What `DiscreteVAE.forward` returns.

    loss: scalar, reconstruction_loss + beta * kl * h * w / (H * W * C), in nats per pixel and channel.
    reconstruction_loss: scalar, the negative log-likelihood (or L1, L2 error) averaged over pixels and channels.
    kl: scalar, the divergence of the codes' distribution from the uniform one, in nats per code.
    codes: (B, h, w) int64, those that were sampled.
    """

    loss: torch.Tensor
    reconstruction_loss: torch.Tensor
    kl: torch.Tensor
    codes: torch.Tensor


class Conv2d(nn.Module):
    """A convolution that keeps the size, with parameters named as OpenAI's: w (out, in, k, k) and b (out,)."""

    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        self.w = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.b = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.w, std=math.prod(self.w.shape[1:]) ** -0.5)
        nn.init.zeros_(self.b)

    def forward(self, x):
        return torch_F.conv2d(x, self.w, self.b, padding=(self.w.shape[-1] - 1) // 2)


class Block(nn.Module):
    """A residual bottleneck of four convolutions; the encoder's ends with the 1x1 one, the decoder's begins with it.

    With `upsample` it is that of the image with every pixel repeated in 2 x 2. What looks at one pixel at a time comes
    before that: the same numbers from a quarter of the work.
    """

    def __init__(self, in_channels, out_channels, gain, kernel_sizes, upsample=False):
        super().__init__()
        middle = out_channels // 4
        sizes = [in_channels, middle, middle, middle, out_channels]
        self.gain, self.upsample = gain, upsample
        self.id_path = nn.Identity() if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)
        path = OrderedDict()
        for x, kernel_size in enumerate(kernel_sizes, 1):
            path[f"relu_{x}"] = nn.ReLU()
            path[f"conv_{x}"] = Conv2d(sizes[x - 1], sizes[x], kernel_size)
        self.res_path = nn.Sequential(path)

    def forward(self, x):
        if not self.upsample:
            return self.id_path(x) + self.gain * self.res_path(x)
        in_place, around = self.res_path[:2], self.res_path[2:]  # the ReLU and the 1x1 convolution, and the rest
        return _repeat(self.id_path(x)) + self.gain * around(_repeat(in_place(x)))


def _repeat(x):
    return torch_F.interpolate(x, scale_factor=2, mode="nearest")


def _groups(config, widths, in_channels, kernel_sizes, *, pool=False, upsample=False):
    """group_1 ... group_n, each of blocks block_1 ...; between two groups the image is halved or doubled."""
    groups = OrderedDict()
    for g, width in enumerate(widths, 1):
        group = OrderedDict()
        for b in range(1, config.blocks_per_group + 1):
            doubles = upsample and g > 1 and b == 1
            group[f"block_{b}"] = Block(in_channels, width, config.gain, kernel_sizes, doubles)
            in_channels = width
        if pool and g < len(widths):
            group["pool"] = nn.MaxPool2d(2)
        groups[f"group_{g}"] = nn.Sequential(group)
    return groups


def _reset(blocks):
    """The convolutions of an encoder or a decoder, in the order in which they are made: the output first."""
    for part in (blocks.output, blocks[:-1]):
        for module in part.modules():
            if isinstance(module, Conv2d):
                module.reset_parameters()


class Encoder(nn.Module):
    """(B, C, H, W) -> features (B, Din, h, w), of which the output convolution makes the logits of K codes."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        widths = config.widths
        output = OrderedDict(relu=nn.ReLU(), conv=Conv2d(widths[-1], config.num_codes, 1))
        self.blocks = nn.Sequential(
            OrderedDict(
                input=Conv2d(config.channels, widths[0], 7),
                **_groups(config, widths, widths[0], (3, 3, 3, 1), pool=True),
                output=nn.Sequential(output),
            )
        )

    def reset_parameters(self):
        """As of a new one; see `DiscreteVAE.reset_parameters`."""
        _reset(self.blocks)

    def features(self, images):
        """What the 1x1 output convolution takes."""
        return self.blocks.output.relu(self.blocks[:-1](images))

    def forward(self, images):
        """The logits (B, K, h, w), which `DiscreteVAE` itself never makes."""
        return self.blocks(images)


class Decoder(nn.Module):
    """Embeddings (B, D, h, w) -> (B, 2 C, H, W): mu and ln b of every pixel."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        widths = config.widths[::-1]
        output = OrderedDict(relu=nn.ReLU(), conv=Conv2d(widths[-1], 2 * config.channels, 1))
        self.blocks = nn.Sequential(
            OrderedDict(
                input=Conv2d(config.num_codes, config.embedding_dim, 1),  # its weight is the codebook
                **_groups(config, widths, config.embedding_dim, (1, 3, 3, 3), upsample=True),
                output=nn.Sequential(output),
            )
        )

    def reset_parameters(self):
        """As of a new one; see `DiscreteVAE.reset_parameters`."""
        _reset(self.blocks)

    def forward(self, embeddings):
        """From the codes' embeddings with the input convolution's bias: its product with one-hot vectors is a lookup."""
        return self.blocks[1:](embeddings)


class DiscreteVAE(nn.Module):
    """The discrete VAE of Ramesh et al. 2021, with OpenAI's architecture and parameter names.

    The encoder's output convolution, the Gumbel-softmax and the decoder's input convolution run as one
    `gumbel_codebook`, and encoding as one `codebook_argmax`: no logits of all codes are made. Of these two convolutions the
    parameters are read, and of `encoder` the method `features` is called: hooks on the three are not noticed. To
    `fully_shard` a model, shard its groups, `blocks.group_1` and so on, and then the model.

    Args:
        config: a `DVAEConfig` or the name of one of PRESETS: "openai", "medium", "small", "tiny".
        impl: as in `dalle_fast.nn.functional.gumbel_codebook`.

    Raises:
        ValueError: no such preset or `impl`.
    """

    def __init__(self, config: DVAEConfig | str = "openai", *, impl: str = "auto"):
        super().__init__()
        if isinstance(config, str):
            config = PRESETS.get(config, config)
        if not isinstance(config, DVAEConfig):
            raise ValueError(f"config must be a DVAEConfig or one of {', '.join(PRESETS)}, got {config!r}")  # noqa: TRY004
        check_impl(impl, IMPLS["gumbel_codebook"])
        self.config, self.impl = config, impl
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def reset_parameters(self):
        """As of a new model: with one seed the same numbers, which this call alone gives. After `to_empty`; where each
        module's own `reset_parameters` is called too the numbers are others, of the same distribution."""
        self.encoder.reset_parameters()
        self.decoder.reset_parameters()

    def encode(self, images):
        """The most likely code of every position: (B, h, w) int64 of images (B, C, H, W) with pixels from 0 to 1.

        Raises:
            TypeError, ValueError: as `forward` of images.
        """
        weight, bias, _, _ = self._codebook()
        return F.codebook_argmax(self._features(images), weight, bias, impl=self.impl)

    def decode(self, codes):
        """Images (B, C, H, W), pixels from 0 to 1, of codes (B, h, w).

        Raises:
            TypeError, ValueError: codes are not int64, not of that shape or, on a CPU, not codes.
        """
        check_integers("codes", codes)
        if codes.dim() != 3:
            raise ValueError(f"codes must have shape (B, h, w), got {tuple(codes.shape)}")
        _, _, codebook, shift = self._codebook()
        check_range("codes", codes, len(codebook) - 1, f"the last of the model's {len(codebook)} codes")
        mu, _ = self._statistics(torch_F.embedding(codes, codebook) + shift)
        return unmap_pixels(torch.sigmoid(mu.float()))

    def reconstruct(self, images):
        """`decode(encode(images))`."""
        return self.decode(self.encode(images))

    def forward(self, images, *, tau=1.0, beta=0.0, seed=None) -> DVAEOutput:
        """The training objective on images (B, C, H, W), pixels from 0 to 1.

        Args:
            tau: temperature of the relaxation; beta: weight of the divergence. See the paper's schedules.
            seed: of the noise, as in `gumbel_codebook`; rows are (B, h, w).

        Raises:
            TypeError, ValueError: images of the wrong dtype or shape or, on a CPU, with pixels that are not from 0 to 1
                by more than an eighth, with which the loss would be NaN (on a GPU, where a look would wait for the
                device, it is); what `gumbel_codebook` raises.
        """
        weight, bias, codebook, shift = self._codebook()
        embedding, kl, codes = F.gumbel_codebook(
            self._features(images), weight, bias, codebook, tau, hard=self.config.hard, seed=seed, impl=self.impl
        )
        reconstruction_loss = self._reconstruction_loss(images, *self._statistics(embedding + shift))
        kl = kl.mean()
        loss = reconstruction_loss + beta * kl * math.prod(codes.shape[1:]) / math.prod(images.shape[1:])
        return DVAEOutput(loss, reconstruction_loss, kl, codes)

    def load_openai(self, encoder: dict, decoder: dict):
        """Load state dicts with the names of OpenAI's published encoder and decoder, in any float dtype."""
        self.encoder.load_state_dict(encoder)
        self.decoder.load_state_dict(decoder)

    def _codebook(self):
        """The two 1x1 convolutions around the codes: weight (K, Din), bias (K,), codebook (K, D), and a shift (D,)."""
        into, out = self.encoder.blocks.output.conv, self.decoder.blocks.input
        return into.w.flatten(1), into.b, out.w.flatten(1).T, out.b

    def _features(self, images):
        """(B, h, w, Din)"""
        C, step = self.config.channels, self.config.downsampling
        if not isinstance(images, torch.Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point tensor with pixels from 0 to 1, got {got}")
        if images.dim() != 4 or images.shape[1] != C or images.shape[2] % step or images.shape[3] % step:
            expected = f"(B, {C}, H, W) with H and W multiples of {step}"
            raise ValueError(f"images must have shape {expected}, got {tuple(images.shape)}")
        check_fits("images", images, self.encoder.blocks.input.w)
        found = bounds(images)
        if found and not -OVERSHOOT < found[0] <= found[1] < 1 + OVERSHOOT:  # nor NaN
            low, high = found
            raise ValueError(f"images must have pixels from 0 to 1 (clamp them), got values from {low:g} to {high:g}")
        return self.encoder.features(map_pixels(images)).movedim(1, -1)

    def _statistics(self, embedding):
        """mu and ln b, (B, C, H, W) each, of embeddings (B, h, w, D)."""
        return self.decoder(embedding.movedim(-1, 1)).chunk(2, 1)

    def _reconstruction_loss(self, images, mu, log_scale):
        """In float32: under autocast the decoder's output has few digits, and its distance from a pixel's logit fewer."""
        mu, log_scale, pixels = mu.float(), log_scale.float(), map_pixels(images.float())
        if self.config.likelihood == "l1":
            return (torch.sigmoid(mu) - pixels).abs().mean()
        if self.config.likelihood == "l2":
            return (torch.sigmoid(mu) - pixels).square().mean()
        log_scale = log_scale.clamp(min=self.config.min_log_scale)
        # -ln f(x) of the logit-Laplace density f(x) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x))
        distance = (torch.logit(pixels) - mu).abs() * torch.exp(-log_scale)
        return (distance + log_scale + torch.log(2 * pixels * (1 - pixels))).mean()
