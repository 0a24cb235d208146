"""Sparse attention over [text | image grid] sequences.

`op` (whole sequences), `decode` (one step against a cache) and `append` (one step into it) are its face, the other modules
its implementations.
"""

from dalle_fast.ops.attention.append import attention_append
from dalle_fast.ops.attention.decode import sparse_attention_decode
from dalle_fast.ops.attention.op import sparse_attention
from dalle_fast.ops.attention.reference import attention_weights

__all__ = ["attention_append", "attention_weights", "sparse_attention", "sparse_attention_decode"]
