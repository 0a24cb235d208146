"""Sparse attention over [text | image grid] sequences: `op` is its face, the other modules are its implementations."""

from dalle_fast.ops.attention.op import sparse_attention
from dalle_fast.ops.attention.reference import attention_weights

__all__ = ["attention_weights", "sparse_attention"]
