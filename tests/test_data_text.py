"""The tokenizer: what comes in comes out, dropout can be repeated, and nothing is unknown."""

import itertools
import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch

from dalle_fast.data import DataError, Tokenizer, all_scenes, caption_of_scene
from dalle_fast.data import text as data_text
from dalle_fast.outputs import UNFINISHED

CAPTIONS = [caption_of_scene(scene) for scene in all_scenes()]
ODD = ["", "Grüße, 世界! \U0001f34e", "it's  THE\tend\n", "<pad> 0", "\x00\x7f", "ﬁ é", "unseen zebra-crossing 12345"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS)


def test_captions_come_back(tokenizer):
    ids, lengths = tokenizer.encode(CAPTIONS, 20)
    assert ids.dtype == lengths.dtype == torch.int64
    assert ids.shape == (720, 20)
    assert tokenizer.decode(ids) == CAPTIONS
    assert tokenizer.decode(ids[3]) == CAPTIONS[3]
    assert lengths.max() <= 13  # every word is a token
    assert 257 < tokenizer.vocab_size < 400
    assert 0 < int(ids.max()) < tokenizer.vocab_size
    behind = torch.arange(20) >= lengths[:, None]
    assert torch.equal(ids == 0, behind)


def test_text_is_lower_cased_and_nothing_is_unknown(tokenizer):
    ids, lengths = tokenizer.encode(ODD, 64)
    assert tokenizer.decode(ids) == [
        "",
        "grüße, 世界! \U0001f34e",
        "it's the end",
        "<pad> 0",
        "\x00\x7f",
        "ﬁ é",
        ODD[-1],
    ]
    assert lengths[0] == 0
    assert torch.equal(tokenizer.encode(["A RED Circle"], 9)[0], tokenizer.encode(["a red circle"], 9)[0])


def test_own_merging_without_dropout_is_the_librarys(tokenizer):
    small = Tokenizer.train(CAPTIONS + ["the quick brown fox jumps over the lazy dog", "grüße"], 300)
    letters = random.Random(0)
    texts = ODD + CAPTIONS[::50] + ["".join(letters.choices("abcdehrtlo gsquü!'1", k=30)) for _ in range(200)]
    for ours in (tokenizer, small):
        theirs, lengths = ours.encode(texts, 200)
        rows = ours._encode_with_dropout(texts, 0.0, 1, 200, False)
        assert rows == [ids[:length].tolist() for ids, length in zip(theirs, lengths)]


def test_dropout_depends_on_seed_and_caption_alone(tokenizer):
    def encode(captions, seed):
        return tokenizer.encode(captions, 64, dropout=0.1, seed=seed)[0]

    first = encode(CAPTIONS[:50], 1)
    random.seed(0)
    assert torch.equal(encode(CAPTIONS[:50], 1), first)
    assert torch.equal(encode(CAPTIONS[20:30], 1), first[20:30])
    assert (encode(CAPTIONS[:50], 2) != first).any(1).sum() > 40
    assert tokenizer.decode(first) == CAPTIONS[:50]
    alike = encode(CAPTIONS, 1)[:, :8].view(-1, 3, 8)  # three captions that only differ in the background
    assert (alike[:, 0] != alike[:, 1]).any(1).float().mean() > 0.2  # do not drop the same merges before it
    script = (
        "import sys, pickle; tokenizer, captions = pickle.load(sys.stdin.buffer); "
        "print(tokenizer.encode(captions, 64, dropout=0.1, seed=1)[0].tolist())"
    )
    data = pickle.dumps((tokenizer, CAPTIONS[:50]))
    run = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True, timeout=120)
    assert json.loads(run.stdout) == first.tolist()


def test_dropout_drops_as_much_as_the_librarys(tokenizer):
    """The mean length, against that of the library's own dropout, which cannot be repeated."""
    parsed = json.loads(tokenizer._tokenizer.to_str())
    parsed["model"]["dropout"] = 0.3
    theirs = type(tokenizer._tokenizer).from_str(json.dumps(parsed))
    captions = CAPTIONS[::9] * 5
    expected = sum(len(theirs.encode(caption).ids) for caption in captions) / len(captions)
    means = [tokenizer.encode(CAPTIONS[::9], 64, dropout=0.3, seed=seed)[1].float().mean() for seed in range(5)]
    plain = float(tokenizer.encode(CAPTIONS[::9], 64)[1].float().mean())
    assert expected > plain + 3
    assert abs(sum(means) / 5 - expected) < 0.15 * (expected - plain)


