"""The codebook operation on NVIDIA GPUs: `csrc/cuda/codebook_chunks.cpp`, which goes through the rows by chunks.

Of N rows only as many are worked on at a time as memory is meant for: a matrix product makes the logits of a chunk, one
kernel does to them all there is to do, and further products take the result. Nothing of size (N, K) exists. A pass is
one native call, as the device is done with a chunk's products and kernels before Python could launch them; here is what
is left: memory and dtypes.

Nothing here waits for the device: seeds, tau and temperature are read by the kernels, so that a CUDA graph replays with
what is in these tensors then. Launched in torch's current stream on the current device, which the caller sets.

N rows, K codes, I size of hidden, D size of an embedding.
"""

from __future__ import annotations

import torch

from dalle_fast import _extension
from dalle_fast.ops.codebook.products import as_float32, float32_product, sum_by_code
from dalle_fast.ops.codebook.truncation import truncated  # noqa: F401 (part of the interface)
from dalle_fast.ops.dtypes import DTYPES, address

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
        if torch.version.hip is not None:
            reasons.append("its kernels are for NVIDIA GPUs, and this torch is built for ROCm")
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
    if no_cuda := _extension.why_no_cuda():
        reasons.append(no_cuda)
    return reasons


# -- the operation ----------------------------------------------------------------------------------------------------


def gumbel_codebook(hidden, weight, bias, codebook, tau, seed, seed_per_row, hard):
    """As `reference` has it, and so have the others."""
    (N, K), D = (hidden.shape[0], weight.shape[0]), codebook.shape[1]
    embedding = hidden.new_empty(N, D)
    kl, codes, stats = _row_results(hidden), _row_results(hidden, dtype=torch.int64), _row_results(hidden, 4)
    # Beside a chunk's logits are its embeddings before they are divided: few, unless there are fewer codes than that.
    rows = _Rows(hidden, weight, bias, chunk_rows(4 * max(K, D), gradients=False))
    table, sums = _for_blas(codebook), None
    wanted = D > 0 and not hard
    if wanted:
        sums = scratch(rows.step * D, torch.float32, hidden.device)
    _extension.native().cuda_gumbel_chunks(
        rows.numbers, _noise(seed, seed_per_row), tau.data_ptr(), D, _matrix(table), address(sums),
        address(embedding if wanted else None), stats.data_ptr(), kl.data_ptr(), codes.data_ptr(),
    )  # fmt: skip
    if hard:
        torch.index_select(codebook, 0, codes, out=embedding)
    return embedding, kl, codes, stats


def gumbel_codebook_backward(
    grad_embedding, grad_kl, hidden, weight, bias, codebook, tau, seed, kl, codes, stats, seed_per_row, hard, needs
):
    K = weight.shape[0]
    rows = _Rows(hidden, weight, bias, chunk_rows(K * (4 + hidden.element_size()), gradients=True))
    gradients = _Gradients(rows, needs)
    table, of_embedding, grad_kl = _for_blas(codebook), _for_blas(grad_embedding.contiguous()), as_float32(grad_kl)
    of_codebook = rows.total(table) if needs[3] and not hard else None
    grad_weights = scratch(rows.step * K, hidden.dtype, hidden.device)
    _extension.native().cuda_gumbel_backward_chunks(
        rows.numbers, _noise(seed, seed_per_row), tau.data_ptr(), table.shape[1], _matrix(table), _matrix(of_embedding),
        stats.data_ptr(), kl.data_ptr(), address(grad_kl), grad_weights.data_ptr(), address(of_codebook),
        gradients.numbers,
    )  # fmt: skip
    del rows, grad_weights  # the memory is free: results take as much
    if hard and needs[3]:
        of_codebook = sum_by_code(codebook, codes, grad_embedding)
    return *gradients.results(hidden, weight, bias), _result(of_codebook, codebook)


def sample(hidden, weight, bias, temperature, seed, seed_per_row):
    codes = _row_results(hidden, dtype=torch.int64)
    rows = _Rows(hidden, weight, bias, chunk_rows(4 * weight.shape[0], gradients=False))
    _extension.native().cuda_sample_chunks(
        rows.numbers, _noise(seed, seed_per_row), address(temperature), codes.data_ptr()
    )
    return codes


def cross_entropy(hidden, weight, bias, target, ignore_index, row_weight, needs):
    """A target that is neither a code nor ignore_index gives NaN in its row, where torch stops the whole process."""
    loss, row_weight = _row_results(hidden), as_float32(row_weight)
    rows = _Rows(hidden, weight, bias, chunk_rows(4 * weight.shape[0], gradients=row_weight is not None))
    gradients = _Gradients(rows, needs)
    _extension.native().cuda_cross_entropy_chunks(
        rows.numbers, target.data_ptr(), ignore_index, loss.data_ptr(), address(row_weight),
        row_weight is not None and len(row_weight) > 1, gradients.numbers,
    )  # fmt: skip
    del rows  # the memory is free: results take as much
    return loss, *gradients.results(hidden, weight, bias)


def gumbel_softmax(logits, tau, seed):
    logits = logits.contiguous()
    out, codes = torch.empty_like(logits), _row_results(logits, dtype=torch.int64)
    _extension.native().cuda_gumbel_softmax(
        *logits.shape, logits.data_ptr(), out.data_ptr(), DTYPES[logits.dtype], _noise(seed, False), tau,
        codes.data_ptr(), _stream(),
    )  # fmt: skip
    return out, codes


