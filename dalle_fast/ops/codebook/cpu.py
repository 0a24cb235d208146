"""The codebook operation on the CPU, by chunks of rows.

Of N rows only as many are worked on at a time as memory is meant for: a matrix product makes the logits of a chunk, one
kernel (`csrc/cpu/codebook_kernels.cpp`) does to them all there is to do, and further products take the result. Nothing of
size (N, K) exists. Codes and losses without gradients need not even a chunk's logits where the products are ours.

N rows, R rows of a chunk, K codes, I size of hidden, D size of an embedding.
"""

from __future__ import annotations

import itertools
import threading

import torch

from dalle_fast import _extension
from dalle_fast.ops.codebook.products import as_float32
from dalle_fast.ops.dtypes import DTYPES, address
from dalle_fast.ops.linear import few_rows, linear_product

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


# -- the operation ----------------------------------------------------------------------------------------------------


def gumbel_codebook(hidden, weight, bias, codebook, tau, seed, seed_per_row, hard):
    """As `reference` has it, and so have the others."""
    N, D = hidden.shape[0], codebook.shape[1]
    embedding = hidden.new_empty(N, D)
    kl, codes, stats = _row_results(hidden), _row_results(hidden, dtype=torch.int64), _row_results(hidden, 4)
    bias, memory = as_float32(bias), _memory(N, weight.shape[0])
    for first_row, *rows in _parts(len(memory), hidden, embedding, kl, codes, stats, seed):
        hidden_here, embedding_here, kl_here, codes_here, stats_here, seed_here = rows
        logits = memory[: len(hidden_here)]
        product(hidden_here, weight, out=logits)
        gumbel_forward(
            logits, bias, seed_here, first_row, tau, not hard, stats_here, kl_here, codes_here,
            seed_per_row=seed_per_row,
        )  # fmt: skip
        if not hard:
            torch.div(product(logits, codebook.T), stats_here[:, 3:], out=embedding_here)
    if hard:
        torch.index_select(codebook, 0, codes, out=embedding)
    return embedding, kl, codes, stats


def gumbel_codebook_backward(
    grad_embedding, grad_kl, hidden, weight, bias, codebook, tau, seed, kl, codes, stats, seed_per_row, hard, needs
):
    N, K = hidden.shape[0], weight.shape[0]
    gradients = _Gradients(hidden, weight, bias, needs)
    of_codebook = Sum(codebook, N) if needs[3] and not hard else None
    bias, grad_kl, dtype = as_float32(bias), as_float32(grad_kl), gradient_dtype(hidden.dtype)
    memory, small_memory = _memory(N, K, small_parts=SMALL_PARTS)
    for first_row, hidden_here, grad_hidden, *others in _parts(
        len(memory), hidden, gradients.of_hidden, grad_embedding, grad_kl, kl, stats, seed
    ):
        logits = memory[: len(hidden_here)]
        product(hidden_here, weight, out=logits)
        for start, part, grad_here, grad_kl_here, kl_here, stats_here, seed_here in _parts(
            len(small_memory), logits, *others
        ):
            grad_weights, grad_here = small_memory[: len(part)], grad_here.contiguous()
            product(grad_here, codebook, out=grad_weights)
            gumbel_backward(
                part, bias, seed_here, first_row + start, tau, stats_here, kl_here, grad_kl_here, grad_weights, dtype,
                of_codebook is not None, seed_per_row=seed_per_row,
            )  # fmt: skip
            if of_codebook is not None:
                of_codebook.add(results(grad_weights, dtype), grad_here)
        gradients.add(results(logits, dtype), hidden_here, weight, grad_hidden)
    if not needs[3]:
        return *gradients.results(), None
    return *gradients.results(), _sum_by_code(codebook, codes, grad_embedding) if hard else of_codebook.result()


