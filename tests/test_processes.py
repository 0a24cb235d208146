"""Several processes train one model: two on this CPU, started by torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle_fast import checkpoint
from dalle_fast.cli import main

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
DVAE = "train-dvae --steps 12 --batch-size 4 --image-size 16 --downsampling 4 --hidden 8 --num-codes 16"
DALLE = "train-dalle --examples 200 --steps 3 --batch-size 8 --layers 2 --width 32 --num-heads 2 --text-weight 0 --bpe-dropout 0"
LOOP = "--log-every 1 --checkpoint-every 5 --no-tensorboard --precision float32"


def start(*arguments):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.Popen(torchrun, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(*arguments):
    process = start(*arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


def flags(command, data, out, *more):
    return [*command.split(), *LOOP.split(), "--data", str(data), "--out", str(out), *map(str, more)]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


IN_BOTH = """
import copy, time, torch
from pathlib import Path
from torch.distributed.distributed_c10d import _get_default_group
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
import dalle_fast.nn as fnn
from dalle_fast.data import open_source
from dalle_fast.nn.generation import why_not_captured
from dalle_fast.training import processes
from dalle_fast.training.codes import encode_source

with processes.joined():
    us = processes.current()
    assert us.count == 2 and us.part([5, 6, 7, 8]) == [[5, 7], [6, 8]][us.number]
    try:
        us.part([1, 2, 3])
    except ValueError as error:
        assert str(error) == "batch_size must be a multiple of the 2 processes, got 3"
    else:
        raise AssertionError
    assert us.largest(3 * us.number) == 3 and us.mean({"a": us.number, "b": 1.0}) == {"a": 0.5, "b": 1.0}
    us.check_same(7, "a")
    try:
        us.check_same(us.number, "the step")
    except processes.UserError as error:
        assert str(error) == "the step must be the same for all 2 processes, got 0 to 1"
    else:
        raise AssertionError
    us.check_same_values({"a": [1, 2], "b": None}, "the settings")
    for values, words in (
        ({"c": "same", "b": us.number, "a": 0.5 + us.number}, f"the settings must be the same for all 2 processes, got a {us.number}.5, b {us.number} in process {us.number}"),
        ({"a": 0, **{str(n): 0 for n in range(us.number)}}, "the names of the settings must be the same for all 2 processes, got"),
    ):
        try:
            us.check_same_values(values, "the settings")
        except processes.UserError as error:
            assert str(error).startswith(words), error
        else:
            raise AssertionError
    # As of data on each machine's own disk.
    source = open_source("shapes", image_size=16)
    try:
        encode_source(fnn.DiscreteVAE(fnn.DVAEConfig(image_size=16, downsampling=8, num_codes=12, embedding_dim=4, hidden=8, blocks_per_group=1)), source, folder="/dev/null", split="train", count=100 + 100 * us.number)
    except processes.UserError as error:
        assert str(error).startswith("the pictures and the VAE must be the same for all 2 processes, got count "), error
    else:
        raise AssertionError
    # What waits for the lead has a group of its own: of one that hangs in a backward pass torch's limit is the shorter.
    limits = [group._get_backend(torch.device("cpu")).options._timeout for group in (_get_default_group(), processes._patient)]
    assert limits[0].total_seconds() <= 1800 and limits[1] == processes.PATIENCE

    torch.manual_seed(0)
    config = fnn.DALLEConfig(50, 6, 40, (4, 4), layers=3, width=32, num_heads=2, head_dim=16, kernel_size=3)
    model = fnn.DALLE(config)
    text, codes = torch.randint(50, (4, 6)), torch.randint(40, (4, 16))
    whole = model(text, codes)
    expected = torch.autograd.grad(whole.loss, list(model.parameters()))

    def check(other, gradient):
        out = other(text[us.number :: 2], codes[us.number :: 2])
        out.loss.backward()
        assert abs(us.mean({"": out.loss.item()})[""] - whole.loss.item()) < 1e-6
        for parameter, exact in zip(other.parameters(), expected, strict=True):
            torch.testing.assert_close(gradient(parameter), exact, rtol=0, atol=1e-7)

    class Objective:
        pass

    Objective.model = together = copy.deepcopy(model)
    with us.sharing(Objective):
        check(Objective.model, lambda parameter: parameter.grad)
    assert Objective.model is together

    for checkpointing in (False, True):  # torch's sharded parameters
        sharded = copy.deepcopy(model)
        sharded.transformer.activation_checkpointing = checkpointing
        for block in sharded.transformer.blocks:
            fully_shard(block)
            register_fsdp_forward_method(block, "step")
        check(fully_shard(sharded), lambda parameter: parameter.grad.full_tensor())
        for name in ("hidden", "step", "generate"):
            register_fsdp_forward_method(sharded, name)
        assert torch.equal(sharded.generate(text, seed=3), model.generate(text, seed=3))
        assert why_not_captured(sharded, None).startswith("its parameters are gathered")

    with torch.device("meta"):
        empty = fnn.DALLE(config)
    for part in (*empty.transformer.blocks, empty):
        fully_shard(part)
    empty.to_empty(device="cpu")
    for part in empty.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for name, parameter in empty.named_parameters():
        spread = model.get_parameter(name).std(correction=0).item()
        assert abs(parameter.full_tensor().std(correction=0).item() - spread) <= 0.3 * spread, name

    torch.manual_seed(0)
    vae = fnn.DiscreteVAE(fnn.DVAEConfig(16, num_codes=70, embedding_dim=6, hidden=8, blocks_per_group=1))
    images = torch.rand(4, 3, 16, 16)[us.number :: 2]
    vae(images, seed=3).loss.backward()
    mine, vae = [x.grad for x in vae.parameters()], copy.deepcopy(vae)
    vae.zero_grad()
    for name, part in vae.named_modules():
        if "group_" in name.rpartition(".")[2]:
            fully_shard(part)
    fully_shard(vae)(images, seed=3).loss.backward()
    for parameter, gradient in zip(vae.parameters(), mine, strict=True):
        torch.distributed.all_reduce(gradient)
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient / 2)

    written = Path(__file__).with_name("written")
    if us.leads:
        time.sleep(0.3)
        written.write_text("the last checkpoint")
    us.end_together()
    assert written.exists()
    if not us.leads:
        us.end_together()  # the lead does not come, but ends
