"""What users call says of what types its arguments and its result are, and `py.typed` has type checkers read it."""

import inspect
import typing
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dalle_fast
from dalle_fast import masks
from dalle_fast.nn import functional as F

FUNCTIONS = [getattr(module, name) for module in (F, masks) for name in module.__all__]
FUNCTIONS = [x for x in FUNCTIONS if inspect.isfunction(x)]
METHODS = [x for name, x in vars(masks.AttentionMask).items() if not name.startswith("_")]
METHODS = [getattr(x, "fget", None) or getattr(x, "__func__", x) for x in METHODS if callable(x) or hasattr(x, "fget")]


def _hints(function):
    """Of masks, which load without torch and matplotlib, with what they name of these."""
    from matplotlib.figure import Figure

    return typing.get_type_hints(function, localns={"torch": torch, "Figure": Figure, "os": __import__("os")})


@pytest.mark.parametrize("function", [*FUNCTIONS, *METHODS], ids=lambda f: f.__qualname__)
def test_every_argument_and_result_has_a_type(function):
    hints = _hints(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"} - {"self"}


def test_types_are_found_as_users_see_them():
    assert len(FUNCTIONS) >= 14 and len(METHODS) >= 14
    for function in FUNCTIONS:
        assert typing.get_type_hints(function)["return"] is not type(None)
    assert typing.get_type_hints(F.sparse_attention)["query"] is Tensor
    assert (Path(dalle_fast.__file__).parent / "py.typed").is_file()


@pytest.mark.skipif(not hasattr(typing, "get_overloads"), reason="typing.get_overloads is new in Python 3.11")
def test_attention_is_declared_as_it_is_defined():
    """Once for each value of return_lse, which says what comes back, with one text of all the rest."""
    written, overloads = inspect.signature(F.sparse_attention), typing.get_overloads(F.sparse_attention)
    assert [_hints(f)["return"] for f in overloads] == [Tensor, tuple[Tensor, Tensor]]
    for function in overloads:
        parameters = dict(inspect.signature(function).parameters)
        del parameters["return_lse"]
        assert parameters == {name: x for name, x in written.parameters.items() if name != "return_lse"}
