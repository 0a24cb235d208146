"""All 2^32 words give finite noise, falling from the first to the last but for its rounding: by slices of 2^24."""

from __future__ import annotations

import numpy as np

from dalle_fast import _extension

SLICE = 1 << 24
ULP = 2.0**-23  # of noise up to 1, and of max(1, |noise|) above


def case(number: int, device: str) -> dict:
    start = number * SLICE
    # The last word of the slice before it comes first, so that no step between words is left out.
    words = np.arange(max(0, start - 1), start + SLICE, dtype=np.int64).astype(np.uint32)
    noise = _extension.native().gumbel_noise(words)
    if not np.isfinite(noise).all():
        raise AssertionError(f"word {int(words[~np.isfinite(noise)][0])} gives noise that is not finite")
    rise = np.diff(noise) / np.maximum(1, np.abs(noise[1:]))
    if rise.max() > 2 * ULP:
        raise AssertionError(f"noise rises by {rise.max():.3g} at word {int(words[rise.argmax()])}")
    return {"largest": float(noise.max()), "minus smallest": float(-noise.min())}
