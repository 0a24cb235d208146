"""A source as image codes and captions, computed once by a discrete VAE and kept in a file (Ramesh et al. 2021: stage 2
takes the argmax of the encoder's logits, without noise).

N examples, G = h * w codes of a picture.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dalle_fast import checkpoint
from dalle_fast.data import batches
from dalle_fast.data.crops import caption_crop, centre_crop
from dalle_fast.data.loading import epoch_order
from dalle_fast.data.source import can_crop, identity
from dalle_fast.data.strings import Strings
from dalle_fast.errors import UserError
from dalle_fast.outputs import UNFINISHED, held, make_folder
from dalle_fast.progress import bar, on_terminal, tell
from dalle_fast.training import processes

BATCH = 64
CAPTIONS_AT_ONCE = 10_000
SAVE_SECONDS = 60  # between two parts of what is computed


class Encoded(NamedTuple):
    """What `encode_source` returns.

    codes: (N, G) int16 or int32, in raster order; mapped from the file, so that all processes of a machine share the
    memory. captions: N of them. key: what they were computed from.
    """

    codes: torch.Tensor
    captions: Sequence[str]
    key: dict


def encode_source(dvae, source, *, folder, split, count=None, seed=0, workers=0, progress=True) -> Encoded:
    """The codes and captions of `count` pictures, from the file in `folder` that holds them, or computed and put there.

    A file is named by a hash of its key: the dVAE's weights, the source's `identity`, the split, the count, the seed
    and, where pictures are cropped, the crop. So another dVAE or other data never read what is not theirs. (A source
    that changed in a way that its identity does not show is not noticed.)

    Codes that were computed when the process ended, but for those of the last minute, are not computed again. Of two
    processes that want the same, one waits; those that train together (see `dalle_fast.training.processes`) all call
    this, and each computes its share.

    Args:
        dvae: a `DiscreteVAE`, on the device that computes.
        folder: made where it is missing. split: "train" takes pictures with the random crops of stage 2,
            `caption_crop`, in the order in which they lie in their files, else a shuffled one; another split in order,
            cropped in the middle.
        count: None for all of the source's. More than that are further crops of the same pictures, where the source
            can be cropped (in training); else there are no more.
        seed: of order and crops. workers: processes that load. progress: say what is computed, on stderr.

    Raises:
        UserError: `folder` or the file cannot be written; processes that train together have other data or another
            dVAE. DataError: the source cannot be read. OSError: codes that are there cannot be read, as another user's.
    """
    key = key_of(dvae, source, split=split, count=count, seed=seed)
    path = path_of(folder, key)
    together = processes.current()
    # As where each machine has data of its own: of other numbers of batches they would wait for one another without end.
    together.check_same_values(key, "the pictures and the VAE")
    if not _lacking(path, key, together):
        if together.leads and any(_files_of_parts(path)):  # of a process that was killed before it had removed them
            with contextlib.suppress(UserError, OSError), held(folder, "the folder of codes"):
                _remove_parts(path)
        return _read(path, key)
    with contextlib.ExitStack() as stack:
        if together.leads:
            make_folder(folder, "the folder of codes")
            stack.enter_context(held(folder, "the folder of codes", wait=True))
        if _lacking(path, key, together):  # still, and not computed by another process
            if together.leads and path.exists():
                tell(f"{path} is damaged: computing the codes again")
            _encode(dvae, source, key, path, workers, progress and together.leads, together)
            together.wait()  # for the others' parts
            with together.lead_first():
                if together.leads:
                    _write(path, _joined(path, key))
                    _remove_parts(path)
        return _read(path, key)


def _lacking(path, key, together) -> bool:
    """Whether there are no codes with this key, as the lead finds."""
    return together.of_lead([int(together.leads and _kept(path, key) is None)]) == [1]


def key_of(dvae, source, *, split, count, seed) -> dict:
    """What codes are known by: the `key` of what `encode_source` returns for the same arguments."""
    key = {
        "dvae": fingerprint(dvae),
        "data": identity(source),
        "split": split,
        "count": _count(source, split, count),
        "seed": seed,
    }
    if can_crop(source):  # a crop that is changed needs another name
        key["crop"] = (caption_crop if split == "train" else centre_crop).__name__
    return key


def path_of(folder, key) -> Path:
    """The file in which `encode_source` keeps codes with this key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(folder) / f"{key['split']}-{digest[:16]}.safetensors"


def captions_ahead(source, *, split, count, seed) -> tuple[Strings, Strings] | None:
    """Names and captions of the pictures that `encode_source` takes for the same arguments, in its order.

    No picture is read: of a bad one, whose place another will take, it is the picture's own caption, or "". None where
    the source cannot tell captions alone; see `Source`.
    """
    if not hasattr(source, "named_caption"):
        return None
    read = functools.lru_cache(1 << 10)(source.named_caption)  # there may be several crops, one behind the other
    indices = _chosen(source, split, _count(source, split, count), seed)[:, 1].tolist()
    names, captions = [], []
    for first in range(0, len(indices), CAPTIONS_AT_ONCE):
        some = [read(index) for index in indices[first : first + CAPTIONS_AT_ONCE]]
        names.append(Strings.of(name for name, _ in some))
        captions.append(Strings.of(caption for _, caption in some))
    return Strings.joined(names), Strings.joined(captions)


