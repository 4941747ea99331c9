"""A tokenizer is found by name, folder or file; anything else is one sentence."""

import json

import pytest

from regpt.errors import UserError
from regpt.text import gpt2
from regpt.text.bpe import train_bpe
from regpt.text.open import from_json, open_tokenizer

needs_gpt2 = pytest.mark.skipif(
    gpt2.find_vocabulary(gpt2.VOCAB_PACKAGE) is None, reason="extra offline is not installed"
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(train_bpe(["the cat " * 9], 260).to_json().encode())
    return tmp_path


def test_a_folder_and_its_file_are_the_same_tokenizer(folder):
    by_folder, by_file = open_tokenizer(str(folder)), open_tokenizer(folder / "tokenizer.json")
    assert by_folder.sha256 == by_file.sha256
    assert by_folder.n_vocab == 260


@needs_gpt2
def test_gpt2_is_found_by_name_and_by_the_file_that_names_it(tmp_path):
    tokenizer = open_tokenizer("gpt2")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert open_tokenizer(tmp_path).sha256 == tokenizer.sha256


@needs_gpt2
def test_another_gpt2_than_ours_is_refused():
    with pytest.raises(UserError, match="names a gpt2 tokenizer of SHA-256 abc"):
        from_json(json.dumps({"name": "gpt2", "sha256": "abc"}))


def test_a_name_that_does_not_exist_names_the_nearest():
    with pytest.raises(UserError, match=r"no tokenizer 'gtp2'.*did you mean 'gpt2'"):
        open_tokenizer("gtp2")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"[]", "describes no tokenizer"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"name": "cl100k"}', "names the tokenizer 'cl100k', this regpt knows gpt2"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content, said):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        open_tokenizer(tmp_path)
    assert str(path) in str(error.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        open_tokenizer(tmp_path)
