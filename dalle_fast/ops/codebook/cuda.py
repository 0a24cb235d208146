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


# -- chunks -----------------------------------------------------------------------------------------------------------

# Bytes of the float matrices (R, K) of a chunk, without and with gradients: what is promised beside the results of a
# forward and backward pass of 8,192 rows and codes is 40 MB, and beside the chunk there are float32 sums of 16-bit
# gradients. Of few rows the host launches operations, 5 to 10 us each, more slowly than the device is done with them:
# on an H200 the forward pass in bfloat16, Din = 512, with earlier kernels, took 4.5 ms by 192 rows, 0.90 by 768, 0.77
# by 1,536 and 0.59 all at once.
# With gradients the rows are fewer, and so the vendor may round the product of the logits otherwise than in the forward
# pass. That changes them by a few units in the last place of float32, as the exact product differs from either; the
# softmax's weights in the backward pass, which are taken over the forward pass's sums, are then wrong by that over tau.
FORWARD_BYTES, BACKWARD_BYTES = 32 << 20, 24 << 20
MIN_ROWS = 16
SMALL_PARTS = 1  # what is memory for one more operation is worth more as rows of a chunk


def chunk_rows(num_codes, *, gradients, matrices):
    """R for K codes and so many matrices: at least MIN_ROWS and a multiple of it."""
    size = (BACKWARD_BYTES if gradients else FORWARD_BYTES) // matrices
    return max(MIN_ROWS, size // (4 * num_codes) // MIN_ROWS * MIN_ROWS)


# -- memory -----------------------------------------------------------------------------------------------------------


def scratch(size, device):
    """`size` floats to work in: torch's allocator keeps them for the next call."""
    return torch.empty(size, device=device)


def result_dtype(dtype, *, gradients):
    """What the kernels below leave of tensors in `dtype`."""
    return dtype


def results(floats, dtype):
    """Where the kernels below leave (R, K) in `dtype`, given floats (R, K): each row at the start of a row's memory."""
    return floats if dtype == torch.float32 else floats.view(dtype)[:, : floats.shape[1]]


# -- products ---------------------------------------------------------------------------------------------------------


def product(a, b, out=None):
    """a (R, I) @ b (J, I).T -> (R, J) in float32, added up in float32 whatever the dtype of a and b."""
    a, b = _for_blas(a), _for_blas(b)
    if a.dtype == torch.float32:
        return torch.mm(a, b.t(), out=out)
    if out is None:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return torch.mm(a, b.t(), out_dtype=torch.float32, out=out)


def rounded_product(a, b, out):
    """out = a (R, I) @ b (J, I).T in their dtype, added up as torch adds up all products: in float32.

    Parts of a long sum may be rounded too: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction.
    """
    torch.mm(_for_blas(a), _for_blas(b).t(), out=out)


def accumulate(total, a, b):
    """total (J, I) += a (R, J).T @ b (R, I), in float32 and in place: total may be as large as the weight."""
    a, b = _for_blas(a), _for_blas(b)
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
    else:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)


def _for_blas(x):
    """The matrix x as torch.mm takes it: cuBLAS holds the distance of two rows in 32 bits."""
    return x if max(x.stride()) < 1 << 31 else x.contiguous()


class Sum:
    """A gradient of the shape and dtype of `like` (J, I), added up in float32 from products of so many rows in all."""

    def __init__(self, like, num_rows):
        self._total, self._dtype = torch.zeros(like.shape, device=like.device), like.dtype

    def add(self, a, b):
        """Add a (R, J).T @ b (R, I)."""
        accumulate(self._total, a, b)

    def result(self):
        """The sum of all rows."""
        return self._total.to(self._dtype)


# -- kernels ----------------------------------------------------------------------------------------------------------


def gumbel_forward(logits, bias, seed, first_row, tau, dtype, want_weights, stats, kl, codes, *, seed_per_row):
    """Fills stats (R, 4), kl (R,), codes (R,) and `results` of logits: weights (R, K), not normalised."""
    _extension.native().cuda_gumbel_forward(
        _logits(logits, bias), _noise(seed, seed_per_row, first_row), tau.data_ptr(),
        logits.data_ptr() if want_weights else 0, DTYPES[dtype], stats.data_ptr(), kl.data_ptr(), codes.data_ptr(),
        _stream(),
    )  # fmt: skip


def gumbel_backward(
    logits, bias, seed, first_row, tau, stats, kl, grad_kl, grad_weights, dtype, want_weights, *, seed_per_row
):
    """Fills `results` of logits with their gradient and, with want_weights, of grad_weights with normalised weights."""
    _extension.native().cuda_gumbel_backward(
        _logits(logits, bias), _noise(seed, seed_per_row, first_row), tau.data_ptr(), stats.data_ptr(), kl.data_ptr(),
        _address(grad_kl), grad_weights.data_ptr(), grad_weights.data_ptr() if want_weights else 0, logits.data_ptr(),
        DTYPES[dtype], _stream(),
    )  # fmt: skip


def sample(logits, bias, seed, first_row, temperature, codes, *, seed_per_row):
    """codes (R,) = argmax of logits + bias + temperature * noise, without noise where temperature is None."""
    _extension.native().cuda_sample(
        _logits(logits, bias), _noise(seed, seed_per_row, first_row), _address(temperature), codes.data_ptr(), _stream()
    )


def cross_entropy(logits, bias, target, ignore_index, row_weight, dtype, loss):
    """Fills loss (R,), and with row_weight `results` of logits with the gradient of sum(row_weight * loss).

    A target that is neither a code nor ignore_index gives NaN in its row, where torch stops the whole process.
    """
    _extension.native().cuda_cross_entropy(
        _logits(logits, bias), target.data_ptr(), ignore_index, loss.data_ptr(), _address(row_weight),
        row_weight is not None and len(row_weight) > 1, 0 if row_weight is None else logits.data_ptr(), DTYPES[dtype],
        _stream(),
    )  # fmt: skip


def add_columns(total, a):
    """total (J,) += the sums of the columns of a (R, J), some `results`, in float32."""
    _extension.native().cuda_add_columns(*a.shape, a.data_ptr(), DTYPES[a.dtype], total.data_ptr(), _stream())


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
# above) or "streaming" (below). On an H200, 8,192 rows and codes in bfloat16: a loss at Din = 128 took 0.288 ms chunked
# and 0.358 streaming, at Din = 512 0.354 and 0.896; a sample 0.408 and 0.870, and 0.470 and 1.404.
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
