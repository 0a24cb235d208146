"""The commands train-dvae and reconstruct: a tokenizer from one line, and errors of one line."""

import dataclasses
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from dalle_fast import checkpoint, cli
from dalle_fast.commands import reconstruct as reconstruct_command
from dalle_fast.commands import train_dvae
from dalle_fast.data import open_source
from dalle_fast.data.source import MAX_BAD_SHARE
from dalle_fast.nn import functional as F
from dalle_fast.nn import memory
from dalle_fast.nn.dvae import LIKELIHOODS, DiscreteVAE
from dalle_fast.training import stage1

SMALL = ["--image-size", "16", "--downsampling", "8", "--num-codes", "12", "--hidden", "8"]
TRAIN = ["train-dvae", "--data", "shapes", *SMALL, "--batch-size", "4", "--no-tensorboard", "--device", "cpu"]


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module", autouse=True)
def few_evaluated():
    """Every run that ends looks at these, and no test asks how good a model is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "EVALUATED", 40)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_evaluated):
    folder = tmp_path_factory.mktemp("runs") / "dvae"
    flags = ["--steps", "4", "--likelihood", "l1", "--hard", "--flip", "--workers", "1", "--seed", "3"]
    assert run(*TRAIN, *flags, "--out", folder) == 0
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Files of a scene, of a wide picture, and of one that is smaller than a model takes."""
    from PIL import Image

    scene = open_source("shapes", image_size=16)[0].image
    for name, image in (("scene", scene), ("wide", np.zeros((20, 50, 3), np.uint8)), ("small", scene[:8, :8])):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_run_leaves_a_model_and_says_how_good_it_is(trained):
    evaluation = json.loads((trained / "evaluation.json").read_text())
    assert evaluation.keys() >= {"images", "psnr", "perplexity", "codes_used", "captions_read", "heldout_captions_read"}
    assert evaluation["captions_read_from_originals"] > 0.98 and evaluation["step"] == 4
    config = checkpoint.load_model(trained, kind="DiscreteVAE").config
    assert (config.image_size, config.num_codes, config.likelihood, config.hard) == (16, 12, "l1", True)
    assert list((trained / "pictures").glob("*.png"))


