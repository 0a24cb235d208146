"""The measurement of unseen captions: it counts what is right, and its control is near chance."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dalle_fast.nn as fnn
from dalle_fast.data import draw, scene_of_caption

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import zero_shot


def artist(share):
    """In place of a model: of the pictures it draws, this share shows the caption, the others nothing."""

    def draw_pictures(_dalle, _dvae, _tokenizer, captions, *, num_images, **_):
        rng = np.random.default_rng(0)
        pictures = np.stack([draw(scene_of_caption(c), 32, rng) for c in captions for _ in range(num_images)])
        pictures[int(share * len(pictures)) :] = 200
        return torch.from_numpy(pictures).movedim(-1, 1).float().div(255).unflatten(0, (len(captions), num_images))

    return draw_pictures


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """measure(share): the results, and the exit status."""
    torch.manual_seed(0)
    vae = fnn.DiscreteVAE(fnn.DVAEConfig(image_size=32, downsampling=8, num_codes=9, hidden=4, blocks_per_group=1))
    dalle = fnn.DALLE("tiny")
    monkeypatch.setattr(zero_shot.sampling, "load", lambda *_, **__: (dalle, vae, None))

    def measure(share):
        monkeypatch.setattr(zero_shot.sampling, "draw", artist(share))
        flags = ["--num", "100", "--json", str(tmp_path / "x.json"), "--picture", str(tmp_path / "x.png")]
        status = zero_shot.main(["--model", "somewhere/run", *flags])
        report = json.loads((tmp_path / "x.json").read_text())
        assert "somewhere" not in json.dumps(report) and (tmp_path / "x.png").exists()
        return report["results"], status

    return measure


def test_all_right(measure, capsys):
    results, status = measure(1.0)
    assert status == 0
    for name, result in results.items():
        assert result["right"] == 1 and set(result["attributes"].values()) == {1}
        assert result["control"] < 0.05 and result["chance"] == pytest.approx(1 / (72 if name == "heldout" else 100))
        assert result["real"] < 0.1  # the VAE is untrained
        low, high = result["interval"]
        assert 0.95 < low < 1 and high == pytest.approx(1)
    assert results["heldout"]["captions"] == 72 and results["train"]["captions"] == 648
    assert "| held out |" in capsys.readouterr().out


def test_some_wrong(measure, capsys):
    results, status = measure(0.6)
    assert status == 1
    for result in results.values():
        assert result["right"] == pytest.approx(0.6, abs=0.01) and result["interval"][0] < 0.6 < result["interval"][1]
    assert capsys.readouterr().out.count("MISSED") == 2


@pytest.mark.parametrize("together", [1, 9])
def test_pictures_that_fail_together_count_as_one(together):
    """In 300 measurements the interval holds the true share in about 95% of them."""
    rng, held, widths = np.random.default_rng(0), 0, []
    captions = [f"caption {number}" for number in range(72) for _ in range(9)]
    for _ in range(300):
        right = np.repeat(rng.random(len(captions) // together) < 0.8, together)
        read = [caption if fine else None for caption, fine in zip(captions, right, strict=True)]
        low, high = zero_shot.Drawn(None, captions, read).interval()
        held += low <= 0.8 <= high
        widths.append(high - low)
    assert 0.92 <= held / 300 <= 0.98
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (0.8 * 0.2 / (len(captions) / together)) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--device", "foo"], "--device foo cannot be used"),
        (["--temperature", "-1"], "temperature must be at least 0, got -1.0"),
        (["--top-p", "7"], "top_p must be in (0, 1], got 7.0"),
        (["--guidance", "nan"], "guidance must be a finite number, got nan"),
        (["--seed", "-1"], "seed must be from 0 to 1048575, got -1"),
        (["--picture", "/proc/a.png"], "argument --picture: expected a writable file in an existing folder"),
    ],
)
def test_a_bad_flag_is_named(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        zero_shot.main(["--model", "no/such/run", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
