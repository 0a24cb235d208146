"""Train the transformer over captions and image codes, stage 2.

The pictures become codes once, by the discrete VAE; the codes are kept in a file. The run lives in one folder, with a
copy of the VAE and the tokenizer, so that it is all that dalle-fast generate needs. Ended by SIGTERM, Ctrl-C or a
terminal that is closed (SIGHUP, unless nohup ignores it) training saves first, and exits with 128 + the signal's number
(143, 130, 129); --resume goes on from there. Ended while pictures become codes it loses those of the last minute at
most: the same command goes on. The processes that torchrun starts (torchrun --nproc-per-node N --shutdown-timeout 600
-m dalle_fast train-dalle ...) share every batch, and the pictures that become codes. When torchrun is stopped it kills them
after that many seconds, by default 30: a large model takes longer to save.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dalle_fast.commands import training
from dalle_fast.errors import UserError
from dalle_fast.masks import RULES
from dalle_fast.progress import tell
from dalle_fast.training.recipes import DALLE_RECIPES

if TYPE_CHECKING:
    import torch

    from dalle_fast.data import Tokenizer
    from dalle_fast.nn import DALLE, DALLEConfig, DiscreteVAE

CODES = "codes"  # in the folder of a run
MASKS, LAST_MASK = "row,column,row,row", "conv_flat"  # the paper's: what DALLEConfig.rules is where it is None
VALIDATION = 1000  # at most, of the validation pictures
EVALUATIONS = 10  # of a run, so that it shows when it only learns by heart; they take 2% of the time of `tiny`
OFTEN = 20  # times that a crop is seen, of which more are recommended
# A VAE that learned has most of its codes in use (65% of `tiny`'s on shapes), a collapsed one a handful, however many it
# has. Of both the bounds are far.
FEW_CODES, FEW_SHARE = 16, 0.02


def add_arguments(parser) -> None:
    run = parser.add_argument_group("the run")
    training.add_run_arguments(run, DALLE_RECIPES)
    run.add_argument("--dvae", metavar="DIR", help="folder of a run of train-dvae (default: that of --init)")
    tokenizer = "of captions (default: that of --init; without it one is trained on the data's)"
    run.add_argument("--tokenizer", metavar="FILE", help=tokenizer)
    run.add_argument("--truncate", action="store_true", help="cut captions that are too long, instead of refusing them")
    run.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="pictures that become codes, at first; more than there are become further crops (default: all there are)",
    )
    run.add_argument(
        "--codes",
        metavar="DIR",
        help="where codes and captions are kept, and found again (default: in the run's folder); empty it after "
        "changes that leave all files' names and sizes as they were, which are not noticed",
    )
    _add_model_arguments(
        parser.add_argument_group("the model; what is not given is the preset's, or that of --init or the VAE")
    )
    recipe = parser.add_argument_group("the recipe; what is not given is the preset's")
    training.add_recipe_arguments(recipe, DALLE_RECIPES)
    training.add_loop_arguments(parser.add_argument_group("the loop"), evaluations=EVALUATIONS)


def _add_model_arguments(group) -> None:
    def add(flag, help, **keywords):  # a flag that is not given is no attribute
        group.add_argument(flag, help=help, default=argparse.SUPPRESS, **keywords)

    add("--vocab-size", "tokens at most of a tokenizer that is trained", type=int, metavar="N")
    add("--text-len", "tokens of the longest caption", type=int, metavar="N")
    add("--layers", "of the transformer", type=int, metavar="N")
    add("--width", "of the transformer", type=int, metavar="N")
    add("--num-heads", "of attention", type=int, metavar="N")
    add("--head-dim", "size of a head", type=int, metavar="N")
    rules = "which earlier codes a code sees, layer by layer, from the first again after the last (the paper's: "
    rules += f"{MASKS}); RULE is one of {', '.join(RULES)} (see dalle_fast.masks)"
    add("--masks", rules, metavar="RULE,...")
    add("--last-mask", f"the RULE of the last layer (the paper's: {LAST_MASK})", choices=RULES)
    add("--kernel-size", "of convolutional attention", type=int, metavar="N")
    add("--text-weight", "of the text's loss; the image's has the rest of 1", type=float, metavar="X")
    add("--hide-padding", "hide padding from attention, instead of learning it", action="store_true")
    group.add_argument("--activation-checkpointing", action="store_true", help="trade time for memory")


def run(arguments) -> int:
    then = f'dalle-fast generate "a caption" --model {shlex.quote(arguments.out)} --out FILE.png'
    return training.run_training(
        make_objective,
        arguments,
        DALLE_RECIPES,
        then,
        evaluations=EVALUATIONS,
    )


def make_objective(arguments, recipe):
    """The `DALLEObjective` of the flags, trained by `recipe`; tokenizer and codes are in the run's folder afterwards.

    Raises:
        ValueError: a flag's value that the model, the recipe or the data refuse.
        UserError: a folder or file that is not what the flag needs.
    """
    from dalle_fast.data.images import tell_of_bad
    from dalle_fast.outputs import held
    from dalle_fast.sampling import TOKENIZER
    from dalle_fast.training import processes

    together, out = processes.current(), Path(arguments.out)
    with contextlib.ExitStack() as stack:
        captions = ahead = None
        with together.lead_first():
            run = _begin(arguments, recipe)
            if together.leads:
                stack.enter_context(held(out, "--out"))
                captions, ahead = _look_ahead(arguments, run)
        encoded = _encoded(arguments, run)  # each has its share of them
        tell_of_bad(*run.sources.values())
        if together.leads:
            _tell_of_used_codes(encoded["train"].codes, run.dvae.config.num_codes)
        with together.lead_first():  # which leaves what the others read
            tokenizer = run.tokenizer
            if tokenizer is None and not together.leads:
                tokenizer = _tokenizer(arguments, out)
            elif tokenizer is None and captions == encoded["train"].captions:
                tokenizer = ahead
            elif tokenizer is None:  # codes were there already, or pictures were bad and others were taken
                tokenizer = _new_tokenizer(encoded["train"].captions, run.preset.vocab_size)
            objective = _objective(arguments, recipe, run, tokenizer, encoded)
            if together.leads and not run.going_on:  # a run's own are never replaced: what does not fit them is refused
                tokenizer.save(out / TOKENIZER)
            return objective


class _Run(NamedTuple):
    """What there is before pictures become codes. tokenizer: None where one is to be trained."""

    going_on: bool
    preset: DALLEConfig
    initial: DALLE | dict | None
    device: torch.device
    dvae: DiscreteVAE
    tokenizer: Tokenizer | None
    sources: dict


def _begin(arguments, recipe) -> _Run:
    """What the flags mean, and all that can be refused now."""
    from dalle_fast import checkpoint
    from dalle_fast.data.text import MIN_VOCAB_SIZE
    from dalle_fast.nn import dalle
    from dalle_fast.nn import functional as F
    from dalle_fast.outputs import make_folder
    from dalle_fast.training import processes
    from dalle_fast.training.codes import key_of
    from dalle_fast.training.loop import check_folder
    from dalle_fast.training.stage2 import known_settings

    if arguments.examples is not None and arguments.examples < 1:
        raise UserError(f"--examples must be at least 1, got {arguments.examples}")
    F.noise_seed(arguments.seed)  # refuses what is out of range
    given, out = dict(vars(arguments)), Path(arguments.out)
    going_on = check_folder(out, resume=arguments.resume)
    preset, initial = training.beginning(arguments, "DALLE", dalle.PRESETS)
    if "masks" in given or "last_mask" in given:
        given["rules"] = _rules(
            given.get("masks", MASKS), given.get("last_mask", LAST_MASK), given.get("layers", preset.layers)
        )
    preset = training.replaced(preset, given)
    device = training.device(arguments.device)
    dvae = _dvae(arguments, going_on, device)
    tokenizer = _tokenizer(arguments, out if going_on else arguments.init)
    if tokenizer is not None:
        tokenizer.encode([], preset.text_len, dropout=recipe.bpe_dropout, seed=0)  # refuses what it cannot leave out
    elif preset.vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"--vocab-size must be at least {MIN_VOCAB_SIZE}, got {preset.vocab_size}")
    training.check_memory(_config(preset, dvae, tokenizer), device)
    sources = _sources(arguments, dvae)
    training.tell_of_left_out(sources["train"])
    if processes.current().leads:
        _tell_of_few_crops(arguments, recipe, sources["train"])
    if going_on:  # wrong flags would take the hours of other codes before the loop refuses them
        key = key_of(dvae, sources["train"], **_chosen(arguments, "train", sources["train"]))
        config = _config(preset, dvae, tokenizer)
        known = known_settings(config, recipe, key, seed=arguments.seed, truncate=arguments.truncate)
        checkpoint.check_settings(out / checkpoint.CHECKPOINTS, known)
    make_folder(out, "--out")
    return _Run(going_on, preset, initial, device, dvae, tokenizer, sources)


def _objective(arguments, recipe, run, tokenizer, encoded):
    from dalle_fast.training.stage2 import DALLEObjective

    try:
        return DALLEObjective(
            _config(run.preset, run.dvae, tokenizer),
            recipe,
            run.dvae,
            tokenizer,
            encoded["train"],
            encoded["validation"],
            initial=run.initial,
            seed=arguments.seed,
            truncate=arguments.truncate,
            device=run.device,
            activation_checkpointing=arguments.activation_checkpointing,
        )
    except ValueError as error:
        raise UserError(f"{error} (the codes are kept, in {_codes_folder(arguments)})") from error


def _dvae(arguments, going_on, device):
    """The frozen discrete VAE: what is not given is that of the run, or of --init."""
    from dalle_fast import checkpoint
    from dalle_fast.sampling import DVAE
    from dalle_fast.training.codes import fingerprint

    if not (arguments.dvae or arguments.init or going_on):
        raise UserError("--dvae must be given, the folder of a run of train-dvae, or --init, whose VAE is taken")
    folder = Path(arguments.dvae or Path(arguments.out if going_on else arguments.init) / DVAE)
    dvae = checkpoint.load_model(folder, kind="DiscreteVAE", device=device)
    if going_on and fingerprint(dvae) != fingerprint(checkpoint.load_model(Path(arguments.out) / DVAE)):
        raise UserError(f"{arguments.out} began with another discrete VAE than the one in {folder}")
    return dvae


def _tokenizer(arguments, folder):
    """The one that is given, or of the run in `folder`; None where one is to be trained."""
    from dalle_fast.data import Tokenizer
    from dalle_fast.sampling import TOKENIZER

    if not (arguments.tokenizer or folder):
        return None
    return Tokenizer.load(arguments.tokenizer or Path(folder) / TOKENIZER)


def _config(preset, dvae, tokenizer):
    """`tokenizer`: None for one of as many tokens as there may be."""
    vocab_size = tokenizer.vocab_size if tokenizer else preset.vocab_size
    fits = {"vocab_size": vocab_size, "num_codes": dvae.config.num_codes, "grid": (dvae.config.grid,) * 2}
    return training.replaced(preset, fits)


def _tell_of_few_crops(arguments, recipe, source) -> None:
    from dalle_fast.data.source import can_crop

    times = recipe.steps * recipe.batch_size / len(source)
    if arguments.examples is None and can_crop(source) and times > OFTEN:
        tell(
            f"each of {len(source)} pictures is seen {times:.0f} times, always in the same crop: "
            f"--examples {10 * len(source)} takes ten crops of each"
        )


def _tell_of_used_codes(codes, num_codes) -> None:
    from dalle_fast.training.codes import codes_used

    used = codes_used(codes, num_codes)
    tell(f"the pictures use {used} of {num_codes} codes")
    if used < min(num_codes, max(FEW_CODES, FEW_SHARE * num_codes)):
        tell(
            "warning: so few that pictures of them show little: the discrete VAE has collapsed, or all pictures are alike "
            "(dalle-fast reconstruct shows what it keeps; a smaller --beta of train-dvae may help)"
        )


def _rules(masks, last, layers):
    """The mask rule of each layer, or None for the paper's."""
    names = [name.strip() for name in masks.split(",")]
    if wrong := [name for name in names if name not in RULES]:
        raise UserError(f"--masks must be of {', '.join(RULES)}, with commas between them, got {wrong[0]!r}")
    if (",".join(names), last) == (MASKS, LAST_MASK):
        return None
    return (*(names[layer % len(names)] for layer in range(layers - 1)), last)


