"""`regpt data` and `regpt tokenizer`, as they are typed."""

import io
import json

import pytest

from regpt.cli import data, tokenizer
from regpt.errors import UsageError, UserError
from regpt.text.open import open_tokenizer


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """The current folder with 40 small texts in `texts/` and a tokenizer trained on them in `bpe/`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"[{i}] the cat sat on the mat\n" * (i + 1), encoding="utf-8")
    assert tokenizer.main(["train", "texts", "--vocab-size", "280", "--out", "bpe"]) == 0
    return tmp_path


def prepare(*more: str) -> int:
    return data.main(["prepare", "texts", "--tokenizer", "bpe", "--val-fraction", "0.2", "--out", "shards", *more])


def test_a_trained_tokenizer_is_written_and_measured(texts, capsys):
    assert open_tokenizer("bpe").n_vocab == 280
    assert tokenizer.main(["train", "texts/1.txt", "texts/2*.txt", "--vocab-size", "270", "--out", "b2"]) == 0
    out = capsys.readouterr().out
    assert "270 tokens" in out
    assert "bytes a token on its training text" in out


def test_long_words_are_cut_to_learn_from_and_counted(texts, capsys):
    (texts / "texts" / "dna.txt").write_text("the cat\n" + "ACGT" * 500 + "\n" + "=" * 1200, encoding="utf-8")
    assert tokenizer.main(["train", "texts", "--vocab-size", "270", "--out", "b2"]) == 0
    assert "words of more than 1,000 characters, cut into pieces to learn from: 2, the longest of 2,000" in (
        capsys.readouterr().out
    )


def test_a_tokenizer_is_never_overwritten(texts):
    same = ["train", "texts", "--vocab-size", "280", "--out", "bpe"]
    for other in (["--vocab-size", "270"], ["--encoding", "latin-1"]):
        with pytest.raises(UserError, match=r"tokenizer\.json exists already; choose another --out"):
            tokenizer.main([*same, *other])
    (texts / "texts" / "1.txt").write_text("[1] another text, as long", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json exists already"):
        tokenizer.main(same)


def test_prepare_info_and_verify_follow_each_other(texts, capsys):
    assert prepare("--shard-tokens", "1000", "--workers", "2") == 0
    assert "look inside with: regpt data info shards" in capsys.readouterr().out
    assert data.main(["info", "shards"]) == 0
    shown = capsys.readouterr().out
    assert "tokenizer bpe-280-" in shown
    assert "documents by length" in shown
    assert "the cat sat on the mat" in shown
    assert data.main(["info", "shards", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["splits"]["train"]["documents"] + info["splits"]["val"]["documents"] == 40
    assert info["sources"][0]["source"] == "texts"
    assert data.main(["verify", "shards"]) == 0
    assert "shards is intact" in capsys.readouterr().out


def test_verify_names_the_damaged_file(texts):
    prepare()
    path = texts / "shards" / "val-00000.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"val-00000\.bin is damaged: .*; restore the file or prepare") as error:
        data.main(["verify", "shards"])
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("command", "args", "said"),
    [
        (data, [], "regpt data needs a command; choose from prepare, import, info, verify"),
        (data, ["veriffy"], r"no command 'veriffy' \(did you mean 'verify'\?\)"),
        (data, ["prepare", "texts"], "--out"),
        (data, ["prepare", "texts", "--out", "x", "--workers", "many"], "many"),
        (data, ["info"], "DIR"),
        (tokenizer, [], "regpt tokenizer needs a command"),
        (tokenizer, ["trian"], r"did you mean 'train'"),
        (tokenizer, ["train", "--vocab-size", "300", "--out", "x"], "no SOURCE given"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(command, args, said):
    with pytest.raises(UsageError, match=said) as error:
        command.main(args)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_help_is_shown_for_the_command_and_its_subcommands(capsys):
    assert data.main(["--help"]) == tokenizer.main(["--help"]) == 0
    for command, name in ((data, "prepare"), (data, "info"), (data, "verify"), (tokenizer, "train")):
        with pytest.raises(SystemExit) as stop:
            command.main([name, "--help"])
        assert not stop.value.code
    shown = capsys.readouterr().out
    assert "--val-fraction" in shown
    assert "--vocab-size" in shown


def test_what_people_have_is_prepared_and_what_may_be_a_mistake_is_said(texts, capsys):
    (texts / "texts" / "40.csv").write_text("a", encoding="utf-8")
    (texts / "texts" / ".41.txt").write_text("a", encoding="utf-8")
    (texts / "rows.csv").write_bytes(b"\xef\xbb\xbfq;a\nthe cat;the mat\r\nragged\nsat;<|endoftext|>\n")
    flags = ["--template", r"{q}\n{a}", "--on-error", "skip"]
    command = ["prepare", "texts", "rows.csv", "--tokenizer", "bpe", "--val-fraction", "0", "--out", "csv"]
    assert data.main(["prepare", "rows.csv", *command[3:], *flags]) == 0
    out = capsys.readouterr().out
    assert "left out 1 row of more or fewer cells than the table (which: removed.jsonl)\n" in out
    assert "1 file with a byte-order mark, which is left out" in out
    assert "1 file with 1 times <|endoftext|> as ordinary characters; if it stands between documents" in out
    assert data.main(["prepare", "rows.csv", *command[3:], *flags]) == 0
    assert capsys.readouterr().out == "nothing to do: csv holds the shards of these sources already\n"
    assert data.main([*command[:2], *command[3:-1], "folder"]) == 0
    assert "left out 2 files: .csv 1, hidden 1\n" in capsys.readouterr().out
    assert tokenizer.main(["train", "rows.csv", "--vocab-size", "257", "--out", "b2", *flags]) == 0
    assert tokenizer.main(["train", "texts", "--vocab-size", "257", "--out", "b3"]) == 0
    assert "left out 2 files: .csv 1, hidden 1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("+++", "--separator '+++': 1 document from 1 file; it stands between no documents, check how it is spelled\n"),
        ("---", "--separator '---': 3 documents from 1 file\n"),
    ],
)
@pytest.mark.parametrize("fraction", ["0", "0.3"])
def test_a_separator_is_said_to_cut_or_not(texts, capsys, mark, said, fraction):
    (texts / "a.md").write_text("the cat\n---\nthe mat\n---\nthe cats sat\n", encoding="utf-8")
    command = ["prepare", "a.md", "--tokenizer", "bpe", "--val-fraction", fraction, "--out", f"md{fraction}"]
    assert data.main([*command, f"--separator={mark}"]) == 0
    assert said in capsys.readouterr().out


def test_text_from_stdin_is_prepared(texts, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(texts / "cache"))
    for said in ("wrote out", "nothing to do"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat<|endoftext|>the mat")))
        flags = ["--format", "txt", "--separator", "<|endoftext|>", "--val-fraction", "0", "--tokenizer", "bpe"]
        assert data.main(["prepare", "-", *flags, "--out", "out"]) == 0
        assert said in capsys.readouterr().out
    assert not list((texts / "cache" / "regpt" / "stdin").iterdir())