# -- chunks -----------------------------------------------------------------------------------------------------------

# Bytes of the matrices (R, K) of a chunk of R rows, without and with gradients: what is promised beside the results of
# a forward and backward pass of 8,192 rows and codes is 40 MB, and beside the chunk there are float32 sums of 16-bit
# gradients, which are read and written once for every chunk.
# With gradients the rows are fewer, and so the vendor may round the product of the logits otherwise than in the forward
# pass. That changes them by a few units in the last place of float32, as the exact product differs from either; the
# softmax's weights in the backward pass, which are taken over the forward pass's sums, are then wrong by that over tau.
FORWARD_BYTES, BACKWARD_BYTES = 32 << 20, 24 << 20
MIN_ROWS, TILE_ROWS = 16, 128  # cuBLAS multiplies tiles of up to so many rows
BIAS_TOTALS = 8  # so many thread blocks share the rows of a chunk where columns are summed


def chunk_rows(row_bytes, *, gradients):
    """R: a multiple of MIN_ROWS and at least that, and of TILE_ROWS where it is more than that."""
    count = (BACKWARD_BYTES if gradients else FORWARD_BYTES) // row_bytes
    multiple = TILE_ROWS if count >= TILE_ROWS else MIN_ROWS
    return max(MIN_ROWS, count // multiple * multiple)


class _Rows:
    """What all passes are given, by chunks of `step` rows; it must live until the pass is launched."""

    def __init__(self, hidden, weight, bias, step):
        N, K = hidden.shape[0], weight.shape[0]
        self.hidden, self.weight, self.bias, self.step = _for_blas(hidden), _for_blas(weight), bias, min(N, step)
        self.logits, self._bias32 = scratch(self.step * K, torch.float32, hidden.device), as_float32(bias)
        self.numbers = (
            (N, K, self.hidden.shape[1], self.step),
            _matrix(self.hidden),
            _matrix(self.weight),
            (DTYPES[hidden.dtype], address(self._bias32), self.logits.data_ptr(), _blas(), _stream()),
        )

    def total(self, like, dtype=torch.float32):
        """Memory of a sum over all rows: the first chunk need not find zeros there, but without rows there is none."""
        return (torch.empty if self.step else torch.zeros)(like.shape, dtype=dtype, device=like.device)


class _Gradients:
    """The gradients of hidden, weight and bias, in float32 as long as they are added up."""

    def __init__(self, rows, needs):
        self.of_hidden = torch.empty_like(rows.hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.of_weight = rows.total(rows.weight) if needs[1] else None
        self.of_bias = self._bias_totals = None
        if needs[2]:
            self.of_bias = rows.total(rows.bias, rows.bias.dtype)
            self._bias_totals = torch.empty(BIAS_TOTALS, len(rows.bias), dtype=torch.float32, device=rows.bias.device)
        self.numbers = (
            address(self.of_hidden),
            address(self.of_weight),
            address(self.of_bias),
            BIAS_TOTALS,
            address(self._bias_totals),
        )

    def results(self, *tensors):
        """In the dtype of the tensors they belong to; None for those that are not needed."""
        return tuple(map(_result, (self.of_hidden, self.of_weight, self.of_bias), tensors))


def _result(gradient, like):
    """A gradient, or None, in the dtype of the tensor `like` and, where that has no columns, in its shape."""
    if gradient is None:
        return None
    return gradient.to(like.dtype) if gradient.shape == like.shape else like.new_empty(like.shape)


def scratch(size, dtype, device):
    """Memory to work in: torch's allocator keeps it for the next call."""
    return torch.empty(size, dtype=dtype, device=device)


# -- matrices for cuBLAS ----------------------------------------------------------------------------------------------


def _for_blas(x):
    """The matrix x as cuBLAS takes it: not without columns, and with a `_layout`."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], 1)
    return x if _layout(x) else x.contiguous()


def _matrix(x):
    return x.data_ptr(), *_layout(x)


def _layout(x):
    """(distance of two rows, False), (distance of two columns, True) if x is transposed, or None if cuBLAS has none.

    It holds the distance in 32 bits.
    """
    if x.is_contiguous():
        return x.shape[1], False
    for y, transposed in ((x, False), (x.T, True)):
        if y.stride(1) == 1 and y.shape[1] <= y.stride(0) < 1 << 31:
            return y.stride(0), transposed
    return None


def _blas():
    return torch.cuda.current_blas_handle()


# -- logits that someone chooses from ----------------------------------------------------------------------------------


def logits(hidden, weight):
    return float32_product(hidden, weight.T)


def sample_of_logits(logits, seed):
    codes, temperature = _row_results(logits, dtype=torch.int64), logits.new_ones(())
    _extension.native().cuda_sample(
        (*logits.shape, logits.data_ptr(), 0),
        _noise(seed, True),
        temperature.data_ptr(),
        codes.data_ptr(),
        _stream(),
    )
    return codes


def _row_results(hidden, *shape, dtype=torch.float32):
    return torch.empty((hidden.shape[0], *shape), dtype=dtype, device=hidden.device)


def _noise(seed, seed_per_row):
    """Of rows from number 0 on."""
    return address(seed), int(seed_per_row), 0


def _stream():
    return torch.cuda.current_stream().cuda_stream


def _dotted(capability):
    return ".".join(map(str, capability))
