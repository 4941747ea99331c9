"""A byte-level BPE trained here: deterministic, lossless, the library's own format."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from regpt.errors import UsageError, UserError
from regpt.text.bpe import BPETokenizer, train_bpe
from regpt.text.open import from_json, open_tokenizer
from regpt.text.tokenizer import ENDOFTEXT

TEXTS = ["the cat sat on the mat; the cats sat on the mats\n" * 4, "naïve cafés, naïve cafés " * 4]
VOCAB = 280


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe(TEXTS, VOCAB)


def changed(tokenizer: BPETokenizer, **fields) -> str:
    return json.dumps({**json.loads(tokenizer.to_json()), **fields})


def test_the_vocabulary_has_exactly_the_size_asked_for_and_ends_with_endoftext(tokenizer):
    assert (tokenizer.n_vocab, tokenizer.eot) == (VOCAB, VOCAB - 1)
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
    assert tokenizer.name == f"bpe-{VOCAB}-{tokenizer.sha256[:8]}"


def test_the_same_text_gives_the_same_file(tokenizer):
    assert train_bpe(iter(TEXTS), VOCAB).to_json() == tokenizer.to_json()


def test_words_that_occur_often_become_tokens(tokenizer):
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


@given(st.text())
@settings(deadline=None, max_examples=100)
def test_any_text_comes_back_though_it_was_never_seen(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert all(0 <= i < tokenizer.eot for i in ids)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_is_the_texts_one_by_one(tokenizer, threads):
    texts = ["the cat", "", "日本", *TEXTS]
    batch = tokenizer.encode_batch(texts, threads)
    assert [ids.dtype for ids in batch] == [np.uint32] * len(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]


def test_text_that_spells_the_special_token_is_only_text(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    trained_on_it = train_bpe(["<|endoftext|> " * 50], 268)
    assert trained_on_it.eot not in trained_on_it.encode("<|endoftext|> <|endoftext|>")


def test_a_stray_surrogate_is_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_the_file_opens_in_hugging_face_with_the_same_ids(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_json().encode())
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = TEXTS[0] + " unseen Wörds 123"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert len(theirs) == tokenizer.n_vocab


def test_the_file_gives_the_same_tokenizer_back(tokenizer):
    again = BPETokenizer(tokenizer.to_json())
    assert (again.name, again.sha256, again.n_vocab, again.eot) == (
        tokenizer.name, tokenizer.sha256, tokenizer.n_vocab, tokenizer.eot,
    )  # fmt: skip
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(UserError, match=r"256 is too small.*at least 257"):
        train_bpe(TEXTS, 256)
    assert train_bpe(TEXTS, 257).encode("the") == [ord(c) - ord("!") for c in "the"]  # bytes alone


def test_text_too_small_for_the_vocabulary_says_what_would_do():
    with pytest.raises(UserError, match=r"too small for a vocabulary of 1000: only (\d+) tokens.*at most \1"):
        train_bpe(["the cat the cat"], 1000)


def test_an_error_of_the_texts_passes_through():
    def texts():
        yield "some text"
        raise UserError("line 2 is broken")

    with pytest.raises(UserError, match="line 2 is broken"):
        train_bpe(texts(), 300)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": {"type": "WordPiece"}}, "its model is 'WordPiece', not 'BPE'"),
        ({"model": {"type": "BPE"}}, "no vocabulary"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}}, "lacks some of the 256 bytes"),
        ({"pre_tokenizer": None}, "not split as GPT-2's"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "not split as GPT-2's"),
        ({"normalizer": {"type": "Lowercase"}}, "changes the text"),
        ({"added_tokens": []}, "special tokens are"),
        ({"added_tokens": [{"content": "<|endoftext|>", "id": 5}]}, "ids are not 0, 1, 2"),
        ({"model": None}, "describes no tokenizer"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(tokenizer, fields, said):
    with pytest.raises(UserError, match=said):
        BPETokenizer(changed(tokenizer, **fields))


def test_merges_outside_the_vocabulary_are_refused(tokenizer):
    model = json.loads(tokenizer.to_json())["model"]
    for merges, said in (([["x", "yz"]], "a merge joins"), (None, "no merges"), ([["a"]], "a merge joins")):
        with pytest.raises(UserError, match=said):
            BPETokenizer(changed(tokenizer, model={**model, "merges": merges}))
    strange = {**model, "vocab": {**model["vocab"], "日": 279}}
    with pytest.raises(UserError, match="stand for no byte, such as '日'"):
        BPETokenizer(changed(tokenizer, model=strange))


def test_bytes_is_a_token_a_byte_the_same_for_every_text():
    tokenizer = open_tokenizer("bytes")
    assert (tokenizer.n_vocab, tokenizer.eot) == (257, 256)
    for text in ("ROMEO:\nAy me!", "é 中 🎭\0", ENDOFTEXT):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths().tolist() == [1] * 256 + [0]
    assert from_json(tokenizer.to_json()).sha256 == tokenizer.sha256


def test_a_vocabulary_beyond_any_is_refused_before_memory_is_taken_for_it():
    with pytest.raises(UsageError, match="999999999 is too large: it must be at most 16,777,216"):
        train_bpe(["some text"], 999_999_999)