def sample(hidden, weight, bias, temperature, seed, seed_per_row):
    codes, bias = _row_results(hidden, dtype=torch.int64), as_float32(bias)
    if _has_few_rows(hidden, weight):
        sample_rows(logits(hidden, weight), bias, seed, 0, temperature, codes, seed_per_row=seed_per_row)
    elif _by_tiles():
        _extension.native().sample_streaming(
            _matrix(hidden), _matrix(weight), address(bias), address(seed), seed_per_row, address(temperature),
            codes.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    else:
        memory = _memory(hidden.shape[0], weight.shape[0])
        for first_row, hidden_here, seed_here, codes_here in _parts(len(memory), hidden, seed, codes):
            z = product(hidden_here, weight, out=memory[: len(hidden_here)])
            sample_rows(z, bias, seed_here, first_row, temperature, codes_here, seed_per_row=seed_per_row)
    return codes


def cross_entropy(hidden, weight, bias, target, ignore_index, row_weight, needs):
    loss, wants = _row_results(hidden), row_weight is not None
    gradients = _Gradients(hidden, weight, bias, needs)
    bias, row_weight = as_float32(bias), as_float32(row_weight)
    if not wants and _by_tiles():
        _extension.native().cross_entropy_streaming(
            _matrix(hidden), _matrix(weight), address(bias), target.data_ptr(), ignore_index, loss.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return loss, None, None, None
    memory, dtype = _memory(hidden.shape[0], weight.shape[0]), gradient_dtype(hidden.dtype)
    for _, hidden_here, grad_hidden, target_here, row_weight_here, loss_here in _parts(
        len(memory), hidden, gradients.of_hidden, target, row_weight, loss
    ):
        z = product(hidden_here, weight, out=memory[: len(hidden_here)])
        cross_entropy_rows(z, bias, target_here, ignore_index, row_weight_here, dtype, loss_here)
        if wants:
            gradients.add(results(z, dtype), hidden_here, weight, grad_hidden)
    return loss, *gradients.results()


def gumbel_softmax(logits, tau, seed):
    logits = logits.contiguous()
    out, codes = torch.empty_like(logits), _row_results(logits, dtype=torch.int64)
    _extension.native().gumbel_softmax(
        *logits.shape, logits.data_ptr(), out.data_ptr(), DTYPES[logits.dtype], seed.data_ptr(), tau, codes.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out, codes


def logits(hidden, weight):
    return linear_product(hidden, weight) if _has_few_rows(hidden, weight) else product(hidden, weight)


def truncated(logits, temperature, top_k, top_p):
    """As `truncation.truncated`, in place of logits (R, K) float32; a row whose largest is infinite is left as it is."""
    logits = logits.contiguous()
    _extension.native().truncate(
        *logits.shape, logits.data_ptr(), temperature, top_k or logits.shape[1], 1 if top_p is None else top_p,
        torch.get_num_threads(),
    )  # fmt: skip
    return logits


def sample_of_logits(logits, seed):
    codes = _row_results(logits, dtype=torch.int64)
    sample_rows(logits, None, seed, 0, logits.new_ones(()), codes, seed_per_row=True)
    return codes


def _has_few_rows(hidden, weight):
    """Are logits sooner made with weight read where it lies, as a linear layer's, than with weight packed?

    A code every time that a model draws one: 8,192 x 512 in float32 took 2.4 ms packed, and takes 0.9.
    """
    return hidden.shape[0] <= few_rows(weight.dtype) and weight.stride(1) == 1


def _row_results(hidden, *shape, dtype=torch.float32):
    return torch.empty((hidden.shape[0], *shape), dtype=dtype, device="cpu")


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


def _parts(step, *tensors):
    """Yield the first row's number and the rows of all tensors, `step` at a time and a last time what is left.

    The first tensor has all rows. Others may be None, or have one row for all.
    """
    N = tensors[0].shape[0]
    if N <= step:
        if N:
            yield 0, *tensors
        return
    split = [itertools.repeat(x) if x is None or len(x) != N else x.split(step) for x in tensors]
    yield from zip(range(0, N, step), *split, strict=False)


# -- memory -----------------------------------------------------------------------------------------------------------

_kept = threading.local()


def scratch(size):
    """`size` floats to work in until this thread asks again. They are kept: the first touch of 16 MB takes some 4 ms."""
    return _keep("rows", size)


def gradient_dtype(dtype):
    """What the kernels below leave gradients of logits in, of tensors in `dtype`: all is float32 but for AMX.

    That multiplies bfloat16 alone, so that exacter gradients of logits cost twice the work. Eager rounds them too.
    """
    rounds = dtype == torch.bfloat16 and _extension.native().instruction_set() == "avx512_amx"
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


def _memory(N, K, *, small_parts=0):
    """Floats (R, K) for a chunk's logits, of N rows in all; with small_parts also floats (R / small_parts, K)."""
    step = min(N, chunk_rows(K))
    small = -(-step // small_parts) if small_parts else 0
    floats = scratch((step + small) * K).view(-1, K)
    return (floats[:step], floats[step:]) if small_parts else floats


# -- products ---------------------------------------------------------------------------------------------------------

# Who multiplies matrices, by the instruction set in use: "ours" (csrc/cpu/product_kernels.cpp), "vendor" (torch.mm), or
# "both": torch those of two float32 matrices, we the others. Where some are ours, `sample` and the loss without gradients
# go tile by tile.
# On an AMD EPYC of Zen 5, 384 x 512 x 8,192 in float32 with two cores: with AVX-512 ours 7.3 ms, torch's (MKL) 18.8, where
# their peak is 6.2; with AVX2 20.0 and 20.4, but of few rows torch's is faster. AMD's CPUs with AVX-512 have avx512_bf16.
# On an Intel Xeon the same product on one core: with AVX-512 ours 23.0 ms, torch's 21.5. With AMX (csrc/cpu/parts.h) and two
# cores ours 6.2 ms, torch's 9.8; in bfloat16 2.0, of a bfloat16 and a float32 matrix 3.8, in float16 4.9, all without float32
# copies.
PRODUCTS = {"portable": "vendor", "avx2": "vendor", "avx512": "both", "avx512_bf16": "ours", "avx512_amx": "ours"}


def _who():
    return PRODUCTS[_extension.native().instruction_set()]


def _by_tiles():
    """Do codes and losses without gradients go tile by tile, with no logits in memory?"""
    return _who() != "vendor"


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
        for part in _slices(b.shape[0], a.shape[0], ROUNDED_BYTES):
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


class _Gradients:
    """Adds up the gradients of hidden, weight and bias over chunks, in float32."""

    def __init__(self, hidden, weight, bias, needs):
        self.bias, self.needs = bias, needs
        self.of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.of_weight = Sum(weight, hidden.shape[0]) if needs[1] else None
        self.of_bias = _floats(*bias.shape).zero_() if needs[2] else None

    def add(self, grad_logits, hidden, weight, grad_hidden):
        """What a chunk contributes; grad_hidden, its rows of of_hidden, is written."""
        if self.needs[0]:
            rounded_product(grad_logits, weight.T, grad_hidden)
        if self.needs[1]:
            self.of_weight.add(grad_logits, hidden)
        if self.needs[2]:
            add_columns(self.of_bias, grad_logits)

    def results(self):
        """In the dtype of the tensors they belong to; None for those that are not needed."""
        return (
            self.of_hidden,
            self.of_weight.result() if self.needs[1] else None,
            self.of_bias.to(self.bias.dtype) if self.needs[2] else None,
        )


def _sum_by_code(codebook, codes, grad_embedding):
    total = _floats(*codebook.shape).zero_()
    return total.index_add_(0, codes, grad_embedding.float()).to(codebook.dtype)


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
        for part in _slices(*b.shape, CONVERTED_BYTES):
            torch.mm(a, _converted(b[part]).T, out=out[:, part])
    else:
        for part in _slices(b.shape[1], b.shape[0], CONVERTED_BYTES):
            torch.addmm(out, a[:, part], _converted(b[:, part].T), beta=0 if part.start == 0 else 1, out=out)
    return out


def _slices(count, width, size):
    """Slices of `count` rows of `width` floats that take `size` bytes each."""
    step = max(1, size // (4 * max(1, width)))
    return [slice(start, min(count, start + step)) for start in range(0, max(1, count), step)]


def _converted(part):
    return _keep("part", part.numel()).view(part.shape).copy_(part)


# -- kernels ----------------------------------------------------------------------------------------------------------


def gumbel_forward(logits, bias, seed, first_row, tau, want_weights, stats, kl, codes, *, seed_per_row):
    """Fills stats (R, 4), kl (R,) and codes (R,), and replaces logits by weights (R, K), not normalised."""
    R, K = logits.shape
    _extension.native().gumbel_forward(
        R, K, logits.data_ptr(), address(bias), seed.data_ptr(), seed_per_row, first_row, tau.data_ptr(),
        logits.data_ptr() if want_weights else 0, stats.data_ptr(), kl.data_ptr(), codes.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def gumbel_backward(
    logits, bias, seed, first_row, tau, stats, kl, grad_kl, grad_weights, dtype, want_weights, *, seed_per_row
):
    """Replaces logits by their gradient and, with want_weights, grad_weights by the weights, normalised: in `dtype`."""
    _extension.native().gumbel_backward(
        *logits.shape, logits.data_ptr(), address(bias), seed.data_ptr(), seed_per_row, first_row, tau.data_ptr(),
        stats.data_ptr(), kl.data_ptr(), address(grad_kl), grad_weights.data_ptr(),
        grad_weights.data_ptr() if want_weights else 0, logits.data_ptr(), DTYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip


def sample_rows(logits, bias, seed, first_row, temperature, codes, *, seed_per_row):
    """codes (R,) = argmax of logits + bias + temperature * noise, without noise where temperature is None."""
    _extension.native().sample(
        *logits.shape, logits.data_ptr(), address(bias), address(seed), seed_per_row, first_row,
        address(temperature), codes.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def cross_entropy_rows(logits, bias, target, ignore_index, row_weight, dtype, loss):
    """Fills loss (R,), and with row_weight replaces logits by the gradient of sum(row_weight * loss), in `dtype`."""
    _extension.native().cross_entropy(
        *logits.shape, logits.data_ptr(), address(bias), target.data_ptr(), ignore_index, loss.data_ptr(),
        address(row_weight), row_weight is not None and len(row_weight) > 1,
        0 if row_weight is None else logits.data_ptr(), DTYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip
