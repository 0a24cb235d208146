"""The command generate: from a caption to a file, and errors of one line."""

import argparse
import csv
import dataclasses
import errno
import io
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import dalle_fast
import dalle_fast.nn as fnn
from dalle_fast import checkpoint, cli, sampling
from dalle_fast.commands import drawing
from dalle_fast.commands import generate as generate_command
from dalle_fast.data import Tokenizer
from dalle_fast.data.crops import centre_crop
from dalle_fast.outputs import held
from dalle_fast.pictures import picture_grid, to_uint8
from dalle_fast.sampling import DVAE, TOKENIZER
from dalle_fast.training.precision import precision_on

S = 16
VAE = fnn.DVAEConfig(image_size=S, downsampling=4, num_codes=12, embedding_dim=4, hidden=16, blocks_per_group=1)
SMALL = fnn.DALLEConfig(
    vocab_size=300, text_len=12, num_codes=12, grid=4, layers=2, width=16, num_heads=2, head_dim=8, kernel_size=3
)
CAPTION, OTHER = "a red circle", "a blue cross"


def make(kind, config, seed=0):
    """With weights so large that captions and codes make a difference."""
    torch.manual_seed(seed)
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0 if kind is fnn.DALLE else 0.3)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a run, as train-dalle leaves it, of an untrained model."""
    folder = tmp_path_factory.mktemp("runs") / "dalle"
    (folder / DVAE).mkdir(parents=True)
    checkpoint.export(folder / checkpoint.MODEL, make(fnn.DALLE, SMALL))
    checkpoint.export(folder / DVAE / checkpoint.MODEL, make(fnn.DiscreteVAE, VAE))
    Tokenizer.train([CAPTION, OTHER, "a green square on a white background"], 300).save(folder / TOKENIZER)
    return folder


@pytest.fixture
def generate(model, tmp_path):
    """generate(*arguments): the status, and the picture that was drawn."""

    def generate(*arguments, out=tmp_path / "out.png"):
        flags = ["generate", "--model", model, "--out", out, "--seed", "3", "--device", "cpu"]
        flags += ["--precision", "float32", *arguments]
        status = cli.main([str(flag) for flag in flags])
        return np.asarray(Image.open(out)) if status == 0 and os.path.isfile(out) else status

    return generate


def drawn(model, captions=(CAPTION,), **options):
    """The same by the library, (P, N, S, S, 3) uint8."""
    pictures = sampling.draw(*sampling.load(model), captions, seed=3, **options)
    return np.stack([to_uint8(row) for row in pictures])


def test_one_picture_keeps_its_size(generate, model, capsys):
    picture = generate(CAPTION)
    assert np.array_equal(picture, drawn(model)[0, 0])
    assert capsys.readouterr().out.strip().endswith("out.png")
    several = "--num-images", "4"
    assert not np.array_equal(generate(CAPTION, *several), generate(OTHER, *several))


@pytest.mark.parametrize(
    ("trained_with", "guidance", "warned"),
    [
        ({"caption_dropout": 0.0}, ["--guidance", "3"], True),
        ({"caption_dropout": 0.0}, ["--guidance", "1"], False),
        ({"caption_dropout": 0.0}, [], False),
        ({"caption_dropout": 0.1}, ["--guidance", "3"], False),
        ({}, ["--guidance", "3"], False),  # of models that something else trained
    ],
)
def test_guidance_by_a_model_that_never_saw_an_empty_caption_is_warned_of(
    generate, model, tmp_path, capsys, trained_with, guidance, warned
):
    plain = generate(CAPTION, *guidance)
    shutil.copytree(model, tmp_path / "run")
    dalle = checkpoint.load_model(model)
    dalle.trained_with = trained_with
    checkpoint.export(tmp_path / "run" / checkpoint.MODEL, dalle)
    assert checkpoint.load_model(tmp_path / "run").trained_with == trained_with
    capsys.readouterr()
    assert np.array_equal(generate(CAPTION, *guidance, "--model", tmp_path / "run"), plain)
    error = capsys.readouterr().err
    assert ("--guidance 3 leads away from" in error and error.count("\n") == 1) if warned else error == ""


def test_several_become_one_picture_with_a_row_for_each_caption(generate, model):
    grid = generate(CAPTION, OTHER, "--num-images", "3")
    expected = drawn(model, (CAPTION, OTHER), num_images=3)
    factor, gap = 96 // S, 2
    assert grid.shape == (2 * (96 + gap) + gap, 3 * (96 + gap) + gap, 3)
    for row in range(2):
        for column in range(3):
            top, left = gap + row * (96 + gap), gap + column * (96 + gap)
            assert np.array_equal(grid[top : top + 96 : factor, left : left + 96 : factor], expected[row, column])


def test_a_folder_gets_a_file_of_each_and_captions_come_from_a_file(generate, model, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text(f"\n{OTHER}\n  {CAPTION} \n\n")
    generate(CAPTION, "--captions", tmp_path / "captions.txt", "--num-images", "2", out=f"{tmp_path}/pictures/")
    names = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    assert names == [f"{row:04d}-{number:04d}.png" for row in range(3) for number in range(2)]
    expected = drawn(model, (CAPTION, OTHER, CAPTION), num_images=2)
    for name, picture in zip(names, expected.reshape(6, S, S, 3)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / name)), picture)
    with open(tmp_path / "pictures" / "metadata.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["file_name"] for line in table] == names
    assert [line["caption"] for line in table] == [caption for caption in (CAPTION, OTHER, CAPTION) for _ in range(2)]
    assert {line["seed"] for line in table} == {"3"} and [line["number"] for line in table] == ["0", "1"] * 3
    assert {line["score"] for line in table} == {""}
    before = (tmp_path / "pictures" / names[0]).read_bytes()
    assert generate(OTHER, out=tmp_path / "pictures") == 2  # not over, nor among, what is there
    error = capsys.readouterr().err
    assert "pictures holds pictures of another run (0000-0000.png): choose another folder" in error
    assert (tmp_path / "pictures" / names[0]).read_bytes() == before


STOPS = "def third(images, caption):\n    if caption == '{}':\n        raise {}\n    return images.mean((1, 2, 3))\n"


@pytest.mark.parametrize(("error", "status"), [("KeyboardInterrupt", 130), ("ValueError", 2), ("MemoryError", 2)])
def test_what_is_done_when_it_ends_early_is_written(generate, model, scores, tmp_path, capsys, error, status):
    """Ctrl-C, and what the user's own score raises: in a folder file by file, on a sheet at the end."""
    scores("stops", STOPS.format("a green", error))
    flags = [CAPTION, OTHER, "a green", CAPTION, "--num-images", "2", "--best-of", "4", "--score", "stops:third"]
    expected = drawn(model, (CAPTION, OTHER), num_images=4, score=lambda images, _: images.mean((1, 2, 3)), keep=2)
    for out in (f"{tmp_path}/pictures/", tmp_path / "sheet.png"):
        assert generate(*flags, out=out) == status
        said = capsys.readouterr()
        assert "stopped after 2 of 4 captions, whose pictures are written\n" in said.err
        assert len(said.out.splitlines()) == (4 if str(out).endswith("/") else 1)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["0000-0000.png", "0000-0001.png", "0001-0000.png", "0001-0001.png", "metadata.csv"]
    with open(tmp_path / "pictures" / "metadata.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 and all(float(a["score"]) > float(b["score"]) for a, b in zip(table[::2], table[1::2]))
    for line, picture in zip(table, expected.reshape(4, S, S, 3)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / line["file_name"])), picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), picture_grid(expected))
    assert generate("a green", *flags[4:], out=tmp_path / "nothing.png") == status
    assert not (tmp_path / "nothing.png").exists() and "stopped after" not in capsys.readouterr().err


