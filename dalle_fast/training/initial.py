"""Weights of a trained model to begin with: more steps after the last one, or other data."""

from __future__ import annotations

from dalle_fast.training.codes import fingerprint


def begin_with(model, initial) -> dict:
    """Give `model` the weights of `initial`, another of its class or None. What has no weights may differ, such as masks.

    Of a run that goes on, whose weights a checkpoint has, `initial` may be what this returned for it at its beginning.

    Returns:
        What a run's settings say of it: a resumed run must have begun with the same.

    Raises:
        ValueError: a tensor has another name or shape.
    """
    if initial is None:
        return {}
    if isinstance(initial, dict):
        return initial
    check_shapes(model, initial)
    model.load_state_dict(initial.state_dict())
    return {"initial": fingerprint(initial)}


def check_shapes(model, initial) -> None:
    """Refuse what `begin_with` would: `model` needs no memory for that, as on torch's device "meta".

    Raises:
        ValueError: as of `begin_with`.
    """
    weights, own = initial.state_dict(), model.state_dict()
    shapes = {name: (_shape(weights, name), _shape(own, name)) for name in {**own, **weights}}
    if wrong := [name for name, (found, expected) in shapes.items() if found != expected]:
        found, expected = shapes[wrong[0]]
        raise ValueError(
            f"initial must have the weights of the model that is trained: {wrong[0]} is {found}, expected {expected}"
            + (f"; and {len(wrong) - 1} more differ" if len(wrong) > 1 else "")
        )


def _shape(tensors, name):
    return tuple(tensors[name].shape) if name in tensors else "missing"