def naive_pieces(ranks, word, dropout, draw):
    """BPE dropout as Provilkov et al. write it: at every step every possible merge is dropped or not."""
    pieces = list(word)
    while True:
        pairs = enumerate(itertools.pairwise(pieces))
        able = [(ranks[pair], at) for at, pair in pairs if pair in ranks and draw() >= dropout]
        if not able:
            return pieces
        _, at = min(able)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("word", ["abababc", "aaaaaa", "bcabcab"])
def test_dropout_has_the_distribution_of_the_naive_algorithm(dropout, word):
    tokenizer = Tokenizer.train(["aaaa aaaa abab abc abcabc bcab cab ab ab"] * 3, 300)
    ranks, draw, count = tokenizer._ranks, random.Random(1).random, 10_000
    ours = Counter(tuple(tokenizer._pieces(word, dropout, draw)) for _ in range(count))
    theirs = Counter(tuple(naive_pieces(ranks, word, dropout, draw)) for _ in range(count))
    assert len(theirs) > 5
    chi_square = sum((ours[x] - theirs[x]) ** 2 / (ours[x] + theirs[x]) for x in ours | theirs)
    freedom = len(ours | theirs) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.95, 1.0])
def test_kept_words_are_merged_as_others(dropout):
    """The same draws make the same pieces, whether or not the word was seen before, and as many of them are drawn."""
    letters = random.Random(0)
    words = [f"Ġ{word}" for word in random_captions()[0].split() + CAPTIONS[0].split()]
    words += ["", "a", *("".join(letters.choices("abcr", k=k)) for k in range(2, 33))]
    known = Tokenizer.train([*CAPTIONS, *random_captions()], 1500)
    for number, word in enumerate(words * 2):
        here, there = (random.Random(number) for _ in range(2))
        pieces = known._pieces(word, dropout, here.random)
        assert "".join(pieces) == word
        assert list(known._with_dropout(word, dropout, there.random)) == [known._ids[piece] for piece in pieces]
        assert here.random() == there.random()


def test_what_is_kept_of_words_is_bounded(tokenizer):
    tokenizer.encode([f"x{number}" for number in range(100)] + ["y" * 33], 64, dropout=0.5, seed=1)
    before = tokenizer._whole_and_kept.cache_info()
    assert before.maxsize == 1 << 15 and 100 <= before.currsize
    tokenizer.encode(["z" * 1000], 2000, dropout=0.5, seed=1)
    assert tokenizer._whole_and_kept.cache_info() == before


def test_a_long_word_costs_little_more_for_each_letter():
    """As captions have them that are written without spaces: draws, and pairs that are looked up."""
    small = Tokenizer.train(["abcabcabdabd" * 5, "ab ab abc abd"], 280)
    seen = Counter()

    class Counted(dict):
        def get(self, pair):
            seen["pairs"] += 1
            return super().get(pair)

        def __contains__(self, pair):
            seen["pairs"] += 1
            return super().__contains__(pair)

    small._ranks, draw, word = Counted(small._ranks), random.Random(1).random, "abcabdab" * 1_000

    def counted():
        seen["draws"] += 1
        return draw()

    assert len(small._pieces(word, 0.1, counted)) < 0.7 * len(word)
    assert 0.3 * len(word) < seen["draws"] < 2 * len(word)
    assert seen["pairs"] < 10 * len(word)


def random_captions():
    letters = random.Random(0)
    words = ["".join(letters.choices("etaoinshrdlu", k=letters.randint(2, 9))) for _ in range(300)]
    return [" ".join(letters.choices(words, k=letters.randint(2, 20))) for _ in range(400)]


