"""A tokenizer is what it does to text: one identity from its content, and the library's tokens or a refusal by name."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from regpt.errors import UserError
from regpt.text.bpe import BPETokenizer, train_bpe
from regpt.text.fast import accelerate
from regpt.text.gpt2 import RULES_SHA256, VOCAB_PACKAGE, GPT2Tokenizer, find_vocabulary
from regpt.text.open import from_json
from regpt.text.rules import BYTES

WORDS = ["the", "stone", "house", "cat", "wonderful", "naïve", "12", "\n\n", " ", "日本", "<|endoftext|>", "!?"]
TEXT = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
TRAINED = train_bpe(["the stone house and the cat runs under the tree, the stones\n" * 60], 275)

FIRST = " ".join(TRAINED.rules.merges[0])


def content(**changes) -> dict:
    """The trained tokenizer's file; `model__name` changes an option of the model."""
    made = json.loads(TRAINED.to_json())
    for key, value in changes.items():
        section, _, option = key.rpartition("__")
        (made[section] if section else made)[option] = value
    return made


def with_words(*words: str, **changes) -> dict:
    """With words in the vocabulary that no merges lead to, and `<|endoftext|>` still last."""
    made = content(**changes)
    vocab = made["model"]["vocab"]
    vocab |= {word: len(vocab) + k for k, word in enumerate(words)}
    made["added_tokens"][0]["id"] = len(vocab)
    return made


def library(made: dict) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.encode_special_tokens = True
    return tokenizer


IGNORING = with_words("Ġwonderful", "Ġhouses", "naÃ¯ve", "Ġcat!", model__ignore_merges=True)
OPENED = BPETokenizer(json.dumps(IGNORING))
FOLDER = tempfile.TemporaryDirectory()


@given(TEXT)
@settings(deadline=None, max_examples=200)
def test_whole_words_come_first_where_merges_are_ignored_for_them(text):
    ids = OPENED.encode(text)
    assert ids == library(IGNORING).encode(text, add_special_tokens=False).ids
    assert OPENED.decode(ids) == text
    assert accelerate(OPENED, Path(FOLDER.name)).encode_batch([text])[0].tolist() == ids


def test_ignoring_merges_is_part_of_the_identity():
    words = with_words("Ġwonderful", "Ġhouses", "naÃ¯ve", "Ġcat!")
    assert BPETokenizer(json.dumps(words)).encode(" wonderful") != OPENED.encode(" wonderful")
    assert BPETokenizer(json.dumps(words)).sha256 != OPENED.sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"model__merges": [" ".join(pair) for pair in content()["model"]["merges"]]},
        {"model__unk_token": "<unk>", "model__fuse_unk": True, "model__byte_fallback": True},
        {"model__continuing_subword_prefix": "", "model__end_of_word_suffix": "", "model__dropout": 0.0},
        {"model__vocab": {**content()["model"]["vocab"], "<|endoftext|>": 274}},
        {"truncation": {"max_length": 4}, "padding": {"strategy": "BatchLongest"}},
        {"post_processor": {"type": "ByteLevel", "trim_offsets": False}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}},
        {"normalizer": {"type": "Sequence", "normalizers": []}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False}]}},
        {"added_tokens": [{**content()["added_tokens"][0], "normalized": True}]},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_the_same_rules_are_the_same_tokenizer_however_they_are_written(changes):
    made = json.dumps(content(**changes), indent=None)
    assert made != TRAINED.to_json()
    assert BPETokenizer(made).sha256 == TRAINED.sha256
    assert BPETokenizer(made).to_json() == TRAINED.to_json()


def test_the_identity_of_a_trained_tokenizer_is_the_hash_of_the_librarys_own_file():
    assert Tokenizer.from_str(TRAINED.to_json()).to_str(pretty=True) == TRAINED.to_json()
    empty = train_bpe(["a"], 257)
    assert Tokenizer.from_str(empty.to_json()).to_str(pretty=True) == empty.to_json()


