"""Models on a GPU: the same numbers as on a CPU, generation from a CUDA graph, and training from the command line.

The operations have GPU cases of their own (the fixtures `server` and `serve`); here is what is built on them.
"""

import concurrent.futures
import copy
import dataclasses
import json

import pytest
import torch
from test_generate import CONFIG, LENGTHS, G, K, P, T, keep_k, make_model, slow_generate

import dalle_fast.nn as fnn
from dalle_fast import cli
from dalle_fast.commands import train_dalle
from dalle_fast.nn import generation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def text():
    return torch.randint(13, (P, T), generator=torch.Generator().manual_seed(0))


def generate_there(model, text, **options):
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return copy.deepcopy(model).cuda().generate(text.cuda(), text_lengths=LENGTHS.cuda(), **options).cpu()


@pytest.mark.parametrize("hide_padding", [False, True])
@pytest.mark.parametrize(
    ("options", "slow"),
    [
        ({}, {}),
        ({"temperature": 0}, {"temperature": 1e-6}),
        ({"guidance": 3.0}, {"guidance": 3.0}),
        ({"top_k": 3, "temperature": 1.5}, {"keep": lambda logits: keep_k(logits, 3), "temperature": 1.5}),
    ],
    ids=lambda x: "-".join(x) or "plain" if isinstance(x, dict) else "",
)
def test_images_are_those_of_the_model_without_a_cache_on_a_cpu(text, options, slow, hide_padding):
    assert G > generation.EAGER_STEPS + 2  # some steps are replayed
    model = make_model(hide_padding=hide_padding)
    expected = slow_generate(model, text, LENGTHS, 2, seed=5, **slow)
    assert torch.equal(generate_there(model, text, num_images=2, seed=5, **options), expected)


def test_regions_are_drawn_around_what_is_known(text):
    model = make_model()
    codes = torch.randint(K, (P, 5, 3), generator=torch.Generator().manual_seed(1))
    known = torch.ones(5, 3, dtype=torch.bool)
    known[2:, 1:] = False
    expected = model.generate(text, text_lengths=LENGTHS, seed=4, codes=codes, known=known)
    assert torch.equal(generate_there(model, text, seed=4, codes=codes, known=known), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"guidance": 2.0, "top_p": 0.9}], ids=["plain", "guided"])
def test_a_replayed_graph_gives_the_bits_of_eager_steps(dtype, options, monkeypatch):
    torch.manual_seed(0)
    config = fnn.DALLEConfig(vocab_size=50, text_len=40, num_codes=512, grid=12, layers=4, width=256, num_heads=4)
    model = fnn.DALLE(config).to("cuda", dtype)
    text = torch.randint(50, (2, 40), device="cuda")
    from_graph = [model.generate(text, num_images=5, seed=seed, **options) for seed in (1, 2, 1)]
    monkeypatch.setattr(generation, "EAGER_STEPS", config.image_len)
    eager = [model.generate(text, num_images=5, seed=seed, **options) for seed in (1, 2, 1)]
    assert all(torch.equal(a, b) for a, b in zip(from_graph, eager, strict=True))
    assert torch.equal(from_graph[0], from_graph[2]) and not torch.equal(from_graph[0], from_graph[1])
    assert len(from_graph[0].flatten(1).unique(dim=0)) == 10


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_steps_that_no_graph_holds_are_eager(text, impl, monkeypatch):
    """Hooks are called for every token, and the reference looks at the position."""
    model, called = make_model(impl), []
    expected = model.generate(text, text_lengths=LENGTHS, seed=3)
    if impl == "auto":
        model.transformer.norm.register_forward_hook(lambda *arguments: called.append(1))
    monkeypatch.setattr(generation, "STEPS_AHEAD", 2)
    assert torch.equal(generate_there(model, text, seed=3), expected)
    assert len(called) == (G if impl == "auto" else 0)


def test_two_threads_generate_at_once(text):
    model = make_model().cuda()
    expected = [model.generate(text.cuda(), num_images=2, seed=seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda seed: model.generate(text.cuda(), num_images=2, seed=seed), range(4)))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_images_from_a_gpu_that_is_not_the_current_one(text):
    model = make_model()
    expected = model.generate(text, seed=3)
    for device in ("cuda:0", "cuda:1"):
        assert torch.equal(copy.deepcopy(model).to(device).generate(text.to(device), seed=3).cpu(), expected)


def batch_of(config, size=3):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(config.vocab_size, (size, config.text_len), generator=generator)
    codes = torch.randint(config.num_codes, (size, config.image_len), generator=generator)
    return text, codes, torch.randint(config.text_len + 1, (size,), generator=generator)


