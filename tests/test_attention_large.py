"""Strides reach beyond what 32 bits count, signed or not. Untouched memory costs nothing."""

import pytest

from dalle_fast.verify import large
from dalle_fast.verify.figures import NotRun


@pytest.mark.parametrize("number", [n for n, (what, _) in enumerate(large.CASES) if what != "codebook"])
def test_far_apart_is_the_same_as_side_by_side(number):
    try:
        large.case(number, "cpu")
    except NotRun as reason:
        pytest.skip(str(reason))
