"""Image codes one after another from a `DALLE`, with a cache for each layer as small as its mask allows.

P prompts, N images of each, B = P * N samples, T text positions, h x w grid, G = h * w image positions, K image codes,
W width, n codes that are known at the start.
"""

from __future__ import annotations

import functools
import sys
import threading
import traceback
from collections import deque
from typing import NamedTuple

import torch

from dalle_fast.nn import functional as F
from dalle_fast.nn.checks import check_number, check_size
from dalle_fast.nn.memory import free_memory, is_out_of_memory
from dalle_fast.ops.calls import has_global_hooks, is_hooked
from dalle_fast.ops.codebook.op import logits_of, sample_of_logits, truncated
from dalle_fast.ops.linear import counters_of_graph
from dalle_fast.progress import bar

EAGER_STEPS = 3  # on a GPU, before a step is captured in a CUDA graph: they compile kernels and allocate workspaces
WORKING_SPACE = 1.25  # what generating takes but for a draw from logits in memory, in sizes of its cache
MOST_GUIDANCE = 2.0**24  # the digits of a float32
STEPS_AHEAD = 8  # on a GPU, from one mark that the host waits for to the next: it is at most two of these ahead
BYTES_PER_LOGIT = 50  # what such a draw takes: 12 to 47 at its peak were measured on a CPU

_CAPTURING = threading.Lock()  # a process captures one CUDA graph at a time


@torch.no_grad()
def generate(
    model,
    text,
    *,
    num_images=1,
    text_lengths=None,
    temperature=1.0,
    top_k=None,
    top_p=None,
    guidance=None,
    seed=None,
    first_image=0,
    codes=None,
    known=None,
    progress=False,
):
    """Sample image codes for captions.

    The model is used as it is: in its dtype, or autocast's where that is on. On a GPU its step becomes a CUDA graph;
    with forward hooks, parameters of FSDP or attention on the reference it is slower, without a graph.

    A caption goes through the whole model once for all its images, then one code after another. The noise of a code is
    a function of (seed, number of the image among its caption's, position) alone, so an image does not depend on what
    else is in the batch (matrix products of another size may round otherwise, which decides between codes whose noisy
    logits are equal in all digits but the last).

    Args:
        text: (P, T) int64. text_lengths: (P,) int64 or None. As in `DALLE.forward`.
        num_images: N.
        temperature: divides the logits; 0 takes the most likely code.
        top_k: sample among the k most likely codes. top_p: among the fewest most likely ones whose probabilities add up
            to top_p, in (0, 1]. With both, top_p is taken of the k.
        guidance: g of classifier-free guidance (Ho and Salimans 2022): logits are u + g * (c - u), c with the caption
            and u with an empty one. For models that have seen empty captions (text_lengths 0); twice the work. None
            means 1, without that work.
        seed: from 0 to 2^20 - 1, or (seed, rank) as of `noise_seed`; None draws such a pair from torch's generator.
        first_image: number of the first image, to make the N images of a caption in several calls.
        codes: complete images: (P, n) or (P, rows, w) int64, the codes of the first n positions, or of whole rows. With
            `known` those of all positions, not looked at where they are not known.
        known: bool (h, w) or (P, h, w), where `codes` holds. A code is drawn given those before it in raster order, so
            what is drawn should reach to the bottom right.
        progress: show a bar. A string is shown beside it, such as "batch 2 of 3".

    Returns:
        (P * N, h, w) int64, the N images of the first caption first.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, and what was expected.
        TooManyImages: a torch.OutOfMemoryError: what does not fit, and how many images of a caption do.
    """
    model.check_text(text, text_lengths, look=True)
    G, P = model.config.image_len, len(text)
    sampling = Sampling(temperature, top_k, top_p, guidance).check(model.config.num_codes)
    guidance = sampling.guidance
    num_images = check_size("num_images", num_images)
    first_seed = _first_seed(seed, first_image, num_images, G)
    codes, known, n = completion(model, codes, known, text)
    if n == G or P == 0:
        return codes.repeat_interleave(num_images, 0).view(-1, *model.config.grid)
    drawing = P * sampling.bytes_of_draw(model.config.num_codes)
    memory = Memory(model, P, num_images, text.device, guided=guidance is not None, drawing=drawing)
    memory.check()
    given = codes[:, :n]
    if guidance is not None:  # a second half of prompts without captions
        lengths = text.new_full((P,), model.config.text_len) if text_lengths is None else text_lengths
        text_lengths = torch.cat((lengths, torch.zeros_like(lengths)))
        text, given = text.repeat(2, 1), given.repeat(2, 1)

    def run():
        seeds = first_seed + torch.arange(num_images, device=text.device) * G  # of each image; a position is added
        cache = model.new_cache(len(text), num_images, text_lengths=text_lengths, device=text.device)
        hidden = model.hidden(text, given, text_lengths=text_lengths, cache=cache)[:, -1]
        samples = Samples(model, cache, sampling, seeds.repeat(P), codes, known)
        samples.choose(hidden.repeat_interleave(num_images, 0))
        steps = samples.steps(G - 1 - n)
        if progress:
            title = progress if isinstance(progress, str) else "image tokens"
            steps = bar(steps, total=G - 1 - n, unit="token", title=title, anywhere=True)
        for _ in steps:
            pass
        return samples.codes.view(-1, *model.config.grid)

    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold the cache: what is free is asked without it
        raise memory.error(str(error)) from error


