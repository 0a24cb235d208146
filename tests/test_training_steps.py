"""What a step of training is given and counts: number, schedules, autocast, skipped steps, random numbers, averages.

That a run resumes bit for bit is in test_training.py; here is what would be wrong in both runs.
"""

import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from test_training import QUIET, RECIPE, disturb_random_states, log_of, objective, settings, spoil

from dalle_fast import checkpoint
from dalle_fast.nn import functional as F
from dalle_fast.training import TrainingError, loop, train
from dalle_fast.training.ema import EMA

pytestmark = pytest.mark.usefixtures("one_thread")


def before_each_loss(o, look):
    """An objective for which look(step) is called first."""
    loss = o.loss

    def looked_at(batch, step, part):
        look(step)
        return loss(batch, step, part)

    o.loss = looked_at
    return o


# -- numbers and schedules ---------------------------------------------------------------------------------------------


def test_a_step_is_numbered_by_those_before_it(tmp_path, monkeypatch):
    """For the loss, for the learning rate and for the log, which has the mean of an interval's."""
    events, numbers = [], loop._numbers
    o = before_each_loss(objective(), events.append)
    fetched, o.batches = (
        o.batches,
        lambda start: (events.append(f"batch {n}") or x for n, x in enumerate(fetched(start))),
    )
    monkeypatch.setattr(loop, "_numbers", lambda scalars: events.append("numbers") or numbers(scalars))
    train(o, tmp_path, settings(), **QUIET)
    # A batch is fetched before the host waits for a device to end the step before.
    steps = (event for step in range(11) for event in (step, f"batch {step + 1}", "numbers"))
    assert events == ["batch 0", *steps, 11, "numbers"]
    for line in log_of(tmp_path):
        interval = range(line["step"] - 3, line["step"])
        for name in ("learning_rate", "tau", "beta"):
            expected = np.mean([getattr(RECIPE, f"{name}_at")(step) for step in interval])
            assert line[name] == pytest.approx(expected, rel=1e-12), (name, line["step"])


def test_the_loss_is_the_models_at_the_steps_temperature_and_weight():
    o = objective()
    batch, step = next(o.batches(0)), 4
    assert 0 < RECIPE.beta_at(step) < RECIPE.beta and RECIPE.tau < RECIPE.tau_at(step) < 0.9
    loss, scalars = o.loss(batch, step, 0)
    expected = o.model(
        batch.images.float() / 255,
        tau=RECIPE.tau_at(step),
        beta=RECIPE.beta_at(step),
        seed=F.noise_seed(0, step=step),
    )
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(scalars["reconstruction"], expected.reconstruction_loss)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_losses_are_computed_in_the_precision_that_is_asked_for(tmp_path, precision):
    seen = []

    def look(step):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)

    train(before_each_loss(objective(), look), tmp_path, settings(steps=2, precision=precision), **QUIET)
    assert seen == [getattr(torch, precision)] * 2 and not torch.is_autocast_enabled("cpu")


# -- parts of a batch --------------------------------------------------------------------------------------------------


def test_parts_of_a_batch_are_a_batch(tmp_path):
    """Each example is seen once, with noise that no other part has; the step's loss is the mean of the parts'."""
    seen, losses = [], []
    o = objective()
    whole = next(objective().batches(0))
    loss = o.loss

    def looked_at(batch, step, part):
        value, scalars = loss(batch, step, part)
        losses.append(value.item())
        seen.append((step, part, batch.indices, batch.captions, batch.images))
        return value, scalars

    o.loss = looked_at
    train(o, tmp_path, settings(steps=2, accumulate=2, log_every=1), **QUIET)
    assert [(step, part) for step, part, *_ in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for part, (*_, indices, captions, images) in enumerate(seen[:2]):
        assert indices == whole.indices[part::2] and captions == whole.captions[part::2]
        assert torch.equal(images, whole.images[part::2])
    assert [line["loss"] for line in log_of(tmp_path)] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])
    with torch.no_grad():
        same = whole._replace(images=whole.images[:1].expand_as(whole.images))
        assert len({objective().loss(same, 0, part)[0].item() for part in range(4)}) == 4


def test_parts_are_of_batches_that_can_be_dealt(tmp_path):
    o = objective()
    o.batches = lambda start: iter([torch.zeros(4, 3, 16, 16)])
    with pytest.raises(TypeError, match="batches must give NamedTuples .* where accumulate is above 1, got Tensor"):
        train(o, tmp_path, settings(accumulate=2), **QUIET)


# -- steps that are not finite -----------------------------------------------------------------------------------------


def test_only_skipped_steps_in_a_row_are_too_many(tmp_path):
    """Two and two with a good one between them are not four."""
    train(spoil(objective(), {2, 3, 5, 6}, lambda x: x * math.nan), tmp_path, settings(max_skipped=2), **QUIET)
    assert [line["skipped"] for line in log_of(tmp_path)] == [1, 3, 4, 4]


