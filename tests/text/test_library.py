"""Tokenizers of today's models: the library's tokens, the text back, what starts a document, one identity."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.data.verify import verify
from regpt.errors import UserError
from regpt.prepare.prepare import prepare
from regpt.text.library import LibraryTokenizer
from regpt.text.open import from_json, open_tokenizer
from tokenizer_files import FAMILIES, LINES, file_of, oracle, texts, write_family

OPENED = {family: from_json(file_of(family)) for family in FAMILIES}
every_family = pytest.mark.parametrize("family", FAMILIES)
PREFIXED = ("llama2", "mistral")


def changed(family: str, **changes) -> str:
    """The family's file; `model__name` changes an option of the model."""
    made = json.loads(file_of(family))
    for key, value in changes.items():
        section, _, option = key.rpartition("__")
        (made[section] if section else made)[option] = value
    return json.dumps(made)


def normalized(family: str, text: str) -> str:
    steps = oracle(file_of(family)).normalizer
    return steps.normalize_str(text) if family in ("qwen", "pythia") else text


@every_family
def test_ids_are_those_of_the_library(family):
    theirs, ours = oracle(file_of(family)), OPENED[family]
    made = texts(800)
    expected = [encoding.ids for encoding in theirs.encode_batch(made, add_special_tokens=False)]
    assert [ours.encode(text) for text in made] == expected
    assert [ids.tolist() for ids in ours.encode_batch(made, threads=2)] == expected
    assert len({i for ids in expected for i in ids}) > 100


@pytest.mark.parametrize("family", ["llama3", "qwen", "gemma", "llama2"])
@given(text=st.text(max_size=40))
@settings(max_examples=60)
def test_any_text_comes_back_from_the_ids_of_the_library(family, text):
    ours = OPENED[family]
    ids = ours.encode(text)
    assert ids == oracle(file_of(family)).encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == normalized(family, text if family == "llama3" else text.replace("▁", " "))


@every_family
def test_text_comes_back(family):
    ours = OPENED[family]
    for text in texts(400, seed=1):
        text = text.lstrip() if family == "mistral" else text  # Metaspace takes one space at the front for its own
        assert ours.decode(ours.encode(text)) == normalized(family, text)


@every_family
def test_decoding_agrees_with_the_library_and_shows_part_of_a_character(family):
    theirs, ours = oracle(file_of(family)), OPENED[family]
    for text in texts(200, seed=2):
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    ids = ours.encode("東京 \u2603")
    assert ours.decode(ids[:-1]).endswith("\ufffd")  # the snowman has three bytes of its own
    assert ours.decode(ids[:-1]).startswith("東京 ")
    assert b"".join(map(ours.token_bytes, ids)).decode().strip() == "東京 \u2603"