class Sampling(NamedTuple):
    """How a code is drawn; see `DALLE.generate`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float | None = None

    def check(self, num_codes):
        """As torch takes it: floats and an int; or TypeError or ValueError."""
        top_p, guidance = (
            None if value is None else check_number(name, value)
            for name, value in (("top_p", self.top_p), ("guidance", self.guidance))
        )
        top_k = None if self.top_k is None else check_size("top_k", self.top_k)
        checked = Sampling(check_number("temperature", self.temperature), top_k, top_p, guidance)
        if checked.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if checked.top_p is not None and not 0 < checked.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if checked.top_k is not None and checked.top_k > num_codes:
            raise ValueError(f"top_k must be an integer from 1 to {num_codes}, the model's codes, got {self.top_k}")
        if checked.guidance is not None and abs(checked.guidance) > MOST_GUIDANCE:
            most = f"{-MOST_GUIDANCE:g} to {MOST_GUIDANCE:g}"
            raise ValueError(f"guidance must be from {most}, beyond which float32 knows no u, got {self.guidance}")
        return checked

    def draw(self, hidden, weight, seeds, impl="auto"):
        """One code for each row of hidden (B, W), weight (K, W), with the noise of seeds (B,): codes (B,) int64."""
        if not self.truncates:
            return F.codebook_sample(hidden, weight, temperature=self.temperature, seed=seeds, impl=impl)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = logits_of(hidden, weight, impl=impl)
        logits = truncated(logits, self.temperature, self.top_k, self.top_p, impl=impl)
        return sample_of_logits(logits, seeds, impl=impl)

    @property
    def truncates(self):
        return self.temperature != 0 and (self.top_k is not None or self.top_p is not None)

    def bytes_of_draw(self, num_codes):
        """What `draw` takes of memory for a row: nothing to speak of where its logits are never there."""
        return BYTES_PER_LOGIT * num_codes if self.truncates else 0


class Samples:
    """B images in the making. All state is in tensors that stay where they are, so that a CUDA graph can replay a step.

    Args:
        model, cache: the cache holds captions and n codes, with guidance of 2 P prompts.
        sampling, seeds: how to draw, and a seed (B,) for each image.
        codes: (P, G), of which the first n and those that are `known`, bool (P, G) or None, stay.
    """

    def __init__(self, model, cache, sampling, seeds, codes, known):
        self.model, self.cache, self.sampling, self.seeds = model, cache, sampling, seeds
        self.codes = codes.repeat_interleave(cache.num_images, 0)  # (B, G)
        self.known = None if known is None else known.repeat_interleave(cache.num_images, 0)

    def steps(self, count):
        """Draw `count` more codes of each image, yielding after each. On a GPU one step becomes a graph, where it can.

        A replay returns before the device has done it. The host waits for the mark before the last, so that a bar shows
        what is drawn and an interrupt is seen: the device, with a mark's steps yet to do, does not wait for the host.
        """
        step, marks = self.step, deque()
        captures = self.codes.is_cuda and why_not_captured(self.model, self.cache) is None
        for done in range(count):
            if captures and done == EAGER_STEPS:
                step = _captured(self.step, self.codes.device).replay
            step()
            if self.codes.is_cuda and (done + 1) % STEPS_AHEAD == 0:
                marks.append(_mark(self.codes.device))
                if len(marks) > 1:
                    marks.popleft().synchronize()
            yield

    def step(self):
        """Put the latest code through the model, and draw the next one."""
        latest = self.codes.index_select(1, self.cache.position.view(1))[:, 0]
        if self.sampling.guidance is not None:
            latest = latest.repeat(2)
        self.choose(self.model.step(latest, self.cache))

    def choose(self, hidden):
        """Draw the code at the cache's position from what predicts it: hidden (B, W), with guidance (2 B, W)."""
        if self.sampling.guidance is not None:  # logits are linear in hidden, so this guides them
            with_caption, without = hidden.chunk(2)
            hidden = torch.lerp(without, with_caption, self.sampling.guidance)
        position = self.cache.position.view(1)
        codes = self.sampling.draw(hidden, self.model.image_weight, self.seeds + position, self.model.codebook_impl)
        if self.known is not None:
            codes = torch.where(
                self.known.index_select(1, position)[:, 0], self.codes.index_select(1, position)[:, 0], codes
            )
        self.codes.index_copy_(1, position, codes[:, None])