def test_dropout_reaches_captions_that_hardly_fit():
    """Those with room for a tenth more as well as short ones, and with as many tokens as there is room for."""
    captions = random_captions()
    tokenizer = Tokenizer.train(captions, 1500)
    plain, lengths = tokenizer.encode(captions, 60)
    longest = int(lengths.max())
    free = tokenizer.encode(captions, 200, dropout=0.1, seed=1)[1]
    ids, fitted = tokenizer.encode(captions, longest, dropout=0.1, seed=1)
    assert tokenizer.decode(ids) == tokenizer.decode(plain) and fitted.max() == longest
    assert torch.equal(fitted[free <= longest], free[free <= longest])
    seen = (ids != plain[:, :longest]).any(1)
    nearly_full = (lengths >= 0.8 * longest) & (lengths <= 0.9 * longest)
    assert nearly_full.sum() > 30 and (free > longest)[nearly_full].float().mean() > 0.8
    assert seen[nearly_full].float().mean() > 0.8
    assert (fitted - lengths)[nearly_full].sum() > 0.7 * (longest - lengths)[nearly_full].sum()
    some = slice(30, 60)  # in other company, and another order
    again = tokenizer.encode(captions[some][::-1], longest, dropout=0.1, seed=1)[0]
    assert torch.equal(again, ids[some].flip(0))


def test_a_long_word_that_hardly_fits_sees_less_dropout():
    """As a caption is that is written without spaces: all of it would be given back."""
    tokenizer = Tokenizer.train(["abcabcabdabd" * 5, "ab ab abc abd"], 280)
    word = "abcabdab" * 20
    length = int(tokenizer.encode([word], 200)[1])
    room = length + 4
    lengths = torch.stack([tokenizer.encode([word], room, dropout=0.9, seed=seed)[1] for seed in range(20)])
    assert all(tokenizer.encode([word], 200, dropout=0.9, seed=seed)[1] > room for seed in range(20))
    assert (lengths > length).float().mean() > 0.3 and lengths.max() <= room


def test_dropout_cuts_what_may_be_cut(tokenizer):
    """A caption that would fit, too."""
    lengths = tokenizer.encode(CAPTIONS[::20], 64)[1]
    longest = int(lengths.max())
    free = tokenizer.encode(CAPTIONS[::20], 64, dropout=0.5, seed=1)[0]
    ids, cut = tokenizer.encode(CAPTIONS[::20], longest, dropout=0.5, seed=1, truncate=True)
    assert torch.equal(ids, free[:, :longest]) and (cut == longest).any()
    with pytest.raises(ValueError, match="caption must have at most text_len 5 tokens, got 12: 'a small red circle at"):
        tokenizer.encode(CAPTIONS[:1], 5, dropout=0.5, seed=1)


def test_what_is_cut_off_is_not_merged(tokenizer, monkeypatch):
    words, pieces = [], tokenizer._pieces
    monkeypatch.setattr(tokenizer, "_pieces", lambda word, *rest: words.append(word) or pieces(word, *rest))
    caption = "a red circle " * 300
    whole = tokenizer.encode([caption], 10_000, dropout=0.3, seed=1)[0]
    words.clear()
    ids, lengths = tokenizer.encode([caption], 20, dropout=0.3, seed=1, truncate=True)
    assert torch.equal(ids, whole[:, :20]) and lengths.tolist() == [20]
    assert 5 < len(words) <= 20


def test_full_dropout_leaves_bytes(tokenizer):
    _, lengths = tokenizer.encode(["a red cross"], 64, dropout=1.0, seed=0)
    assert lengths.tolist() == [1 + len("a red cross")]  # a space before the first word


def test_training_does_not_depend_on_order_or_process(tokenizer):
    assert Tokenizer.train(CAPTIONS[::-1]).encode(CAPTIONS, 20)[0].equal(tokenizer.encode(CAPTIONS, 20)[0])
    script = (
        "from dalle_fast.data import *; "
        "print(Tokenizer.train([caption_of_scene(s) for s in all_scenes()])._tokenizer.to_str())"
    )
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120, env=environment
        )
        assert run.stdout.strip() == tokenizer._tokenizer.to_str()