@pytest.mark.parametrize("edit", ["swapped ids", "merges in another order", "a merge less"])
def test_other_content_of_the_same_size_is_another_tokenizer(edit):
    made = content()
    vocab, merges = made["model"]["vocab"], made["model"]["merges"]
    if edit == "swapped ids":
        vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    elif edit == "a merge less":
        merges.pop()
    else:
        merges[0], merges[1] = merges[1], merges[0]
    other = BPETokenizer(json.dumps(made))
    assert other.n_vocab == TRAINED.n_vocab
    assert other.sha256 != TRAINED.sha256


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__end_of_word_suffix": "</w>"}, r"model\.end_of_word_suffix"),
        ({"model__continuing_subword_prefix": "##"}, r"model\.continuing_subword_prefix"),
        ({"model__dropout": 0.1}, r"model\.dropout"),
        ({"model__of_the_future": True}, r"model\.of_the_future"),
        ({"model__ignore_merges": "yes"}, r"model\.ignore_merges"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, r"pre_tokenizer\.use_regex is False"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            r"pre_tokenizer\.add_prefix_space is True",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"pre_tokenizer is \['Whitespace'\]"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}},
            r"pre_tokenizer is \['Digits', 'ByteLevel'\]",
        ),
        ({"normalizer": {"type": "NFC"}}, r"normalizer is \['NFC'\]"),
        ({"normalizer": "NFC"}, "normalizer is str"),
        ({"post_processor": {"type": "RobertaProcessing"}}, r"post_processor is \['RobertaProcessing'\]"),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {}}, {"Sequence": {}}]}},
            r"post_processor is \['TemplateProcessing'\]",
        ),
        ({"decoder": {"type": "WordPiece"}}, r"decoder is \['WordPiece'\]"),
        ({"added_tokens": [{**content()["added_tokens"][0], "lstrip": True}]}, r"'<\|endoftext\|>' sets lstrip"),
        ({"added_tokens": [{**content()["added_tokens"][0], "special": False}]}, r"'<\|endoftext\|>' is not special"),
        (
            {"added_tokens": [*content()["added_tokens"], {"content": "<p>", "id": 275, "special": False}]},
            "'<p>' is not",
        ),
        ({"added_tokens": content()["added_tokens"] * 2}, "one name"),
        ({"added_tokens": [*content()["added_tokens"], {"content": "\ud800", "id": 275}]}, "no name"),
        ({"model__merges": content()["model"]["merges"] * 2}, f"merge '{FIRST}' occurs twice"),
        ({"model__merges": [3]}, "a merge joins"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_changes_tokens_and_is_not_implemented_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        BPETokenizer(json.dumps(content(**changes)))


PADDED = content()
PADDED["added_tokens"] += [{"id": 275, "content": "[PAD]", "special": True}]


def test_further_special_tokens_are_tokens_that_no_text_becomes():
    tokenizer = BPETokenizer(json.dumps(PADDED))
    assert (tokenizer.n_vocab, tokenizer.eot) == (276, 274)
    ids = tokenizer.encode("the [PAD] <|endoftext|>")
    assert max(ids) < 274
    assert tokenizer.decode(ids) == "the [PAD] <|endoftext|>"
    assert tokenizer.decode([275]) == "[PAD]"
    assert tokenizer.byte_lengths()[274:].tolist() == [0, 0]
    assert BPETokenizer(tokenizer.to_json()).sha256 == tokenizer.sha256 != TRAINED.sha256


def test_a_special_token_may_come_first():
    made = content()
    vocab = {"<|endoftext|>": 0} | {token: i + 1 for token, i in made["model"]["vocab"].items()}
    made["model"]["vocab"], made["added_tokens"][0]["id"] = vocab, 0
    tokenizer = BPETokenizer(json.dumps(made))
    assert tokenizer.eot == 0
    assert tokenizer.encode("the cat") == [i + 1 for i in TRAINED.encode("the cat")]
    assert BPETokenizer(tokenizer.to_json()).sha256 == tokenizer.sha256
    assert library(json.loads(tokenizer.to_json())).encode("the cat").ids == tokenizer.encode("the cat")
    fast = accelerate(tokenizer, Path(FOLDER.name)).encode_batch(["the <|endoftext|> cat"])
    assert fast[0].tolist() == tokenizer.encode("the <|endoftext|> cat")


def test_a_vocabulary_without_one_of_the_bytes_is_refused():
    made = content()
    model = made["model"]
    model["merges"] = []
    kept = [token for token in BYTES if token != "q"]  # numbered without a hole
    model["vocab"] = {token: i for i, token in enumerate(kept)}
    made["added_tokens"] = [made["added_tokens"][0] | {"id": len(kept)}]
    with pytest.raises(UserError, match="vocabulary lacks some of the 256 bytes"):
        BPETokenizer(json.dumps(made))


@pytest.mark.parametrize("merge", ["a", "a b c", ["a", 5], ["a", "no such token"], ["q9", "xq"], 5, {}])
def test_a_merge_that_is_no_pair_of_tokens_is_refused(merge):
    made = with_words("q9xq")
    made["model"]["merges"][0] = merge
    with pytest.raises(UserError, match="a merge joins tokens that are not in its vocabulary"):
        BPETokenizer(json.dumps(made))


@pytest.mark.parametrize("token", [FIRST.replace(" ", ""), "a", "tree"])
def test_a_special_token_that_text_would_become_is_refused(token):
    made = with_words("tree", model__ignore_merges=True)
    made["added_tokens"].append({"id": made["model"]["vocab"][token], "content": token, "special": True})
    with pytest.raises(UserError, match=f"ordinary text becomes its special token '{token}'"):
        BPETokenizer(json.dumps(made))


def test_a_million_merges_of_one_pair_are_refused_before_they_are_used():
    made = content(model__merges=[TRAINED.rules.merges[0]] * 1_000_000)
    with pytest.raises(UserError, match=f"merge '{FIRST}' occurs twice"):
        BPETokenizer(json.dumps(made))


@pytest.mark.skipif(find_vocabulary(VOCAB_PACKAGE) is None, reason="extra offline is not installed")
def test_gpt2_is_recognised_by_all_of_its_rules_and_by_nothing_less():
    from regpt.hf.export import gpt2_json

    text = gpt2_json()
    made = json.loads(text)
    assert BPETokenizer(text).sha256 == RULES_SHA256
    opened = from_json(text)
    assert (type(opened), opened.name) == (GPT2Tokenizer, "gpt2")
    made["model"]["merges"][-2:] = reversed(made["model"]["merges"][-2:])
    assert from_json(json.dumps(made)).name.startswith("bpe-50257-")


def test_bytes_are_spelled_as_the_library_spells_them():
    from regpt.text.gpt2 import byte_characters

    assert sorted(byte_characters()) == BYTES
    ids = TRAINED.encode(bytes(range(128)).decode())
    assert "".join(byte_characters()[:128]) == "".join(list(TRAINED.rules.vocab)[i] for i in ids)
