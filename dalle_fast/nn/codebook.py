"""The Gumbel-softmax codebook of a discrete VAE as a module.

B batch, Din input channels, K codes, D embedding channels.
"""

from __future__ import annotations

import math

import torch

from dalle_fast.nn import functional as F
from dalle_fast.nn.checks import check_fits, check_integers, check_range, check_size
from dalle_fast.ops.choice import check_impl
from dalle_fast.ops.codebook.op import IMPLS, check_tau
from dalle_fast.ops.dtypes import check_tensor


class GumbelCodebook(torch.nn.Module):
    """1x1 convolution to K logits -> Gumbel-softmax -> product with a codebook, as one operation without the logits.

    As torch's `gumbel_softmax` it samples in training and in evaluation mode alike; `encode` and `decode` do not.

    Parameters are `weight` (K, Din) and `bias` (K,), which also load from a 1x1 convolution's (K, Din, 1, 1), and
    `codebook` (K, D). Initialised as torch.nn.Conv2d's and torch.nn.Embedding's.

    Args:
        in_channels: Din.
        num_codes: K.
        embedding_dim: D.
        tau: temperature; an attribute that a schedule may set, a number or a tensor without dimensions.
        hard: embed the sampled code, with the gradient of the soft sample.
        bias: whether there is one.
        impl: as in `dalle_fast.nn.functional.gumbel_codebook`.

    Raises:
        TypeError: a size that is no integer; tau is no number. ValueError: a size below 1; tau is not positive and finite;
            impl is none.
    """

    def __init__(
        self,
        in_channels,
        num_codes,
        embedding_dim,
        *,
        tau=1.0,
        hard=False,
        bias=True,
        impl="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, size in (("in_channels", in_channels), ("num_codes", num_codes), ("embedding_dim", embedding_dim)):
            check_size(name, size)
        check_tau(tau)
        check_impl(impl, IMPLS["gumbel_codebook"])
        options = {"device": device, "dtype": dtype}
        self.tau, self.hard, self.impl = tau, hard, impl
        self.weight = torch.nn.Parameter(torch.empty(num_codes, in_channels, **options))
        self.bias = torch.nn.Parameter(torch.empty(num_codes, **options)) if bias else None
        self.codebook = torch.nn.Parameter(torch.empty(num_codes, embedding_dim, **options))
        self.reset_parameters()

    def reset_parameters(self):
        bound = 1 / math.sqrt(self.weight.shape[1])
        torch.nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            torch.nn.init.uniform_(self.bias, -bound, bound)
        torch.nn.init.normal_(self.codebook)

    def forward(self, hidden, *, seed=None):
        """
        Args:
            hidden: (B, Din, ...), channels first as a convolution's output; channels_last memory is read in place.
            seed: as in `dalle_fast.nn.functional.gumbel_codebook`; rows are the positions (B, ...).

        Returns:
            GumbelCodebookOutput: embedding (B, D, ...), kl (B, ...) in nats, codes (B, ...).

        Raises:
            TypeError, ValueError: hidden is not of that shape, or not of the module's dtype and device; as
                `gumbel_codebook`.
        """
        out = F.gumbel_codebook(
            self._rows(hidden),
            self.weight,
            self.bias,
            self.codebook,
            self.tau,
            hard=self.hard,
            seed=seed,
            impl=self.impl,
        )
        return out._replace(embedding=out.embedding.movedim(-1, 1))

    def encode(self, hidden):
        """The most likely code of every position: (B, ...) int64 of hidden (B, Din, ...)."""
        return F.codebook_argmax(self._rows(hidden), self.weight, self.bias, impl=self.impl)

    def decode(self, codes):
        """The embeddings (B, D, ...) of codes (B, ...) int64.

        Raises:
            TypeError, ValueError: codes are not int64 or, on a CPU, not codes.
        """
        check_integers("codes", codes)
        num_codes = len(self.codebook)
        check_range("codes", codes, num_codes - 1, f"the last of the codebook's {num_codes} codes")
        return torch.nn.functional.embedding(codes, self.codebook).movedim(-1, 1)

    def extra_repr(self):
        K, Din = self.weight.shape
        return f"{Din}, {K}, {self.codebook.shape[1]}, tau={self.tau}, hard={self.hard}, bias={self.bias is not None}"

    def _rows(self, hidden):
        check_tensor("hidden", hidden)
        Din = self.weight.shape[1]
        if hidden.dim() < 2 or hidden.shape[1] != Din:
            raise ValueError(f"hidden must have shape (B, {Din}, ...), got {tuple(hidden.shape)}")
        check_fits("hidden", hidden, self.weight)
        return hidden.movedim(1, -1)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name = prefix + "weight"
        if name in state_dict and state_dict[name].dim() > 2:
            state_dict[name] = state_dict[name].flatten(1)  # a 1x1 convolution's
        super()._load_from_state_dict(state_dict, prefix, *args)
