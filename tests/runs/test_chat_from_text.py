"""`regpt chat-from-text`: stages that are ordinary runs, stopped and continued; what a newcomer gets wrong."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

import tiny
from regpt.checkpoint.open import open_model
from regpt.cli import chat_from_text, train
from regpt.config import read_config
from regpt.data.manifest import read_manifest
from regpt.errors import UserError
from regpt.evals.chat.everyday import everyday_conversations
from regpt.runs import chat_from_text as stages
from regpt.runs import chat_plan

WORDS = ["river", "stone", "garden", "winter", "silver", "morning", "house", "old", "red", "the", "a", "of", "and"]


def write_texts(folder: Path, kilobytes: int = 120, files: int = 30) -> Path:
    folder.mkdir(parents=True)
    draw = random.Random(3)
    for i in range(files):
        lines = "\n".join(" ".join(draw.choices(WORDS, k=9)) for _ in range(kilobytes * 20 // files))
        (folder / f"{i:02d}.txt").write_text(f"{i} {lines}", encoding="utf-8")
    return folder


def write_pairs(path: Path) -> Path:
    rows = [{"prompt": f"say {i}", "chosen": f"Gladly: {i}.", "rejected": f"no {i}"} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows, few conversations, and a machine on which a step takes a second."""
    runs = chat_plan.SIZES["tiny"][2]
    short = {name: one._replace(seq_len=128, batch_tokens=128, share=1.0) for name, one in runs.items()}
    monkeypatch.setitem(chat_plan.SIZES, "tiny", (300, 1.5, short))
    monkeypatch.setattr(chat_plan, "everyday_conversations", lambda: everyday_conversations()[:60])
    real = chat_plan.make_plan

    def planned(config: Any, name: str) -> dict[str, Any]:
        plan = real(config, name, mfu=0.5)
        return plan | {"time": {"step_ms": 1000.0}}

    monkeypatch.setattr(chat_plan, "make_plan", planned)


def start(folder: Path, out: Path, *flags: str) -> int:
    return chat_from_text.main([str(folder), "--out", str(out), "--no-serve", "--device", "cpu", *flags])


def test_texts_become_a_model_that_answers_also_when_stopped_on_the_way(small, tmp_path, monkeypatch, capsys):
    folder, out = write_texts(tmp_path / "texts"), tmp_path / "out"
    write_pairs(folder / "pairs.jsonl")

    def killed(*args: object, **options: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "finetune", killed)
        with pytest.raises(KeyboardInterrupt):
            start(folder, out)
    base = tiny.final_files(out / "base")
    capsys.readouterr()
    assert start(folder, out) == 0
    said = capsys.readouterr().out
    for name in ("tokenizer.json", "tokens", "base"):
        assert f"{name}: done before" in said
    assert tiny.final_files(out / "base") == base
    assert "planned, in" in said.split("tokenizer.json: done")[0]
    assert said.count("you    ") >= 6
    for name in ("base", "chat", "preferred"):
        assert read_config(str(out / name / "config.toml")).train.steps >= 20
        assert train.main(["--resume", str(out / name)]) == 0
    assert read_manifest(out / "chat" / "data").documents("train") > 40
    assert "<|im_start|>" in open_model(str(out / "preferred")).companions["chat_template.jinja"]
    assert json.loads((out / "preferred" / "preferences.json").read_text())["pairs"] > 0
    assert read_config(str(out / "preferred" / "config.toml")).preference.method == "dpo"

    assert start(folder, out) == 0
    assert "preferred: done before" in capsys.readouterr().out
    with pytest.raises(UserError, match="begun with another --minutes; repeat that command"):
        start(folder, out, "--minutes", "3")
    (folder / "more.txt").write_text("more " * 100)
    with pytest.raises(UserError, match="other"):
        start(folder, out)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--minutes", "0.5"], "are left for base, and 20 steps take"),
        (["--data", "none.jsonl"], "--data 'none.jsonl' is not a file"),
        (["--pairs", "FOLDER/00.txt"], "no conversation is in the columns|holds"),
        (["--vocab-size", "5000"], "the text is too small for a vocabulary of 5000"),
        (["--out", "FOLDER"], "is not empty; choose a folder"),
        (["--out", "FOLDER/00.txt"], "is a file; choose a folder"),
    ],
)
def test_mistakes_are_one_sentence(small, tmp_path, flags, sentence):
    folder = write_texts(tmp_path / "texts")
    with pytest.raises(UserError, match=sentence):
        start(folder, tmp_path / "out", *[flag.replace("FOLDER", str(folder)) for flag in flags])


def test_too_little_text_and_none_at_all(small, tmp_path):
    folder = write_texts(tmp_path / "texts", kilobytes=20)
    with pytest.raises(UserError, match=r"of text, and a model needs 100 kB at least"):
        start(folder, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no readable file"):
        start(tmp_path / "empty", tmp_path / "out")
    write_pairs(tmp_path / "empty" / "pairs.jsonl")
    with pytest.raises(UserError, match="holds conversations and no text"):
        start(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("sizes", "held_out"), [([900, 80, 500], "1.txt"), ([900, 800], None), ([900], "")])
def test_of_a_few_files_one_is_held_out_unless_it_is_much_of_the_text(tmp_path, sizes, held_out):
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_text("word " * size)
    corpus = chat_plan.read_corpus(chat_plan.ChatFromTextRequest(str(tmp_path), tmp_path / "out"))
    assert [Path(one).name for one in corpus.held_out] == ([held_out] if held_out else [])
    assert corpus.val_fraction == (0.0 if held_out is None else None)
