"""The fast encoder against the tokenizer that it stands in for: every token the same, on text meant to break it."""

import importlib.metadata
import mmap
import random
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from regpt.text import fast, gpt2
from regpt.text.bpe import train_bpe
from regpt.text.fast import FastEncoder, WrongTokens, accelerate, encoder_name, find_model, is_disputed, save_model
from regpt.text.tokenizer import Encoder, Tokenizer

pytestmark = pytest.mark.skipif(not fast.available(), reason="the package gigatoken is not installed")
TRAINED = train_bpe(["the cat's 12 hats sat on the mat, and they'll sit; import numpy as np\n  return x\n" * 4], 300)
STRANGE = [
    *(
        "a",
        "the",
        " the",
        "Z",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "'",
        "'s",
        "'ll",
        "'RE",
        "'ſ",
        "1",
        "23",
        "９",
        "٣",
        "²",
        "Ⅷ",
    ),
    *(
        "é",
        "e\u0301",
        "日本",
        "한국",
        "कि",
        "ſ",
        "ı",
        "İ",
        "😀",
        "👩‍👩‍👧",
        "🇩🇰",
        "\u200d",
        "\ufe0f",
        "\u00ad",
        "\ufeff",
        "\ufffd",
    ),
    *(
        "\u00a0",
        "\u2003",
        "\u3000",
        "\u2028",
        "\x85",
        "\u180e",
        "\u200b",
        "\x00",
        "\x1c",
        "\x1f",
        "\x7f",
        "\x0b",
        "\x0c",
    ),
    *(
        "<|endoftext|>",
        "<|",
        "|>",
        "_",
        "--",
        "…",
        "\U00010400",
        "\ue000",
        "\uffff",
        "\U0010ffff",
        "\U000e0001",
        "\u0378",
    ),
    *("\u088f", "\u0c5c", "\ua7ce", "\U0001e6c0", "\U000323b0", "\U0002b73a"),  # new in Unicode 17
]


def tokenizers() -> list[Tokenizer]:
    return [TRAINED, *([gpt2.load_gpt2()] if gpt2.find_vocabulary(gpt2.VOCAB_PACKAGE) else [])]


EXACT = tokenizers()
FOLDER = tempfile.TemporaryDirectory()  # one for all: what is read once is not needed again
PAIRS = [(exact, accelerate(exact, Path(FOLDER.name))) for exact in EXACT]


def encode(encoder: Encoder, text: str) -> list[int]:
    return encoder.encode_batch([text])[0].tolist()


def differences(texts: list[str]) -> list[str]:
    return [
        text
        for exact, quick in PAIRS
        for text, one, other in zip(texts, exact.encode_batch(texts), quick.encode_batch(texts))
        if not np.array_equal(one, other)
    ]


def test_it_is_taken_where_it_is_installed():
    assert all(isinstance(quick, FastEncoder) for _, quick in PAIRS)
    assert encoder_name(TRAINED, accelerated=True) == f"gigatoken {importlib.metadata.version('gigatoken')}"
    assert encoder_name(TRAINED, accelerated=False).startswith("tokenizers ")
    assert encoder_name(EXACT[-1], accelerated=False).startswith(("tiktoken ", "tokenizers "))


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), min_size=1, max_size=8))
@settings(deadline=None, max_examples=200)
def test_random_characters_have_the_same_tokens(texts):
    assert differences(texts) == []


@given(st.lists(st.sampled_from(STRANGE), max_size=40).map("".join))
@example("don't'll'RE we'll\u0c5c's")
@settings(deadline=None, max_examples=600)
def test_strange_characters_have_the_same_tokens(text):
    assert differences([text]) == []


@pytest.mark.parametrize("length", [63, 64, 65, 255, 256, 257, 4095, 4096, 65_535, 65_537])
def test_long_words_and_runs_have_the_same_tokens(length):
    chosen = random.Random(length)
    repeated = [part * length for part in (" ", "\n", "a", "é", "1", "!", "日", "😀", "\u00a0", " \n", "ab'")]
    words = ["".join(chosen.choices("abcdefgh", k=length)), "".join(chosen.choices("aé1 '\n", k=length))]
    assert differences([*repeated, *words, *("x" + text + "y" for text in repeated)]) == []


def test_a_million_spaces_have_the_same_tokens():
    assert differences([" " * 10**6, "x" + " " * 10**6 + "y", "\n" * 10**6 + "end"]) == []


def test_text_that_spells_the_end_of_text_token_is_only_text():
    for exact, quick in PAIRS:
        assert exact.eot not in encode(quick, "<|endoftext|> and <|endoftext|>")
        assert encode(quick, "<|endoftext|>") == exact.encode("<|endoftext|>")


def test_lone_surrogates_are_replaced_as_without_it():
    assert differences(["a\ud800b", "\udc00", "\ud83d\ude00 joined"]) == []


