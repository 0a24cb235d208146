"""Checkpoints that outlive a killed process, a full disk and half-written files: folders of safetensors and JSON.

    step-000001000/
        model.safetensors       the weights that are evaluated and shared (EMA), with the model's config in its header
        training.safetensors    the weights in training, the optimizer's state
        state.json              step, settings of the run, random states, and what else the trainer keeps
        manifest.json           size and SHA-256 of each of the others; written last

A checkpoint is written to a folder of another name, every file and the folder itself fsynced, then renamed to its own,
and the folder around it fsynced. Only then the oldest one goes, so there is a good one at every moment. Nothing here
is a pickle, and foreign pickles are read with torch's `weights_only`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from dalle_fast.errors import UserError
from dalle_fast.outputs import UNFINISHED, fsync, written_whole

MODEL, TRAINING, STATE, MANIFEST = "model.safetensors", "training.safetensors", "state.json", "manifest.json"
CHECKPOINTS = "checkpoints"  # the folder of checkpoints in the folder of a run
KEEP = 2
PHASES = ("begun", "model written", "training written", "state written", "manifest written", "renamed", "older removed")
FORMAT, HEADER = "dalle_fast 1", "dalle_fast"
MODELS = {  # kind -> module, class of the model, class of its config
    "DiscreteVAE": ("dalle_fast.nn.dvae", "DiscreteVAE", "DVAEConfig"),
    "DALLE": ("dalle_fast.nn.dalle", "DALLE", "DALLEConfig"),
}
_PREFIX, _REPLACED = "step-", ".replaced-"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint or model file that cannot be written, read or used here; the message names it and says why."""


class _Damaged(CheckpointError):
    """A checkpoint that lacks a file, or has another than was written: the one before it will do."""


class CheckpointWarning(UserWarning):
    """The newest checkpoint was not usable, and an older one was taken; or an old one cannot be removed."""


class Checkpoint(NamedTuple):
    """What `load` returns: the folder, the updates done, weights (EMA), training's tensors and the rest."""

    path: Path
    step: int
    weights: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    state: dict


# -- writing -----------------------------------------------------------------------------------------------------------


