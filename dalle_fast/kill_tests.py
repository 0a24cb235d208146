"""Training that is killed at random moments, again and again: whether what it leaves resumes bit for bit.

A small run of stage 1 is started in a process of its own, killed with SIGKILL, resumed, killed ... until it is done,
and its log, weights and evaluation are compared, byte by byte, with those of a run that nobody disturbed. Steps and
writes are slowed down, and files written in two halves, so that kills fall into all of them; where each fell is
counted.
"""

from __future__ import annotations

import dataclasses
import mmap
import multiprocessing
import random
import time
import warnings
from pathlib import Path

from dalle_fast import checkpoint

STEPS, CHECKPOINT_EVERY = 12, 2
PAUSE = 0.02  # seconds, in each step and each phase of a write
SHORTEST_WAIT, LONGEST_WAIT = 0, 0.9  # seconds from the first step to the kill
PATIENCE = 120  # seconds for a process to begin or to end
OUTSIDE = ("starting", "in a step", "finishing")
INSIDE = ("half a file", *checkpoint.PHASES)
PLACES = (*OUTSIDE, *INSIDE)


@dataclasses.dataclass
class KillReport:
    """places: where kills fell -> how many. runs: how many were carried to their end and compared.

    failures: what differed from the undisturbed run, and processes that ended with an error.
    """

    places: dict[str, int]
    runs: int
    failures: list[str]

    @property
    def kills(self) -> int:
        return sum(self.places.values())

    @property
    def inside_writes(self) -> int:
        return sum(self.places[place] for place in INSIDE)

    def __str__(self):
        places = ", ".join(f"{place} {count}" for place, count in self.places.items() if count)
        where = f"{self.inside_writes} inside a checkpoint write ({places})"
        return f"{self.kills} kills, {where}; {self.runs} runs compared"


def kill_and_resume(folder, *, kills: int, inside: int = 1, seed: int = 0) -> KillReport:
    """Kill runs in `folder` until at least `kills` fell, and `inside` of them inside a write, and the last run ended.

    Args:
        folder: an empty one. seed: of the moments.
    """
    folder, moments = Path(folder), random.Random(seed)
    report = KillReport(dict.fromkeys(PLACES, 0), 0, [])
    _process(folder / "undisturbed", folder / "place", report)
    expected = _outcome(folder / "undisturbed")
    while not report.failures and (report.kills < kills or report.inside_writes < inside):
        run = folder / f"run-{report.runs}"
        wait = True
        while wait is not None and not report.failures:
            enough = report.kills >= kills and report.inside_writes >= inside
            wait = None if enough else moments.uniform(SHORTEST_WAIT, LONGEST_WAIT)
            if _process(run, folder / "place", report, wait):
                break
        if not report.failures:
            report.runs += 1
            outcome = _outcome(run)
            different = [name for name in expected if outcome.get(name) != expected[name]]
            report.failures += [f"{run.name}: {name} differs" for name in different]
    return report


def _process(run, place, report, wait=None) -> bool:
    """Go on with `run` in a process of its own, killed `wait` seconds after its first step; whether it was too late."""
    place.write_bytes(bytes(2))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dalle_fast.training.stage1", "dalle_fast.training.loop"])
    process = context.Process(target=_train, args=(run, place))
    process.start()
    try:
        deadline = time.monotonic() + PATIENCE
        while wait is not None and not place.read_bytes()[1] and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.join(PATIENCE if wait is None else wait)
        ended = process.exitcode is not None
    finally:
        process.kill()
        process.join()
    if not ended and wait is None:
        report.failures.append(f"{run.name}: not done after {PATIENCE} s")
    elif not ended:
        report.places[PLACES[place.read_bytes()[0]]] += 1
    elif process.exitcode:
        report.failures.append(f"{run.name}: its process ended with {process.exitcode}")
    return ended


def _outcome(run) -> dict[str, bytes]:
    """The bytes of everything that must be equal."""
    last = checkpoint.latest(run / checkpoint.CHECKPOINTS)
    files = [run / "log.jsonl", run / "evaluation.json", run / checkpoint.MODEL, *last.iterdir()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def _train(run, place) -> None:
    """In the process that is killed: train, resuming, and keep telling in the file `place` where it is."""
    import torch

    from dalle_fast.training import LoopSettings, train

    torch.set_num_threads(1)
    warnings.simplefilter("error", checkpoint.CheckpointWarning)  # a kill, unlike a power cut, leaves nothing torn
    with open(place, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 2)  # in the page cache, which outlives the process

    def at(name):
        memory[0] = PLACES.index(name)
        time.sleep(PAUSE)

    checkpoint._reached = at
    _write_files_in_halves(at)
    objective = _small_objective()
    loss = objective.loss

    def slow_loss(batch, step, part):
        memory[0], memory[1] = PLACES.index("in a step"), 1
        time.sleep(3 * PAUSE)
        return loss(batch, step, part)

    objective.loss = slow_loss
    settings = LoopSettings(steps=STEPS, log_every=3, checkpoint_every=CHECKPOINT_EVERY, ema_decay=0.9)
    train(objective, run, settings, resume=True, tensorboard=False, progress=False)


def _small_objective():
    from dalle_fast.data import open_source
    from dalle_fast.nn.dvae import DVAEConfig
    from dalle_fast.training import DVAEObjective, DVAERecipe, stage1

    stage1.EVALUATED = stage1.SHOWN
    config = DVAEConfig(image_size=16, downsampling=8, num_codes=12, embedding_dim=4, hidden=8, blocks_per_group=1)
    recipe = DVAERecipe(steps=STEPS, batch_size=4, learning_rate=1e-2, beta_share=0.5, tau_share=0.8)
    sources = (open_source("shapes", image_size=16, split=split) for split in ("train", "validation"))
    return DVAEObjective(config, recipe, *sources)


def _write_files_in_halves(at) -> None:
    import safetensors.torch

    def save_file(tensors, path, metadata=None):
        data = safetensors.torch.save(tensors, metadata)
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            at("half a file")
            file.write(data[len(data) // 2 :])

    safetensors.torch.save_file = save_file
