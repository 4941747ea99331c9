"""`regpt data info`, as it is typed."""

import json

import pytest

from regpt.cli import data
from regpt.data.manifest import read_manifest
from regpt.errors import UsageError, UserError
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


def test_numbers_histogram_tokens_and_rows_are_shown(shards, capsys):
    assert info("--seq-len", "32") == 0
    shown = capsys.readouterr().out
    manifest = read_manifest(shards)
    assert f"{manifest.tokens('train'):,}" in shown
    assert "val: documents by length in tokens" in shown
    assert "train: the most frequent tokens\n" in shown
    assert "train: the first rows of 32 tokens in the order shuffle begin with" in shown
    assert "the cat sat on the mat" in shown


def test_json_has_the_same_facts(shards, capsys):
    assert info("--json", "--order", "bos", "--seq-len", "16") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens_counted"] == facts["splits"]["train"]["tokens"]
    assert facts["frequent_tokens"][0]["share"] >= facts["frequent_tokens"][-1]["share"] > 0
    assert len(facts["rows"]) == 3
    assert all(row.startswith("<|endoftext|>") for row in facts["rows"])
    kept = facts["bos"]["rows"] * 17 / facts["splits"]["train"]["tokens"]
    assert facts["bos"]["left_out"] == pytest.approx(1 - kept, abs=1e-6)


def test_the_order_bos_says_what_it_leaves_out(shards, capsys):
    assert info("--order", "bos", "--seq-len", "16") == 0
    assert "rows of 16 an epoch, which leave out" in capsys.readouterr().out


def test_numbers_are_shown_where_the_text_cannot_be_decoded(shards, capsys):
    (shards / "tokenizer.json").unlink()
    assert info("--seq-len", "32") == 0
    assert "no text shown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "error", "said"),
    [
        (["--seq-len", "0"], UsageError, "--seq-len is 0, must be at least 1"),
        (["--order", "boss"], UsageError, "boss"),
        (["--order", "bos", "--seq-len", "100000"], UserError, "fill no row of data.seq_len 100000"),
    ],
)
def test_bad_input_is_one_sentence(shards, args, error, said):
    with pytest.raises(error, match=said) as raised:
        info(*args)
    assert "\n" not in str(raised.value)


def test_rows_longer_than_the_text_are_called_by_their_length(shards, capsys):
    assert data.main(["info", str(shards), "--seq-len", "2000000"]) == 0
    said = capsys.readouterr().out
    assert "(there are no more, 2,000,000 were asked for) in the order shuffle begin with" in said
    assert "rows of 2,000,000" not in said


def test_a_file_in_the_place_of_a_folder_is_called_one(shards):
    with pytest.raises(UserError, match=r"manifest.json' is a file; give the folder of the shards"):
        data.main(["info", str(shards / "manifest.json")])