def save(folder, step: int, model, *, tensors: dict[str, torch.Tensor], state: dict) -> Path:
    """Write the checkpoint of `step` into `folder`; afterwards it and the one before it are there, and no others.

    One of the same step is replaced. Ones of later steps go: they are what `load` refused, or this run would not have
    begun before them.

    Args:
        folder: of checkpoints; made where it is missing.
        model: whose weights are evaluated and shared; see `export`.
        tensors: name -> tensor, on any device. state: whatever JSON can hold.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it cannot be written, as on a full disk. What was there before is still there.
    """
    folder = Path(folder)
    path = folder / f"{_PREFIX}{step:09d}"
    unfinished, sums = folder / f"{UNFINISHED}{path.name}", {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        unfinished.mkdir()
        _reached("begun")
        sums[MODEL] = _fingerprint_of_written(unfinished / MODEL, _write_model(unfinished / MODEL, model))
        fsync(unfinished / MODEL)
        _reached("model written")
        sums[TRAINING] = _fingerprint_of_written(unfinished / TRAINING, _write_tensors(unfinished / TRAINING, tensors))
        fsync(unfinished / TRAINING)
        _reached("training written")
        _write_json(unfinished / STATE, {"format": FORMAT, "step": step, **state})
        sums[STATE] = _fingerprint(unfinished / STATE)
        fsync(unfinished / STATE)
        _reached("state written")
        _write_json(unfinished / MANIFEST, sums)
        fsync(unfinished / MANIFEST)
        fsync(unfinished)
        _reached("manifest written")
        if path.exists():
            path.rename(folder / f"{_REPLACED}{path.name}")
        unfinished.rename(path)
        fsync(folder)
        _reached("renamed")
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(_why_not_written(folder, path, error)) from error
    try:
        _remove_all_but_the_last(folder, step)
        _reached("older removed")
    except OSError as error:
        reason = f"an older one of {folder} cannot be removed: {error.strerror or error}"
        warnings.warn(f"{path.name} is written, but {reason}", CheckpointWarning, stacklevel=2)
    return path


def export(path, model) -> None:
    """Write a model's weights and config to one safetensors file, in one step: the old file or the new one is there.

    What a `DALLE` was trained with is in it too.

    Raises:
        CheckpointError: it cannot be written.
    """
    with _written(path) as unfinished:
        _write_model(unfinished, model)


def save_tensors(path, tensors: dict[str, torch.Tensor], *, header: dict) -> None:
    """Write tensors and a header (of what JSON can hold) to a safetensors file, in one step; see `load_tensors`.

    Raises:
        CheckpointError: it cannot be written.
    """
    with _written(path) as unfinished:
        _write_tensors(unfinished, tensors, header)


@contextlib.contextmanager
def _written(path):
    """`written_whole` to last, whose error is a CheckpointError."""
    try:
        with written_whole(path, durable=True) as unfinished:
            yield unfinished
    except OSError as error:
        there = Path(path).absolute().parent.is_dir()  # where not, the error is of a file that no one has named
        reason = error.strerror or error if there else "there is no such folder"
        raise CheckpointError(f"cannot write {path}: {reason}") from error


def write_json(path, value) -> None:
    """Write `value` as JSON in one step: the old file or the new one is there. JSON has no NaN: it becomes null.

    Raises:
        OSError: it cannot be written. TypeError: JSON cannot hold it.
    """
    with written_whole(path, durable=True) as unfinished:
        _write_json(unfinished, _finite(value))


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reached(phase: str) -> None:
    """Told how far a write has come; tests replace it to be there at that moment."""


def kind_of(model) -> str:
    """The name of a model's class, under which a file of it is read again.

    Raises:
        ValueError: it is none that `load_model` makes.
    """
    kind = type(model).__name__
    if kind not in MODELS or type(model).__module__ != MODELS[kind][0]:
        got = f"{type(model).__module__}.{type(model).__qualname__}"
        raise ValueError(
            f"model must be a {' or a '.join(MODELS)}, itself and no subclass, as files hold no others, got {got}"
        )
    return kind


def _write_model(path, model) -> dict[str, torch.Tensor]:
    kind = kind_of(model)
    header = {"format": FORMAT, "kind": kind, "config": config_to_json(model.config)}
    if trained_with := getattr(model, "trained_with", None):
        header["trained_with"] = trained_with
    return _write_tensors(path, model.state_dict(), header)


def _write_tensors(path, tensors, header=None) -> dict[str, torch.Tensor]:
    """`header`: one JSON value, under one name, as safetensors writes several in an order that changes.

    Returns:
        The tensors as they were written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored = _storable(tensors)
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode  # as everyone's files have it: safetensors may make them readable for their owner alone
    try:
        save_file(stored, path, metadata={HEADER: json.dumps(header)} if header else None)
    except SafetensorError as error:  # it makes an error of its own of every OSError
        raise OSError(None, str(error)) from error
    with contextlib.suppress(OSError):  # some file systems have no modes
        path.chmod(mode)
    return stored


def _storable(tensors):
    """On the host, in C order, no two of one memory: what a safetensors file can hold."""
    seen, plain = set(), {}
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        if stored.numel() and stored.untyped_storage().data_ptr() in seen:
            stored = stored.clone()
        seen.add(stored.untyped_storage().data_ptr())
        plain[name] = stored
    return plain


def _write_json(path, value) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)


def _fingerprint(path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


def _fingerprint_of_written(path, stored: dict[str, torch.Tensor]) -> dict:
    """The same of what `_write_tensors` has just written and returned: nothing large is read back from the disk."""
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    digest = hashlib.sha256(length + header)
    places = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
    for name in sorted(places, key=places.get):
        digest.update(stored[name].reshape(-1).view(torch.uint8).numpy())
    return {"bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


def _remove_leftovers(folder) -> None:
    """What a write that was cut short left behind; a checkpoint that was moved out of the way of another of its step, which
    never came, returns."""
    for path in folder.glob(_REPLACED + "*"):
        original = folder / path.name.removeprefix(_REPLACED)
        if not original.exists():
            path.rename(original)
    for path in (*folder.glob(_REPLACED + "*"), *folder.glob(UNFINISHED + "*")):
        _remove(path)


def _remove_all_but_the_last(folder, step) -> None:
    _remove_leftovers(folder)
    steps = {_step_of(path.name): path for path in _all(folder)}
    kept = sorted(x for x in steps if x <= step)[-KEEP:]
    for x, path in steps.items():
        if x not in kept:
            _remove(path)


def _remove(path) -> None:
    """A folder, a link to one that was put elsewhere to be kept, or a file of a checkpoint's name."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def _why_not_written(folder, path, error) -> str:
    with contextlib.suppress(OSError):
        if good := _all(folder):
            return f"cannot write the checkpoint {path}: {error.strerror or error}; the last one is {good[-1].name}"
    return f"cannot write the checkpoint {path}: {error.strerror or error}; there is none yet"


# -- reading -----------------------------------------------------------------------------------------------------------


def latest(folder) -> Path | None:
    """The newest checkpoint of a folder by its name, unread; None where there is none."""
    found = _all(Path(folder))
    return found[-1] if found else None


def load(folder, *, settings: dict | None = None) -> Checkpoint:
    """Read and verify the newest good checkpoint in `folder`; each newer one that is damaged is warned of.

    Args:
        settings: what the checkpoint's state["settings"] must equal; None: anything.

    Raises:
        CheckpointError: no checkpoint is good, or the newest one that is not damaged has other settings, is of another
            format or cannot be read.
    """
    wrong = []
    for path in reversed(_all(Path(folder))):
        try:
            checkpoint = _read(path)
        except _Damaged as error:
            wrong.append(str(error))
            continue
        for message in wrong:
            warnings.warn(f"{message}; continuing from {path.name}", CheckpointWarning, stacklevel=2)
        if settings is not None:
            _check_settings(path, checkpoint.state.get("settings", {}), settings)
        return checkpoint
    raise CheckpointError("; ".join(wrong) if wrong else f"there is no checkpoint in {folder}")


def saved_settings(folder) -> dict:
    """The settings of the run that `load` would go on with, without the time that tensors take; {} where there is none."""
    return _newest_settings(Path(folder))[1]


def check_settings(folder, known: dict) -> None:
    """Refuse, before long work, what `load` would refuse after it.

    Args:
        known: those of the settings that can be told already.

    Raises:
        CheckpointError: the run whose checkpoints are in `folder` has others.
    """
    path, found = _newest_settings(Path(folder))
    if path is not None:
        known = json.loads(json.dumps(known))  # as a checkpoint gives them back
        _check_settings(path, {name: value for name, value in found.items() if name in known}, known)


def _newest_settings(folder) -> tuple[Path | None, dict]:
    for path in reversed(_all(folder)):
        try:
            _verify(path, (STATE,))
            return path, _read_state(path).get("settings", {})
        except _Damaged:  # of which `load` warns
            continue
    return None, {}


def load_model(folder, *, kind: str | None = None, device="cpu"):
    """The trained model in `folder`, with its EMA weights, in evaluation mode, without gradients.

    Args:
        folder: of a finished run, of an unfinished one (its newest good checkpoint is taken), or a checkpoint; or the
            file of a model itself.
        kind: "DiscreteVAE" or "DALLE", where only one will do.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another kind.
    """
    try:
        path = _model_in(Path(folder))
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error
    weights, metadata = _read_tensors(path)
    header = _header_of(metadata)
    found = header.get("kind")
    if found not in MODELS or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no model of format {FORMAT!r}: its header says {metadata or 'nothing'}")
    if kind not in (None, found):
        raise CheckpointError(f"{path} holds a {found}, expected a {kind}")
    module_name, class_name, config_name = MODELS[found]
    module = importlib.import_module(module_name)
    try:
        model = getattr(module, class_name)(config_from_json(getattr(module, config_name), header["config"]))
        model.load_state_dict(weights)
        if "trained_with" in header:
            model.trained_with = dict(header["trained_with"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this version's {found}: {error}") from error
    return model.requires_grad_(False).eval().to(device)


def _model_in(folder) -> Path:
    if folder.is_file():
        return folder
    if (folder / MODEL).exists():
        return folder / MODEL
    if _all(folder / CHECKPOINTS):
        return load(folder / CHECKPOINTS).path / MODEL
    lacks = f"neither {MODEL} nor a checkpoint in {CHECKPOINTS}/" if folder.exists() else "there is no such folder"
    raise CheckpointError(f"{folder} holds no model: {lacks}")


def load_tensors(path, *, mapped: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the header of a file of `save_tensors`.

    Args:
        mapped: the tensors stay in the file, and all processes that read it share the memory. For files that are only
            ever replaced, as `save_tensors` does: what is mapped would change, or crash the process, with the file.

    Raises:
        CheckpointError: it is not there, or cannot be read.
    """
    tensors, metadata = _read_tensors(path, mapped)
    return tensors, _header_of(metadata)


def read_weights(path) -> dict[str, torch.Tensor]:
    """The tensors of a foreign file: safetensors, or a pickle of tensors and plain containers and nothing else.

    Raises:
        CheckpointError: neither, or the pickle would run code.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(9)
    if len(start) == 9 and start[8:] == b"{":  # a header's length, then JSON
        return _read_tensors(path)[0]
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is no safetensors file")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} holds more than weights and was not loaded: {reason}") from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from error
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path} must hold a dictionary of tensors, got {type(weights).__name__}")
    return weights


def config_to_json(config) -> dict:
    """A config's fields as strict JSON can hold them: infinities and NaN as text."""
    fields = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, float) and v - v != 0 else v for k, v in fields.items()}


