"""Processes that train one model together, each on its part of every batch: as torchrun starts them, by torch's
DistributedDataParallel. One process alone is the rule, and a case of it.

The first of them (the lead) writes what is written; the others find it in the same folder.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import warnings
from typing import NamedTuple

import torch
from torch import distributed

from dalle_fast.errors import UserError

# Of those that wait while the lead evaluates, or reads captions: without end. One that dies ends its connections, and
# torchrun tells of it. Gradients keep torch's own limit: there all are at the same place, and one that hangs is an error.
PATIENCE = datetime.timedelta(days=365)
_patient = None  # the group of `joined` that waits so long


class Processes(NamedTuple):
    """number: of this one, from 0. count: how many there are."""

    number: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        return self.number == 0

    def part(self, batch: list) -> list:
        """This process's part of a batch.

        Raises:
            ValueError: the batch cannot be shared evenly.
        """
        if len(batch) % self.count:
            raise ValueError(f"batch_size must be a multiple of the {self.count} processes, got {len(batch)}")
        return batch[self.number :: self.count]

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.count == 1:
            return number
        return self._reduced([number], torch.int64, distributed.ReduceOp.MAX)[0]

    def of_lead(self, numbers: list[int]) -> list[int]:
        """The lead's numbers, none negative. The others must have as many: other ones would wait without end."""
        if self.count == 1:
            return numbers
        return self._reduced(numbers if self.leads else [0] * len(numbers), torch.int64, distributed.ReduceOp.MAX)

    def mean(self, scalars: dict[str, float]) -> dict[str, float]:
        """The means of all processes' scalars."""
        if self.count == 1:
            return scalars
        sums = self._reduced(list(scalars.values()), torch.float64, distributed.ReduceOp.SUM)
        return {name: total / self.count for name, total in zip(scalars, sums, strict=True)}

    def check_same(self, number: int, what: str) -> None:
        """Refuse numbers that differ between the processes.

        Raises:
            UserError: `what` is not the same.
        """
        least, most = -self.largest(-number), self.largest(number)
        if least != most:
            raise UserError(f"{what} must be the same for all {self.count} processes, got {least} to {most}")

    def check_same_values(self, values: dict, what: str) -> None:
        """Refuse values, by their names, that differ between the processes. JSON must be able to hold them.

        Raises:
            UserError: `what` is not the same; which values differ, and what this process has.
        """
        if self.count == 1:
            return
        names = sorted(values)
        self.check_same(_hash(names), f"the names of {what}")  # only as many numbers can be compared
        hashes = [_hash(values[name]) for name in names]
        largest = self._reduced([*hashes, *(-number for number in hashes)], torch.int64, distributed.ReduceOp.MAX)
        most, least = largest[: len(names)], largest[len(names) :]
        differing = [name for name, a, b in zip(names, most, least, strict=True) if a != -b]
        if differing:
            got = ", ".join(f"{name} {values[name]!r}" for name in differing)
            raise UserError(
                f"{what} must be the same for all {self.count} processes, got {got} in process {self.number}"
            )

    def _reduced(self, numbers, dtype, how):
        # A group that a caller made may know GPUs alone.
        device = "cuda" if distributed.get_backend(_patient) == "nccl" else "cpu"
        shared = torch.tensor(numbers, dtype=dtype, device=device)
        try:
            distributed.all_reduce(shared, how, group=_patient)
        except RuntimeError as error:
            raise self._has_ended(error) from error
        return shared.tolist()

    def _has_ended(self, error):
        return UserError(f"another of the {self.count} processes has ended: {str(error).splitlines()[0]}")

    def wait(self) -> None:
        """Until all processes have called this."""
        self.largest(0)

    def end_together(self) -> None:
        """Until all processes have called this, or one of them has ended, whose own error says why: the lead may still
        write or evaluate for long, and when another one ends torchrun gives it 30 seconds, another machine's 5 minutes.

        A group that a caller made is not waited for: it may be used up, or end the process when its limit has passed.
        """
        if _patient is not None:
            with contextlib.suppress(UserError):
                self.wait()

    @contextlib.contextmanager
    def lead_first(self):
        """What the lead does within this the others do after it. It does not wait for what they did before."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    @contextlib.contextmanager
    def sharing(self, objective):
        """While entered, objective.model is a wrapper whose backward pass averages all processes' gradients."""
        if self.count == 1:
            yield
            return
        model, device = objective.model, next(objective.model.parameters()).device
        objective.model = torch.nn.parallel.DistributedDataParallel(
            model,
            [device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # else there are two copies of all gradients
        )
        with warnings.catch_warnings():
            # Of 1x1 convolutions whose weights are matrices to us: a copy of a small gradient.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            try:
                yield
            finally:
                objective.model = model

    @contextlib.contextmanager
    def sharing_gradients(self, model, share: bool):
        """While entered, passes through the model of `sharing` average their gradients, or leave that to a later one.

        Raises:
            UserError: another process has ended.
        """
        if self.count == 1:
            yield
            return
        try:
            with contextlib.nullcontext() if share else model.no_sync():
                yield
        except RuntimeError as error:  # gloo's have no class of their own, and a loss may raise others
            if isinstance(error, distributed.DistError) or "/gloo/" in str(error):
                raise self._has_ended(error) from error
            raise


def _hash(value) -> int:
    """Of what JSON can hold, in 56 bits: its negative is an int64 too."""
    return int.from_bytes(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:7], "big")


def current() -> Processes:
    """Those of torch's default process group; one alone where there is none."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Processes()
    return Processes(distributed.get_rank(), distributed.get_world_size())


@contextlib.contextmanager
def joined():
    """While entered, this process belongs to the group that torchrun started it for, if it did.

    Raises:
        UserError: the group does not come together.
    """
    global _patient
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend)
        _patient = distributed.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = f"{os.environ['WORLD_SIZE']} processes do not come together: {str(error).splitlines()[0]}"
        raise UserError(reason) from error
    try:
        yield
    finally:
        _patient = None
        distributed.destroy_process_group()


def own_gpu() -> str:
    """The name of this process's GPU: among those of its machine the one with its number there."""
    return "cuda:" + os.environ.get("LOCAL_RANK", "0") if current().count > 1 else "cuda"