def _sources(arguments, dvae) -> dict:
    from dalle_fast.data import open_source

    options = {"image_size": dvae.config.image_size, "seed": arguments.seed, "max_bad_share": arguments.max_bad_share}
    return {
        split: open_source(arguments.data, split=split, require_captions=True, **options)
        for split in ("train", "validation")
    }


def _look_ahead(arguments, run) -> tuple:
    """Refuse captions that are too long, and a tokenizer that does not fit, before hours in which pictures become codes.

    Where the codes are there already, or a source cannot tell captions alone, there is nothing to gain.

    Returns:
        The captions of training, as they are if no picture is bad, and the tokenizer that was trained on them, or the
        given one; or (None, None).
    """
    import torch

    from dalle_fast.nn.dalle import DALLE
    from dalle_fast.outputs import make_folder
    from dalle_fast.training.codes import captions_ahead, key_of, path_of
    from dalle_fast.training.initial import check_shapes

    sources, preset, initial = run.sources, run.preset, run.initial
    chosen = {split: _chosen(arguments, split, source) for split, source in sources.items()}
    paths = [path_of(_codes_folder(arguments), key_of(run.dvae, sources[split], **chosen[split])) for split in sources]
    if all(path.exists() for path in paths):
        return None, None
    make_folder(_codes_folder(arguments), "the folder of codes")
    tell(f"reading the captions of {arguments.data}")  # of a million files for minutes
    told = {split: captions_ahead(source, **chosen[split]) for split, source in sources.items()}
    if None in told.values():
        return None, None
    captions = told["train"][1]
    tokenizer = run.tokenizer or _new_tokenizer(captions, preset.vocab_size)
    for names, of_split in told.values():
        tokenizer.check_lengths(of_split, None if arguments.truncate else preset.text_len, names=names)
    if initial is not None and not isinstance(initial, dict):
        with torch.device("meta"):
            check_shapes(DALLE(_config(preset, run.dvae, tokenizer)), initial)
    return captions, tokenizer


def _encoded(arguments, run) -> dict:
    """The codes and captions of each split."""
    from dalle_fast.training.codes import encode_source

    folder, workers = _codes_folder(arguments), arguments.workers
    return {
        split: encode_source(run.dvae, source, folder=folder, workers=workers, **_chosen(arguments, split, source))
        for split, source in run.sources.items()
    }


def _codes_folder(arguments) -> Path:
    return Path(arguments.codes or Path(arguments.out) / CODES)


def _chosen(arguments, split, source) -> dict:
    """Which pictures of a split become codes."""
    count = arguments.examples if split == "train" else min(VALIDATION, len(source))
    return {"split": split, "count": count, "seed": arguments.seed}


def _new_tokenizer(captions, vocab_size):
    from dalle_fast.data import Tokenizer

    tokenizer = Tokenizer.train(captions, vocab_size)
    tell(f"a tokenizer of {tokenizer.vocab_size} entries was trained on {len(captions)} captions")
    return tokenizer
