"""At OpenAI's codebook sizes the step from encoder features to decoder features needs a tenth of the eager memory.

And a whole training step needs less by what the eager form keeps for its backward pass. Measured as the growth of
resident memory, each in a fresh process (see `cpu_extra_bytes` of benchmarks/measuring.py).

N rows, K codes, Din features, D embedding.
"""

import math
import sys
from pathlib import Path

import pytest
import torch

import dalle_fast.nn as fnn
from dalle_fast.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
measuring = pytest.importorskip("measuring")

DIN, K, D = 2048, 8192, 128
ROWS = 4096  # four pictures of 256 pixels; what the eager form needs grows with them, and ours hardly does
# The encoder's and decoder's widths are OpenAI's, as the codebook's sizes ask for; one block in a group saves time.
CONFIG = fnn.DVAEConfig(image_size=32, hidden=256, num_codes=K, embedding_dim=D, blocks_per_group=1)
BATCH = 64


def eager_codebook(hidden, weight, bias, codebook, tau):
    """What a user would write: torch's own gumbel_softmax and log_softmax of all logits."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    log_p = torch.log_softmax(logits, -1)
    kl = (log_p.exp() * (log_p + math.log(K))).sum(-1)
    return torch.nn.functional.gumbel_softmax(logits, tau=tau) @ codebook, kl


def our_codebook(hidden, weight, bias, codebook, tau):
    return F.gumbel_codebook(hidden, weight, bias, codebook, tau)[:2]


def codebook_step(function, rows):
    torch.set_num_threads(1)
    sizes = [(rows, DIN), (K, DIN), (K,), (K, D)]
    tensors = [(torch.randn(size) / size[-1] ** 0.5).requires_grad_() for size in sizes]

    def call():
        embedding, kl = function(*tensors, 0.5)
        return torch.autograd.grad([embedding, kl], tensors, [torch.ones_like(embedding), torch.ones_like(kl)])

    return measuring.cpu_extra_bytes(call)


class EagerVAE(fnn.DiscreteVAE):
    def forward(self, images, *, tau, beta):
        weight, bias, codebook, shift = self._codebook()
        features = self._features(images)
        embedding, kl = eager_codebook(features, weight, bias, codebook, tau)
        loss = self._reconstruction_loss(images, *self._statistics(embedding + shift))
        return (loss + beta * kl.mean(),)


def training_step(model_class):
    torch.set_num_threads(1)
    model = model_class(CONFIG)
    images = torch.rand(BATCH, 3, CONFIG.image_size, CONFIG.image_size)
    parameters = list(model.parameters())

    def call():
        return torch.autograd.grad(model(images, tau=0.5, beta=1.0)[0], parameters)

    return measuring.cpu_extra_bytes(call)


def measured(function, ours, eager, *arguments):
    """Bytes that ours and the eager one need."""
    contenders = {"ours": (ours, *arguments), "eager": (eager, *arguments)}
    results = measuring.isolated(function, contenders, workers=1)
    for result in results.values():
        if isinstance(result, measuring.NotRun):
            pytest.skip(f"memory cannot be measured here: {result}")
        if isinstance(result, Exception):
            raise result
    print({name: f"{result / measuring.MIB:.1f} MiB" for name, result in results.items()})
    return results["ours"], results["eager"]


def test_from_encoder_features_to_decoder_features():
    ours, eager = measured(codebook_step, our_codebook, eager_codebook, ROWS)
    assert ours < eager / 10


def test_a_whole_training_step_saves_what_the_codebook_keeps():
    """At its peak a step holds what is kept for the backward pass: eager two softmaxes, and both factors of the KL."""
    kept = 4 * (BATCH * CONFIG.grid**2) * K * 4
    ours, eager = measured(training_step, fnn.DiscreteVAE, EagerVAE)
    assert eager - ours > 0.95 * kept
