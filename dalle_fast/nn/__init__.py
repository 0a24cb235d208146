"""Modules that take the place of torch's, and their functional forms in `dalle_fast.nn.functional`."""

from dalle_fast.nn import functional
from dalle_fast.nn.attention import MultiheadAttention
from dalle_fast.nn.codebook import GumbelCodebook
from dalle_fast.nn.dvae import DiscreteVAE, DVAEConfig

__all__ = ["DVAEConfig", "DiscreteVAE", "GumbelCodebook", "MultiheadAttention", "functional"]