def test_a_picture_says_how_it_is_drawn_again(generate, model, tmp_path, scores, capsys):
    """A seed that was not given is told, and in the picture, as are the caption and the options."""
    scores("scores", "def dark(images, caption):\n    return -images.mean((1, 2, 3))\n")
    out = tmp_path / "one.png"
    flags = ["generate", "--model", str(model), "--out", str(out), "--device", "cpu", "--precision", "float32"]
    assert cli.main([*flags, "ein ro\u0308ter Kreis \u2603", "--temperature", "0.7", "--truncate"]) == 0
    text = Image.open(out).text
    about = json.loads(text["Comment"])
    assert text["Description"] == "ein ro\u0308ter Kreis \u2603"
    assert text["Software"] == f"dalle_fast {dalle_fast.__version__}"
    assert about == {"seed": about["seed"], "number": 0, "temperature": 0.7, "truncate": True, "precision": "float32"}
    assert capsys.readouterr().err == f"seed {about['seed']}\n"
    again = generate(text["Description"], "--temperature", 0.7, "--truncate", "--seed", about["seed"])
    assert np.array_equal(again, np.asarray(Image.open(out)))
    best = generate(CAPTION, "--best-of", "6", "--score", "scores:dark")
    number = json.loads(Image.open(tmp_path / "out.png").text["Comment"])["number"]
    assert np.array_equal(best, drawn(model, num_images=6)[0, number])
    generate(CAPTION, OTHER)
    text = Image.open(tmp_path / "out.png").text
    assert text["Description"] == f"{CAPTION}\n{OTHER}" and "number" not in json.loads(text["Comment"])
    generate(CAPTION, out=tmp_path / "one.jpg")


