"""A source as image codes and captions, computed once by a discrete VAE and kept in a file (Ramesh et al. 2021: stage 2
takes the argmax of the encoder's logits, without noise).

N examples, G = h * w codes of a picture.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from dalle_fast import checkpoint
from dalle_fast.data import batches
from dalle_fast.outputs import make_folder

BATCH, PROBED = 64, 16


class Encoded(NamedTuple):
    """What `encode_source` returns.

    codes: (N, G) int16 or int32, in raster order. captions: N of them. key: what they were computed from.
    """

    codes: torch.Tensor
    captions: list[str]
    key: dict


def encode_source(dvae, source, *, folder, split, count=None, seed=0, workers=0, progress=True) -> Encoded:
    """The codes and captions of `count` pictures, from the file in `folder` that holds them, or computed and put there.

    A file is named by a hash of its key: the dVAE's weights, the source's name, length and a few of its pictures, the
    split, the count and the seed. So another dVAE or other data never read what is not theirs. (A source that changed
    in a way that name, length and those few pictures do not show is not noticed.)

    Args:
        dvae: a `DiscreteVAE`, on the device that computes.
        folder: made where it is missing. split: "train" takes pictures in a shuffled order with the random crops of
            training; another one in order, cropped in the middle.
        count: None for all of the source's. More than that are further crops of the same pictures, where the source
            can be cropped (in training); else there are no more.
        seed: of order and crops. workers: processes that load. progress: say what is computed, on stderr.

    Raises:
        UserError: `folder` or the file cannot be written. DataError: the source cannot be read.
    """
    train = split == "train"
    limit = sys.maxsize if train and source.crop else len(source)
    count = min(len(source) if count is None else count, limit)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    key = {
        "dvae": fingerprint(dvae),
        "data": source.name,
        "pictures": len(source),
        "probe": _probe(source),
        "split": split,
        "count": count,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = Path(folder) / f"{split}-{digest[:16]}.safetensors"
    if path.exists():
        try:
            return _read(path, key)
        except checkpoint.CheckpointError as error:
            print(f"{error}; computing the codes again", file=sys.stderr)
    make_folder(folder, "the folder of codes")
    stream = batches(source, BATCH, image_size=dvae.config.image_size, seed=seed, train=train, num_workers=workers)
    encoded = _encode(dvae, stream, count, f"codes of {source.name}, {split}" if progress else None)._replace(key=key)
    _write(path, encoded)
    return encoded


def fingerprint(model) -> str:
    """A hash of a model's config and weights."""
    digest = hashlib.sha256(json.dumps(checkpoint.config_to_json(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _encode(dvae, stream, count, title):
    device = next(dvae.parameters()).device
    kind = torch.int16 if dvae.config.num_codes <= 1 << 15 else torch.int32
    codes, captions = [], []
    for batch in _bar(itertools.islice(stream, -(-count // BATCH)), -(-count // BATCH), title):
        images = batch.images.to(device, non_blocking=True).float() / 255
        codes.append(dvae.encode(images).flatten(1).to("cpu", kind))
        captions += batch.captions
    return Encoded(torch.cat(codes)[:count], captions[:count], {})


def _probe(source) -> str:
    """A hash of a few pictures and their captions, evenly spread."""
    digest = hashlib.sha256()
    for index in range(0, len(source), max(1, len(source) // PROBED)):
        image, caption = source[index]
        digest.update(f"{image.shape} {caption}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def _write(path, encoded) -> None:
    text = [caption.encode() for caption in encoded.captions]
    tensors = {
        "codes": encoded.codes,
        "captions": torch.frombuffer(bytearray(b"".join(text) or b" "), dtype=torch.uint8),
        "caption_lengths": torch.tensor([len(caption) for caption in text]),
    }
    checkpoint.save_tensors(path, tensors, header=encoded.key)


def _read(path, key) -> Encoded:
    tensors, header = checkpoint.load_tensors(path)
    if header != key:
        raise checkpoint.CheckpointError(f"{path} is of {header}, expected {key}")
    text, captions, first = tensors["captions"].numpy().tobytes(), [], 0
    for length in tensors["caption_lengths"].tolist():
        captions.append(text[first : first + length].decode())
        first += length
    return Encoded(tensors["codes"], captions, key)


def _bar(steps, total, title):
    if title is None:
        return steps
    if not sys.stderr.isatty():
        print(f"{title}: {total} batches of {BATCH}", file=sys.stderr, flush=True)
        return steps
    from tqdm import tqdm

    return tqdm(steps, total=total, desc=title, unit="batch")