def why_not_captured(model, cache):
    """Why a CUDA graph cannot hold a step of `model` with `cache`; None if it can.

    A graph repeats what was launched while it was captured, on one stream, and nothing that Python does.
    """
    if _is_sharded(model):  # by hooks, which say less
        return "its parameters are gathered from several processes, on streams that the capture does not see"
    for name, part in model.named_modules():
        if is_hooked(part):
            return f"{name or 'the model'} has forward hooks, or a forward of its own, which a replay would not call"
    if has_global_hooks():
        return "there are hooks on all modules, which a replay would not call"
    blocks = model.transformer.blocks
    for index, block in enumerate(blocks):
        attention = getattr(block, "attention", None)
        if cache.layer(index).waits_for_device(impl=getattr(attention, "impl", "auto")):
            return f"attention of layer {index} runs on the reference, which waits for the device"
    return None


def _is_sharded(model) -> bool:
    """Whether parameters are those of FSDP, or `DTensor`s. What has not been imported is not in use."""
    fsdp, tensor = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    wrappers = tuple(getattr(fsdp, name, ()) for name in ("FSDPModule", "FullyShardedDataParallel"))
    return any(isinstance(part, wrappers) for part in model.modules()) or any(
        isinstance(parameter, getattr(tensor, "DTensor", ())) for parameter in model.parameters()
    )


def _mark(device):
    """An event behind what has been launched on `device`."""
    event = torch.cuda.Event(blocking=True)  # the host sleeps, where it would keep a core busy
    event.record(torch.cuda.current_stream(device))
    return event


def _captured(step, device):
    """A CUDA graph of what `step` does on `device`, which is recorded, not computed. For the current stream alone."""
    graph = torch.cuda.CUDAGraph()
    with (
        _CAPTURING,
        torch.cuda.device(device),
        counters_of_graph(device) as graph.counters,
        torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"),
    ):
        step()
    return graph


@functools.cache
def _capture_stream(device):
    """One, as cuBLAS keeps memory for each. Torch's own is of the device that was current at the process' first capture."""
    return torch.cuda.Stream(device)


class TooManyImages(torch.OutOfMemoryError):
    """Images that memory does not hold.

    Attributes:
        num_prompts: captions of the call. num_images: of each. fits: how many of each would fit, 0 where not one does;
            None where the free memory is not known.
    """

    def __init__(self, message, num_prompts, num_images, fits):
        super().__init__(message)
        self.num_prompts, self.num_images, self.fits = num_prompts, num_images, fits

    def __reduce__(self):  # an exception's own would call the class with the message alone
        return type(self), (str(self), self.num_prompts, self.num_images, self.fits)