def around(character: str) -> str:
    """Text in which the class of a character changes the words."""
    c = character
    return f"{c}|a{c}b|1{c}2| {c}|  {c}a|{c}{c} {c}|'{c}s'{c}|{c}'s\n{c}\n\n{c}|\t{c}"


@pytest.mark.slow
def test_every_character_has_the_same_tokens():
    points = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for i in range(0, len(points), 4096):
        assert differences([around(chr(point)) for point in points[i : i + 4096]]) == []


def test_characters_at_borders_of_classes_have_the_same_tokens():
    kinds = [unicodedata.category(chr(i)) for i in range(0x20000)]
    borders = [i for i in range(1, 0x20000) if kinds[i] != kinds[i - 1] and not 0xD800 <= i <= 0xE000]
    near = {point for border in random.Random(0).sample(borders, 500) for point in (border - 1, border)}
    assert differences([around(chr(point)) for point in sorted(near)]) == []


def test_letters_that_editions_of_unicode_disagree_on_are_disputed():
    assert all(is_disputed(f"text {chr(first)}") and is_disputed(chr(last)) for first, last in fast.UNICODE_17)
    assert is_disputed("😀 \u0378")
    assert not any(map(is_disputed, ("plain", "déjà “vu” – 日本 한국 😀 \u00a0", "")))
    backend = PAIRS[-1][1]._encoder  # type: ignore[union-attr]
    split = [
        chr(first)
        for first, _ in fast.UNICODE_17
        if backend.encode(around(chr(first))).tolist() != EXACT[-1].encode(around(chr(first)))
    ]
    assert split, "the libraries agree by now: the table can go"


@pytest.mark.parametrize("seen", [True, False])
def test_the_cache_is_renewed_and_nothing_changes(monkeypatch, tmp_path, seen):
    monkeypatch.setattr(fast, "RENEW_S", 0.0)
    monkeypatch.setattr(fast, "RENEW_UNSEEN_S", 0.0)
    monkeypatch.setattr(fast, "GROWN_BYTES", -(1 << 40))
    if not seen:
        monkeypatch.setattr(fast, "own_bytes", lambda: None)
    built, original = [], fast.build
    monkeypatch.setattr(fast, "build", lambda model: built.append(model) or original(model))
    quick = accelerate(TRAINED, tmp_path)
    for text in ("the cat sat", "on the mat", "the cat sat"):
        assert encode(quick, text) == TRAINED.encode(text)
    assert built == [tmp_path / "model.json"] * 3


def test_the_cache_is_kept_until_the_process_has_grown(monkeypatch, tmp_path):
    monkeypatch.setattr(fast, "RENEW_S", 0.0)
    sizes = iter([10, 20, 10 + fast.GROWN_BYTES, 11 + fast.GROWN_BYTES, 15, 15 + fast.GROWN_BYTES])
    monkeypatch.setattr(fast, "own_bytes", lambda: next(sizes))
    built, original = [], fast.build
    monkeypatch.setattr(fast, "build", lambda model: built.append(model) or original(model))
    quick, counts = accelerate(TRAINED, tmp_path), []
    for _ in range(5):
        encode(quick, "the cat sat")
        counts.append(len(built))
    assert counts == [1, 1, 1, 2, 2]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell a process its size")
def test_a_process_knows_its_size():
    before, size = fast.own_bytes(), 100 << 20
    assert before
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, size, flags=flags) as memory:  # an array may lie in memory that the process has kept
        memory.write(b"x" * size)
        after = fast.own_bytes()
    assert after
    assert 0.9 * size < after - before < 1.1 * size


def test_the_exact_tokenizer_is_opened_when_it_is_needed(tmp_path):
    opened = []
    quick = FastEncoder(save_model(TRAINED, tmp_path), lambda: opened.append(1) or TRAINED)
    encode(quick, "plain, déjà vu, 😀")
    assert opened == []
    for _ in range(2):
        assert encode(quick, "\u0378") == TRAINED.encode("\u0378")
    assert opened == [1]
    assert find_model(tmp_path) == tmp_path / "model.json"
    assert find_model(tmp_path / "nothing") is None


def test_one_text_in_so_many_is_compared_with_the_tokenizer(monkeypatch, tmp_path):
    monkeypatch.setattr(fast, "EVERY", 3)
    other = train_bpe(["zz zz yy yy xx xx ww ww" * 9], 260)
    right, wrong = (FastEncoder(save_model(one, tmp_path), lambda: TRAINED) for one in (TRAINED, other))
    assert len(right.encode_batch(["the cat"] * 7)) == 7
    assert len(wrong.encode_batch(["the cat"] * 2)) == 2
    with pytest.raises(WrongTokens, match=r"gigatoken encodes 'the cat'… differently from the tokenizer"):
        wrong.encode_batch(["the cat"])


def test_a_version_that_was_not_vetted_is_not_taken(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.11.0")
    assert accelerate(TRAINED, Path()) is TRAINED

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert accelerate(TRAINED, Path()) is TRAINED
