"""Checkpoints outlive torn files, full disks and the wrong hands; the last good one is never lost."""

import dataclasses
import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import stat
import warnings

import pytest
import torch

import dalle_fast.nn as fnn
from dalle_fast import checkpoint
from dalle_fast.checkpoint import CheckpointError, CheckpointWarning

SMALL = fnn.DVAEConfig(image_size=8, downsampling=4, num_codes=9, embedding_dim=4, hidden=4, blocks_per_group=1)
FILES = (checkpoint.MODEL, checkpoint.TRAINING, checkpoint.STATE, checkpoint.MANIFEST)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return fnn.DiscreteVAE(SMALL)


@pytest.fixture
def save(model, tmp_path):
    """save(step): a checkpoint in tmp_path, whose tensors and state tell its step."""

    def save(step, **state):
        tensors = {"t": torch.full((3, 2), float(step)), "count": torch.tensor(step)}
        return checkpoint.save(tmp_path, step, model, tensors=tensors, state={"settings": {"seed": 1}, **state})

    return save


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(save, model, tmp_path):
    path = save(7, other=[1.5, None, "x"])
    assert names(path) == sorted(FILES)
    loaded = checkpoint.load(tmp_path, settings={"seed": 1})
    assert (loaded.step, loaded.path, loaded.state["other"]) == (7, path, [1.5, None, "x"])
    assert torch.equal(loaded.tensors["t"], torch.full((3, 2), 7.0)) and loaded.tensors["count"].shape == ()
    assert loaded.weights.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in model.state_dict().items())


def test_the_last_two_are_kept(save, tmp_path):
    for step in (1, 2, 3, 10):
        save(step)
    assert names(tmp_path) == ["step-000000003", "step-000000010"]
    assert checkpoint.latest(tmp_path).name == "step-000000010"


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_can_be_read_by_whom_the_users_files_can(save, model, tmp_path, umask):
    """Not by their owner alone, as safetensors makes them; also where a process was killed before it could say so."""
    before = os.umask(umask)
    try:
        path = save(1)
        (tmp_path / ".writing-model.safetensors").touch(0o600)
        checkpoint.export(tmp_path / "model.safetensors", model)
        checkpoint.save_tensors(tmp_path / "codes.safetensors", {"t": torch.ones(2)}, header={})
    finally:
        os.umask(before)
    files = (*path.iterdir(), tmp_path / "model.safetensors", tmp_path / "codes.safetensors")
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}


def test_a_step_can_be_saved_again(save, tmp_path):
    save(5)
    save(5, other=2)
    assert names(tmp_path) == ["step-000000005"] and checkpoint.load(tmp_path).state["other"] == 2


def test_every_file_is_synced_before_the_rename_and_the_folders_after(save, tmp_path, monkeypatch):
    """The order that makes a rename mean that the files are whole."""
    events = []
    fsync, rename = os.fsync, type(tmp_path).rename

    def log_fsync(descriptor):
        events.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def log_rename(path, target):
        events.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(type(tmp_path), "rename", log_rename)
    path = save(5)
    writing = f".writing-{path.name}"
    assert events == [*(f"fsync {name}" for name in (*FILES, writing)), f"rename {writing}", f"fsync {tmp_path.name}"]


# -- torn ones ---------------------------------------------------------------------------------------------------------


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "flipped", "pickle"])
@pytest.mark.parametrize("name", FILES)
def test_a_torn_checkpoint_is_named_and_the_one_before_it_taken(save, tmp_path, name, how):
    save(1)
    damage(save(2) / name, how)
    with pytest.warns(CheckpointWarning) as caught:
        loaded = checkpoint.load(tmp_path)
    assert loaded.step == 1 and torch.equal(loaded.tensors["count"], torch.tensor(1))
    (warning,) = caught
    for word in ("step-000000002", "damaged", "continuing from step-000000001"):
        assert word in str(warning.message)
    if name != checkpoint.MANIFEST:
        assert name in str(warning.message)