@every_family
def test_transformers_opens_the_file_and_makes_the_same_ids(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    start = FAMILIES[family][1]
    (tmp_path / "tokenizer.json").write_text(OPENED[family].to_json(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = texts(300, seed=3, lines=[line for line in LINES if "<s>" not in line])
    assert [OPENED[family].encode(text) for text in plain] == theirs(plain, add_special_tokens=False).input_ids
    added = theirs("fox").input_ids[: -len(OPENED[family].encode("fox"))]
    assert added == ([theirs.convert_tokens_to_ids(start)] if family not in UNTOLD else [])


UNTOLD = ("qwen", "pythia", "smollm", "olmo2")  # transformers adds nothing to their texts


@every_family
def test_what_starts_a_document_is_read_from_the_file(family):
    ours, start = OPENED[family], FAMILIES[family][1]
    assert isinstance(ours, LibraryTokenizer)
    assert ours.token_bytes(ours.eot) == start.encode()
    assert ours.stop_ids == (ours.eot,)
    assert ours.byte_lengths()[ours.eot] == 0
    assert ours.encode(start) != [ours.eot]
    assert ours.decode(ours.encode(start)) == start


@every_family
def test_the_stored_file_is_the_same_tokenizer(family, tmp_path):
    ours = OPENED[family]
    again = from_json(ours.to_json())
    assert (again.sha256, again.name, again.to_json()) == (ours.sha256, ours.name, ours.to_json())
    assert (again.eot, again.stop_ids, again.n_vocab) == (ours.eot, ours.stop_ids, ours.n_vocab)
    assert open_tokenizer(write_family(family, tmp_path)).sha256 == ours.sha256


@pytest.mark.parametrize(
    ("family", "changes", "same"),
    [
        ("llama3", {"truncation": {"max_length": 4}}, True),
        ("llama3", {"post_processor": None}, True),  # Llama 3's first files: tokenizer_config.json names the start
        ("llama3", {"decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}}, True),
        ("llama3", {"model__ignore_merges": False}, False),
        ("qwen", {"normalizer": None}, False),
        ("smollm", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}, False),
        ("llama2", {"model__fuse_unk": False}, True),
    ],
)
def test_the_identity_is_of_what_decides_the_tokens(family, changes, same):
    assert (from_json(changed(family, **changes)).sha256 == OPENED[family].sha256) == same


def test_another_start_is_another_identity_and_another_end_is_not(tmp_path):
    plain = open_tokenizer(write_family("qwen", tmp_path / "base"))
    chat = open_tokenizer(write_family("qwen", tmp_path / "chat", tokenizer_config={"eos_token": "<|im_end|>"}))
    assert chat.sha256 == plain.sha256
    assert list(map(chat.token_bytes, chat.stop_ids)) == [b"<|endoftext|>", b"<|im_end|>"]
    other = {"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}
    started = open_tokenizer(write_family("qwen", tmp_path / "other", tokenizer_config=other))
    assert started.token_bytes(started.eot) == b"<|im_start|>"
    assert started.sha256 != plain.sha256


@pytest.mark.parametrize("where", ["generation_config", "config"])
def test_end_tokens_come_from_a_list_of_ids_too(where, tmp_path):
    ids = {OPENED["llama3"].decode([i]): i for i in range(400, OPENED["llama3"].n_vocab)}
    ends = [ids["<|end_of_text|>"], ids["<|eot_id|>"]]
    tokenizer = open_tokenizer(write_family("llama3", tmp_path, **{where: {"eos_token_id": ends}}))
    assert tokenizer.stop_ids == (ids["<|begin_of_text|>"], *ends)
    assert from_json(tokenizer.to_json()).stop_ids == tokenizer.stop_ids


def test_a_continuation_has_no_space_of_its_own():
    for family in FAMILIES:
        ours = OPENED[family]
        whole, first = ours.encode("fox jumps over the dog"), ours.encode("fox jumps")
        (rest,) = ours.encode_continuations([" over the dog"])
        assert [*first, *rest] == whole
        assert (ours.encode(" over the dog") == rest.tolist()) == (family != "llama2")


@every_family
def test_text_cut_at_seams_has_the_same_tokens(family):
    ours, text = OPENED[family], "".join(texts(600, seed=4))
    if family in PREFIXED:
        assert ours.seam is None
        return
    assert ours.seam
    places = [0, *(found.end() for found in ours.seam.finditer(text)), len(text)]
    assert len(places) > 1000
    parts = [text[a:b] for a, b in itertools.pairwise(places)]
    assert np.concatenate(ours.encode_batch(parts)).tolist() == ours.encode(text)


def test_no_seam_is_assumed_for_words_with_spaces_inside():
    words = {"type": "Split", "pattern": {"Regex": r"[^\n]+|\n"}, "behavior": "Isolated", "invert": False}
    steps = [words, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    made = changed("olmo2", pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    assert from_json(made).seam is None


@pytest.mark.parametrize("family", ["llama3", "llama2"])
def test_data_is_prepared_with_it(family, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number, line in enumerate(LINES):
        (text / f"{number}.txt").write_text(line * 3, encoding="utf-8", newline="")
    tokenizer = open_tokenizer(write_family(family, tmp_path / "tokenizer"))
    manifest = prepare([str(text)], tmp_path / "data", tokenizer, val_fraction=0.2, workers=1)
    assert (manifest.eot, manifest.vocab_size) == (tokenizer.eot, tokenizer.n_vocab)
    assert open_tokenizer(tmp_path / "data").sha256 == tokenizer.sha256
    assert verify(tmp_path / "data") == []
    tokens = np.fromfile(tmp_path / "data" / manifest.split("train")[0].file, dtype="<u2")
    documents = [
        tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, np.flatnonzero(tokens == manifest.eot))[1:]
    ]
    assert set(documents) <= {line * 3 for line in LINES}
    assert len(documents) > 10


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama3", {"model__type": "Unigram"}, "its model is 'Unigram', not 'BPE'"),
        ("llama3", {"model__type": "WordPiece"}, "its model is 'WordPiece', not 'BPE'"),
        ("llama3", {"model__dropout": 0.1}, r"sets model\.dropout"),
        ("llama3", {"model__of_the_future": 1}, r"sets model\.of_the_future"),
        ("llama3", {"a_section": 1}, "sets a_section"),
        ("llama3", {"pre_tokenizer": {"type": "Unheard"}}, "library cannot read its steps"),
        ("llama3", {"pre_tokenizer": 5}, "its pre_tokenizer is int"),
        ("llama3", {"decoder": None, "pre_tokenizer": None}, "joined in another way: decoder is"),
        ("llama3", {"added_tokens": None}, "nothing in it says which token starts a document; put a tokenizer_config"),
        ("llama3", {"added_tokens": [{"id": 2**33, "content": "<s>"}]}, "its ids go up to 8,589,934,592"),
        ("llama3", {"added_tokens": [{"id": 5, "content": "<s>"}]}, "have one id, 5"),
        ("llama3", {"model__vocab": {"a": -1}}, "no vocabulary of whole numbers"),
        (
            "llama3",
            {"model__vocab": {str(i): i for i in range(400)}, "model__merges": []},
            "lacks some of the 256 bytes",
        ),
        ("llama3", {"model__merges": [["a", "zz"]]}, "a merge joins tokens that are not in its vocabulary"),
        ("llama3", {"post_processor": {"type": "RobertaProcessing"}}, "post_processor is 'RobertaProcessing'"),
        (
            "llama3",
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {}}, {"SpecialToken": {"id": "<s>"}}],
                }
            },
            "its post_processor makes of every text",
        ),
        ("llama2", {"model__byte_fallback": False}, r"model\.byte_fallback is off"),
        ("llama2", {"normalizer": None}, "a space at the front"),
        ("gemma", {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, r"decoder is \['WordPiece'\]"),
        (
            "qwen",
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
            r"pre_tokenizer\.add_prefix_space is True",
        ),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(family, changes, said):
    with pytest.raises(UserError, match=said):
        from_json(changed(family, **changes))


def test_a_special_token_that_text_would_become_is_refused():
    vocab = json.loads(file_of("llama3"))["model"]["vocab"]
    word = next(token for token in vocab if token.isalpha() and len(token) > 3)
    added = [{"id": vocab[word], "content": word}, *json.loads(file_of("llama3"))["added_tokens"]]
    with pytest.raises(UserError, match=f"ordinary text becomes its special token '{word}'"):
        from_json(changed("llama3", added_tokens=added))


def test_ids_with_a_hole_keep_their_numbers():
    made = json.loads(file_of("qwen"))
    made["added_tokens"][-1]["id"] += 3
    tokenizer = from_json(json.dumps(made))
    last = made["added_tokens"][-1]["id"]
    assert tokenizer.encode("<tool_call>") == [last] == [tokenizer.n_vocab - 1]
    assert tokenizer.decode([last - 1, last]) == "<tool_call>"
    assert from_json(tokenizer.to_json()).sha256 == tokenizer.sha256


def test_special_tokens_beyond_a_models_rows_can_be_left_out():
    tokenizer = OPENED["tekken"]
    assert isinstance(tokenizer, LibraryTokenizer)
    fewer = tokenizer.within(tokenizer.n_vocab - 1)
    assert fewer.n_vocab == tokenizer.n_vocab - 1
    assert fewer.encode("[INST] the fox") == tokenizer.encode("[INST] the fox")


def test_lone_surrogates_become_the_replacement_character():
    for tokenizer in OPENED.values():
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_an_added_token_beyond_ascii_stands_for_its_own_bytes():
    made = json.loads(file_of("qwen"))
    made["added_tokens"][-1]["content"] = "é日"
    tokenizer = from_json(json.dumps(made))
    last = made["added_tokens"][-1]["id"]
    assert tokenizer.encode("aé日") == [*tokenizer.encode("a"), last]
    assert (tokenizer.decode([last]), tokenizer.byte_lengths()[last]) == ("é日", 5)
