"""Row kernels of the codebook operation on the CPU: `csrc/cpu/codebook_kernels.cpp`. See `chunked` for who calls them.

R rows, K codes, I size of hidden, D size of an embedding.
"""

from __future__ import annotations

import threading

import torch

from dalle_fast import _extension
from dalle_fast.ops.linear import few_rows, linear_product

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the order of CodebookDType in csrc/codebook.h
CONVERTED_BYTES = 4 << 20  # of the float32 copies of parts of a 16-bit operand, where the vendor multiplies
ROUNDED_BYTES = 2 << 20  # of a part of a product before it is rounded to 16 bits


def why_not(tensors) -> list[str]:
    """Every reason why this implementation cannot serve these tensors (by name, None allowed); empty if it can."""
    reasons = []
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type != "cpu":
            reasons.append(f"it needs CPU tensors, got {name} on {tensor.device}")
            break
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in DTYPES:
            reasons.append(f"it computes in float32, float16 or bfloat16, got {name} of {tensor.dtype}")
            break
    if missing := _extension.why_missing():
        reasons.append(missing)
    return reasons


# -- chunks -----------------------------------------------------------------------------------------------------------

# Bytes of the float32 logits (R, K) of a chunk. Less makes the products slower, which read and pack `weight` once for
# every chunk; more gains nothing (forward + backward at N = 1,024, K = 8,192, Din = 512: 6 MiB 142 ms, 12 MiB 125, 24
# MiB 125). 40 MB are promised, and of 16-bit tensors the lower bits of weight's gradient lie beside it, 17 MB at Din =
# 2,048.
CHUNK_BYTES = 12 << 20
MIN_ROWS = 16
# The backward pass also has the gradient of the softmax's weights, whose product is cheap: of this part of a chunk at once.
SMALL_PARTS = 4