@pytest.mark.parametrize("why", ["format", "permission"])
def test_what_is_not_damaged_but_cannot_be_read_is_not_passed_over(save, tmp_path, monkeypatch, why):
    """The next save would take the place of what a newer version, or another user, could still read."""
    save(1)
    path = save(2)
    if why == "format":
        state = json.loads((path / checkpoint.STATE).read_text())
        (path / checkpoint.STATE).write_text(json.dumps({**state, "format": "dalle_fast 2"}))
        manifest = {name: checkpoint._fingerprint(path / name) for name in FILES[:3]}
        (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    else:
        fingerprint = checkpoint._fingerprint

        def denied(file):
            if file == path / checkpoint.TRAINING:
                raise PermissionError(errno.EACCES, "Permission denied")
            return fingerprint(file)

        monkeypatch.setattr(checkpoint, "_fingerprint", denied)
    words = {"format": "has format 'dalle_fast 2', expected", "permission": "training.safetensors cannot be read: Perm"}
    with pytest.raises(CheckpointError, match=f"step-000000002.*{words[why]}"):
        checkpoint.load(tmp_path)


def test_a_file_of_a_checkpoints_name(save, tmp_path):
    """It is passed over, as a torn one, and hinders no later one, nor one of its step."""
    save(1)
    (tmp_path / "step-000000009").write_text("a note")
    with pytest.warns(CheckpointWarning, match=r"step-000000009 is damaged: manifest.json is missing; continuing from"):
        assert checkpoint.load(tmp_path).step == 1
    save(9)
    (tmp_path / "step-000000012").write_text("a note")
    save(10)
    assert names(tmp_path) == ["step-000000009", "step-000000010"] and checkpoint.load(tmp_path).step == 10


@pytest.mark.parametrize("key", ["random", "step"])
def test_what_a_state_lacks_is_named(save, tmp_path, key):
    """It is whole, as its manifest says, but of another version, or changed by hand."""
    path = save(1, random=[], other=2)
    state = json.loads((path / checkpoint.STATE).read_text())
    del state[key]
    (path / checkpoint.STATE).write_text(json.dumps(state))
    (path / checkpoint.MANIFEST).write_text(
        json.dumps({name: checkpoint._fingerprint(path / name) for name in FILES[:3]})
    )
    with pytest.raises(CheckpointError, match=rf"step-000000001/state.json lacks '{key}'"):
        checkpoint.load(tmp_path).state[key]
    if key != "step":
        loaded = checkpoint.load(tmp_path).state
        assert loaded["other"] == 2 and loaded.get(key) is None


def test_a_link_to_one_that_was_put_elsewhere(save, tmp_path):
    """It goes when its turn comes, and what it leads to stays."""
    kept = tmp_path.parent / f"{tmp_path.name}-kept"
    save(1).rename(kept)
    (tmp_path / "step-000000001").symlink_to(kept)
    save(2)
    save(3)
    assert names(tmp_path) == ["step-000000002", "step-000000003"] and names(kept) == sorted(FILES)


def test_an_old_one_that_cannot_be_removed_is_warned_of(save, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    save(1)
    save(2)
    monkeypatch.setattr(checkpoint, "_remove", refuse)
    with pytest.warns(CheckpointWarning, match=r"step-000000003 is written, but an older one of .* cannot be removed"):
        save(3)
    assert checkpoint.load(tmp_path).step == 3


def test_with_none_whole_each_is_named(save, tmp_path):
    for step in (1, 2):
        damage(save(step) / checkpoint.TRAINING, "truncated")
    with pytest.raises(CheckpointError, match=r"step-000000002 .*training.*step-000000001 .*training"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.load(tmp_path / "nothing")


def test_going_on_after_a_torn_one_leaves_only_good_ones(save, tmp_path):
    save(1)
    damage(save(9) / checkpoint.MODEL, "truncated")
    save(4)
    assert names(tmp_path) == ["step-000000001", "step-000000004"]


@pytest.mark.parametrize("phase", checkpoint.PHASES)
@pytest.mark.parametrize("step", [2, 3], ids=["over one of its step", "of a new step"])
def test_a_write_that_stops_anywhere_loses_nothing(save, tmp_path, monkeypatch, phase, step):
    save(1)
    save(2)

    class Killed(BaseException):
        """As SIGKILL, it is not handled."""

    def stop(reached):
        if reached == phase:
            raise Killed

    monkeypatch.setattr(checkpoint, "_reached", stop)
    with pytest.raises(Killed):
        save(step)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load(tmp_path).step == (step if phase in ("renamed", "older removed") else 2)
    save(4)
    assert len(names(tmp_path)) == 2 and checkpoint.load(tmp_path).step == 4


def test_stopped_between_two_renames(save, tmp_path):
    """One of the same step was moved away, and what was to replace it did not come: it is still the newest one. Only a
    run puts it back, as who reads may meet one between the two."""
    save(1)
    path = save(2)
    moved = path.rename(tmp_path / f".replaced-{path.name}")
    assert checkpoint.latest(tmp_path) == checkpoint.load(tmp_path).path == moved
    assert checkpoint.saved_settings(tmp_path) == {"seed": 1}
    assert names(tmp_path) == [moved.name, "step-000000001"]
    save(3)
    assert names(tmp_path) == [path.name, "step-000000003"] and checkpoint.load(tmp_path).step == 3
    shutil.copytree(path, moved)  # a run that was killed behind the second rename
    assert checkpoint.latest(tmp_path).name == "step-000000003" and len(checkpoint._all(tmp_path)) == 2


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", range(1, 6))
def test_a_full_disk(save, tmp_path, monkeypatch, fails_at):
    save(1)
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step-000000002: No space left on device; the last one is step-0*1$"):
        save(2)
    assert names(tmp_path) == ["step-000000001"]
    monkeypatch.undo()
    assert checkpoint.load(tmp_path).step == 1


def _save_with_little_room(folder, room, pipe):
    """In a process of its own: files can grow to `room` bytes, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    model = fnn.DiscreteVAE(SMALL)
    try:
        checkpoint.save(folder, 2, model, tensors={"t": torch.zeros(1)}, state={})
    except CheckpointError as error:
        pipe.send(str(error))
    else:
        pipe.send("")


def test_files_that_really_cannot_grow(save, tmp_path):
    save(1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_save_with_little_room, args=(tmp_path, 3000, sender))
    process.start()
    sender.close()
    message = receiver.recv()
    process.join()
    assert "step-000000002" in message and "the last one is step-000000001" in message
    assert "File too large" in message
    assert names(tmp_path) == ["step-000000001"] and checkpoint.load(tmp_path).step == 1


# -- of another run, or another kind -----------------------------------------------------------------------------------


def test_other_settings_are_named_with_both_values(save, tmp_path):
    save(1)
    with pytest.raises(CheckpointError, match=r"step-000000001 .*seed 1, not 2; steps None, not 5 .--init begins"):
        checkpoint.load(tmp_path, settings={"seed": 2, "steps": 5})
    with pytest.raises(CheckpointError, match=r"step-000000001 is of a run with seed 1, not None$"):
        checkpoint.load(tmp_path, settings={})


@torch.no_grad()
def test_a_model_comes_back_for_use(model, tmp_path):
    checkpoint.export(tmp_path / checkpoint.MODEL, model)
    assert names(tmp_path) == [checkpoint.MODEL]
    loaded = checkpoint.load_model(tmp_path, kind="DiscreteVAE")
    assert loaded.config == SMALL and loaded.config.min_log_scale == -float("inf")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))


def test_a_model_of_an_unfinished_run(save, model, tmp_path):
    folder = tmp_path / checkpoint.CHECKPOINTS
    checkpoint.save(folder, 3, model, tensors={}, state={})
    for place in (tmp_path, folder / "step-000000003"):
        assert torch.equal(checkpoint.load_model(place).encoder.blocks.input.w, model.encoder.blocks.input.w)


def test_a_config_goes_through_strict_json():
    @dataclasses.dataclass(frozen=True)
    class Config:
        grid: tuple = (3, 4)
        floor: float = -float("inf")
        name: str = "x"

    text = json.dumps(checkpoint.config_to_json(Config()), allow_nan=False)
    assert checkpoint.config_from_json(Config, json.loads(text)) == Config()


def export_with_header(path, **changes):
    header = {"format": checkpoint.FORMAT, "kind": "DiscreteVAE", "config": checkpoint.config_to_json(SMALL)}
    checkpoint._write_tensors(path, fnn.DiscreteVAE(SMALL).state_dict(), {**header, **changes})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: None, ["holds no model"]),
        (lambda path: path.write_bytes(b""), [checkpoint.MODEL, "safetensors"]),
        (lambda path: path.mkdir(), [checkpoint.MODEL, "Is a directory"]),
        (lambda path: path.write_bytes(pickle.dumps([1])), [checkpoint.MODEL, "safetensors"]),
        (lambda path: torch.save({"w": torch.zeros(2)}, path), [checkpoint.MODEL, "safetensors"]),
        (lambda path: export_with_header(path, kind="DALLE"), ["holds a DALLE", "expected a DiscreteVAE"]),
        (lambda path: export_with_header(path, kind="GAN"), ["header", "GAN"]),
        (lambda path: export_with_header(path, format="other 3"), ["dalle_fast 1", "other 3"]),
        (lambda path: export_with_header(path, config={"depth": 3}), ["does not fit", "depth"]),
        (lambda path: export_with_header(path, config={"hidden": 8}), ["does not fit", "size mismatch"]),
        (lambda path: export_with_header(path, config=None), ["does not fit"]),
    ],
)
def test_models_that_are_none(tmp_path, spoil, words):
    path = tmp_path / checkpoint.MODEL
    spoil(path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_model(tmp_path, kind="DiscreteVAE")
    for word in words:
        assert word in str(caught.value)


def test_a_model_is_found_by_its_file_too(tmp_path):
    checkpoint.export(tmp_path / "any.safetensors", fnn.DiscreteVAE(SMALL))
    assert checkpoint.load_model(tmp_path / "any.safetensors").config == SMALL
    with pytest.raises(CheckpointError, match="none holds no model: there is no such folder"):
        checkpoint.load_model(tmp_path / "none")


def test_why_a_path_cannot_be_read_is_told(tmp_path):
    """As where a folder is another user's; newer Pythons say of some such paths that there is nothing."""
    with pytest.raises(CheckpointError, match=r"nn cannot be read: File name too long|nn holds no model"):
        checkpoint.load_model(tmp_path / ("n" * 300))


def test_a_missing_folder_is_named_and_no_temporary_file(tmp_path):
    path = tmp_path / "none" / checkpoint.MODEL
    with pytest.raises(CheckpointError, match=f"^cannot write {path}: there is no such folder$"):
        checkpoint.export(path, fnn.DiscreteVAE(SMALL))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def test_foreign_weights(tmp_path, monkeypatch):
    """Tensors load from safetensors and from torch's files; whatever would run code does not run."""
    monkeypatch.chdir(tmp_path)
    weights = {"w": torch.arange(6.0).view(2, 3)}
    torch.save(weights, "weights.pt")
    checkpoint._write_tensors(tmp_path / "weights.safetensors", weights)
    checkpoint._write_tensors(tmp_path / "weights.bin", weights)
    for name in ("weights.pt", "weights.safetensors", "weights.bin"):
        assert torch.equal(checkpoint.read_weights(name)["w"], weights["w"])
    torch.save({"w": Bomb()}, "bomb.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "bomb.safetensors").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "weights.pt").read_bytes()[:300])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:-4])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], "list.pt")
    for name in ("bomb.pt", "bomb.pkl", "bomb.safetensors", "cut.pt", "cut.safetensors", "empty.pt", "list.pt"):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.read_weights(name)
    assert not (tmp_path / "bomb").exists()


def test_tensors_of_one_memory_are_stored(tmp_path):
    """And of any type, whose bytes are hashed from memory as they would be from the file."""
    x = torch.arange(12.0).view(3, 4)
    others = {"f": x.bfloat16(), "g": x > 3, "h": x[1, 1], "i": x.double(), "j": x.to(torch.int64)}
    given = {"a": x, "b": x, "c": x.T, "d": x[1:], "e": x[:0], **others}
    written = checkpoint._write_tensors(tmp_path / "x", given, {"kind": "\u00e4"})
    assert checkpoint._fingerprint_of_written(tmp_path / "x", written) == checkpoint._fingerprint(tmp_path / "x")
    loaded = checkpoint.read_weights(tmp_path / "x")
    assert torch.equal(loaded["b"], x) and torch.equal(loaded["c"], x.T) and torch.equal(loaded["d"], x[1:])
