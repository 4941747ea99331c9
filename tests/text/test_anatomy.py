"""Looking into a tokenizer: kinds of ids, uses of special tokens, tokens that no text becomes."""

import json
import unicodedata

import pytest

from regpt.text import gpt2
from regpt.text.anatomy import describe_special, examine_tokens, measure_text, shown_tokens
from regpt.text.bpe import byte_tokenizer, train_bpe
from regpt.text.open import from_json, open_tokenizer
from regpt.text.sentences import SENTENCES
from tokenizer_files import FAMILIES, file_of, oracle, write_family


@pytest.mark.parametrize("family", FAMILIES)
def test_every_id_is_of_one_kind(family):
    tokenizer, theirs = from_json(file_of(family)), oracle(file_of(family))
    anatomy = examine_tokens(tokenizer)
    added = theirs.get_added_tokens_decoder()
    assert anatomy.special == sum(token.special for token in added.values())
    assert anatomy.found == sum(not token.special for token in added.values())
    assert anatomy.learned + len(added) == tokenizer.n_vocab


def test_parts_of_characters_are_counted():
    assert examine_tokens(byte_tokenizer()).partial == 128
    assert examine_tokens(byte_tokenizer()).learned == 256


def test_a_token_that_no_merge_leads_to_is_one_that_no_text_becomes():
    made = json.loads(train_bpe(["the stone and the tree\n" * 50], 265).to_json())
    vocab = made["model"]["vocab"]
    vocab["Ġstore"], made["added_tokens"][0]["id"] = len(vocab), len(vocab) + 1
    anatomy = examine_tokens(from_json(json.dumps(made)))
    assert anatomy.unreachable == (vocab["Ġstore"],)
    made["model"]["ignore_merges"] = True
    assert examine_tokens(from_json(json.dumps(made))).unreachable == ()


def test_a_token_that_the_normalizer_replaces_is_one_that_no_text_becomes():
    made = json.loads(file_of("qwen"))
    spelled = oracle(file_of("qwen")).pre_tokenizer.pre_tokenize_str("\u212b")[0][0]
    made["model"]["vocab"][spelled] = 500
    made["model"]["ignore_merges"] = True
    tokenizer = from_json(json.dumps(made))
    assert examine_tokens(tokenizer).unreachable == (500,)
    assert tokenizer.decode([500]) == "\u212b" != unicodedata.normalize("NFC", "\u212b")


@pytest.mark.skipif(gpt2.find_vocabulary(gpt2.VOCAB_PACKAGE) is None, reason="extra offline is not installed")
def test_gpt2_has_its_known_longest_tokens_and_every_token_can_be_made():
    tokenizer = open_tokenizer("gpt2")
    anatomy = examine_tokens(tokenizer, longest=2)
    assert [len(tokenizer.token_bytes(i)) for i in anatomy.longest] == [128, 66]
    assert (anatomy.unreachable, anatomy.learned, anatomy.special) == ((), 50_256, 1)


def test_the_uses_of_special_tokens_are_read_from_the_folder(tmp_path):
    config = {
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<|endoftext|>",
        "chat_template": [{"name": "default", "template": "{{ '<|im_start|>' }}"}],
    }
    folder = write_family("qwen", tmp_path, tokenizer_config=config)
    found = {token.text: token.roles for token in describe_special(open_tokenizer(folder), folder)}
    assert found == {
        "<|endoftext|>": ("starts documents", "ends text", "pad"),
        "<|im_start|>": ("chat template",),
        "<|im_end|>": ("ends text", "eos"),
    }
    (folder / "chat_template.jinja").write_text("<|im_end|>", encoding="utf-8")
    assert "chat template" in describe_special(open_tokenizer(folder), folder)[2].roles


def test_sentences_are_measured_and_tokens_shown_in_one_line():
    tokenizer = byte_tokenizer()
    cost = measure_text(tokenizer, "Japanese", SENTENCES["Japanese"])
    assert (cost.tokens, cost.bytes_per_token) == (len(SENTENCES["Japanese"].encode()), 1.0)
    assert cost.characters == len(SENTENCES["Japanese"])
    assert shown_tokens(tokenizer, tokenizer.encode("é\n")) == ["\\xc3", "\\xa9", "\\n"]
    assert len(SENTENCES) >= 13
