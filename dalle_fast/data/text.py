"""Captions to token ids and back: byte-pair encoding by the `tokenizers` library, with dropout that can be repeated.

B captions, T text positions, V vocabulary size.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from dalle_fast.data.source import DataError, check_count
from dalle_fast.outputs import written_whole

VOCAB_SIZE = 16_384  # Ramesh et al. 2021
MIN_VOCAB_SIZE = 257  # every byte and the padding
PADDING = "<pad>"
SHOWN = 80  # letters of a caption in a message
KEPT, SHORT = 1 << 15, 32  # words, and letters of those that are kept; longer ones lose a merge nearly always
AT_ONCE = 10_000  # captions that are checked: the library keeps 5 to 9 KB of each
HALVINGS = 4  # of the dropout, for a word that must grow less
MARGIN = 1.3  # of text_len over the longest caption: room for what dropout makes of it
_HALF = re.compile("[\ud800-\udfff]")  # of a character
_UNKNOWN_TO_PIECES = (  # parts of the library's BPE that `_pieces` does not have
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "unk_token",
    "byte_fallback",
    "ignore_merges",
)


class Tokenizer:
    """A byte-pair encoding. It lower-cases, and as its alphabet is the 256 bytes there are no unknown tokens.

    Made by `train` or `load`; can be pickled.

    Attributes:
        vocab_size: V, one more than the largest id.
    """

    def __init__(self, json_text: str):
        tokenizers = _library()
        parsed = json.loads(json_text)
        model = parsed["model"]
        if model.get("type") != "BPE":
            raise ValueError(f"its type must be BPE, got {model.get('type')}")
        model["dropout"] = None  # it would apply to every call
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(parsed))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # a caption is text, even if it says "<pad>"
        unknown = set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - set(model["vocab"])
        if unknown and not model.get("unk_token") and not model.get("byte_fallback"):
            raise ValueError(
                f"it must have a token for every byte, or for what is unknown; {len(unknown)} bytes lack one"
            )
        merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        self._ids = self._tokenizer.get_vocab()
        self._whole_and_kept = functools.lru_cache(KEPT)(self._merged)
        self._vocab_size = 1 + max(self._ids.values())  # ids may have gaps
        self._not_plain = [name for name in _UNKNOWN_TO_PIECES if model.get(name)]
        if self._tokenizer.pre_tokenizer is None:
            self._not_plain.append("no pre-tokenizer")
        if added := [token["content"] for token in parsed.get("added_tokens") or () if not token.get("special")]:
            self._not_plain.append(f"added tokens such as {added[0]!r}")  # special ones are text to `encode`

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
        """A tokenizer whose merges are the most frequent ones of the captions.

        Args:
            vocab_size: V at most; less where the captions do not have so many pairs.

        Raises:
            ValueError: no captions, or `vocab_size` below 257 (every byte, and padding).
        """
        vocab_size = check_count("vocab_size", vocab_size, minimum=MIN_VOCAB_SIZE)
        captions = (caption for caption in captions if caption.strip())  # one at a time: of millions there is no list
        first = next(captions, None)
        if first is None:
            raise ValueError("captions must hold a caption that is not empty, got none")
        tokenizers = _library()
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [
                tokenizers.normalizers.NFC(),
                tokenizers.normalizers.Lowercase(),
                tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                tokenizers.normalizers.Strip(),
            ]
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PADDING],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(itertools.chain([first], captions), trainer)
        return cls(tokenizer.to_str())

    @classmethod
    def load(cls, path) -> Tokenizer:
        """A tokenizer that `save` wrote, or any BPE of the `tokenizers` library's JSON files.

        Raises:
            DataError: the file cannot be read or is something else.
        """
        try:
            return cls(Path(path).read_text(encoding="utf-8"))
        except ImportError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a BPE tokenizer file: {error}") from error

    def save(self, path) -> None:
        """Write it as JSON: wholly or, if that fails, not at all."""
        with written_whole(path, durable=True) as unfinished:
            unfinished.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def encode(
        self,
        captions: list[str],
        text_len: int,
        *,
        dropout: float = 0.0,
        seed: int | None = None,
        truncate: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of captions.

        Args:
            captions: B strings; an empty one has length 0.
            text_len: T.
            dropout: the probability with which a merge is left out, for training (Provilkov et al. 2020). A caption of
                at most T tokens that it makes longer than that loses less, see `_fit`, so that it still fits; with
                `truncate` it is cut.
            seed: of the dropout; a caption's tokens depend on the seed and the caption alone, and, where they must fit,
                on T. Needed for dropout.
            truncate: cut captions of more than T tokens.

        Returns:
            ids (B, T) int64, 0 behind a caption's end, and lengths (B,) int64.

        Raises:
            ValueError: a caption has more than T tokens, and `truncate` is False, or halves of characters, as Python
                makes of bytes that are no UTF-8; dropout outside [0, 1] or without a seed, or of a loaded tokenizer
                that is not a plain BPE.
        """
        if isinstance(captions, str):
            raise TypeError("captions must be a list of strings, got one string")
        text_len = check_count("text_len", text_len, minimum=1)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be from 0 to 1, got {dropout}")
        captions = list(captions)
        _check_text(captions)
        if dropout:
            rows = self._encode_with_dropout(captions, dropout, seed, text_len, truncate)
        else:
            rows = self._encode_plainly(captions)
        ids = torch.zeros(len(rows), text_len, dtype=torch.int64)
        for number, row in enumerate(rows):
            if len(row) > text_len and not truncate:
                raise ValueError(
                    f"caption must have at most text_len {text_len} tokens, got {len(row)}: "
                    f"{shortened(captions[number])!r}"
                )
            ids[number, : len(row)] = torch.tensor(row[:text_len], dtype=torch.int64)
        return ids, torch.tensor([min(len(row), text_len) for row in rows], dtype=torch.int64)

    def check_lengths(
        self, captions: Sequence[str], text_len: int | None, *, names: Sequence[str] | None = None
    ) -> None:
        """Refuse captions of more than `text_len` tokens, and say what would take them all. Of millions no tokens are kept.

        Args:
            text_len: None for any: then that they are text is all that is looked at.
            names: of the captions' pictures: that of the first caption that is refused is in the message.

        Raises:
            ValueError: how many of the captions are too long, and the longest; or halves of characters, as of `encode`.
        """
        too_long, longest, first = 0, (0, ""), None
        for start in range(0, len(captions), AT_ONCE):
            some = captions[start : start + AT_ONCE]
            different = list(dict.fromkeys(some))
            _check_text(different)
            if text_len is None:
                continue
            lengths = dict(zip(different, map(len, self._encode_plainly(different)), strict=True))
            for number, caption in enumerate(some, start):
                if lengths[caption] > text_len:
                    too_long += 1
                    longest = max(longest, (lengths[caption], caption), key=lambda pair: pair[0])
                    first = number if first is None else first
        if too_long:
            length, caption = longest
            raise ValueError(
                f"{too_long} of {len(captions)} captions are longer than text_len {text_len}, the longest has {length} "
                f"tokens: --text-len {length}, better {math.ceil(MARGIN * length)}, which leaves room for BPE dropout, or "
                f"--truncate; it is {shortened(caption)!r}"
                + (f", and the first of them is that of {names[first]}" if names else "")
            )

    def decode(self, ids) -> str | list[str]:
        """The text of ids (T,), or the texts of ids (B, T).

        Special tokens are left out, which the padding is of a tokenizer that `train` made. Of a loaded one id 0 may be a
        token like others, and is text behind a caption's end too: cut rows to their lengths before.

        Raises:
            ValueError: an id is not below `vocab_size`.
        """
        ids = torch.as_tensor(ids)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(
                f"ids must be below vocab_size {self.vocab_size}, got {int(ids.min())} to {int(ids.max())}"
            )
        rows = ids.tolist() if ids.dim() > 1 else [ids.tolist()]
        texts = [text.strip() for text in self._tokenizer.decode_batch(rows)]
        return texts if ids.dim() > 1 else texts[0]

    def _encode_plainly(self, captions):
        return [encoding.ids for encoding in self._tokenizer.encode_batch(captions, add_special_tokens=False)]

    # The library's dropout draws from the thread's own random numbers, which cannot be seeded: a resumed run would see
    # other tokens. So with dropout the merges are applied here, to the words that the library cuts captions into.

    def _encode_with_dropout(self, captions, dropout, seed, text_len, truncate):
        """The tokens of each caption; of one that is to be cut, not all that are behind `text_len`."""
        if self._not_plain:
            raise ValueError(f"dropout must be 0 for a tokenizer with {', '.join(self._not_plain)}, got {dropout}")
        if seed is None:
            raise ValueError(f"seed must be given with dropout {dropout}, got None")
        seed = check_count("seed", seed, minimum=0)
        rows = []
        for caption in captions:
            digest = hashlib.sha256(f"{seed} {caption}".encode()).digest()
            draw = random.Random(int.from_bytes(digest, "big")).random
            words, dropped, length = self._words(caption), [], 0
            for word in words:
                if truncate and length >= text_len:
                    break
                dropped.append(self._with_dropout(word, dropout, draw))
                length += len(dropped[-1])
            if length > text_len and not truncate:
                self._fit(words, dropped, text_len, dropout, draw)
            rows.append([id for ids in dropped for id in ids])
        return rows

    def _fit(self, words, dropped, text_len, dropout, draw):
        """Give back merges to a caption that dropout made longer than `text_len`: to as few words as will do.

        One word after the other, in a random order, of those that grew, is drawn anew with a half, a quarter ... of the
        dropout, and whole if nothing of these fits, until the caption does.

        Args:
            dropped: ids of each word; changed in place.
        """
        length = sum(map(len, dropped))
        whole = {at: ids for at, word in enumerate(words) if len(ids := self._whole(word)) < len(dropped[at])}
        for at in sorted(whole, key=lambda _: draw()):
            if length <= text_len:
                break
            length -= len(dropped[at])
            drawn = (self._with_dropout(words[at], dropout / 2**halvings, draw) for halvings in range(1, 1 + HALVINGS))
            dropped[at] = next((ids for ids in drawn if length + len(ids) <= text_len), whole[at])
            length += len(dropped[at])

    def _words(self, caption) -> list[str]:
        """Those that no merge reaches across."""
        if self._tokenizer.normalizer:
            caption = self._tokenizer.normalizer.normalize_str(caption)
        return [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(caption)]

    def _whole(self, word):
        """A word's ids without dropout."""
        return self._whole_and_kept(word) if len(word) <= SHORT else self._merged(word)

    def _merged(self, word):
        return [self._ids[piece] for piece in self._pieces(word, 0.0, lambda: 1.0)]

    def _with_dropout(self, word, dropout, draw):
        """A word's ids. One that loses no merge, as most do, is what it is without dropout: that is kept."""
        drawn = []
        if len(word) <= SHORT:
            whole = self._whole(word)
            for _ in range(len(word) - len(whole)):  # its merges
                drawn.append(draw())
                if drawn[-1] < dropout:
                    break
            else:
                return whole
        draws = itertools.chain(drawn, iter(draw, None))  # from the first, as if the word had not been looked up
        return [self._ids[piece] for piece in self._pieces(word, dropout, draws.__next__)]

    def _pieces(self, word, dropout, draw):
        """A word's pieces: each time, of the merges that could be made, those that survive the dropout, the first.

        Whether one survives is drawn anew each time, in the order of the merges and only until one does: what is drawn
        for those behind it changes nothing. So a step takes 1 / (1 - dropout) draws on average, however long the word is.
        """
        pieces, end = list(word), len(word)  # a piece stands where its first letter was; None where others were
        before, behind = list(range(-1, end - 1)), list(range(1, end + 1))

        def rank(at):
            return self._ranks.get((pieces[at], pieces[behind[at]])) if 0 <= at and behind[at] < end else None

        able = [(found, at) for at in range(end) if (found := rank(at)) is not None]  # and merges that were possible
        heapq.heapify(able)
        while able:
            dropped = []
            while able:
                found, at = heapq.heappop(able)
                if pieces[at] is None or rank(at) != found:
                    continue  # a neighbour was merged; for good, as pieces only grow
                if draw() >= dropout:
                    break
                dropped.append((found, at))
            else:
                break
            right = behind[at]
            pieces[at], pieces[right], behind[at] = pieces[at] + pieces[right], None, behind[right]
            if behind[at] < end:
                before[behind[at]] = at
            dropped += [(found, where) for where in (before[at], at) if (found := rank(where)) is not None]
            for merge in dropped:
                heapq.heappush(able, merge)
        return [piece for piece in pieces if piece is not None]

    def __getstate__(self):
        return self._tokenizer.to_str()

    def __setstate__(self, json_text):
        self.__init__(json_text)


def _check_text(captions):
    for caption in captions:
        if _HALF.search(caption):
            raise ValueError(f"caption must be text in UTF-8, got {shortened(caption)!r}")


def shortened(caption: str) -> str:
    """A caption for a message: a file that was taken for one may have megabytes."""
    return caption if len(caption) <= SHOWN else caption[: SHOWN - 3] + "..."


def _library():
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ImportError("text needs the tokenizers library: pip install tokenizers") from error
    return tokenizers