def assert_same_gradients(there, here, tolerance):
    for (name, a), b in zip(there.named_parameters(), here.parameters(), strict=True):
        scale = b.grad.abs().max()
        torch.testing.assert_close(
            a.grad.cpu(), b.grad, rtol=0, atol=float(scale) * tolerance + 1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_losses_and_gradients_of_a_transformer(activation_checkpointing):
    config = dataclasses.replace(CONFIG, grid=(9, 7), kernel_size=5, text_len=20)
    torch.manual_seed(0)
    here = fnn.DALLE(config)
    there = fnn.DALLE(config, activation_checkpointing=activation_checkpointing).cuda()
    there.load_state_dict(here.state_dict())
    text, codes, lengths = batch_of(config)
    expected = here(text, codes, text_lengths=lengths)
    actual = there(text.cuda(), codes.cuda(), text_lengths=lengths.cuda())
    torch.testing.assert_close(actual.loss.cpu(), expected.loss, rtol=1e-5, atol=0)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(there, here, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradient_scaling(dtype):
    config = dataclasses.replace(CONFIG, grid=(9, 7), kernel_size=5, text_len=20)
    torch.manual_seed(0)
    here = fnn.DALLE(config)
    there = fnn.DALLE(config, gradient_scaling=dtype == torch.float16).cuda()
    there.load_state_dict(here.state_dict(), strict=False)
    text, codes, lengths = batch_of(config)
    here(text, codes, text_lengths=lengths).loss.backward()
    with torch.autocast("cuda", dtype):
        loss = there(text.cuda(), codes.cuda(), text_lengths=lengths.cuda()).loss
    loss.backward()
    there.unscale_gradients()
    for (name, a), b in zip(there.named_parameters(), here.parameters(), strict=True):
        assert (a.grad.cpu() - b.grad).norm() < 0.1 * b.grad.norm(), name


def test_the_whole_loss_compiles_without_graph_breaks():
    config = dataclasses.replace(CONFIG, grid=(9, 7), kernel_size=5, text_len=20)
    torch.manual_seed(0)
    model = fnn.DALLE(config).cuda()
    other = copy.deepcopy(model)
    text, codes, lengths = (x.cuda() for x in batch_of(config))
    expected = other(text, codes, text_lengths=lengths)
    expected.loss.backward()
    out = torch.compile(model, fullgraph=True)(text, codes, text_lengths=lengths)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0)
    out.loss.backward()
    for actual, exact in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, exact.grad, rtol=0, atol=1e-4 * float(exact.grad.abs().max()) + 1e-9)


@pytest.mark.parametrize("hard", [False, True])
def test_losses_codes_and_gradients_of_a_tokenizer(hard):
    config = fnn.DVAEConfig(
        image_size=16, downsampling=4, num_codes=30, embedding_dim=4, hidden=16, blocks_per_group=1, hard=hard
    )
    torch.manual_seed(0)
    here = fnn.DiscreteVAE(config)
    there = copy.deepcopy(here).cuda()
    images = torch.rand(2, 3, 16, 16)
    expected = here(images, tau=0.5, beta=6.6, seed=3)
    actual = there(images.cuda(), tau=0.5, beta=6.6, seed=3)
    torch.testing.assert_close(actual.loss.cpu(), expected.loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(actual.codes.cpu(), expected.codes)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(there, here, 1e-3)
    assert torch.equal(there.encode(images.cuda()).cpu(), here.encode(images))


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_both_stages_train_resume_and_generate(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_dalle, "VALIDATION", 20)
    dvae, dalle = tmp_path / "dvae", tmp_path / "dalle"
    common = ["--data", "shapes", "--batch-size", "4", "--no-tensorboard", "--device", "cuda"]
    sizes = ["--image-size", "16", "--downsampling", "8", "--num-codes", "12", "--hidden", "8"]
    train = ["train-dvae", *common, *sizes, "--steps", "6", "--out", dvae]
    assert run(*train) == 0, capsys.readouterr().err
    assert json.loads((dvae / "evaluation.json").read_text())["step"] == 6
    assert run(*train, "--resume") == 0, capsys.readouterr().err
    sizes = ["--layers", "2", "--width", "16", "--num-heads", "2", "--head-dim", "8", "--text-len", "30"]
    sizes += ["--vocab-size", "300", "--examples", "40"]
    train = ["train-dalle", *common, *sizes, "--dvae", dvae, "--steps", "6", "--out", dalle]
    assert run(*train) == 0, capsys.readouterr().err
    assert run(*train, "--resume") == 0, capsys.readouterr().err
    assert run("generate", "--model", dalle, "--device", "cuda", "--out", tmp_path / "out.png", "a red circle") == 0
    assert (tmp_path / "out.png").exists()