def test_the_vocabulary_has_at_most_the_size_asked_for():
    assert Tokenizer.train(CAPTIONS, 257).vocab_size == 257
    assert Tokenizer.train(CAPTIONS, 280).vocab_size == 280
    with pytest.raises(ValueError, match="vocab_size must be at least 257, got 256"):
        Tokenizer.train(CAPTIONS, 256)


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    path = tmp_path / "text.json"
    path.write_text("old")
    (tmp_path / f"{UNFINISHED}text.json").write_text("of a save that was killed")
    tokenizer.save(path)
    assert os.listdir(tmp_path) == ["text.json"]
    again = Tokenizer.load(path)
    assert again.vocab_size == tokenizer.vocab_size
    assert torch.equal(again.encode(CAPTIONS + ODD, 64)[0], tokenizer.encode(CAPTIONS + ODD, 64)[0])
    options = {"dropout": 0.2, "seed": 3}
    assert torch.equal(again.encode(CAPTIONS, 64, **options)[0], tokenizer.encode(CAPTIONS, 64, **options)[0])


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "text.json"
    tokenizer.save(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Tokenizer.train(CAPTIONS, 280).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["text.json"]


@pytest.mark.parametrize("text", ["", "{}", "no json", '{"model": {"type": "WordLevel", "vocab": {}}}'])
def test_another_file_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match="x.json: not a BPE tokenizer file"):
        Tokenizer.load(tmp_path / "x.json")
    with pytest.raises(DataError, match="none.json: not a BPE tokenizer file"):
        Tokenizer.load(tmp_path / "none.json")


