"""Row kernels of the codebook operation on NVIDIA GPUs: `csrc/cuda/codebook.cu`. See `chunked` for who calls them.

Nothing here waits for the device: seeds, tau and temperature are read by the kernels, so that a CUDA graph replays with
what is in these tensors then. Launched in torch's current stream on the current device, which the caller sets.

R rows, K codes, I size of hidden, D size of an embedding.
"""

from __future__ import annotations

import torch

from dalle_fast import _extension

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the order of CodebookDType in csrc/codebook.h
MAX_DIN, MAX_D = 4096, 1024  # what was promised and is tested, not what the kernels could do
OLDEST_GPU = (8, 0)  # compute capability of the oldest machine code in the module


def why_not(tensors) -> list[str]:
    """Every reason why this implementation cannot serve these tensors (by name, None allowed); empty if it can."""
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    reasons = []
    for name, tensor in tensors.items():
        if tensor.device.type != "cuda":
            reasons.append(f"it needs CUDA tensors, got {name} on {tensor.device}")
            break
    else:
        for device in {tensor.device for tensor in tensors.values()}:
            if (capability := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
                reasons.append(f"it needs compute capability {_dotted(OLDEST_GPU)}, {device} has {_dotted(capability)}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            reasons.append(f"it computes in float32, float16 or bfloat16, got {name} of {tensor.dtype}")
            break
    for name, what, limit in (("hidden", "Din", MAX_DIN), ("codebook", "D", MAX_D)):
        if name in tensors and tensors[name].shape[-1] > limit:
            reasons.append(f"its {what} is at most {limit}, got {name} of shape {tuple(tensors[name].shape)}")
    if missing := _extension.why_missing():
        reasons.append(missing)
    elif no_cuda := _extension.native().build_info()["why_no_cuda"]:
        reasons.append(f"the native module was built without CUDA: {no_cuda}")
    return reasons


# -- memory -----------------------------------------------------------------------------------------------------------


def scratch(size, device):
    """`size` floats to work in: torch's allocator keeps them for the next call."""
    return torch.empty(size, device=device)


# -- products ---------------------------------------------------------------------------------------------------------


def product(a, b, out=None):
    """a (R, I) @ b (J, I).T -> (R, J) in float32, added up in float32 whatever the dtype of a and b."""
    if a.dtype == torch.float32:
        return torch.mm(a, b.t(), out=out)
    if out is None:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return torch.mm(a, b.t(), out_dtype=torch.float32, out=out)


def accumulate(total, a, b):
    """total (J, I) += a (R, J).T @ b (R, I), in float32 and in place: total may be as large as the weight."""
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
    else:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)


class Sum:
    """A gradient of the shape and dtype of `like` (J, I), added up in float32 from products."""

    def __init__(self, like):
        self._total, self._dtype = torch.zeros(like.shape, device=like.device), like.dtype

    def add(self, a, b):
        """Add a (R, J).T @ b (R, I)."""
        accumulate(self._total, a, b)

    def result(self):
        """The sum. No more can be added."""
        return self._total.to(self._dtype)


# -- kernels ----------------------------------------------------------------------------------------------------------


def gumbel_forward(logits, bias, seed, first_row, tau, dtype, want_weights, *, seed_per_row):
    """Consumes logits. Returns weights (R, K) not normalised, or None; stats (R, 4); kl (R,); codes (R,)."""
    R = logits.shape[0]
    stats, kl, codes = logits.new_empty(R, 4), logits.new_empty(R), logits.new_empty(R, dtype=torch.int64)
    weights = _in_place_of(logits, dtype) if want_weights else None
    _extension.native().cuda_gumbel_forward(
        _logits(logits, bias), _noise(seed, seed_per_row, first_row), tau.data_ptr(), _address(weights), DTYPES[dtype],
        stats.data_ptr(), kl.data_ptr(), codes.data_ptr(), _stream(),
    )  # fmt: skip
    return weights, stats, kl, codes


def gumbel_backward(
    logits, bias, seed, first_row, tau, stats, kl, grad_kl, grad_weights, dtype, want_weights, *, seed_per_row
):
    """Consumes logits and grad_weights. Returns grad_logits (R, K) and weights (R, K), normalised, or None."""
    grad_logits = _in_place_of(logits, dtype)
    weights = _in_place_of(grad_weights, dtype) if want_weights else None
    _extension.native().cuda_gumbel_backward(
        _logits(logits, bias), _noise(seed, seed_per_row, first_row), tau.data_ptr(), stats.data_ptr(), kl.data_ptr(),
        _address(grad_kl), grad_weights.data_ptr(), _address(weights), grad_logits.data_ptr(), DTYPES[dtype], _stream(),
    )  # fmt: skip
    return grad_logits, weights


def sample(logits, bias, seed, first_row, temperature, *, seed_per_row):
    """Returns codes (R,): argmax of logits + bias + temperature * noise, without noise where temperature is None."""
    codes = logits.new_empty(logits.shape[0], dtype=torch.int64)
    _extension.native().cuda_sample(
        _logits(logits, bias), _noise(seed, seed_per_row, first_row), _address(temperature), codes.data_ptr(), _stream()
    )
    return codes


def cross_entropy(logits, bias, target, ignore_index, row_weight, dtype):
    """Consumes logits. Returns loss (R,) and grad_logits (R, K) of sum(row_weight * loss), None without row_weight.

    A target that is neither a code nor ignore_index gives NaN in its row, where torch stops the whole process.
    """
    loss = logits.new_empty(logits.shape[0])
    grad_logits = None if row_weight is None else _in_place_of(logits, dtype)
    _extension.native().cuda_cross_entropy(
        _logits(logits, bias), target.data_ptr(), ignore_index, loss.data_ptr(), _address(row_weight),
        row_weight is not None and len(row_weight) > 1, _address(grad_logits), DTYPES[dtype], _stream(),
    )  # fmt: skip
    return loss, grad_logits


def gumbel_softmax(logits, seed, tau, want_codes):
    """softmax((logits + noise) / tau) of contiguous logits (R, K), in their dtype, and codes (R,) or None."""
    out = torch.empty_like(logits)
    codes = logits.new_empty(logits.shape[0], dtype=torch.int64) if want_codes else None
    _extension.native().cuda_gumbel_softmax(
        *logits.shape, logits.data_ptr(), out.data_ptr(), DTYPES[logits.dtype], _noise(seed, False, 0), tau,
        _address(codes), _stream(),
    )  # fmt: skip
    return out, codes


# -- without logits in memory -----------------------------------------------------------------------------------------

# Who samples and who computes a loss without gradients where both could: "chunked" (the vendor's product, then a kernel
# above) or "streaming" (below). Neither was measured on a GPU yet: chunked is the default because its product is.
SMALL_DIN = {"sample": "chunked", "cross_entropy": "chunked"}
MAX_STREAMED_DIN = 512


def streams(operation, hidden, weight):
    """Does `operation` run as one of the two functions below?"""
    return SMALL_DIN[operation] == "streaming" and can_stream(hidden, weight)


def can_stream(hidden, weight):
    """Can they take these? 16-bit and contiguous, Din a multiple of 8 and small."""
    return (
        hidden.dtype in (torch.float16, torch.bfloat16)
        and hidden.shape[1] <= MAX_STREAMED_DIN
        and hidden.shape[1] % 8 == 0
        and all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (hidden, weight))
    )


