"""Faults that kernels and models of this field have had, seeded one at a time: the tests must catch each.

A mutant is a line of the sources changed in a copy of them, and the tests that are to fail. It counts as caught only
where a test fails that passes in another copy without the fault: not where it no longer applies, nor where the build or
the collection of the tests breaks, nor where a test fails anyway. That one test is run there, of a crash all of them.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from dalle_fast.verify.checkout import copy_of_sources, rebuild, run_tests


class Mutant(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`; `tests` are files or ids, `keyword` as of pytest's -k."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    keyword: str = ""


ATTENTION, CODEBOOK = "dalle_fast/ops/attention", "dalle_fast/ops/codebook"
MUTANTS = (
    Mutant(
        "offsets of 32 bits",
        "csrc/cpu/rows.h",
        "+ b * x.stride_b + h * x.stride_h +",
        "+ int32_t(b * x.stride_b) + int32_t(h * x.stride_h) +",
        ("tests/test_attention_large.py",),
    ),
    Mutant(
        "a window that is one key too short",
        "csrc/mask.h",
        "case Rule::row: return delta <= W;",
        "case Rule::row: return delta < W;",
        ("tests/test_attention.py",),
        "every_mask and cpu",
    ),
    Mutant(
        "a window of the Triton kernels that is one key too short",
        f"{ATTENTION}/triton/primitives.py",
        "start = max(t0 - MASK.REACH, 0)",
        "start = max(t0 - MASK.REACH + 1, 0)",
        ("tests/test_triton_interpreter.py",),
    ),
    Mutant(
        "a mask for another length",
        f"{ATTENTION}/cpu.py",
        "return _extension.native().AttentionLayout(mask.encode(), seq_len)",
        "return _extension.native().AttentionLayout(mask.encode(), min(seq_len + 1, mask.seq_len))",
        ("tests/test_attention.py",),
        "prefix and cpu",
    ),
    Mutant(
        "NaN where a query sees no key",
        "csrc/cpu/attention_kernels.cpp",
        "store_row(s.out + r * Dp, sum[r] == 0 ? 0 : 1 / sum[r],",
        "store_row(s.out + r * Dp, 1 / sum[r],",
        ("tests/test_attention.py",),
        "every_mask and cpu",
    ),
    Mutant(
        "hidden text that is seen in the backward pass",
        f"{ATTENTION}/op.py",
        "grads = _backward(grad_out, grad_lse, query, key, value, out, lse, text_lengths, *ctx.rest)",
        "grads = _backward(grad_out, grad_lse, query, key, value, out, lse, None, *ctx.rest)",
        ("tests/test_attention_grad.py",),
        "every_mask and cpu",
    ),
    Mutant(
        "gradients read as if they were contiguous",
        f"{ATTENTION}/cpu.py",
        "(query, key, value, out, lse, grad_out, grad_lse, *grads)]",
        "(query, key, value, out, lse, grad_out.as_strided(out.shape, out.stride()), grad_lse, *grads)]",
        ("tests/test_attention_grad.py",),
        "stride and cpu",
    ),
    Mutant(
        "the gradient of lse left out",
        f"{ATTENTION}/reference.py",
        "delta = delta - grad_lse",
        "delta = delta + 0 * grad_lse",
        ("tests/test_attention_grad.py",),
        "every_mask and reference",
    ),
    Mutant(
        "a scale that does not know the head size",
        f"{ATTENTION}/op.py",
        "return D**-0.5",
        "return 0.125",
        ("tests/test_attention.py",),
        "head_size",
    ),
    Mutant(
        "a fast path of torch that drops the mask",
        "dalle_fast/nn/attention.py",
        "return self._packed and self._mask is None",
        "return self._packed",
        ("tests/test_multihead_attention.py",),
    ),
    Mutant(
        "a uniform variate of 0",
        "csrc/gumbel.h",
        "Lanes::from_word(word) * 0x1p-32f + 0x1p-33f",
        "Lanes::from_word(word) * 0x1p-32f",
        ("tests/test_codebook_noise.py",),
        "slice_of_all_words",
    ),
    Mutant(
        "a uniform variate of 1",
        f"{CODEBOOK}/noise.py",
        "uniform = (words.float() * 2**-32 + 2**-33).clamp(max=1 - 2**-24)",
        "uniform = words.float() * 2**-32 + 2**-33",
        ("tests/test_codebook_noise.py",),
        "slice_of_all_words",
    ),
    Mutant(
        "noise in bfloat16",
        f"{CODEBOOK}/noise.py",
        "return gumbel_of_words(noise_words(seed, row, num_codes), dtype)",
        "return gumbel_of_words(noise_words(seed, row, num_codes), dtype).bfloat16().to(dtype)",
        ("tests/test_codebook_noise.py",),
    ),
    Mutant(
        "the same noise at every step",
        f"{CODEBOOK}/op.py",
        "return (int(seed) << 11 | int(rank)) << 32 | int(step)",
        "return (int(seed) << 11 | int(rank)) << 32",
        ("tests/test_codebook_noise.py", "tests/test_codebook_op.py"),
    ),
    Mutant(
        "the same noise on every rank",
        f"{CODEBOOK}/op.py",
        "return (int(seed) << 11 | int(rank)) << 32 | int(step)",
        "return int(seed) << 43 | int(step)",
        ("tests/test_codebook_noise.py", "tests/test_codebook_op.py"),
    ),
    Mutant(
        "rows numbered anew in every chunk",
        f"{CODEBOOK}/cpu.py",
        "logits, bias, seed_here, first_row, tau, not hard, stats_here, kl_here,",
        "logits, bias, seed_here, 0, tau, not hard, stats_here, kl_here,",
        ("tests/test_codebook.py",),
        "many_rows and cpu",
    ),
    Mutant(
        "codes behind the last that count",
        "csrc/cpu/codebook_kernels.cpp",
        "load_block(row + block * kNoiseBlock, valid, -kInfinity, z);",
        "load_block(row + block * kNoiseBlock, valid, 0, z);",
        ("tests/test_codebook.py",),
        "every_size and cpu",
    ),
    Mutant(
        "a cotangent taken for uniform",
        "csrc/cpu/codebook_kernels.cpp",
        "const float grad_kl = a.grad_kl ? a.grad_kl[r] / stats.sum : 0;",
        "const float grad_kl = a.grad_kl ? a.grad_kl[0] / stats.sum : 0;",
        ("tests/test_codebook_grad.py",),
        "every_size and cpu",
    ),
    Mutant(
        "the last of equal codes",
        f"{CODEBOOK}/reference.py",
        "    return z.argmax(-1)\n",
        "    return z.shape[-1] - 1 - z.flip(-1).argmax(-1)\n",
        ("tests/test_codebook.py", "tests/test_codebook_samples.py"),
        "reference",
    ),
    Mutant(
        "ignored targets that are counted",
        f"{CODEBOOK}/reference.py",
        "loss = -log_p.gather(-1, index[:, None])[:, 0].where(counted, 0)",
        "loss = -log_p.gather(-1, index[:, None])[:, 0]",
        ("tests/test_codebook.py",),
        "reference",
    ),
    Mutant(
        "a divergence that grows with the batch",
        "dalle_fast/nn/dvae.py",
        "kl = kl.mean()",
        "kl = kl.sum() / 64",
        ("tests/test_dvae.py",),
    ),
    Mutant(
        "a ring of the cache that is one slot too short",
        "dalle_fast/masks.py",
        "        return min(reach + 1, self.image_len)\n",
        "        return min(reach, self.image_len) or 1\n",
        ("tests/test_decode.py", "tests/test_masks.py"),
    ),
    Mutant(
        "a checkpoint without its manifest's sums",
        "dalle_fast/checkpoint.py",
        "        if found != expected:\n",
        "        if found is None:\n",
        ("tests/test_checkpoint.py",),
    ),
    Mutant(
        "weights in training evaluated in place of their average",
        "dalle_fast/training/loop.py",
        "found = self.objective.evaluate(self.ema.model, self.at_once)",
        "found = self.objective.evaluate(self.model, self.at_once)",
        ("tests/test_training.py",),
    ),
    Mutant(
        "a batch that is skipped when a run resumes",
        "dalle_fast/training/stage1.py",
        "            start=start,\n",
        "            start=start + 1 if start else 0,\n",
        ("tests/test_training.py",),
    ),
    Mutant(
        "noise of a tile's codes taken for that of the first codes",
        "csrc/cpu/codebook_kernels.cpp",
        "add_noise(noise, first_block + block, temperature, z);",
        "add_noise(noise, block, temperature, z);",
        ("tests/test_codebook_products.py",),
    ),
    Mutant(
        "NaN of a tile whose codes are all forbidden",
        "csrc/cpu/codebook_kernels.cpp",
        "const float most = std::fmax(max_logit(bias, logits, count), std::numeric_limits<float>::lowest());",
        "const float most = max_logit(bias, logits, count);",
        ("tests/test_codebook_products.py",),
    ),
    Mutant(
        "later rows of tiles numbered anew",
        "csrc/cpu/codebook.cpp",
        "{{first + piece.row, first + piece.end_row, piece.column, piece.end_column}",
        "{{piece.row, piece.end_row, piece.column, piece.end_column}",
        ("tests/test_codebook_products.py",),
    ),
    Mutant(
        "a piece of a product that is written where the first one is",
        "csrc/cpu/product.cpp",
        "const int64_t first = piece.row * p.stride_out + piece.column;",
        "const int64_t first = piece.row * p.stride_out;",
        ("tests/test_codebook_products.py",),
    ),
    Mutant(
        "the first of equal codes in a lane, not in the row",
        "csrc/cpu/codebook_kernels.cpp",
        "places = min(places, ((best_[v] == most) & (block_[v] == block)) ? lane + v * VW : none);",
        "places = min(places, best_[v] == most ? lane + v * VW : none);",
        ("tests/test_codebook_products.py", "tests/test_codebook.py"),
        "not cuda",
    ),
    Mutant(
        "a short panel that is taken for a whole one",
        "csrc/cpu/product_kernels.cpp",
        "const int64_t lanes = std::min<int64_t>(kPanel, x.lanes - lane);\n    int64_t i = 0;\n    if (x.stride_depth == 1",
        "const int64_t lanes = kPanel;\n    int64_t i = 0;\n    if (x.stride_depth == 1",
        ("tests/test_codebook_products.py",),
    ),
    Mutant(
        "sums that are cut off, not rounded",
        "csrc/cpu/product_kernels.cpp",
        "rounded = bits + 0x7f + (bits >> 8 & 1);",
        "rounded = bits;",
        ("tests/test_codebook_products.py",),
    ),
    Mutant(
        "one code fewer than top-k may be drawn",
        "csrc/cpu/codebook_kernels.cpp",
        "int64_t surplus = count_from(least, z, K) - count;",
        "int64_t surplus = count_from(least, z, K) - count + 1;",
        ("tests/test_codebook.py",),
        "drawn and cpu",
    ),
    Mutant(
        "pixels of a crop that are copied",
        "dalle_fast/data/crops.py",
        "        if part:\n",
        "        if not part:\n",
        ("tests/test_data_crops.py",),
    ),
    Mutant(
        "a place in a split that depends on other pictures",
        "dalle_fast/data/images.py",
        "count = int((digests < threshold).sum())",
        "count = round(share * len(names))",
        ("tests/test_data_sources.py",),
    ),
)


def case(number: int, device: str) -> None:
    mutant, (folder, sound) = MUTANTS[number], (Path(copy.name) for copy in _copies())
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise AssertionError(f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}")
    try:
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        _build(folder)
        counts = run_tests(*mutant.tests, folder=folder, keyword=mutant.keyword)
    finally:
        path.write_text(text, encoding="utf-8")
    if not counts["failed"]:
        raise AssertionError(f"{mutant.name}: no test of {', '.join(mutant.tests)} fails, {counts['passed']} pass")
    tests, keyword = ([counts["failed test"]], "") if counts["failed test"] else (mutant.tests, mutant.keyword)
    without = run_tests(*tests, folder=sound, keyword=keyword)
    if without["failed"]:
        failed = without["failed test"] or ", ".join(tests)
        raise RuntimeError(f"{mutant.name}: {failed} fails without the fault too: {without['first failure'][:500]}")


_built = {}  # the text of each C++ source in the module that stands in the copy


def _build(folder: Path) -> None:
    """Build the copy's module again, where it was built from other sources than those that are there now."""
    texts = {path: path.read_text(encoding="utf-8") for path in (folder / "csrc").rglob("*") if path.is_file()}
    if texts != _built:
        _built.clear()  # a build that breaks leaves nothing to rely on
        rebuild(folder)
        _built.update(texts)


@functools.cache
def _copies():
    """Two copies for all mutants, both built: one to change, so that only what a mutant changes is compiled again."""
    folder, sound = copy_of_sources(), tempfile.TemporaryDirectory(prefix="dalle_fast_verify_")
    _build(Path(folder.name))
    shutil.copytree(folder.name, sound.name, ignore=shutil.ignore_patterns("build"), dirs_exist_ok=True)
    return folder, sound
