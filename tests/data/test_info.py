"""What is said of a data folder, against the texts that it was made from."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from regpt.cli import data_info
from regpt.data import info
from regpt.data.info import (
    SplitInfo,
    count_tokens,
    describe_shards,
    first_texts,
    histogram,
    most_frequent,
    tokenizer_identity,
    tokenizer_of,
)
from regpt.data.manifest import read_manifest
from regpt.data.stream import document_starts, open_stream
from regpt.errors import UserError
from regpt.files import file_sha256
from regpt.prepare.prepare import prepare
from regpt.text.bpe import train_bpe
from regpt.text.gpt2 import VOCAB_PACKAGE, find_vocabulary, load_gpt2

TOKENIZER = train_bpe(["the cat sat on the mat, and the cats sat on the mats\n" * 4], 270)
TEXTS = [f"the cat {i} sat on the mat" for i in range(30)]


@pytest.fixture
def folder(tmp_path) -> Path:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    prepare([str(source)], tmp_path / "out", TOKENIZER, val_fraction=0.2, shard_tokens=50)
    return tmp_path / "out"


def split_of(lengths: list[int]) -> SplitInfo:
    return SplitInfo("train", len(lengths), sum(lengths), 10, 1, np.array(lengths))


def test_the_description_counts_what_was_prepared(folder):
    manifest = read_manifest(folder)
    train, val = describe_shards(folder, manifest)
    assert train.documents + val.documents == len(TEXTS)
    assert train.text_bytes + val.text_bytes == sum(map(len, TEXTS))
    lengths = sorted([*train.lengths, *val.lengths])
    assert lengths == sorted(len(TOKENIZER.encode(text)) + 1 for text in TEXTS)
    expected = sum(map(len, TEXTS)) / sum(len(TOKENIZER.encode(text)) for text in TEXTS)
    assert train.bytes_per_token == pytest.approx(expected, rel=0.05)
    assert int(document_starts(folder, manifest, "train")[-1]) == manifest.tokens("train")
    json.dumps(train.to_dict())


def test_the_histogram_has_a_bin_for_each_power_of_two():
    lengths = np.array([1, 2, 3, 4, 7, 8, 33])
    assert histogram(lengths) == [(1, 2, 1), (2, 4, 2), (4, 8, 2), (8, 16, 1), (16, 32, 0), (32, 64, 1)]
    assert sum(n for _, _, n in histogram(np.arange(1, 1000))) == 999


def test_every_token_is_counted_and_the_most_frequent_come_first(folder):
    manifest = read_manifest(folder)
    counts = count_tokens(folder, manifest, "train") + count_tokens(folder, manifest, "val")
    by_hand = Counter(token for text in TEXTS for token in [TOKENIZER.eot, *TOKENIZER.encode(text)])
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == by_hand
    total = sum(by_hand.values())
    expected = [(i, n / total) for i, n in sorted(by_hand.items(), key=lambda item: (-item[1], item[0]))]
    assert most_frequent(counts, 5) == expected[:5]
    assert most_frequent(counts, 10**6) == expected  # tokens that do not occur are not named


def test_of_a_long_split_blocks_spread_over_it_are_counted(write_shards, monkeypatch):
    monkeypatch.setattr(info, "BLOCK", 10)
    monkeypatch.setattr(info, "COUNTED_BLOCKS", 3)
    folder, manifest, _ = write_shards([95], vocab_size=100)
    counted = np.flatnonzero(count_tokens(folder, manifest, "train")).tolist()
    assert counted == [*range(1, 11), *range(41, 51), *range(91, 96)]  # token i of the corpus is i + 1


def test_the_first_documents_are_decoded(folder):
    manifest = read_manifest(folder)
    starts = document_starts(folder, manifest, "train")
    tokens = open_stream(folder, manifest, "train", "sequential", 0).tokens(0, int(starts[2])).tolist()
    texts = first_texts(folder, manifest, "train", TOKENIZER, 2, 5)
    assert texts == [TOKENIZER.decode(tokens[int(start) :][:5]) for start in starts[:2]]
    assert texts[0].startswith("<|endoftext|>the cat")
    assert first_texts(folder, manifest, "train", TOKENIZER, 1, 10**6) == [TOKENIZER.decode(tokens[: int(starts[1])])]


def test_shards_of_another_tokenizer_are_not_decoded(folder):
    other = train_bpe(["something else " * 9], 260)
    (folder / "tokenizer.json").write_bytes(other.to_json().encode())
    with pytest.raises(UserError, match=r"were made with bpe-270-.* the tokenizer found is bpe-260-"):
        tokenizer_of(folder, read_manifest(folder))


def test_a_folder_of_before_is_known_by_the_hash_of_its_file(folder):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(TOKENIZER.to_json())), encoding="utf-8")  # as it came from elsewhere
    manifest = read_manifest(folder)
    assert tokenizer_identity(folder, manifest) == tokenizer_of(folder, manifest).sha256 == TOKENIZER.sha256
    before = replace(manifest, tokenizer="bpe-270-01234567", tokenizer_sha256=file_sha256(file))
    assert tokenizer_identity(folder, before) == tokenizer_of(folder, before).sha256 == TOKENIZER.sha256
    with pytest.raises(UserError, match="the tokenizer found is"):
        tokenizer_of(folder, replace(manifest, tokenizer_sha256="0" * 64))
    with pytest.raises(UserError, match=r"has 271 tokens, its tokenizer bpe-270-\w+ 270"):
        tokenizer_of(folder, replace(manifest, vocab_size=271))


def test_parts_of_characters_are_shown_as_bytes(tmp_path, monkeypatch, capsys):
    """No token of this tokenizer is a whole character of this text."""
    monkeypatch.setattr(data_info, "SHOWN_TOKENS", 5)
    (tmp_path / "a.txt").write_text("日本語", encoding="utf-8")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", TOKENIZER, val_fraction=0)
    assert data_info.main([str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "\ufffd" not in out
    assert "b'\\xe6'" in out
    assert data_info.main([str(tmp_path / "out"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"\\xe6", "<|endoftext|>"} < {token["text"] for token in shown["frequent_tokens"]}
    assert shown["texts"] == ["<|endoftext|>日\\xe6"]


@pytest.mark.parametrize("text", ["the cat 日本 \x00\xad\xff🙂", "".join(map(chr, range(0x250)))])
def test_the_bytes_of_tokens_are_those_of_their_text(text):
    for tokenizer in (TOKENIZER, *([load_gpt2()] if find_vocabulary(VOCAB_PACKAGE) else [])):
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert [len(tokenizer.token_bytes(i)) for i in ids] == tokenizer.byte_lengths()[ids].tolist()
        assert tokenizer.token_bytes(tokenizer.eot) == b"<|endoftext|>"


def test_a_shard_that_is_a_pointer_of_git_lfs_is_named(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d7a2146" * 8 + "\nsize 301966000\n"
    (folder / "train-00000.bin").write_text(pointer, encoding="utf-8")
    with pytest.raises(UserError, match=r"train-00000\.bin' is a Git LFS pointer"):
        read_manifest(folder)
