"""Published weights of others as models of this package.

OpenAI publishes the discrete VAE of Ramesh et al. 2021 as two pickles of whole modules, `encoder.pkl` and `decoder.pkl`
of the package `dall_e`. Unpickled as they are, they could run anything. Here each class that they name becomes one
without behaviour, and every other name is refused; what is wanted is only the tensors.
"""

from __future__ import annotations

import pickle
import re
import types
import warnings
import zipfile
from pathlib import Path

import torch

from dalle_fast.checkpoint import CheckpointError, read_weights
from dalle_fast.nn.dvae import DiscreteVAE, DVAEConfig

# What the pickles name, besides what tensors, parameters and plain containers are made of.
_MODULES = (
    "dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d", "torch.nn.modules.activation.ReLU", "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity", "torch.nn.modules.pooling.MaxPool2d", "torch.nn.modules.upsampling.Upsample",
)  # fmt: skip
_PARTS = (
    "collections.OrderedDict", "builtins.set", "__builtin__.set", "torch.device", "torch.FloatStorage",
    "torch.HalfStorage", "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2",
)  # fmt: skip


class _Module:
    """What any of _MODULES is read as: a place for its attributes."""

    dump_patches = False  # which torch asks of a class whose source has changed


class _Unpickler(pickle.Unpickler):
    """For torch's format before 1.6, of which its `weights_only` reader takes no modules, whatever they are read as."""

    def find_class(self, module, name):
        if (full := f"{module}.{name}") in _MODULES:
            return _Module
        if full in _PARTS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {full}")


def read_openai(path) -> dict[str, torch.Tensor]:
    """The tensors of OpenAI's `encoder.pkl` or `decoder.pkl` by their names in a state dict; or what `read_weights` reads.

    Raises:
        CheckpointError: neither, or a pickle that names anything else.
        OSError: it cannot be opened.
    """
    path = Path(path)
    try:
        return read_weights(path)
    except CheckpointError as error:
        try:
            module = _read_module(path)
        except Exception:  # of a file that is no module either: the first error says why
            raise error from None
        if not isinstance(module, _Module):
            raise
    return dict(_tensors(module, path))


def _read_module(path):
    if zipfile.is_zipfile(path):
        with torch.serialization.safe_globals([(_Module, name) for name in _MODULES]):
            return torch.load(path, map_location="cpu", weights_only=True)
    with open(path, "rb") as file:  # not one of torch's two still older formats
        if file.read(2) != b"\x80\x02":
            raise CheckpointError(f"{path} is no pickle")
    reader = types.SimpleNamespace(__name__="pickle", Unpickler=_Unpickler, load=lambda f, **_: _Unpickler(f).load())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the source of their classes
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)


def _tensors(module, path, prefix=""):
    parts = {name: getattr(module, name, {}) for name in ("_parameters", "_buffers", "_modules")}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise CheckpointError(f"{path} holds no modules as torch pickles them")
    for name, tensor in (parts["_parameters"] | parts["_buffers"]).items():
        if isinstance(tensor, torch.Tensor):
            yield prefix + name, tensor.detach()
    for name, child in parts["_modules"].items():
        if isinstance(child, _Module):
            yield from _tensors(child, path, f"{prefix}{name}.")


def openai_dvae(encoder: dict, decoder: dict, *, image_size: int = 256) -> DiscreteVAE:
    """A `DiscreteVAE` of OpenAI's architecture with these weights, whose sizes say the rest of its config.

    Args:
        encoder, decoder: state dicts with the names of OpenAI's modules, in any float dtype.
        image_size: pixels of a side that the model is for; the weights fit any.

    Raises:
        ValueError: they are not those of one encoder and its decoder; what is missing or has another shape.
    """
    groups = {int(found[1]) for name in encoder if (found := re.match(r"blocks\.group_(\d+)\.", name))}
    blocks = {int(found[1]) for name in encoder if (found := re.match(r"blocks\.group_1\.block_(\d+)\.", name))}
    weights = {f"encoder's {name}": x for name, x in encoder.items()} | {
        f"decoder's {name}": x for name, x in decoder.items()
    }
    _check(weights, {"encoder's blocks.input.w", "encoder's blocks.output.conv.w", "decoder's blocks.input.w"})
    config = DVAEConfig(
        image_size=image_size,
        downsampling=1 << max(0, len(groups) - 1),
        num_codes=len(encoder["blocks.output.conv.w"]),
        embedding_dim=len(decoder["blocks.input.w"]),
        hidden=len(encoder["blocks.input.w"]),
        blocks_per_group=max(1, len(blocks)),
        channels=encoder["blocks.input.w"].shape[1],
    )
    model = DiscreteVAE(config)
    expected = {"encoder's ": model.encoder.state_dict(), "decoder's ": model.decoder.state_dict()}
    _check(weights, {half + name: x.shape for half, weights in expected.items() for name, x in weights.items()})
    model.load_openai(encoder, decoder)
    return model.requires_grad_(False).eval()


def _check(weights, expected):
    """Refuse weights without these names or, where they are given, shapes."""
    for name in expected:
        if name not in weights:
            raise ValueError(f"these are not the weights of OpenAI's encoder and decoder: the {name} is missing")
        if name.endswith(".w") and getattr(weights[name], "ndim", None) != 4:
            raise ValueError(f"the {name} must be a convolution's weight, of 4 dimensions")
        if isinstance(expected, dict) and weights[name].shape != expected[name]:
            shapes = f"must have shape {tuple(expected[name])}, got {tuple(weights[name].shape)}"
            raise ValueError(
                f"these are not the weights of one of OpenAI's encoders and its decoder: the {name} {shapes}"
            )
