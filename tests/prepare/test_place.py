"""A disk that takes nothing: one sentence, before the work where it can be known, and nothing is left behind."""

import errno
from pathlib import Path

import pytest

from regpt import files
from regpt.__main__ import main
from regpt.errors import UserError
from regpt.prepare import importer
from regpt.prepare.work import try_place, writing_to


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("ba do mi ta ru ke " * 200, encoding="utf-8")
    return path


def refusing(number: int):
    def finish(file, path) -> None:
        file.close()
        raise OSError(number, "refused")

    return finish


def test_a_place_is_tried_and_left_as_it_was(tmp_path):
    try_place(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "here").mkdir()
    try_place(tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_what_cannot_be_a_folder_is_refused(text):
    with pytest.raises(
        UserError, match=r"--out .*a\.txt.b cannot be written \(Not a directory\); choose another folder"
    ):
        try_place(text / "b")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_called_full(number):
    with pytest.raises(UserError, match="the disk of out is full; free space"), writing_to(Path("out")):
        raise OSError(number, "refused")


@pytest.mark.parametrize(("number", "said"), [(errno.EROFS, "cannot be written"), (errno.ENOSPC, "is full")])
def test_commands_that_write_refuse_the_place_before_the_work(tmp_path, text, monkeypatch, capsys, number, said):
    monkeypatch.setattr(files, "finish_file", refusing(number))
    monkeypatch.setattr("regpt.text.bpe.train_bpe", lambda *args: pytest.fail("worked"))
    monkeypatch.setattr(importer, "copy_files", lambda *args: pytest.fail("worked"))
    (tmp_path / "tokens").mkdir()
    for name in ("train.bin", "val.bin"):
        (tmp_path / "tokens" / name).write_bytes(bytes(64))
    for command in (
        ["tokenizer", "train", str(text), "--vocab-size", "260"],
        ["data", "import", str(tmp_path / "tokens"), "--tokenizer", "gpt2"],
    ):
        assert main([*command, "--out", str(tmp_path / "new" / "out")]) == 1, command
        err = capsys.readouterr().err
        assert said in err, (command, err)
        assert "raceback" not in err
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_after_the_work_is_a_sentence_too(tmp_path, text, monkeypatch, capsys):
    real = files.finish_file

    def full(file, path) -> None:
        if "tokenizer" in path.name:
            refusing(errno.ENOSPC)(file, path)
        real(file, path)

    monkeypatch.setattr(files, "finish_file", full)
    assert main(["tokenizer", "train", str(text), "--vocab-size", "260", "--out", str(tmp_path / "out")]) == 1
    assert "the disk of " in capsys.readouterr().err
