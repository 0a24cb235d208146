"""OpenAI's published discrete VAE becomes a model of this package, and no code of its files runs."""

import pickle
import re
import sys
import types

import pytest
import torch
from torch import nn

from dalle_fast import checkpoint, cli, convert
from dalle_fast.nn.dvae import DiscreteVAE, DVAEConfig

CONFIG = DVAEConfig(image_size=32, downsampling=8, num_codes=50, embedding_dim=12, hidden=16, blocks_per_group=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DiscreteVAE(CONFIG).requires_grad_(False).eval()


@pytest.fixture
def dall_e(monkeypatch):
    """Classes of the names that OpenAI's pickles have. They are there while files are written, not when they are read."""

    def make(module, name, base=nn.Module):
        made = type(name, (base,), {"__module__": f"dall_e.{module}"})
        monkeypatch.setitem(sys.modules, f"dall_e.{module}", modules.setdefault(module, types.ModuleType(module)))
        setattr(modules[module], name, made)
        return made

    modules = {}
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    names = (("encoder", "Encoder"), ("encoder", "EncoderBlock"), ("decoder", "Decoder"), ("decoder", "DecoderBlock"))
    return {name: make(module, name) for module, name in (*names, ("utils", "Conv2d"))}


def as_openais(dall_e, ours, kind):
    """One of our halves as a module of OpenAI's classes, with what theirs have beside weights."""

    def copy(module, made):
        for name, child in module.named_children():
            children = list(child.named_children())
            if not children and not list(child.parameters()):
                made.add_module(name, nn.ReLU())
            elif not children:
                conv = dall_e["Conv2d"]()
                conv.n_in, conv.device, conv.use_float16 = 3, torch.device("cpu"), True
                conv.w, conv.b = (nn.Parameter(x.clone(), requires_grad=False) for x in (child.w, child.b))
                made.add_module(name, conv)
            elif name.startswith("block_"):
                made.add_module(name, copy(child, dall_e[f"{kind}Block"]()))
            else:
                made.add_module(name, copy(child, nn.Sequential()))
        return made

    whole = copy(ours, dall_e[kind]())
    whole.group_count, whole.device = 4, torch.device("cpu")
    whole.blocks.group_1.add_module("pool", nn.MaxPool2d(2))
    whole.blocks.group_2.add_module("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
    whole.blocks.group_2.add_module("identity", nn.Identity())
    return whole


def write(tmp_path, dall_e, model, monkeypatch, **options):
    paths = [tmp_path / name for name in ("encoder.pkl", "decoder.pkl")]
    for path, ours, kind in zip(paths, (model.encoder, model.decoder), ("Encoder", "Decoder"), strict=True):
        torch.save(as_openais(dall_e, ours, kind), path, **options)
    for name in [name for name in sys.modules if name.startswith("dall_e")]:
        if name.partition(".")[0] == "dall_e":
            monkeypatch.delitem(sys.modules, name)
    return paths


@pytest.mark.parametrize("zipped", [True, False])
def test_openais_files_become_a_model(tmp_path, dall_e, model, monkeypatch, capsys, zipped):
    paths = write(tmp_path, dall_e, model, monkeypatch, _use_new_zipfile_serialization=zipped)
    assert cli.main(["convert", *map(str, paths), "--out", str(tmp_path / "vae"), "--image-size", "32"]) == 0
    assert "50 codes, 4 x 4 of them for 32 x 32 pixels" in capsys.readouterr().out
    loaded = checkpoint.load_model(tmp_path / "vae", kind="DiscreteVAE")
    assert loaded.config == CONFIG
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))
    assert not [name for name in sys.modules if name.partition(".")[0] == "dall_e"]


def test_state_dicts_do_as_well(tmp_path, model):
    torch.save(model.encoder.state_dict(), tmp_path / "encoder.pt")
    checkpoint._write_tensors(tmp_path / "decoder.safetensors", model.decoder.half().state_dict())
    command = ["convert", str(tmp_path / "encoder.pt"), str(tmp_path / "decoder.safetensors")]
    assert cli.main([*command, "--out", str(tmp_path / "vae"), "--image-size", "64"]) == 0
    assert checkpoint.load_model(tmp_path / "vae").config.grid == 8


def test_the_golden_weights(golden):
    encoder, decoder = (
        {name[2:]: value for name, value in golden(f"openai_dvae_{half}").items() if name.startswith("w.")}
        for half in ("encoder", "decoder")
    )
    config = convert.openai_dvae(encoder, decoder).config
    assert (config.hidden, config.num_codes, config.grid, config.blocks_per_group) == (64, 512, 32, 2)


class Bomb:
    def __reduce__(self):
        return exec, ("open('bomb', 'w')",)


def test_code_does_not_run(tmp_path, dall_e, model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = as_openais(dall_e, model.encoder, "Encoder")
    whole.blocks.bomb = Bomb()
    torch.save(whole, "encoder.pkl")
    torch.save(whole, "old.pkl", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("encoder.pkl", "old.pkl", "plain.pkl"):
        assert cli.main(["convert", name, name, "--out", "vae"]) == 2
        assert f"{name} holds more than weights" in capsys.readouterr().err
    assert not (tmp_path / "bomb").exists() and not (tmp_path / "vae").exists()


def test_what_does_not_fit_is_named(tmp_path, model, capsys):
    torch.save(model.encoder.state_dict(), tmp_path / "encoder.pt")
    torch.save(model.decoder.state_dict(), tmp_path / "decoder.pt")
    encoder, decoder, out = (str(tmp_path / name) for name in ("encoder.pt", "decoder.pt", "vae"))
    for command, message in (
        ([decoder, encoder], "encoder's blocks.input.w must have shape .*, got|encoder's .* is missing"),
        ([encoder, str(tmp_path / "none.pt")], "cannot read .*none.pt: No such file"),
        ([encoder, decoder, "--image-size", "36"], "image_size must be a multiple of downsampling 8, got 36"),
    ):
        assert cli.main(["convert", *command, "--out", out]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1, error
    assert cli.main(["convert", encoder, decoder, "--out", out, "--image-size", "32"]) == 0
    assert cli.main(["convert", encoder, decoder, "--out", out, "--image-size", "32"]) == 2
    assert "holds a model already" in capsys.readouterr().err