def _chosen(source, split, count, seed) -> np.ndarray:
    """(N, 2) int64: epoch and index of each picture that is taken, in the order in which they are.

    Training shuffles codes anyway. So files are read from front to back: of millions in shuffled order a disk, or a
    network's, would be slower than a GPU.
    """
    size = len(source)
    epochs, indices = np.divmod(np.arange(count), size)
    if split == "train":
        orders = (epoch_order(size, seed, epoch) for epoch in range(-(-count // size)))
        indices = np.concatenate(list(orders))[:count]
        places = getattr(source, "places", None)
        if places is not None:
            order = np.lexsort((epochs, places[indices]))
            epochs, indices = epochs[order], indices[order]
    return np.stack([epochs, indices], 1)


def _count(source, split, count):
    limit = sys.maxsize if split == "train" and can_crop(source) else len(source)
    count = min(len(source) if count is None else count, limit)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return count


def codes_used(codes, num_codes: int) -> int:
    """How many of `num_codes` codes there are among codes (N, G), of which little is in memory at once."""
    used = torch.zeros(num_codes, dtype=torch.bool)
    for some in codes.split(1 << 12):
        used |= torch.bincount(some.flatten(), minlength=num_codes) > 0
    return int(used.sum())


def fingerprint(model) -> str:
    """A hash of a model's config and weights."""
    digest = hashlib.sha256(json.dumps(checkpoint.config_to_json(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# While codes are computed, what there is of them is kept in parts, files of their own: so little is lost with the process,
# and each of several has its own.


@torch.no_grad()
def _encode(dvae, source, key, path, workers, progress, together):
    """Compute this process's share of what no part has, and leave it in parts."""
    device = next(dvae.parameters()).device
    kind = torch.int16 if dvae.config.num_codes <= 1 << 15 else torch.int32
    done = np.zeros(-(-key["count"] // BATCH), np.int64)
    for first, part in _parts(path, key) if together.leads else ():
        done[first : first + _batches_of(part)] = 1
    lacking = np.flatnonzero(np.array(together.of_lead(done.tolist())) == 0)
    mine = np.array_split(lacking, together.count)[together.number].tolist()
    keys = _chosen(source, key["split"], key["count"], key["seed"])
    stream = batches(
        source,
        BATCH,
        image_size=dvae.config.image_size,
        seed=key["seed"],
        keys=np.concatenate([keys[:0], *(keys[number * BATCH : (number + 1) * BATCH] for number in mine)]),
        train=key["split"] == "train",
        crop=caption_crop,
        num_workers=workers,
    )
    codes, captions, since = [], [], time.monotonic()
    title, in_lines = f"codes of {source.name}, {key['split']}", progress and not on_terminal()
    if in_lines:
        tell(f"{title}: {len(mine)} batches of {BATCH}")
    elif progress:
        stream = bar(stream, total=len(mine), unit="batch", title=title)
    for place, batch in enumerate(stream, 1):
        images = batch.images.to(device, non_blocking=True).float() / 255
        codes.append(dvae.encode(images).flatten(1).to("cpu", kind))
        captions += batch.captions
        next_one = mine[place] if place < len(mine) else None
        if next_one != mine[place - 1] + 1 or time.monotonic() - since > SAVE_SECONDS:
            first = mine[place - 1] + 1 - len(codes)
            _write(_part(path, first), Encoded(torch.cat(codes), Strings.of(captions), _key_of_part(key, first)))
            codes, captions, since = [], [], time.monotonic()
            if in_lines and next_one is not None:
                tell(f"{title}: {place} of {len(mine)} batches are saved")


def _part(path, first_batch):
    return path.with_name(f"{path.stem}-part-{first_batch:09d}{path.suffix}")


def _key_of_part(key, first_batch) -> dict:
    return {**key, "batch": BATCH, "first_batch": first_batch}


def _parts(path, key) -> Iterator[tuple[int, Encoded]]:
    """The parts that there are, each behind the number of its first batch, in order. Of two that overlap, as two runs leave
    them where no folder can be held, the later one is none: what is lacking then is computed again."""
    end = 0
    for file in sorted(path.parent.glob(f"{path.stem}-part-*{path.suffix}")):
        number = file.stem.rpartition("-")[2]
        first = int(number) if number.isdecimal() else -1
        if first >= end and (part := _kept(file, _key_of_part(key, first))):
            end = first + _batches_of(part)
            yield first, part


def _batches_of(part) -> int:
    return -(-len(part.captions) // BATCH)


def _joined(path, key) -> Encoded:
    parts = [part for _, part in _parts(path, key)]
    codes, captions = torch.cat([part.codes for part in parts]), Strings.joined([part.captions for part in parts])
    if len(codes) != key["count"]:
        raise checkpoint.CheckpointError(
            f"{path.parent} lacks parts of the codes: all processes must have it as one folder"
        )
    return Encoded(codes, captions, key)


def _files_of_parts(path) -> Iterator[Path]:
    """Also of one that was cut short."""
    for start in ("", UNFINISHED):
        yield from path.parent.glob(f"{start}{path.stem}-part-*")


def _remove_parts(path) -> None:
    for part in _files_of_parts(path):
        part.unlink(missing_ok=True)


def _kept(path, key) -> Encoded | None:
    if not path.exists():
        return None
    open(path, "rb").close()  # what this user may not read is not damaged: it could not be replaced either, after hours
    try:
        return _read(path, key)
    except checkpoint.CheckpointError:
        return None


def _write(path, encoded) -> None:
    text = encoded.captions.data
    tensors = {
        "codes": encoded.codes,
        "captions": torch.from_numpy(text if len(text) else np.zeros(1, np.uint8)),
        "caption_lengths": torch.from_numpy(encoded.captions.lengths),
    }
    checkpoint.save_tensors(path, tensors, header=encoded.key)


def _read(path, key) -> Encoded:
    tensors, header = checkpoint.load_tensors(path, mapped=True)
    if header != key:
        raise checkpoint.CheckpointError(f"{path} is of {header}, expected {key}")
    captions = Strings(tensors["captions"].numpy(), tensors["caption_lengths"].numpy().cumsum())
    return Encoded(tensors["codes"], captions, key)