@pytest.mark.parametrize("rows", [None, 1])
def test_a_completion_says_what_it_completes(generate, tmp_path, rows):
    Image.new("RGB", (S, S)).save(tmp_path / "top.png")
    generate(CAPTION, "--complete", tmp_path / "top.png", *([] if rows is None else ["--keep-rows", rows]))
    about = json.loads(Image.open(tmp_path / "out.png").text["Comment"])
    assert about["complete"] == "top.png" and about["keep_rows"] == (rows or 2)


def test_an_interruption_among_a_captions_pictures_leaves_a_line_for_each(generate, tmp_path, monkeypatch, capsys):
    write, names = drawing.write, ["0000-0000.png", "0000-0001.png", "0000-0002.png", "0001-0000.png"]

    def interrupted(rows, path, texts):
        if os.path.basename(path) == "0001-0001.png":
            raise KeyboardInterrupt
        write(rows, path, texts)

    monkeypatch.setattr(drawing, "write", interrupted)
    assert generate(CAPTION, OTHER, "--num-images", "3", out=f"{tmp_path}/pictures/") == 130
    assert sorted(os.listdir(tmp_path / "pictures")) == [*names, "metadata.csv"]
    with open(tmp_path / "pictures" / "metadata.csv", newline="") as file:
        assert [line["file_name"] for line in csv.DictReader(file)] == names
    assert [os.path.basename(line) for line in capsys.readouterr().out.splitlines()] == names


def test_a_folder_is_drawn_into_by_one_run_at_a_time(generate, tmp_path, monkeypatch, capsys):
    draw_each, folder = sampling.draw_each, f"{tmp_path}/pictures/"

    def drawn_beside_another(*arguments, **options):
        monkeypatch.setattr(sampling, "draw_each", draw_each)
        with ThreadPoolExecutor(1) as another:  # as another process, and would find no picture yet
            assert another.submit(generate, OTHER, out=folder).result() == 2
        return draw_each(*arguments, **options)

    monkeypatch.setattr(sampling, "draw_each", drawn_beside_another)
    generate(CAPTION, out=folder)
    assert capsys.readouterr().err == f"dalle-fast: error: --out {folder} is in use by another process\n"
    assert json.loads(Image.open(f"{folder}0000-0000.png").text["Comment"])["number"] == 0
    with held(folder, "it"):
        pass