def test_reconstruct_draws_originals_above_reconstructions(trained, pictures):
    from PIL import Image

    out = pictures / "out.png"
    flags = ["--model", trained, "--out", out, "--device", "cpu"]
    assert run("reconstruct", pictures / "scene.png", pictures / "wide.png", *flags) == 0
    with Image.open(out) as image, Image.open(pictures / "scene.png") as scene:
        grid, scene = np.asarray(image), np.asarray(scene)
    assert grid.shape == (2 + 2 * 98, 2 + 2 * 98, 3)
    assert np.array_equal(grid[2:98:6, 2:98:6], scene)
    model = checkpoint.load_model(trained)
    expected = model.reconstruct(torch.tensor(scene).movedim(-1, 0)[None].float() / 255)
    assert np.abs(grid[100:196:6, 2:98:6] / 255 - expected[0].movedim(0, -1).numpy()).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nowhere"], ["nowhere", "shapes"]),
        (["--batch-size", "0"], ["batch_size must be at least 1, got 0"]),
        (["--num-codes", "-3"], ["num_codes", "-3"]),
        (["--downsampling", "3"], ["downsampling", "power of two", "3"]),
        (["--tau", "0"], ["tau", "0.0"]),
        (
            ["--steps", "5000000000"],
            ["steps must be fewer, got 5000000000; of the last one: step must be from 0 to 4294967295"],
        ),
        (["--seed", "-1"], ["seed must be from 0 to 1048575, got -1"]),
        (["--seed", "1048576"], ["seed must be from 0 to 1048575, got 1048576"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--device", "meta"], ["--device", "meta", "cuda:N"]),
        (["--learning-rate", "1e300"], ["learning_rate", "1e+38", "1e+300"]),
        (["--min-log-scale", "1e300"], ["--min-log-scale", "1e+300"]),
        (["--workers", "-1"], ["--workers", "-1"]),
        (["--min-log-scale", "nan"], ["--min-log-scale", "nan"]),
        (["--min-log-scale", "inf"], ["--min-log-scale", "inf"]),
        (["--log-every", "-1"], ["log_every", "-1"]),
        (["--ema-decay", "2"], ["decay", "2"]),
        (["--out", "/dev/null/x"], ["/dev/null"]),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, capsys, flags, words):
    assert run(*TRAIN, "--steps", "2", "--out", tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("dalle-fast: error: ") and error.count("\n") == 1
    for word in words:
        assert word in error


def test_a_wrong_instruction_set_is_one_line(tmp_path):
    command = [sys.executable, "-m", "dalle_fast", *TRAIN, "--steps", "1", "--out", tmp_path]
    environment = {**os.environ, "DALLE_FAST_ISA": "abacus"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("dalle-fast: error: ")
    assert "DALLE_FAST_ISA" in done.stderr and "'abacus'" in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_without_pictures(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(*TRAIN, "--steps", "2", "--out", tmp_path / "run", "--data", tmp_path / "empty") == 2
    assert "empty" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_does_not_draw_among_the_pictures_it_learns_from(pictures, tmp_path, monkeypatch, capsys):
    """They would be other data for the run that is resumed. Hidden folders are not read, so that a run may be there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for name in ("0.png", "pictures/0.png", "pictures/1.png"):
        (tmp_path / "data" / name).write_bytes((pictures / "scene.png").read_bytes())
    (tmp_path / "link").symlink_to("data")
    flags = [*TRAIN, "--steps", "1"]
    apart = [("data", "run"), ("data", "data-2"), ("data", "data/.run"), ("data/pictures", "data/pictures-2")]
    for data, out in [
        ("data", "data"),
        ("data/pictures", "data"),
        ("data", "data/a/run"),
        (".", "x"),
        ("data", "link"),
    ]:
        for command in (flags, ["train-dalle", "--dvae", "none", "--steps", "1"]):
            assert run(*command, "--data", data, "--out", out) == 2
            error = capsys.readouterr().err
            assert f"--data {data} " in error and f"--out {out}" in error and error.count("\n") == 1, error
        assert not (tmp_path / out / "checkpoints").exists()
    for data, out in apart:
        assert run(*flags, "--data", data, "--out", out) == 0
        assert run(*flags, "--data", data, "--out", out, "--resume") == 0


def test_a_run_begins_with_another_ones_model(trained, tmp_path, capsys):
    """Its settings are those of the model, but for what is given."""
    arguments = ["train-dvae", "--data", "shapes", "--device", "cpu", "--batch-size", "4", "--no-tensorboard"]
    flags = [
        "--steps",
        "2",
        "--init",
        trained,
        "--learning-rate",
        "1e-12",
        "--final-learning-rate",
        "0",
        "--accumulate",
        2,
    ]
    assert run(*arguments, *flags, "--out", tmp_path / "more", "--image-size", "24") == 0
    old, new = (checkpoint.load_model(folder) for folder in (trained, tmp_path / "more"))
    assert new.config == dataclasses.replace(old.config, image_size=24) and old.config.likelihood == "l1"
    for name, tensor in old.state_dict().items():
        torch.testing.assert_close(new.state_dict()[name], tensor, rtol=0, atol=1e-9)
    capsys.readouterr()
    for more, words in {
        ("--init", tmp_path / "none"): "none holds no model",
        ("--init", trained, "--hidden", "16"): "initial must have the weights of the model that is trained: ",
        ("--accumulate", "3"): "batch_size must be a multiple of --accumulate 3, got 4",
    }.items():
        assert run(*arguments, "--steps", "2", "--out", tmp_path / "wrong", *more) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_a_resumed_run_does_not_need_what_it_began_with(trained, tmp_path, capsys):
    """It may be gone, or trained further; the run is the same one: its log, weights and settings."""
    first = tmp_path / "first"
    shutil.copytree(trained, first)
    flags = ["train-dvae", "--data", "shapes", "--device", "cpu", "--batch-size", "4", "--no-tensorboard"]
    flags += ["--init", first, "--checkpoint-every", "2", "--log-every", "1"]
    for out in ("whole", "ended", "further"):
        assert run(*flags, "--steps", "4", "--out", tmp_path / out) == 0
        if out != "whole":  # as if it had ended after two steps
            shutil.rmtree(tmp_path / out / "checkpoints" / "step-000000004")
            (tmp_path / out / checkpoint.MODEL).unlink()
    checkpoint.export(first / checkpoint.MODEL, checkpoint.load_model(tmp_path / "whole"))
    assert run(*flags, "--steps", "4", "--out", tmp_path / "further", "--resume") == 0
    shutil.rmtree(first)
    capsys.readouterr()
    assert run(*flags, "--steps", "4", "--out", tmp_path / "ended", "--resume", "--num-codes", "13") == 2
    assert "is of a run with model.num_codes 12, not 13" in capsys.readouterr().err
    assert run(*flags, "--steps", "4", "--out", tmp_path / "ended", "--resume") == 0
    for out in ("ended", "further"):
        for file in (checkpoint.MODEL, "log.jsonl", f"checkpoints/step-000000004/{checkpoint.STATE}"):
            assert (tmp_path / out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert run(*flags, "--steps", "4", "--out", tmp_path / "none", "--resume") == 2  # nothing to go on from
    assert "first holds no model" in capsys.readouterr().err
    assert run(*flags, "--steps", "4", "--out", trained, "--resume") == 2  # which began with a new one
    assert "first holds no model" in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_not_resumed_with_other_flags(trained, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert run(*TRAIN, "--steps", "4", "--out", trained) == 2
    assert "holds a run" in capsys.readouterr().err
    assert run(*TRAIN, "--steps", "4", "--out", trained, "--resume") == 2
    error = capsys.readouterr().err
    assert "model.likelihood 'l1', not 'logit_laplace'" in error and "seed 3, not 0" in error
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_many_pictures_are_reconstructed_in_batches(trained, pictures, monkeypatch):
    from PIL import Image

    sizes, reconstruct = [], DiscreteVAE.reconstruct

    def counted(self, images):
        sizes.append(len(images))
        return reconstruct(self, images)

    monkeypatch.setattr(DiscreteVAE, "reconstruct", counted)
    out = pictures / "new" / "out.png"  # in a folder that is made
    names = [pictures / name for name in ("scene.png", "wide.png", "wide.png", "wide.png", "scene.png")]
    with monkeypatch.context() as patch:
        patch.setattr(reconstruct_command, "BATCH", 2)
        assert run("reconstruct", *names, "--model", trained, "--out", out, "--device", "cpu") == 0
    assert sizes == [2, 2, 1]
    parts = np.asarray(Image.open(out))
    assert run("reconstruct", *names, "--model", trained, "--out", out, "--device", "cpu") == 0
    assert sizes == [2, 2, 1, 5] and np.abs(np.asarray(Image.open(out)).astype(int) - parts).max() <= 1


def test_what_reconstruct_cannot_write_or_hold_is_one_line_before_the_work(trained, pictures, capsys, monkeypatch):
    monkeypatch.setattr(DiscreteVAE, "reconstruct", lambda *_: pytest.fail("in vain"))
    (pictures / "file").write_text("")
    os.symlink("missing/x.png", pictures / "missing_link.png")
    scene, flags = pictures / "scene.png", ["--model", trained, "--device", "cpu", "--out"]
    for name, count, words in (
        ("out.psd", 1, "--out must end as a colour picture"),
        ("file/out.png", 1, "--out's folder must be a folder"),
        ("missing_link.png", 1, "--out must name a file that can be written"),
        ("wide.jpg", 669, "wide.jpg cannot hold 65564 x 198 pixels, .*: choose .png, or fewer pictures"),
    ):
        assert run("reconstruct", *[scene] * count, *flags, pictures / name) == 2, name
        error = capsys.readouterr().err
        assert re.search(words, error) and error.count("\n") == 1
    with monkeypatch.context() as patch:
        patch.setattr(memory, "free_memory", lambda device: 2 * 198 * 198)
        assert run("reconstruct", scene, scene, *flags, pictures / "out.png") == 2
    assert "for 198 x 198 pixels: choose fewer pictures\n" in capsys.readouterr().err

    def exhausted(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(DiscreteVAE, "reconstruct", exhausted)
    assert run("reconstruct", scene, *flags, pictures / "out.png") == 2
    expected = (
        "dalle-fast: error: reconstructing 1 pictures ran out of memory: DefaultCPUAllocator: can't allocate memory\n"
    )
    assert capsys.readouterr().err == expected


def test_what_reconstruct_cannot_read(trained, pictures, capsys):
    (pictures / "broken.png").write_bytes((pictures / "scene.png").read_bytes()[:60])
    (pictures / "text.png").write_text("no picture")
    out = pictures / "out.png"
    for name in ("missing.png", "broken.png", "text.png", "small.png"):
        assert run("reconstruct", "--model", trained, pictures / name, "--out", out) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1
    assert run("reconstruct", "--model", pictures, pictures / "scene.png", "--out", out) == 2
    assert "holds no model" in capsys.readouterr().err
    assert run("reconstruct", "--model", trained, pictures / "scene.png", "--out", out, "--device", "abacus") == 2
    error = capsys.readouterr().err
    assert "--device abacus cannot be used" in error and error.count("\n") == 1
    assert not out.exists()


def test_sigterm_saves_exits_with_143_and_resume_goes_on(tmp_path):
    command = [sys.executable, "-m", "dalle_fast", *TRAIN, "--steps", "100000", "--log-every", "1", "--out", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    log = tmp_path / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume" in output
    step = checkpoint.load(tmp_path / checkpoint.CHECKPOINTS).step
    assert f"after step {step} of 100000" in output and len(log.read_text().splitlines()) == step


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_terminal_that_is_gone_does_not_change_the_exit_status(tmp_path, number):
    """Its end is what sends SIGHUP: then nothing can be written to it any more."""
    command = [sys.executable, "-m", "dalle_fast", *TRAIN, "--steps", "100000", "--log-every", "1", "--out", tmp_path]
    ours, its = os.openpty()
    process = subprocess.Popen(command, stdout=its, stderr=its, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(its)
    log = tmp_path / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        select.select([ours], [], [], 0.05)[0] and os.read(ours, 1 << 16)
    os.close(ours)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert checkpoint.load(tmp_path / checkpoint.CHECKPOINTS).step == len(log.read_text().splitlines())


def test_more_parts_than_have_noise_are_refused_at_the_start(tmp_path, capsys):
    flags = [*TRAIN, "--data", tmp_path / "nothing", "--batch-size", "2049", "--accumulate", "2049", "--out", tmp_path]
    assert run(*flags) == 2
    assert "--accumulate times the processes must be at most 2048, got 2049" in capsys.readouterr().err
    F.noise_seed(0, rank=train_dvae.MOST_PARTS - 1)
    with pytest.raises(ValueError, match="rank"):
        F.noise_seed(0, rank=train_dvae.MOST_PARTS)


def test_choices_are_those_of_the_library():
    """They are written again in the command, which does without torch until it runs."""
    assert train_dvae.LIKELIHOODS == LIKELIHOODS


def test_help_shows_every_preset(capsys):
    with pytest.raises(SystemExit):
        run("train-dvae", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for what in ("lines of the log", "pictures", "evaluations", "checkpoints"):
        assert f"steps between two {what}; 0: only at the end (default: " in text
    assert "of all that is random, from 0 to 2^20 - 1 (default: 0)" in text
    assert "pictures in one update (default: openai 512, medium 128, small 64, tiny" in text


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_and_those_of_other_formats_are_told_of_once(tmp_path, capsys, workers):
    """By both commands; nothing is said of good ones, nor of what is drawn."""
    from PIL import Image

    for n in range(40):
        Image.new("RGB", (20, 20), (6 * n, 0, 0)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"number {n}")
    flags = ["--data", tmp_path, "--device", "cpu", "--no-tensorboard", "--seed", "1", "--workers", workers]
    of_dvae = ["train-dvae", *flags, *SMALL, "--batch-size", "20", "--steps", "4"]
    out = tmp_path.parent / f"{tmp_path.name}-runs"
    of_dalle = ["train-dalle", *flags, "--dvae", out / "dvae", "--batch-size", "4", "--steps", "1", "--width", "16"]
    of_dalle += ["--layers", "1", "--num-heads", "2", "--head-dim", "8", "--vocab-size", "300", "--text-len", "30"]
    assert run(*of_dvae, "--out", out / "dvae") == 0
    assert "are bad" not in capsys.readouterr().err
    for n in (5, 22):
        (tmp_path / f"{n}.png").write_bytes(b"no picture")
    (tmp_path / "a.heic").touch()
    (tmp_path / "7.txt").write_text("number 7\nand 8")
    for command in (of_dvae, of_dalle):
        assert run(*command, "--out", out / command[0]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert lines.count(f"{tmp_path}: files that are not taken: 1 .heic") == 1
        of_lines = (
            f"{tmp_path}: captions of several lines, each taken for one caption: 1; the first is that of 7.png, 2"
        )
        assert sum(line.startswith(of_lines) for line in lines) == (command is of_dalle)
        told = [line for line in lines if "are bad" in line]
        assert len(told) == 1 and f"{tmp_path}: 2 of 40 pictures are bad, and others were taken instead" in told[0]
        assert re.search(r"; the first is (5|22)\.png: not a picture of PNG, ", told[0])


def test_the_share_of_bad_pictures_can_be_chosen(tmp_path, capsys):
    from PIL import Image

    assert cli.make_parser().parse_args(["train-dvae", "--data", "x", "--out", "y"]).max_bad_share == MAX_BAD_SHARE
    data = tmp_path / "data"
    data.mkdir()
    for n in range(8):
        Image.new("RGB", (20, 20)).save(data / f"{n}.png")
        (data / f"bad{n}.png").write_bytes(b"no picture")
    flags = ["train-dvae", "--data", data, *SMALL, "--batch-size", "2", "--no-tensorboard", "--steps", "1"]
    for share, status, words in (
        ("0.05", 2, "max_bad_share is 0.05"),
        ("1.5", 2, "from 0 to 1, got 1.5"),
        ("0.9", 0, ""),
    ):
        assert run(*flags, "--out", tmp_path / f"run {share}", "--max-bad-share", share) == status
        out, err = capsys.readouterr()
        assert words in err and (status or f"--model '{tmp_path}/run 0.9' IMAGE" in out)