def sample_streaming(hidden, weight, bias, seed, temperature, *, seed_per_row):
    """Returns codes (N,) as `sample` does, of hidden (N, I) and weight (K, I)."""
    codes = hidden.new_empty(hidden.shape[0], dtype=torch.int64)
    _extension.native().cuda_codebook_sample_streaming(
        *_streamed(hidden, weight, bias), _noise(seed, seed_per_row, 0), _address(temperature), codes.data_ptr(),
        _stream(),
    )  # fmt: skip
    return codes


def cross_entropy_streaming(hidden, weight, bias, target, ignore_index):
    """Returns loss (N,) as `cross_entropy` does, of hidden (N, I) and weight (K, I)."""
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    _extension.native().cuda_codebook_cross_entropy_streaming(
        *_streamed(hidden, weight, bias), target.data_ptr(), ignore_index, loss.data_ptr(), _stream()
    )
    return loss


def _streamed(hidden, weight, bias):
    sizes = (hidden.shape[0], *weight.shape)
    return sizes, hidden.data_ptr(), weight.data_ptr(), DTYPES[hidden.dtype], _address(bias)


def _in_place_of(x, dtype):
    """Where a kernel may write its result in `dtype`: x itself, if that is its dtype."""
    return x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)


def _logits(logits, bias):
    return (*logits.shape, logits.data_ptr(), _address(bias))


def _noise(seed, seed_per_row, first_row):
    return (_address(seed), int(seed_per_row), first_row)


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _stream():
    return torch.cuda.current_stream().cuda_stream


def _dotted(capability):
    return ".".join(map(str, capability))
