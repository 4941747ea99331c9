"""`regpt data info`, as it is typed."""

import json

import pytest

from regpt.cli import data
from regpt.data.manifest import read_manifest
from regpt.errors import UserError
from regpt.prepare.prepare import prepare
from regpt.text.bpe import train_bpe


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """The current folder with token shards of forty small texts in `shards/`."""
    monkeypatch.chdir(tmp_path)
    texts = [f"[{i}] the cat sat on the mat\n" * (i + 1) for i in range(40)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    prepare(["*.txt"], tmp_path / "shards", train_bpe(texts, 280), val_fraction=0.2)
    return tmp_path / "shards"


def info(*args: str) -> int:
    return data.main(["info", "shards", *args])


def test_numbers_histogram_tokens_and_texts_are_shown(shards, capsys):
    assert info() == 0
    shown = capsys.readouterr().out
    manifest = read_manifest(shards)
    assert f"{manifest.tokens('train'):,}" in shown
    assert "val: documents by length in tokens" in shown
    assert "train: the most frequent tokens\n" in shown
    assert "train: the first documents begin with" in shown
    assert "the cat sat on the mat" in shown


def test_json_has_the_same_facts(shards, capsys):
    assert info("--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens_counted"] == facts["splits"]["train"]["tokens"]
    assert facts["frequent_tokens"][0]["share"] >= facts["frequent_tokens"][-1]["share"] > 0
    assert len(facts["texts"]) == 3
    assert all(text.startswith("<|endoftext|>[") for text in facts["texts"])


def test_numbers_are_shown_where_the_text_cannot_be_decoded(shards, capsys):
    (shards / "tokenizer.json").unlink()
    assert info() == 0
    assert "no text shown" in capsys.readouterr().out


def test_a_file_in_the_place_of_a_folder_is_called_one(shards):
    with pytest.raises(UserError, match=r"manifest.json' is a file; give the folder of the shards"):
        data.main(["info", str(shards / "manifest.json")])
