"""What a run tells: a log, pictures, TensorBoard's files, and a progress bar."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from dalle_fast.outputs import written_whole
from dalle_fast.pictures import save_picture
from dalle_fast.progress import bar, tell

LOG, PICTURES, TENSORBOARD = "log.jsonl", "pictures", "tensorboard"
SHOWN = ("loss", "reconstruction", "kl", "perplexity", "text_loss", "image_loss")  # of a record, beside the bar


class Reports:
    """The reports of a run in the folder `out` that goes on after `step` updates; a context manager.

    What an earlier run in the same folder reported of steps after `reported` is dropped.

    Args:
        reported: the last step whose reports were all made. steps: updates in all. examples_per_step: for the rate.
        tensorboard, progress: as in `train`.
    """

    def __init__(self, out, step, reported, steps, examples_per_step, tensorboard=True, progress=True):
        self.out, self.step, self.steps, self.examples_per_step = Path(out), step, steps, examples_per_step
        self.progress = progress
        (self.out / PICTURES).mkdir(exist_ok=True)
        _drop_later_lines(self.out / LOG, reported)
        self.log = open(self.out / LOG, "a", encoding="utf-8")
        self.writer = _summary_writer(self.out / TENSORBOARD, reported) if tensorboard else None
        self.bar = bar(total=steps, done=step, unit="step") if progress else None
        self.since = (time.monotonic(), step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.log.close()
        if self.writer:
            self.writer.close()
        if self.bar is not None:
            self.bar.close()

    def tick(self) -> None:
        """One more step is done."""
        self.step += 1
        if self.bar is not None:
            self.bar.update()

    def record(self, step: int, scalars: dict[str, float]) -> None:
        """A line of the log, TensorBoard's scalars, and a few of them for who watches."""
        self.log.write(json.dumps({"step": step, **scalars}) + "\n")
        self.log.flush()
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
        now = time.monotonic()
        rate = (step - self.since[1]) * self.examples_per_step / max(now - self.since[0], 1e-9)
        self.since = (now, step)
        if self.writer and rate:
            self.writer.add_scalar("examples_per_second", rate, step)
        shown = " ".join(f"{name} {scalars[name]:.4g}" for name in SHOWN if name in scalars)
        speed = f"{rate:.0f} examples/s " if rate else ""  # of two lines of one step the first has it
        if self.bar is not None and shown:
            self.bar.set_postfix_str(speed + shown)
        elif self.bar is None and self.progress:
            shown = shown or " ".join(f"{name.rpartition('/')[2]} {value:.4g}" for name, value in scalars.items())
            tell(f"step {step}/{self.steps} {speed}{shown}")

    def pictures(self, step: int, pictures: dict) -> None:
        """Name -> (height, width, 3) uint8 array: PNG files, and TensorBoard's images."""
        for name, picture in pictures.items():
            save_picture(picture, self.out / PICTURES / f"{name}-{step:09d}.png")
            if self.writer:
                self.writer.add_image(name, picture, step, dataformats="HWC")

    def sync(self) -> None:
        """What was recorded outlives the machine from here on: a checkpoint counts on it."""
        self.log.flush()
        os.fsync(self.log.fileno())


class NoReports:
    """The reports of a process beside the one that writes them."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def tick(self) -> None:
        pass


def _drop_later_lines(path, step) -> None:
    """Lines of later steps, and a last one that was cut short; in one step, as everything else."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step or not line.endswith("\n"):
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    with written_whole(path, durable=True) as unfinished:
        unfinished.write_text("".join(kept), encoding="utf-8")


def _summary_writer(folder, reported):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        tell("tensorboard is not installed: no files for it (pip install tensorboard)")
        return None
    return SummaryWriter(folder, purge_step=reported + 1)