def test_a_resumed_run_goes_on_counting_what_it_skips(tmp_path):
    """Two steps in a row before it stopped and one after are three."""

    def stop(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    broken = [spoil(objective(), {4, 5, 6}, lambda x: x * math.nan) for _ in range(2)]
    assert train(before_each_loss(broken[0], stop), tmp_path, settings(max_skipped=2), **QUIET).step == 6
    with pytest.raises(TrainingError, match="3 steps in a row, up to step 7"):
        train(broken[1], tmp_path, settings(max_skipped=2), resume=True, **QUIET)


# -- averages ----------------------------------------------------------------------------------------------------------


def test_the_average_counts_updates_and_no_skipped_steps(tmp_path, monkeypatch):
    counted = []

    class Counting(EMA):
        def update(self, model, updates, **options):
            counted.append(updates)
            super().update(model, updates, **options)

    monkeypatch.setattr(loop, "EMA", Counting)
    train(spoil(objective(), {4, 5}, lambda x: x * math.nan), tmp_path, settings(), **QUIET)
    assert counted == list(range(1, 11))


def test_the_average_has_the_models_buffers():
    model = torch.nn.BatchNorm1d(3)
    ema = EMA(model, decay=0.9)
    for update in (1, 2):
        model(torch.randn(5, 3, generator=torch.Generator().manual_seed(update)))
        ema.update(model, update)
        assert all(torch.equal(a, b) for a, b in zip(ema.model.buffers(), model.buffers(), strict=True))
    assert ema.model.num_batches_tracked == 2


@pytest.mark.parametrize("every", [1, 4, 5])
def test_the_average_has_all_updates_though_the_last_step_is_skipped(tmp_path, every):
    """Once each: as if training had been one step shorter, but for what depends on their number."""
    whole, spoiled = objective(), spoil(objective(), {8}, lambda x: x * math.nan)
    train(whole, tmp_path / "whole", settings(steps=8, ema_every=every), **QUIET)
    train(spoiled, tmp_path / "spoiled", settings(steps=9, ema_every=every, evaluate_every=9), **QUIET)
    whole, spoiled = (checkpoint.load_model(tmp_path / name).state_dict() for name in ("whole", "spoiled"))
    assert all(torch.equal(tensor, spoiled[name]) for name, tensor in whole.items())


def test_lost_weights_stay_out_of_the_average(tmp_path):
    o = spoil(objective(), {6, 7, 8}, lambda x: x * math.nan)

    def lose(step):
        if step == 6:
            next(o.model.parameters()).data.fill_(math.nan)

    train(before_each_loss(o, lose), tmp_path, settings(steps=9, ema_every=4), **QUIET)
    assert all(x.isfinite().all() for x in checkpoint.load_model(tmp_path).state_dict().values())


def test_on_the_way_the_average_is_evaluated_and_drawn(tmp_path):
    """In parts as large as those of a batch, here two of four examples."""
    o, seen = objective(), []
    o.measures = lambda *of: seen.append(of) or {}
    o.evaluate = lambda *of: seen.append(of) or {"psnr": 1.0}
    o.pictures = lambda *of: seen.append(of) or {}
    train(o, tmp_path, settings(accumulate=2, log_every=6, evaluate_every=4, picture_every=6), **QUIET)
    assert len(seen) == 2 + 3 + 2  # lines of the log, evaluations, the last one of which is that of the end, pictures
    assert all(model is seen[-1][0] and at_once == 2 for model, at_once in seen) and seen[-1][0] is not o.model


# -- random numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["evaluate", "pictures"])
def test_evaluating_and_drawing_do_not_change_the_numbers_of_a_step(tmp_path, what):
    drawn = []
    for disturbs in (False, True):
        numbers = []
        o = before_each_loss(objective(), lambda step, numbers=numbers: numbers.append(draw()))
        if disturbs:
            setattr(o, what, lambda model, at_once: disturb_random_states() or random.seed(99) or {})
        train(o, tmp_path / str(disturbs), settings(steps=4, evaluate_every=1, picture_every=1), **QUIET)
        drawn.append(numbers)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 4


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_a_resumed_run_draws_the_numbers_that_an_uninterrupted_one_does(tmp_path):
    """An objective of one's own may draw from the global generators; ours draw from none."""

    def numbers_of(folder, stop_at=None):
        numbers = []

        def look(step):
            numbers.append(draw())
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        train(before_each_loss(objective(), look), tmp_path / folder, settings(steps=6), resume=True, **QUIET)
        return numbers

    whole = numbers_of("whole")
    assert numbers_of("parts", stop_at=2) + numbers_of("parts") == whole and len(set(whole)) == 6
