"""What meets all K codes of a codebook: `op` is its face, the other modules are its implementations."""

from dalle_fast.ops.codebook.op import (
    GumbelCodebookOutput,
    codebook_argmax,
    codebook_cross_entropy,
    codebook_sample,
    gumbel_codebook,
    gumbel_softmax,
    noise_seed,
)

__all__ = [
    "GumbelCodebookOutput",
    "codebook_argmax",
    "codebook_cross_entropy",
    "codebook_sample",
    "gumbel_codebook",
    "gumbel_softmax",
    "noise_seed",
]
