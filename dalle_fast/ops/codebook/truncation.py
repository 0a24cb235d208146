"""Which codes may be drawn: the k most likely ones, or the fewest whose probabilities add up to p (Holtzman et al. 2020)."""

from __future__ import annotations

import torch

UNIT = float(1 << 40)  # of probabilities that are added up as integers: a GPU adds floats up in any order


def truncated(logits, temperature, top_k, top_p):
    """Logits (N, K) over temperature, less the largest of each row, and -inf for codes that may not be drawn.

    A NaN is forbidden, and so never drawn from a row that has other logits. +inf stays, and is what is drawn.

    Args:
        temperature: above 0, such that no quotient is infinite where the logit is not.
        top_k: how many of the largest stay; None for all.
        top_p: of them the fewest of the most likely stay whose probabilities add up to it; None or 1 for all.
    """
    logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if top_k is not None:
        most_likely = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(1, *reversed(most_likely))
    # The largest becomes 0, which no temperature makes infinite. Not of a row that has none which is finite: a difference
    # of two infinities is NaN.
    logits = (logits - logits.amax(-1, keepdim=True).nan_to_num()) / temperature
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = (ordered.softmax(-1) * UNIT).to(torch.int64)
        before = p.cumsum(-1) - p
        ordered = ordered.masked_fill(before >= top_p * UNIT, -torch.inf)  # the first stays, also where p is NaN
        logits = logits.scatter(1, order, ordered)
    return logits