def test_a_name_that_stdout_cannot_say_ends_nothing(generate, tmp_path, monkeypatch):
    said = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", said)
    assert generate(CAPTION, "--num-images", "2", out=f"{tmp_path}/caf\u00e9\udce9/") == 0
    lines = said.buffer.getvalue().decode("ascii").splitlines()
    assert lines == [f"{tmp_path}/caf\\xe9\\udce9/0000-000{number}.png" for number in range(2)]


def test_a_vae_of_one_channel_draws_shades_of_grey(generate, tmp_path, capsys):
    picture = np.random.default_rng(0).integers(0, 255, (S, S, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "colours.png")
    Image.fromarray(picture).convert("L").save(tmp_path / "grey.png")
    (tmp_path / "vae").mkdir()
    vae = make(fnn.DiscreteVAE, dataclasses.replace(VAE, channels=1))
    checkpoint.export(tmp_path / "vae" / checkpoint.MODEL, vae)
    alone = generate(CAPTION, "--dvae", tmp_path / "vae")
    assert alone.shape == (S, S, 3) and alone.std() > 0 and (alone == alone[..., :1]).all()
    generate(CAPTION, OTHER, "--dvae", tmp_path / "vae", out=f"{tmp_path}/pictures/")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / "0000-0000.png")), alone)
    colours, grey = (
        generate(CAPTION, "--dvae", tmp_path / "vae", "--complete", tmp_path / f"{name}.png")
        for name in ("colours", "grey")
    )
    assert np.array_equal(colours, grey) and not np.array_equal(grey, alone)
    flags = ["--model", tmp_path / "vae", "--out", tmp_path / "both.png", "--device", "cpu"]
    assert cli.main([*map(str, ["reconstruct", tmp_path / "colours.png", *flags])]) == 0
    sheet = np.asarray(Image.open(tmp_path / "both.png"))
    images = torch.from_numpy(np.array(Image.open(tmp_path / "grey.png")))[None, None] / 255
    assert np.array_equal(sheet, picture_grid([to_uint8(images), to_uint8(vae.reconstruct(images))]))
    checkpoint.export(tmp_path / "vae" / checkpoint.MODEL, make(fnn.DiscreteVAE, dataclasses.replace(VAE, channels=4)))
    capsys.readouterr()
    assert generate(CAPTION, "--dvae", tmp_path / "vae") == 2
    assert "vae must have 1 or 3 channels, as pictures have, got 4\n" in capsys.readouterr().err


def test_many_pictures_of_a_caption_go_on_in_another_row(generate, model):
    grid = generate(CAPTION, "--num-images", "10")
    expected = drawn(model, num_images=10)[0]
    assert np.array_equal(grid, picture_grid([expected[:8], expected[8:]]))


@pytest.mark.parametrize(
    ("name", "captions", "size"), [("tall.webp", 168, "100 x 16466"), ("tall.jpg", 669, "100 x 65564")]
)
def test_a_sheet_that_is_too_large_for_its_format_is_refused_before(
    generate, tmp_path, capsys, monkeypatch, name, captions, size
):
    monkeypatch.setattr(sampling, "draw_each", raising(AssertionError("drawn in vain")))
    assert generate(*[CAPTION] * captions, out=tmp_path / name) == 2
    error = capsys.readouterr().err
    assert f"{name} cannot hold {size} pixels, which all pictures together have: choose .png, or a folder" in error
    with pytest.raises(AssertionError, match="in vain"):
        generate(*[CAPTION] * (captions - 1), out=tmp_path / name)