def config_from_json(config_class, fields: dict):
    """The inverse of `config_to_json`: text becomes a number again, lists tuples.

    Raises:
        TypeError, ValueError: fields that the class does not have, or refuses.
    """
    fields = {k: float(v) if v in ("inf", "-inf", "nan") else v for k, v in fields.items()}
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _all(folder) -> list[Path]:
    """Checkpoints by step, the newest last. One that was moved out of the way of another of its step, which is not there
    yet, is one: who only reads does not put it back, as a run may be about to put the other there."""
    if not folder.is_dir():
        return []
    paths = {path.name: path for path in folder.iterdir()}
    moved = {name.removeprefix(_REPLACED): path for name, path in paths.items() if name.startswith(_REPLACED)}
    found = {name: path for name, path in {**moved, **paths}.items() if _step_of(name) is not None}
    return [found[name] for name in sorted(found, key=_step_of)]


def _step_of(name) -> int | None:
    number = name.removeprefix(_PREFIX)
    return int(number) if name.startswith(_PREFIX) and number.isdecimal() else None


def _read(path) -> Checkpoint:
    _verify(path, (MODEL, TRAINING, STATE))
    state = _read_state(path)
    return Checkpoint(path, state["step"], _read_tensors(path / MODEL)[0], _read_tensors(path / TRAINING)[0], state)


