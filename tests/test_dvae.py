"""The discrete VAE: OpenAI's outputs, the paper's objective, and no logits of all codes.

B batch, C channels, H x W pixels, h x w codes, K codes, D embedding.
"""

import dataclasses
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv2d, interpolate, max_pool2d, one_hot, relu

import dalle_fast.nn as fnn
from dalle_fast.nn.dvae import LIKELIHOODS, PRESETS, map_pixels, unmap_pixels
from dalle_fast.ops.codebook.noise import gumbel_noise

SMALL = fnn.DVAEConfig(image_size=16, downsampling=4, num_codes=70, embedding_dim=6, hidden=8, blocks_per_group=1)


def weights_of(golden):
    return {name[2:]: tensor.float() for name, tensor in golden.items() if name.startswith("w.")}


@pytest.fixture
def openai(golden):
    encoder, decoder = golden("openai_dvae_encoder"), golden("openai_dvae_decoder")
    config = fnn.DVAEConfig(image_size=64, num_codes=512, embedding_dim=32, hidden=64)
    model = fnn.DiscreteVAE(config)
    model.load_openai(weights_of(encoder), weights_of(decoder))
    return model, encoder, decoder


@torch.no_grad()
def test_openai_encoder(openai):
    model, encoder, _ = openai
    torch.testing.assert_close(map_pixels(encoder["image"]), encoder["mapped"])
    torch.testing.assert_close(model.encoder(encoder["mapped"]), encoder["z_logits"], rtol=1e-4, atol=1e-3)
    assert torch.equal(model.encode(encoder["image"]), encoder["z"])


@torch.no_grad()
def test_openai_decoder(openai):
    model, _, decoder = openai
    _, _, codebook, shift = model._codebook()
    statistics = model.decoder((codebook[decoder["z"]] + shift).movedim(-1, 1))
    torch.testing.assert_close(statistics, decoder["x_stats"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.decode(decoder["z"]), decoder["recon"], rtol=0, atol=2e-5)


# -- the architecture --------------------------------------------------------------------------------------------------


def with_biases(model):
    """The same with biases as those of a trained model are: none is 0, and all of them matter."""
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def convolution(p, name, x, kernel_size=1):
    return conv2d(x, p[f"{name}.w"], p[f"{name}.b"], padding=kernel_size // 2)


def groups(p, name, x, config, kernel_sizes, resize):
    """OpenAI's residual bottlenecks, four groups of two in the paper; between two groups the image is resized."""
    count = config.downsampling.bit_length()
    gain = config.residual_gain or 1 / (count * config.blocks_per_group) ** 2
    for g in range(1, count + 1):
        for b in range(1, config.blocks_per_group + 1):
            block, inner = f"{name}.group_{g}.block_{b}", x
            for c, kernel_size in enumerate(kernel_sizes, 1):
                inner = convolution(p, f"{block}.res_path.conv_{c}", relu(inner), kernel_size)
            x = convolution(p, f"{block}.id_path", x) if f"{block}.id_path.w" in p else x
            x = x + gain * inner
        x = resize(x) if g < count else x
    return x


def encoder_written_out(model, images):
    """Logits (B, K, h, w) of images (B, C, H, W), pixels from 0 to 1."""
    p, name = dict(model.named_parameters()), "encoder.blocks"
    x = convolution(p, f"{name}.input", 0.8 * images + 0.1, 7)
    x = groups(p, name, x, model.config, (3, 3, 3, 1), lambda x: max_pool2d(x, 2))
    return convolution(p, f"{name}.output.conv", relu(x))


def decoder_written_out(model, codes):
    """mu and ln b, (B, C, H, W) each, of one-hot vectors (B, K, h, w) or what training has in their place."""
    p, name = dict(model.named_parameters()), "decoder.blocks"
    x = convolution(p, f"{name}.input", codes)
    x = groups(p, name, x, model.config, (1, 3, 3, 3), lambda x: interpolate(x, scale_factor=2))
    return convolution(p, f"{name}.output.conv", relu(x)).chunk(2, 1)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"blocks_per_group": 2}, {"residual_gain": 0.7}], ids=str)