"""


def test_gradients_are_those_of_the_whole_batch(tmp_path):
    """Of a model in DistributedDataParallel, and of one whose parameters are sharded by `fully_shard`; which also draws."""
    (tmp_path / "in_both.py").write_text(IN_BOTH)
    run(str(tmp_path / "in_both.py"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 pictures with captions."""
    folder = tmp_path_factory.mktemp("processes") / "data"
    folder.mkdir()
    for n in range(24):
        Image.new("RGB", (20, 20), (10 * n, 255 - 10 * n, 99)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"number {n}")
    return folder


@pytest.fixture(scope="module")
def dvae(data):
    """The folder of an undisturbed run."""
    run("-m", "dalle_fast", *flags(DVAE, data, data.parent / "dvae"))
    return data.parent / "dvae"


def test_a_stopped_run_goes_on_bit_for_bit(data, dvae, tmp_path):
    """SIGTERM to torchrun, which passes it on: both end after the same step, and one has saved."""
    process = start("-m", "dalle_fast", *flags(DVAE, data, tmp_path, "--workers", 1))
    while not (tmp_path / "log.jsonl").exists() or len(log_of(tmp_path)) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    done = log_of(tmp_path)[-1]["step"]
    assert f"stopped by signal 15 after step {done} of 12" in output or done == 12, output[-4000:]
    assert checkpoint.latest(tmp_path / checkpoint.CHECKPOINTS).name == f"step-{done:09d}"
    run("-m", "dalle_fast", *flags(DVAE, data, tmp_path, "--resume"))
    for name in ("log.jsonl", checkpoint.MODEL, "evaluation.json"):
        assert (tmp_path / name).read_bytes() == (dvae / name).read_bytes(), name


LOST = """
import os, signal, sys
from dalle_fast.cli import main
from dalle_fast.training import DVAEObjective

def loss_or_end(self, batch, step, part):
    if (step, part) == (7, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, batch, step, part)

loss, DVAEObjective.loss = DVAEObjective.loss, loss_or_end
sys.exit(main(sys.argv[1:]))
"""


def test_a_lost_process_costs_no_whole_step(data, dvae, tmp_path):
    """The other one meets it in its backward pass, says so in a line, and has saved."""
    (tmp_path / "lost.py").write_text(LOST)
    # How often torchrun looks: it ends the other one then, which must not meet it between two lines of Python.
    process = start("--monitor-interval=2", str(tmp_path / "lost.py"), *flags(DVAE, data, tmp_path / "run"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode and "dalle-fast: error: another of the 2 processes has ended: " in output, output[-4000:]
    assert "loop.py" not in output  # a traceback
    assert checkpoint.latest(tmp_path / "run" / checkpoint.CHECKPOINTS).name == "step-000000007"
    run("-m", "dalle_fast", *flags(DVAE, data, tmp_path / "run", "--resume"))
    assert (tmp_path / "run" / checkpoint.MODEL).read_bytes() == (dvae / checkpoint.MODEL).read_bytes()


def test_another_number_of_processes_is_another_run(data, dvae, capsys):
    """Unless it takes a batch in as many parts: here the run has ended, and is evaluated again."""
    assert main(flags(DVAE, data, dvae, "--resume")) == 2
    assert "processes_times_accumulate 2, not 1" in capsys.readouterr().err
    assert main(flags(DVAE, data, dvae, "--resume", "--accumulate", 2)) == 0


LATE = """
import os, sys, time
from dalle_fast.cli import main
from dalle_fast.training import codes

def write_later(path, encoded):
    time.sleep(3 * int(os.environ["RANK"]))
    write(path, encoded)

write, codes._write = codes._write, write_later
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_learn_what_one_does(data, dvae, tmp_path):
    """Stage 2 draws nothing but what a batch consists of: its losses of codes are the same to rounding.

    Of the four batches of pictures that become codes each has two; the lead waits for the other's.
    """
    (tmp_path / "late.py").write_text(LATE)
    output = run(str(tmp_path / "late.py"), *flags(DALLE, data, tmp_path / "two", "--dvae", dvae))
    assert ", train: 2 batches of 64" in output
    assert main(flags(DALLE, data, tmp_path / "one", "--dvae", dvae)) == 0
    kept, other = (
        {path.name: path.read_bytes() for path in (tmp_path / run / "codes").iterdir()} for run in ("one", "two")
    )
    assert kept == other
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        for name in ("image_loss", "gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


def test_parts_of_a_process_are_as_processes(data, dvae, tmp_path):
    """Two processes with two parts each learn what one with four does, noise and all: examples are dealt the same way."""
    run("-m", "dalle_fast", *flags(DVAE, data, tmp_path / "two", "--accumulate", 2))
    assert main(flags(DVAE, data, tmp_path / "one", "--accumulate", 4)) == 0
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for a, b in zip(one[:6], two[:6], strict=True):
        for name in ("loss", "reconstruction", "kl", "gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), (a["step"], name)
    assert abs(one[0]["loss"] - log_of(dvae)[0]["loss"]) > 1e-5  # the noise of two parts