def chunk_rows(num_codes):
    """R for K codes: at least MIN_ROWS and a multiple of it.

    The same for a forward and a backward pass, as the vendor rounds the product of other R otherwise.
    """
    return max(MIN_ROWS, CHUNK_BYTES // (4 * num_codes) // MIN_ROWS * MIN_ROWS)


# -- memory -----------------------------------------------------------------------------------------------------------

_kept = threading.local()


def scratch(size, device):
    """`size` floats to work in until this thread asks again. They are kept: the first touch of 16 MB takes some 4 ms."""
    return _keep("rows", size)


def result_dtype(dtype, *, gradients):
    """What the kernels below leave of tensors in `dtype`: all is computed in float32, and stays so but for AMX.

    That multiplies bfloat16 alone, so that exacter gradients of logits cost twice the work. Eager rounds them too.
    """
    rounds = gradients and dtype == torch.bfloat16 and _extension.native().instruction_set() == "avx512_amx"
    return dtype if rounds else torch.float32


def results(floats, dtype):
    """Where the kernels below leave (R, K) in `dtype`, given floats (R, K): each row at the start of a row's memory."""
    return floats if dtype == torch.float32 else floats.view(dtype)[:, : floats.shape[1]]


def _keep(name, size):
    memory = getattr(_kept, name, None)
    if memory is None or memory.numel() < size:
        memory = None
        setattr(_kept, name, None)  # both gone before there is a larger one
        with torch.inference_mode(False):  # else no later call outside of that mode could write to it
            memory = torch.empty(size, dtype=torch.float32, device="cpu")
        setattr(_kept, name, memory)
    return memory[:size]


# -- products ---------------------------------------------------------------------------------------------------------

# Who multiplies matrices, by the instruction set in use: "ours" (csrc/cpu/product_kernels.cpp), "vendor" (torch.mm), or
# "both": torch those of two float32 matrices, we the others. Where some are ours, `sample` and the loss without gradients
# go tile by tile and have no logits in memory.
# On an AMD EPYC of Zen 5, 384 x 512 x 8,192 in float32 with two cores: with AVX-512 ours 7.3 ms, torch's (MKL) 18.8, where
# their peak is 6.2; with AVX2 20.0 and 20.4, but of few rows torch's is faster. AMD's CPUs with AVX-512 have avx512_bf16.
# On an Intel Xeon the same product on one core: with AVX-512 ours 23.0 ms, torch's 21.5. With AMX (csrc/cpu/parts.h) and two
# cores ours 6.2 ms, torch's 9.8; in bfloat16 2.0, of a bfloat16 and a float32 matrix 3.8, in float16 4.9, all without float32
# copies.
PRODUCTS = {"portable": "vendor", "avx2": "vendor", "avx512": "both", "avx512_bf16": "ours", "avx512_amx": "ours"}


def _who():
    return PRODUCTS[_extension.native().instruction_set()]


def _ours(a, b):
    return _who() == "ours" or (_who() == "both" and not a.dtype == b.dtype == torch.float32)


def product(a, b, out=None):
    """a (R, I) @ b (J, I).T -> (R, J) in float32, in `out` where it is given: neighbours in a row side by side."""
    if not _ours(a, b):
        return _vendor_product(a, b, out)
    out = _floats(a.shape[0], b.shape[0]) if out is None else out
    _multiply(a, b, out, False)
    return out


def rounded_product(a, b, out):
    """out = a (R, I) @ b (J, I).T, rounded once."""
    if out.dtype == torch.float32:
        product(a, b, out=out)
    else:
        for part in _parts(b.shape[0], a.shape[0], ROUNDED_BYTES):
            out[:, part] = product(a, b[part])


def accumulate(total, a, b, *, begun=True):
    """total (J, I) += a (R, J).T @ b (R, I), in float32; = where it has not begun."""
    if _ours(a, b):
        _multiply(a.T, b.T, total, begun)
    else:
        total.addmm_(a.float().T, b.float(), beta=1 if begun else 0)


class Sum:
    """A gradient of the shape and dtype of `like` (J, I), added up in float32 from products of so many rows in all.

    In 16 bits all of it in float32 would be the largest tensor of a backward pass (67 MB of 8,192 x 2,048). Between two
    products only 24 bits of a sum are kept, 16 of them where the result is going to be: 8 more than bfloat16 has.
    """

    def __init__(self, like, num_rows):
        self._result = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        self._lower = None
        if like.dtype != torch.float32:
            self._lower = torch.empty(like.shape, dtype=torch.uint8, device="cpu")
        self._begun, self._rows_left = False, num_rows

    def add(self, a, b):
        """Add a (R, J).T @ b (R, I). In 16 bits the product is ours: it never is in memory."""
        self._rows_left -= a.shape[0]
        if self._lower is None:
            accumulate(self._result, a, b, begun=self._begun)
        else:
            where = self._result.data_ptr(), self._lower.data_ptr(), DTYPES[self._result.dtype]
            step = self._begun, self._rows_left == 0, torch.get_num_threads()
            _extension.native().product_as_sums(_matrix(a.T), _matrix(b.T), *where, *step)
        self._begun = True

    def result(self):
        """The sum of all rows."""
        return self._result if self._begun else self._result.zero_()


def add_columns(total, a):
    """total (J,) += the sums of the columns of a (R, J), in float32."""
    if a.dtype == torch.float32:
        total += a.sum(0)
    else:  # torch would make a float32 copy
        _multiply(a.new_ones(1, a.shape[0]), a.T, total[None], True)


def _floats(*shape):
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever torch's defaults are


def _multiply(a, b, out, add):
    _extension.native().product(_matrix(a), _matrix(b), out.data_ptr(), out.stride(0), add, torch.get_num_threads())


def _matrix(x):
    return x.data_ptr(), DTYPES[x.dtype], *x.shape, *x.stride()


def _vendor_product(a, b, out):
    """In float32 too: torch's product of 16-bit matrices would be rounded to 16 bits."""
    a = a.float()
    if b.dtype == torch.float32:
        return torch.mm(a, b.T, out=out)
    out = _floats(a.shape[0], b.shape[0]) if out is None else out
    if b.stride(0) >= b.stride(1):  # parts of what lies together in memory: of its rows
        for part in _parts(*b.shape, CONVERTED_BYTES):
            torch.mm(a, _converted(b[part]).T, out=out[:, part])
    else:
        for part in _parts(b.shape[1], b.shape[0], CONVERTED_BYTES):
            torch.addmm(out, a[:, part], _converted(b[:, part].T), beta=0 if part.start == 0 else 1, out=out)
    return out


def _parts(count, width, size):
    """Slices of `count` rows of `width` floats that take `size` bytes each."""
    step = max(1, size // (4 * max(1, width)))
    return [slice(start, min(count, start + step)) for start in range(0, max(1, count), step)]


def _converted(part):
    return _keep("part", part.numel()).view(part.shape).copy_(part)


# -- kernels ----------------------------------------------------------------------------------------------------------


def gumbel_forward(logits, bias, seed, first_row, tau, dtype, want_weights, stats, kl, codes, *, seed_per_row):
    """Fills stats (R, 4), kl (R,) and codes (R,), and replaces logits by weights (R, K), not normalised."""
    R, K = logits.shape
    _extension.native().gumbel_forward(
        R, K, logits.data_ptr(), _address(bias), seed.data_ptr(), seed_per_row, first_row, tau.data_ptr(),
        logits.data_ptr() if want_weights else 0, stats.data_ptr(), kl.data_ptr(), codes.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def gumbel_backward(
    logits, bias, seed, first_row, tau, stats, kl, grad_kl, grad_weights, dtype, want_weights, *, seed_per_row
):
    """Replaces logits by their gradient and, with want_weights, grad_weights by the weights, normalised: in `dtype`."""
    _extension.native().gumbel_backward(
        *logits.shape, logits.data_ptr(), _address(bias), seed.data_ptr(), seed_per_row, first_row, tau.data_ptr(),
        stats.data_ptr(), kl.data_ptr(), _address(grad_kl), grad_weights.data_ptr(),
        grad_weights.data_ptr() if want_weights else 0, logits.data_ptr(), DTYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip


def sample(logits, bias, seed, first_row, temperature, codes, *, seed_per_row):
    """codes (R,) = argmax of logits + bias + temperature * noise, without noise where temperature is None."""
    _extension.native().sample(
        *logits.shape, logits.data_ptr(), _address(bias), _address(seed), seed_per_row, first_row,
        _address(temperature), codes.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def truncated(logits, temperature, top_k, top_p):
    """As `truncation.truncated`, in place of logits (R, K) float32; a row whose largest is infinite is left as it is."""
    _extension.native().truncate(
        *logits.shape, logits.data_ptr(), temperature, top_k or logits.shape[1], 1 if top_p is None else top_p,
        torch.get_num_threads(),
    )  # fmt: skip
    return logits


def cross_entropy(logits, bias, target, ignore_index, row_weight, dtype, loss):
    """Fills loss (R,), and with row_weight replaces logits by the gradient of sum(row_weight * loss), in `dtype`."""
    _extension.native().cross_entropy(
        *logits.shape, logits.data_ptr(), _address(bias), target.data_ptr(), ignore_index, loss.data_ptr(),
        _address(row_weight), row_weight is not None and len(row_weight) > 1,
        0 if row_weight is None else logits.data_ptr(), DTYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip


def gumbel_softmax(logits, seed, tau, want_codes):
    """softmax((logits + noise) / tau) of contiguous logits (R, K), in their dtype, and codes (R,) or None."""
    out = torch.empty_like(logits)
    codes = logits.new_empty(logits.shape[0], dtype=torch.int64) if want_codes else None
    _extension.native().gumbel_softmax(
        *logits.shape, logits.data_ptr(), out.data_ptr(), DTYPES[logits.dtype], seed.data_ptr(), tau, _address(codes),
        torch.get_num_threads(),
    )  # fmt: skip
    return out, codes


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


# -- without logits in memory -----------------------------------------------------------------------------------------


def streams(operation, hidden, weight):
    """Does `operation` run as one of the two functions below?"""
    return _who() != "vendor" or (operation == "sample" and _has_few_rows(hidden, weight))


def _has_few_rows(hidden, weight):
    """Are logits sooner made with weight read where it lies, as a linear layer's, than with weight packed?

    A code every time that a model draws one: 8,192 x 512 in float32 took 2.4 ms packed, and takes 0.9.
    """
    return hidden.shape[0] <= few_rows(weight.dtype) and weight.stride(1) == 1


def logits(hidden, weight):
    """Returns hidden (N, I) @ weight (K, I).T in float32."""
    return linear_product(hidden, weight) if _has_few_rows(hidden, weight) else product(hidden, weight)


def sample_streaming(hidden, weight, bias, seed, temperature, *, seed_per_row):
    """Returns codes (N,) as `sample` does, of hidden (N, I) and weight (K, I). Few rows have logits, which are small."""
    codes = hidden.new_empty(hidden.shape[0], dtype=torch.int64)
    if _has_few_rows(hidden, weight):
        sample(logits(hidden, weight), bias, seed, 0, temperature, codes, seed_per_row=seed_per_row)
        return codes
    _extension.native().sample_streaming(
        _matrix(hidden), _matrix(weight), _address(bias), _address(seed), seed_per_row, _address(temperature),
        codes.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return codes


def cross_entropy_streaming(hidden, weight, bias, target, ignore_index):
    """Returns loss (N,) as `cross_entropy` does, of hidden (N, I) and weight (K, I)."""
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    _extension.native().cross_entropy_streaming(
        _matrix(hidden), _matrix(weight), _address(bias), target.data_ptr(), ignore_index, loss.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return loss