def foreign(tmp_path, **changes):
    """A tokenizer of another make: words of letters, without byte alphabet."""
    model = {"type": "BPE", "vocab": {"[UNK]": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"], **changes}
    whole = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": [], "model": model}
    (tmp_path / "foreign.json").write_text(json.dumps(whole))
    return tmp_path / "foreign.json"


def test_a_tokenizer_that_would_drop_unknown_text_in_silence_is_refused(tmp_path):
    with pytest.raises(DataError, match="254 bytes lack one"):
        Tokenizer.load(foreign(tmp_path))
    loaded = Tokenizer.load(foreign(tmp_path, unk_token="[UNK]", dropout=0.5))
    assert all(loaded.encode(["ab c"], 3)[0].tolist() == [[3, 0, 0]] for _ in range(20))  # no dropout of its own
    assert loaded.encode(["ab c"], 3)[1].tolist() == [2]
    with pytest.raises(ValueError, match="dropout must be 0 for a tokenizer with unk_token, got 0.1"):
        loaded.encode(["ab"], 3, dropout=0.1, seed=0)


def test_added_tokens_are_not_dropped_out_of(tokenizer, tmp_path):
    """Cut as `encode` cuts them they would need the library's rules for them; special ones are text."""
    parsed = json.loads(tokenizer._tokenizer.to_str())
    added = type(tokenizer._tokenizer).from_str(json.dumps(parsed))
    added.add_special_tokens(["<end>"])
    added.save(str(tmp_path / "special.json"))
    added.add_tokens(["<sks>", " dog"])
    added.save(str(tmp_path / "added.json"))
    special, loaded = (Tokenizer.load(tmp_path / name) for name in ("special.json", "added.json"))
    captions = ["a <sks> dog <end>", "a red circle"]
    assert torch.equal(special.encode(captions, 64)[0], special.encode(captions, 64, dropout=1e-15, seed=0)[0])
    assert loaded.encode(captions, 64)[0].max() > special.vocab_size
    with pytest.raises(
        ValueError, match="dropout must be 0 for a tokenizer with added tokens such as '<sks>', got 0.1"
    ):
        loaded.encode(captions, 64, dropout=0.1, seed=0)


def test_of_a_loaded_tokenizer_padding_may_be_a_token(tmp_path):
    """Without a special token at id 0, where `encode` puts it behind a caption: the length says what is text."""
    letters = {letter: x for x, letter in enumerate("a" + "".join(set(bytes_as_letters()) - {"a"}))}
    loaded = Tokenizer.load(foreign(tmp_path, vocab=letters, merges=[]))
    ids, [length] = loaded.encode(["ba"], 4)
    assert ids[0, 1:].tolist() == [0, 0, 0] and length == 2
    assert loaded.decode(ids[0, :length]) == "b a" != loaded.decode(ids[0])


def bytes_as_letters():
    import tokenizers

    return tokenizers.pre_tokenizers.ByteLevel.alphabet()


def test_ids_with_gaps(tmp_path):
    """The model needs an embedding for the largest."""
    path = foreign(tmp_path, unk_token="[UNK]", vocab={"[UNK]": 0, "a": 1, "b": 2, "ab": 3000})
    assert Tokenizer.load(path).vocab_size == 3001


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_caption_that_is_no_text_is_refused(tokenizer, dropout):
    with pytest.raises(ValueError, match=r"caption must be text in UTF-8, got 'caf\\udcff'"):
        tokenizer.encode(["a", "caf\udcff"], 5, dropout=dropout, seed=0)


def test_a_caption_that_is_too_long_is_refused_or_cut(tokenizer):
    with pytest.raises(ValueError, match="caption must have at most text_len 5 tokens, got 12: 'a small red circle at"):
        tokenizer.encode(["a red", CAPTIONS[0]], 5)
    whole, _ = tokenizer.encode(CAPTIONS[:1], 12)
    ids, lengths = tokenizer.encode(["a red", CAPTIONS[0]], 5, truncate=True)
    assert torch.equal(ids[1], whole[0, :5])
    assert lengths.tolist() == [2, 5]


def test_messages_show_the_beginning_of_a_long_caption(tokenizer):
    caption = "a red circle " * 100_000
    for captions in ([caption], [caption + "\udcff"]):
        with pytest.raises(ValueError, match=r": |got 'a red circle .*\.\.\.'$") as error:
            tokenizer.encode(captions, 5)
        assert len(str(error.value)) < 200


def test_lengths_are_checked_of_all_captions(tokenizer, monkeypatch):
    """A few at a time, as the library keeps 5 to 9 KB of each."""
    monkeypatch.setattr(data_text, "AT_ONCE", 3)
    encoded, plainly = [], tokenizer._encode_plainly
    monkeypatch.setattr(tokenizer, "_encode_plainly", lambda some: encoded.append(len(some)) or plainly(some))
    captions = ["a red", "", *CAPTIONS[:3] * 2]
    lengths = tokenizer.encode(captions, 20)[1].tolist()
    encoded.clear()
    tokenizer.check_lengths(captions, max(lengths))
    assert encoded == [3, 3, 2]
    tokenizer.check_lengths([], 1)
    tokenizer.check_lengths(captions, None)
    assert len(encoded) == 3
    message = f"^6 of 8 captions are longer than text_len 2, the longest has {max(lengths)} tokens"
    flags = (
        f": --text-len {max(lengths)}, better {math.ceil(1.3 * max(lengths))}, which leaves room for BPE dropout, or"
    )
    with pytest.raises(ValueError, match=message + flags + " --truncate; it is 'a small"):
        tokenizer.check_lengths(captions, 2)


def test_bad_arguments(tokenizer):
    with pytest.raises(ValueError, match="captions must hold a caption that is not empty"):
        Tokenizer.train(["", "  "])
    with pytest.raises(TypeError, match="captions must be a list of strings, got one string"):
        tokenizer.encode("a red circle", 5)
    with pytest.raises(ValueError, match="text_len must be at least 1, got 0"):
        tokenizer.encode(["a"], 0)
    with pytest.raises(ValueError, match=r"dropout must be from 0 to 1, got 1.5"):
        tokenizer.encode(["a"], 5, dropout=1.5, seed=0)
    with pytest.raises(ValueError, match=r"seed must be given with dropout 0.1, got None"):
        tokenizer.encode(["a"], 5, dropout=0.1)
    with pytest.raises(ValueError, match=f"ids must be below vocab_size {tokenizer.vocab_size}, got 5 to 99999"):
        tokenizer.decode([5, 99_999])
    assert tokenizer.encode([], 5)[0].shape == (0, 5)