class Memory:
    """What generating takes, and how many images of a caption would fit.

    Args:
        guided: a second half of prompts without captions is there too.
        drawing: what the draws take, of one image of each caption.
    """

    def __init__(self, model, num_prompts, num_images, device, *, guided=False, drawing=0):
        self.num_prompts, self.num_images, self.guided, self.device = num_prompts, num_images, guided, device
        one, two = (model.new_cache(num_prompts * (1 + guided), count, device="meta").nbytes for count in (1, 2))
        self.cache = 2 * one - two + num_images * (two - one)
        self.text, self.per_image = WORKING_SPACE * (2 * one - two), WORKING_SPACE * (two - one) + drawing

    def check(self):
        """Raise where it is more than the free memory: a CPU would begin to swap, or end the process."""
        free = free_memory(self.device)
        if free is not None and self.text + self.num_images * self.per_image > free:
            raise self.error()

    def error(self, reason=""):
        """The error that names the batch that would fit."""
        free, fits = free_memory(self.device), None
        what = f"{self.num_images} images of each of {self.num_prompts} captions{', guided,' if self.guided else ''}"
        message = f"generating {what} needs {self.cache / 1e9:.3g} GB of cache"
        if free is not None:
            fits = max(0, min(int((free - self.text) // self.per_image), self.num_images - 1))
            fewer = "; pass fewer captions" if self.num_prompts > 1 else ""
            advice = f"num_images={fits} would fit" if fits else f"not even one of each fits{fewer}"
            message += f", {free / 1e9:.3g} GB are free on {self.device}: {advice}"
        message = f"{message} ({reason})" if reason else message
        return TooManyImages(message, self.num_prompts, self.num_images, fits)


def random_seed():
    """A seed that `generate` takes, from torch's generator: (seed, rank) as of `noise_seed`, one of 2^31.

    For what draws one image in several calls, which all need the same.
    """
    seed, rank = (torch.randint(limit, (), device="cpu") for limit in (1 << 20, 1 << 11))  # also under torch.device
    return int(seed), int(rank)


def _first_seed(seed, first_image, num_images, image_len):
    """The first image's, to which G for each other one and a code's position are added: all differ below 2^32 of them."""
    last = (1 << 32) // image_len - num_images
    if last < 0:
        raise ValueError(f"num_images must be at most {(1 << 32) // image_len} images of a caption, got {num_images}")
    first_image = check_size("first_image", first_image, least=0)
    if first_image > last:
        raise ValueError(f"first_image must be from 0 to {last}, got {first_image}")
    seed = random_seed() if seed is None else seed
    seed, rank = seed if isinstance(seed, tuple) and len(seed) == 2 else (seed, 0)
    return F.noise_seed(seed, rank=rank) + first_image * image_len


def completion(model, codes, known, text):
    """codes (P, G), 0 where not known; known, bool (P, G), or None where only the first are; n, of those first ones.

    Raises:
        TypeError, ValueError: the model cannot complete them.
    """
    P, G = len(text), model.config.image_len
    if codes is None:
        if known is not None:
            raise ValueError("known needs codes, got none")
        return text.new_zeros(P, G), None, 0
    codes = model.check_codes(codes, P, least=0 if known is None else G, look=False)
    if known is None:
        n = codes.shape[1]
        known = (torch.arange(G, device=codes.device) < n).expand(P, G)
        codes = torch.nn.functional.pad(codes, (0, G - n))
    else:
        known = _known(model, known, P, codes.device)
        n = int(known.all(0).to(torch.int64).cumprod(0).sum()) if P else 0
    codes = model.check_codes(codes.masked_fill(~known, 0), P, least=G, look=True)
    return codes, known if bool(known[:, n:].any()) else None, n


def _known(model, known, P, device):
    h, w = model.config.grid
    if not isinstance(known, torch.Tensor) or known.dtype != torch.bool or known.device != device:
        got = f"{known.dtype} on {known.device}" if isinstance(known, torch.Tensor) else type(known).__name__
        raise TypeError(f"known must be a bool tensor on {device}, got {got}")
    if tuple(known.shape) not in ((h, w), (P, h, w)):
        raise ValueError(f"known must have shape ({h}, {w}) or ({P}, {h}, {w}), got {tuple(known.shape)}")
    return known.expand(P, h, w).flatten(1)
