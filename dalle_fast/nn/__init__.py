"""Modules that take the place of torch's, and their functional forms in `dalle_fast.nn.functional`."""

from dalle_fast.nn import functional
from dalle_fast.nn.attention import MultiheadAttention
from dalle_fast.nn.codebook import GumbelCodebook
from dalle_fast.nn.dalle import DALLE, DALLEConfig
from dalle_fast.nn.dvae import DiscreteVAE, DVAEConfig
from dalle_fast.nn.kv_cache import KVCache
from dalle_fast.nn.transformer import Transformer

__all__ = [
    "DALLE",
    "DALLEConfig",
    "DVAEConfig",
    "DiscreteVAE",
    "GumbelCodebook",
    "KVCache",
    "MultiheadAttention",
    "Transformer",
    "functional",
]