@pytest.mark.parametrize("flags", [(), ("--guidance", "2")])
def test_bfloat16_draws_the_same_in_every_batch(generate, model, flags):
    """The transformer alone is cast, once; what auto is on a device training says."""
    whole = generate(CAPTION, "--num-images", "5", "--precision", "bfloat16", *flags)
    again = generate(CAPTION, "--num-images", "5", "--precision", "bfloat16", "--batch-size", "2", *flags)
    assert np.array_equal(again, whole)
    auto = generate(CAPTION, "--num-images", "5", "--precision", "auto", *flags)
    plain = generate(CAPTION, "--num-images", "5", *flags)
    assert np.array_equal(auto, whole if precision_on(torch.device("cpu"), "auto") == "bfloat16" else plain)
    dalle, dvae, _ = sampling.load(model, precision="bfloat16")
    assert dalle.head.weight.dtype == torch.bfloat16 and next(dvae.parameters()).dtype == torch.float32


def test_lines_of_captions_end_where_editors_end_them(tmp_path):
    arguments = argparse.Namespace(caption=[], captions=tmp_path / "captions.txt", complete=None)
    arguments.captions.write_bytes("\ufeffa\u2028b\r\nc\x85d\x0be\rf\u2029g\n\nh".encode())
    assert generate_command._captions(arguments) == ["a\u2028b", "c\x85d\x0be", "f\u2029g", "h"]


def test_flags_of_sampling_reach_the_model(generate, model):
    flags = ["--temperature", "0.7", "--top-k", "5", "--top-p", "0.9", "--guidance", "2"]
    picture = generate(CAPTION, *flags)
    assert np.array_equal(picture, drawn(model, temperature=0.7, top_k=5, top_p=0.9, guidance=2.0)[0, 0])
    assert not np.array_equal(picture, drawn(model)[0, 0])


def test_an_image_does_not_depend_on_the_batch(generate):
    whole = generate(CAPTION, "--num-images", "5")
    assert np.array_equal(generate(CAPTION, "--num-images", "5", "--batch-size", "2"), whole)


def test_the_best_of_many(generate, model, scores):
    scores("scores", "def dark(images, caption):\n    return -images.mean((1, 2, 3))\n")
    picture = generate(CAPTION, "--best-of", "6", "--score", "scores:dark")
    means = drawn(model, num_images=6)[0].mean((1, 2, 3))
    assert picture.mean() == means.min() < means.max()


