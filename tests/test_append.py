"""A token goes into its slots of a layer's caches, the same way by torch and by the kernel, and who does it.

The kernel is in test_triton_interpreter.py and test_triton_compile.py.

B samples, H heads, D head size.
"""

import pytest
import torch

from dalle_fast.nn import KVCache, kv_cache
from dalle_fast.nn.transformer import Attention
from dalle_fast.ops.attention import append as append_ops
from dalle_fast.ops.attention import attention_append
from dalle_fast.testing import every_mask

B, H, D = 3, 5, 16
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def operands(mask, dtype=torch.float32, device="cpu"):
    """Caches of NaN, and the keys and values of all tokens in packed projections (G, B, 3, H, D)."""
    caches = [torch.full((B, H, mask.cache_slots, D), torch.nan, dtype=dtype, device=device) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    return caches, torch.randn(mask.image_len, B, 3, H, D, generator=generator).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", every_mask(0, 1))
def test_every_token_lies_where_the_mask_says(rule, device):
    mask = every_mask(2, (5, 3))[rule]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        caches, packed = operands(mask, dtype, device)
        expected = [cache.clone() for cache in caches]
        for i in range(mask.image_len):
            tokens = packed[i].unbind(1)[1:]
            attention_append(*caches, *tokens, mask, torch.tensor(i, device=device))
            for cache, wanted, token in zip(caches, expected, tokens, strict=True):
                wanted[:, :, mask.cache_slot(i)] = token
                assert torch.equal(cache.nan_to_num(7), wanted.nan_to_num(7))


class OnGpu(torch.Tensor):
    """A CPU tensor that says that it is on a GPU: who serves is decided before anything is computed."""

    is_cuda = True


def test_what_the_kernel_serves_and_what_is_torchs(monkeypatch):
    calls = []

    class Kernels:
        @staticmethod
        def why_not(*arguments):
            return []

    monkeypatch.setattr(append_ops, "implementation", lambda name: Kernels)
    monkeypatch.setattr(append_ops, "_append_op", lambda *arguments: calls.append(arguments))
    mask = every_mask(2, (5, 3))["row"]
    caches, packed = operands(mask)
    key, value, *caches = (x.as_subclass(OnGpu) for x in (*packed[4].unbind(1)[1:], *caches))
    position = torch.tensor(4)
    attention_append(*caches, key, value, mask, position)
    assert len(calls) == 1 and caches[0].isnan().all()
    attention_append(*caches, key.double(), value.double(), mask, position)  # of another dtype
    plain = [x.as_subclass(torch.Tensor) for x in (*caches, key, value)]
    attention_append(*plain, mask, position)
    needs = [x.clone().requires_grad_() for x in (key, value)]
    attention_append(*(x.clone() for x in caches), *needs, mask, position)
    with pytest.raises((RuntimeError, IndexError)):  # torch's own error: the kernel would read past the end
        attention_append(*caches, key, value[:2], mask, position)
    attention_append(*caches, key, value, mask, position, impl="reference")
    monkeypatch.setattr(Kernels, "why_not", lambda *arguments: ["compute capability must be at least 8.0"])
    attention_append(*caches, key, value, mask, position)
    assert len(calls) == 1
    assert torch.equal(plain[0][:, :, 0], plain[2])  # 4 of a ring of 4


def test_a_models_impl_also_writes_its_caches(monkeypatch):
    told = []

    class Cache:
        def append(self, key, value, *, impl):
            told.append(impl)

        def attend(self, query, *, impl):
            return query

    mask = every_mask(2, (5, 3))["row"]
    Attention(H * D, H, D, mask, "reference").step(torch.zeros(B, H * D), Cache())
    monkeypatch.setattr(kv_cache, "attention_append", lambda *arguments, impl: told.append(impl))
    sizes = {"num_prompts": B, "num_images": 1, "num_heads": H, "head_dim": D}
    token = torch.zeros(B, H, D, device="meta")
    KVCache([mask], **sizes, device="meta").layer(0).append(token, token, impl="reference")
    assert told == ["reference"] * 2