def _verify(path, names) -> None:
    """Whether the files of a checkpoint are those that were written."""
    manifest = _read_json(path / MANIFEST)
    for name in names:
        try:
            found, expected = _fingerprint(path / name), manifest[name]
        except (FileNotFoundError, KeyError) as error:
            raise _Damaged(f"{path} is damaged: {name} is missing") from error
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror or error}") from error
        if not isinstance(expected, dict):
            raise _Damaged(f"{path} is damaged: {MANIFEST} says nothing of {name}")
        if found != expected:
            what = "bytes" if found["bytes"] != expected.get("bytes") else "sha256"
            raise _Damaged(
                f"{path} is damaged: {name} has {what} {found[what]}, the manifest says {expected.get(what)}"
            )


class _State(dict):
    """What a checkpoint's state.json says. That it lacks something is found out where that is needed."""

    def __init__(self, path, values):
        super().__init__(values)
        self.path = path

    def __missing__(self, key):
        raise CheckpointError(f"{self.path} lacks {key!r}: it is of no run of this version")


def _read_state(path) -> dict:
    state = _State(path / STATE, _read_json(path / STATE))
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')!r}, expected {FORMAT!r}")
    return state


def _read_json(path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:  # a file may have a checkpoint's name
        raise _Damaged(f"{path.parent} is damaged: {path.name} is missing") from error
    except ValueError as error:
        raise _Damaged(f"{path.parent} is damaged: {path.name} cannot be read: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise _Damaged(f"{path.parent} is damaged: {path.name} holds no object")
    return value


def _read_tensors(path, mapped=False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A safetensors file's tensors and header, or CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        open(path, "rb").close()  # safetensors would say that there is no file, whatever the reason
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # Copies: what is mapped from a file would change, or crash the process, with the file.
            if not mapped:
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def _header_of(metadata) -> dict:
    try:
        header = json.loads(metadata[HEADER])
    except (KeyError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def _check_settings(path, found: dict, expected: dict) -> None:
    names = {*found, *expected} - {"evaluate_every"}  # which earlier runs have, and which may change
    names = [name for name in sorted(names) if found.get(name) != expected.get(name)]
    if names:
        differences = "; ".join(f"{name} {found.get(name)!r}, not {expected.get(name)!r}" for name in names)
        longer = " (--init begins a run that trains its model further)" if "steps" in names else ""
        raise CheckpointError(f"{path} is of a run with {differences}{longer}")