def test_it_is_openais_architecture(changes):
    """Features, codes and pictures, with biases that are not 0."""
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, **changes)
    model = with_biases(fnn.DiscreteVAE(config, impl="reference")).double()
    images = torch.rand(3, 3, 16, 24, dtype=torch.float64)
    logits = encoder_written_out(model, images)
    torch.testing.assert_close(model.encoder(map_pixels(images)), logits)
    codes = logits.argmax(1)
    assert len(codes.unique()) > 2
    assert torch.equal(model.encode(images), codes)
    codes = torch.randint(config.num_codes, (3, 4, 6))
    mu, _ = decoder_written_out(model, one_hot(codes, config.num_codes).movedim(-1, 1).double())
    pictures = ((torch.sigmoid(mu) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(model.decode(codes).double(), pictures, rtol=0, atol=1e-6)


def test_initialisation_is_openais():
    """Normal, with a variance of one over the numbers that are added up, and biases 0."""
    torch.manual_seed(0)
    model = fnn.DiscreteVAE(dataclasses.replace(SMALL, hidden=64, num_codes=500, embedding_dim=50))
    sizes = set()
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            assert not parameter.any(), name
        elif parameter.numel() > 5000:
            sizes.add(parameter.shape[-1])
            assert parameter.std().item() == pytest.approx(parameter[0].numel() ** -0.5, rel=0.05), name
    assert sizes == {1, 3, 7}


# -- the objective -----------------------------------------------------------------------------------------------------


def eager_loss(model, images, tau, beta, seed):
    """The objective as the paper has it, with all logits, by convolutions of whole one-hot-like maps."""
    config = model.config
    logits = encoder_written_out(model, images).movedim(1, -1)
    B, h, w, K = logits.shape
    rows = torch.arange(B * h * w)
    noise = gumbel_noise(torch.tensor([seed]), rows, K, torch.float64).view(logits.shape)
    relaxed = torch.softmax((logits + noise) / tau, -1)
    if config.hard:
        relaxed = one_hot(relaxed.argmax(-1), K) + relaxed - relaxed.detach()
    mu, log_scale = decoder_written_out(model, relaxed.movedim(-1, 1))
    x = map_pixels(images)
    if config.likelihood == "logit_laplace":
        log_scale = log_scale.clamp(min=config.min_log_scale)
        b = log_scale.exp()
        density = torch.exp(-(torch.logit(x) - mu).abs() / b) / (2 * b * x * (1 - x))
        reconstruction = -density.log().mean()
    else:
        error = (torch.sigmoid(mu) - x).abs()
        reconstruction = (error if config.likelihood == "l1" else error**2).mean()
    p = logits.softmax(-1)
    kl_per_image = (p * (p.log() + math.log(K))).sum((1, 2, 3))
    return (
        reconstruction + beta * kl_per_image.mean() / images[0].numel(),
        reconstruction,
        kl_per_image.mean() / (h * w),
    )


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, hard=True),
        dataclasses.replace(SMALL, min_log_scale=0.1),
        dataclasses.replace(SMALL, likelihood="l1", channels=1),
        dataclasses.replace(SMALL, likelihood="l2", downsampling=1, image_size=3),
    ],
    ids=["paper", "hard", "min_log_scale", "l1", "l2"],
)
def test_objective_and_gradients_equal_the_eager_ones(config):
    torch.manual_seed(0)
    model = with_biases(fnn.DiscreteVAE(config, impl="reference")).double()
    images = torch.rand(2, config.channels, config.image_size, config.image_size, dtype=torch.float64)
    out = model(images, tau=0.5, beta=6.6, seed=3)
    expected = eager_loss(model, images, 0.5, 6.6, 3)
    # The loss itself is added up in float32: see DiscreteVAE._reconstruction_loss.
    for actual, exact in zip(out[:3], expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    actual = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    exact = torch.autograd.grad(expected[0], parameters, allow_unused=True)
    for (name, _), a, e in zip(model.named_parameters(), actual, exact, strict=True):
        scale = e.abs().max().item()
        torch.testing.assert_close(
            a, e, rtol=1e-4, atol=1e-4 * scale + 1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_cpu_equals_the_reference():
    torch.manual_seed(0)
    model = fnn.DiscreteVAE(SMALL)
    images = torch.rand(2, 3, 16, 16)
    out = model(images, tau=0.5, beta=6.6, seed=3)
    model.impl = "reference"
    expected = model(images, tau=0.5, beta=6.6, seed=3)
    for actual, exact in zip(out[:3], expected[:3], strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(out.codes, expected.codes)


@pytest.mark.parametrize("hard", [False, True])
def test_the_reference_serves_all_that_is_asked_of_it(no_kernels, hard):
    model = fnn.DiscreteVAE(dataclasses.replace(SMALL, hard=hard), impl="reference")
    images = torch.rand(2, 3, 16, 16)
    model(images, beta=6.6).loss.backward()
    model.reconstruct(images)


def test_a_named_kernel_serves_or_refuses():
    """In float64 none computes."""
    model, images = fnn.DiscreteVAE(SMALL, impl="cpu").double(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    for call in (model, model.encode):
        with pytest.raises(ValueError, match="impl='cpu' cannot serve this call: it computes in float32"):
            call(images)


def test_loss_does_not_depend_on_the_batch():
    """The paper's division: KL is summed over an image's codes and divided by its pixels, whatever the batch is."""
    model = fnn.DiscreteVAE(SMALL)
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        one, many = model(image, seed=0), model(image.expand(5, -1, -1, -1), seed=0)
        beta = model(image, beta=6.6, seed=0).loss - one.loss
    torch.testing.assert_close(one.kl, many.kl)
    torch.testing.assert_close(beta, 6.6 * one.kl * 16 / (3 * 16 * 16), rtol=1e-3, atol=1e-6)


def test_it_learns():
    torch.manual_seed(0)
    model = fnn.DiscreteVAE(SMALL)
    images = (torch.rand(16, 3, 1, 1) > 0.5).float().expand(-1, -1, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(150):
        out = model(images, tau=0.5, seed=step)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert (model.reconstruct(images) - images).abs().mean() < 0.25


# -- the rest of the face ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_images_of_other_sizes():
    model = fnn.DiscreteVAE(SMALL)
    images = torch.rand(2, 3, 8, 20)
    codes = model.encode(images)
    assert codes.shape == (2, 2, 5) and codes.dtype == torch.int64
    assert model.decode(codes).shape == images.shape
    assert torch.equal(model.reconstruct(images), model.decode(codes))
    assert model(images[:0]).codes.shape == (0, 2, 5)


@torch.no_grad()
def test_what_the_docstring_says_of_hooks():
    model, called = fnn.DiscreteVAE(SMALL), set()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: called.add(module))
    model(torch.rand(2, 3, 16, 16))
    # Sequences of what is called may be called in part.
    silent = {name for name, x in model.named_modules() if x not in called and not isinstance(x, torch.nn.Sequential)}
    assert silent == {"encoder", "encoder.blocks.output.conv", "decoder.blocks.input"}
    assert called.issuperset(x for name, x in model.named_modules() if "group_" in name.rpartition(".")[2])


def test_encode_is_the_argmax_of_the_logits():
    model = fnn.DiscreteVAE(SMALL)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.encode(images), model.encoder(map_pixels(images)).argmax(1))


def test_pixels_map_there_and_back():
    x = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(map_pixels(x), torch.tensor([0.1, 0.3, 0.9]))
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)
    assert unmap_pixels(torch.tensor([0.05, 0.95])).tolist() == [0, 1]


def test_presets():
    openai = PRESETS["openai"]
    assert (openai.num_codes, openai.grid, openai.embedding_dim, openai.widths) == (
        8192,
        32,
        128,
        [256, 512, 1024, 2048],
    )
    for name in PRESETS:
        with torch.device("meta"):
            model = fnn.DiscreteVAE(name)
        assert model.config is PRESETS[name]


def test_gains():
    """The paper's is one over the number of blocks squared."""
    assert PRESETS["openai"].gain == 1 / 64
    assert dataclasses.replace(SMALL, blocks_per_group=5).gain == 1 / 225
    assert PRESETS["tiny"].gain == 1


def test_autocast():
    model = fnn.DiscreteVAE(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.rand(2, 3, 16, 16), beta=6.6)
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_under_autocast_pixels_and_losses_keep_float32s_digits(likelihood):
    """They are what float64 makes of the same output of the decoder and of the same pixels."""
    torch.manual_seed(0)
    model = with_biases(fnn.DiscreteVAE(dataclasses.replace(SMALL, likelihood=likelihood)))
    outputs = []
    model.decoder.register_forward_hook(lambda module, arguments, out: outputs.append(out))
    images = torch.rand(2, 3, 16, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, seed=0)
        pictures = model.decode(out.codes)
    assert all(x.dtype == torch.bfloat16 for x in outputs)
    (mu, log_scale), x = outputs[0].double().chunk(2, 1), 0.8 * images.double() + 0.1
    b = log_scale.exp()
    loss = {
        "logit_laplace": (torch.logit(x) - mu).abs() / b + torch.log(2 * b * x * (1 - x)),
        "l1": (torch.sigmoid(mu) - x).abs(),
        "l2": (torch.sigmoid(mu) - x) ** 2,
    }[likelihood].mean()
    torch.testing.assert_close(out.reconstruction_loss.double(), loss, rtol=2e-6, atol=0)
    mu, _ = outputs[1].double().chunk(2, 1)
    assert pictures.dtype == torch.float32
    torch.testing.assert_close(pictures.double(), unmap_pixels(torch.sigmoid(mu)), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["encode", "decode", "reconstruct"])
def test_it_compiles_whole_and_exports(name):
    """What is checked of values is left out where there are none: under compilers, exporters, vmap and fake tensors."""
    model = fnn.DiscreteVAE(SMALL).eval()
    method, images, codes = getattr(model, name), torch.rand(2, 3, 16, 16), torch.randint(70, (2, 4, 4))
    given = codes if name == "decode" else images

    class Method(torch.nn.Module):
        def forward(self, x):
            return getattr(self.model, name)(x)

    exported = Method()
    exported.add_module("model", model)
    program = torch.export.export(exported, (given,)).module()
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    expected = method(given)
    for call in (compiled, program):
        torch.testing.assert_close(call(given), expected)
    mapped = torch.func.vmap(lambda one: method(one[None])[0])(given)
    torch.testing.assert_close(mapped, expected, rtol=0, atol=1e-5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert method(mode.from_tensor(given)).shape == expected.shape


def test_images_are_of_the_models_dtype_or_autocast_makes_them_and_on_its_device():
    model, images = fnn.DiscreteVAE(SMALL), torch.rand(2, 3, 16, 16)
    for call in (model, model.encode):
        with pytest.raises(ValueError, match="images must be on the module's device cpu, got meta"):
            call(images.to("meta"))
        for dtype in (torch.float64, torch.bfloat16):
            with pytest.raises(TypeError, match=f"the module's dtype torch.float32, or autocast, got {dtype}"):
                call(images.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            call(images.bfloat16())
            with pytest.raises(TypeError, match="got torch.float64"):  # which autocast leaves alone
                call(images.double())
    model.double()(images.double())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_pixels_are_from_0_to_1_and_what_resizing_adds(likelihood):
    """A loss is finite, or refused."""
    model = fnn.DiscreteVAE(dataclasses.replace(SMALL, likelihood=likelihood))
    images = torch.rand(2, 3, 16, 16)
    for value in (0.0, 1.0, -0.12, 1.12):
        images[0, 0, 0, 0] = value
        assert model(images).loss.isfinite()
    for value in (-0.13, 1.13, -1.0, 255.0, math.nan, math.inf):
        images[0, 0, 0, 0] = value
        for call in (model, model.encode):
            with pytest.raises(ValueError, match="images must have pixels from 0 to 1 .*, got values from"):
                call(images)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: fnn.DiscreteVAE("huge"), ValueError, ["config", "tiny", "huge"]),
        (lambda m: m(torch.zeros(2, 3, 16, 18)), ValueError, ["images", "multiples of 4", "18"]),
        (lambda m: m(torch.zeros(2, 1, 16, 16)), ValueError, ["images", "(B, 3, H, W)"]),
        (lambda m: m.encode(torch.zeros(3, 16, 16)), ValueError, ["images", "(3, 16, 16)"]),
        (lambda m: m(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)), TypeError, ["images", "from 0 to 1", "uint8"]),
        (lambda m: m(None), TypeError, ["images", "NoneType"]),
        (lambda m: m.decode(torch.zeros(1, 4, 4)), TypeError, ["codes", "int64", "float32"]),
        (lambda m: m.decode(torch.zeros(4, 4, dtype=torch.int64)), ValueError, ["codes", "(B, h, w)", "(4, 4)"]),
        (lambda m: m.decode(torch.full((1, 4, 4), 70)), ValueError, ["codes", "from 0 to 69", "values from 70 to 70"]),
        (lambda m: m.decode(torch.full((1, 4, 4), -1)), ValueError, ["codes", "from 0 to 69", "values from -1 to -1"]),
        (lambda m: fnn.DVAEConfig(downsampling=6), ValueError, ["downsampling", "power of two", "6"]),
        (lambda m: fnn.DVAEConfig(image_size=100), ValueError, ["image_size", "multiple", "100"]),
        (lambda m: fnn.DVAEConfig(num_codes=0), ValueError, ["num_codes", "at least 1", "0"]),
        (lambda m: fnn.DVAEConfig(image_size=True), TypeError, ["image_size", "an integer", "True"]),
        (lambda m: fnn.DVAEConfig(residual_gain=0), ValueError, ["residual_gain", "positive", "0"]),
        (lambda m: fnn.DVAEConfig(residual_gain="1"), TypeError, ["residual_gain", "a finite number", "'1'"]),
        (lambda m: fnn.DVAEConfig(min_log_scale=float("nan")), TypeError, ["min_log_scale", "a finite number", "nan"]),
        (lambda m: fnn.DVAEConfig(hidden=6), ValueError, ["hidden", "multiple of 4", "6"]),
        (lambda m: fnn.DVAEConfig(likelihood="l3"), ValueError, ["likelihood", "logit_laplace", "l3"]),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call(fnn.DiscreteVAE(SMALL))
    for word in words:
        assert word in str(caught.value)