@pytest.fixture
def scores(tmp_path, monkeypatch):
    """scores(name, text) writes a module into the working folder, which is on no path, as under the console script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])

    def write(name, text):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text)

    return write


def test_a_score_may_import_when_it_is_called(generate, scores):
    scores("lazy", "def dark(images, caption):\n    import beside\n    return beside.means(images)\n")
    scores("beside", "def means(images):\n    return -images.mean((1, 2, 3))\n")
    assert generate(CAPTION, "--best-of", "2", "--score", "lazy:dark").shape == (S, S, 3)


def test_what_is_wrong_in_a_score_is_told_as_its_own(generate, scores, capsys):
    """With the way to the line; what it returns is judged by us, in one line."""
    scores("wrong", "def typed(images, caption):\n    return 1 + caption\ndef nothing(images, caption):\n    pass\n")
    assert generate(CAPTION, "--best-of", "2", "--score", "wrong:typed") == 2
    error = capsys.readouterr().err
    assert 'wrong.py", line 2, in typed' in error and "generate.py" not in error
    assert error.splitlines()[-1].startswith("dalle-fast: error: --score wrong:typed failed: TypeError: unsupported op")
    assert generate(CAPTION, "--best-of", "2", "--score", "wrong:nothing") == 2
    error = capsys.readouterr().err
    assert error.startswith("dalle-fast: error: score must return 2 numbers, got NoneType") and error.count("\n") == 1


def test_a_score_that_cannot_be_imported_is_one_line_that_says_where(generate, scores, capsys):
    scores("unfinished", "x = 1\ndef gray(images, caption:\n    pass\n")
    scores("unnamed", "x = 1\ny = missing\n")
    scores("ending", "import sys\nsys.exit(0)\n")
    scores("over", "import unnamed\n")
    scores("needy", "import nothing_of_this_name\n")
    for name, words in {
        "./unnamed:gray": ["--score must be MODULE:FUNCTION, the module as `import` takes it, got ./unnamed:gray"],
        ":gray": ["--score must be MODULE:FUNCTION", "got :gray"],
        "unfinished:gray": ["cannot import unfinished: SyntaxError: ", "(unfinished.py, line 2)"],
        "unnamed:gray": ["cannot import unnamed: NameError: name 'missing' is not defined (", "unnamed.py, line 2)"],
        "over:gray": ["cannot import over: NameError: name 'missing' is not defined (", "unnamed.py, line 2)"],
        "ending:gray": ["cannot import ending: SystemExit: 0 (", "ending.py, line 2)"],
        "needy:gray": ["ModuleNotFoundError: No module named 'nothing_of_this_name' (", "needy.py, line 1)"],
        "absent:gray": ["cannot import absent: ModuleNotFoundError: No module named 'absent'\n"],
        "math:gray": ["--score math:gray must be MODULE:FUNCTION: module 'math' has no attribute 'gray'"],
    }.items():
        assert generate(CAPTION, "--best-of", "2", "--score", name) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("dalle-fast: error: --score ") and error.count("\n") == 1, error
        assert all(word in error for word in [*words, name]), error


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_completing_keeps_the_codes_of_the_first_rows(generate, model, tmp_path, rows):
    picture = np.random.default_rng(0).integers(0, 255, (S, S, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "top.png")
    flags = [] if rows is None else ["--keep-rows", rows]
    completed = generate(CAPTION, "--complete", tmp_path / "top.png", *flags)
    _, dvae, _ = sampling.load(model)
    codes = dvae.encode(torch.from_numpy(picture).movedim(-1, 0)[None].float() / 255)[:, : rows or 2]
    assert np.array_equal(completed, drawn(model, codes=codes)[0, 0])
    assert generate("--complete", tmp_path / "top.png", *flags).shape == (S, S, 3)  # without a caption


def test_what_is_completed_is_the_square_in_the_middle(generate, tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (40, 75, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    Image.fromarray(centre_crop(picture, S)).save(tmp_path / "square.png")
    wide, square = (generate(CAPTION, "--complete", tmp_path / f"{name}.png") for name in ("wide", "square"))
    assert np.array_equal(wide, square) and not np.array_equal(wide, generate(CAPTION))


def test_another_vae_can_be_named(generate, tmp_path):
    (tmp_path / "vae").mkdir()
    checkpoint.export(tmp_path / "vae" / checkpoint.MODEL, make(fnn.DiscreteVAE, VAE, seed=1))
    assert not np.array_equal(generate(CAPTION, "--dvae", tmp_path / "vae"), generate(CAPTION))


def test_what_the_user_can_put_right_is_one_line(generate, model, tmp_path, capsys):
    for name, config in {
        "codes": fnn.DVAEConfig(**{**vars(VAE), "num_codes": 13}),
        "grid": fnn.DVAEConfig(**{**vars(VAE), "image_size": 24}),
    }.items():
        (tmp_path / name).mkdir()
        checkpoint.export(tmp_path / name / checkpoint.MODEL, make(fnn.DiscreteVAE, config))
    Image.new("RGB", (20, S - 1)).save(tmp_path / "small.png")
    Image.new("RGB", (S, S)).save(tmp_path / "right.png")
    right = (tmp_path / "right.png").read_bytes()
    at = right.index(b"IDAT")  # behind its length, which shall be too small
    (tmp_path / "broken.png").write_bytes(right[: at - 4] + b"\0\0\0\4" + right[at:])
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "text.json").write_text("{}")
    cases = {
        (): ["a caption is needed"],
        (CAPTION, "--num-images", 0): ["--num-images must be at least 1, got 0"],
        ("a b c d e f g h i j k l m n o p",): ["at most text_len 12 tokens, got", "'a b c"],
        (CAPTION, "--dvae", tmp_path / "codes"): ["the dVAE has 13 codes, the transformer takes 12"],
        (CAPTION, "--dvae", tmp_path / "grid"): ["6 x 6 codes, the transformer takes 4 x 4"],
        (CAPTION, "--dvae", model): ["holds a DALLE, expected a DiscreteVAE"],
        (CAPTION, "--model", model / DVAE): ["holds a DiscreteVAE, expected a DALLE"],
        (CAPTION, "--model", tmp_path / "none"): ["none holds no model"],
        (CAPTION, "--top-p", 0): ["top_p must be in (0, 1], got 0.0"],
        (CAPTION, "--top-p", 1.5): ["top_p must be in (0, 1], got 1.5"],
        (CAPTION, "--top-k", 13): ["top_k must be an integer from 1 to 12, the model's codes, got 13"],
        (CAPTION, "--temperature", -1): ["temperature must be at least 0, got -1.0"],
        (CAPTION, "--temperature", "nan"): ["temperature", "nan"],
        (CAPTION, "--seed", -1): ["seed", "-1"],
        (CAPTION, "--batch-size", 0): ["batch_size must be at least 1, got 0"],
        (CAPTION, "--complete", tmp_path / "small.png"): [
            "small.png: image must be at least 16 pixels a side",
            "got 20 x 15",
        ],
        (CAPTION, "--complete", tmp_path / "empty.txt"): ["empty.txt: not a picture"],
        (CAPTION, "--complete", tmp_path / "broken.png"): ["broken.png: ", "broken PNG"],
        (CAPTION, "--complete", tmp_path / "right.png", "--keep-rows", 4): ["from 1 to 3", "4 rows", "got 4"],
        (CAPTION, "--keep-rows", 2): ["--keep-rows needs --complete"],
        (CAPTION, "--best-of", 3): ["--best-of and --score"],
        (CAPTION, "--best-of", 0, "--score", "math:fsum"): ["--best-of must be at least 1, got 0"],
        (CAPTION, "--best-of", 3, "--score", "nowhere:x"): ["nowhere"],
        (CAPTION, "--best-of", 1, "--num-images", 2, "--score", "math:fsum"): [
            "--num-images must be at most --best-of 1",
            "got 2",
        ],
        ("--captions", tmp_path / "missing.txt"): ["cannot read captions", "missing.txt"],
        ("--captions", tmp_path / "empty.txt"): ["a caption is needed"],
    }
    for arguments, words in cases.items():
        assert generate(*arguments) == 2, arguments
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("dalle-fast: error: ")
        for word in words:
            assert word in line, (arguments, line)


def test_what_does_not_fit_in_memory_is_one_line(generate, tmp_path, capsys, monkeypatch):
    assert generate(CAPTION, "--num-images", 10**9) == 2
    error = capsys.readouterr().err
    assert (
        "out.png takes 1.16e+05 GB of memory, and " in error and "for 786 x 12250000002 pixels: choose a fol" in error
    )
    folder = f"{tmp_path}/pictures/"
    assert generate(CAPTION, "--num-images", 10**9, out=folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("dalle-fast: error: 1000000000 images of a caption take ")
    assert ": --num-images " in error and " would fit" in error and error.count("\n") == 1
    assert generate(CAPTION, "--best-of", 10**9, "--score", "math:fsum", out=folder) == 2
    assert ": --best-of " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "free_memory", lambda device: 7 * 4 * 3 * S * S)
        best = ["--num-images", 4, "--best-of", 6, "--score", "math:fsum"]
        assert generate(CAPTION, *best) == 2  # not "--best-of 3", which --num-images 4 would not let be
    assert "6 images of a caption, 4 of them kept, take " in (error := capsys.readouterr().err)
    assert error.endswith(" are free on cpu: not even 4 fit\n")
    with monkeypatch.context() as patch:
        patch.setattr(
            fnn.DALLE, "generate", lambda self, text, **_: raising(MemoryError("no room"))() if len(text) else 0
        )
        assert generate(CAPTION, "--num-images", 512) == 2
    line = "dalle-fast: error: drawing 64 images at once ran out of memory: try --batch-size 32 (no room)\n"
    assert capsys.readouterr().err == line
    for owner, name, error in (
        (fnn.DALLE, "generate", torch.OutOfMemoryError("generating ... num_images=7 would fit")),
        (
            fnn.DALLE,
            "generate",
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ),
        (
            fnn.DiscreteVAE,
            "decode",
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ),
        (sampling, "load", torch.OutOfMemoryError("CUDA out of memory")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raising(error))
            assert generate(CAPTION) == 2
        line = capsys.readouterr().err
        assert line.startswith("dalle-fast: error: ") and str(error) in line and line.count("\n") == 1
    monkeypatch.setattr(fnn.DiscreteVAE, "decode", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        generate(CAPTION)


def raising(error):
    def refuse(*_, **__):
        raise error

    return refuse


def test_what_cannot_be_written_is_refused_before_anything_is_drawn(generate, tmp_path, capsys, monkeypatch):
    def forbid(*_, **__):
        raise AssertionError("drawn in vain")

    monkeypatch.setattr(sampling, "draw_each", forbid)
    (tmp_path / "file").write_text("")
    for name in ("nothing.xyz", "nothing", "only_read.cur", "not_in_colour.xbm", "file/x.png", "file/"):
        assert generate(CAPTION, out=f"{tmp_path}/{name}") == 2
        error = capsys.readouterr().err
        assert error.startswith("dalle-fast: error: --out") and name.split("/")[0] in error and error.count("\n") == 1
    (tmp_path / "old.png").write_text("old")
    for name in ("new.png", "old.png"):
        with pytest.raises(AssertionError, match="in vain"):
            generate(CAPTION, out=tmp_path / name)
    assert (tmp_path / "old.png").read_text() == "old" and not (tmp_path / "new.png").exists()


def test_a_full_disk_leaves_the_picture_that_was_there(generate, model, tmp_path, capsys, monkeypatch):
    """Of generate, reconstruct and save_grid; what can be written takes its place, behind a link too."""
    Image.new("RGB", (S, S)).save(tmp_path / "old.png")
    before = (tmp_path / "old.png").read_bytes()
    os.symlink("old.png", tmp_path / "link.png")
    reconstruct = ["reconstruct", tmp_path / "old.png", "--model", model / DVAE, "--out", tmp_path / "old.png"]
    save = Image.Image.save

    def full(self, path, *arguments, **options):
        if isinstance(path, io.BytesIO):
            return save(self, path, *arguments, **options)
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert generate(CAPTION, out=tmp_path / "old.png") == 2
        assert cli.main([*map(str, reconstruct), "--device", "cpu"]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert all("cannot write" in line and "No space left" in line for line in errors) and len(errors) == 2
        with pytest.raises(OSError, match="No space left"):
            sampling.save_grid(torch.zeros(1, 3, S, S), tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.png", "old.png"]
    generate(CAPTION, out=tmp_path / "link.png")
    assert (tmp_path / "old.png").read_bytes() != before and (tmp_path / "link.png").is_symlink()


def test_parts_that_are_missing(model, tmp_path, capsys):
    checkpoint.export(tmp_path / checkpoint.MODEL, checkpoint.load_model(model))
    arguments = ["generate", CAPTION, "--model", str(tmp_path), "--out", str(tmp_path / "x.png"), "--device", "cpu"]
    assert cli.main(arguments) == 2
    assert "has no folder 'dvae'" in capsys.readouterr().err
    assert cli.main([*arguments, "--dvae", str(model / DVAE)]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
