"""Names that no file system takes, and files that are not their content."""

import errno
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import regpt.errors
import regpt.files
from regpt.errors import UserError, word
from regpt.files import (
    exists,
    is_file,
    is_folder,
    is_lfs_pointer,
    matching,
    refuse_lfs_pointer,
    rename,
    replacing,
    resolved,
    write_json,
    write_text,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 301966000\n"


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "a/" * 6000, "a" * 5000 + "\0", "", "missing"])
def test_a_name_that_no_file_system_takes_names_nothing(name):
    assert not any(ask(name) for ask in (exists, is_file, is_folder))


def test_a_circle_of_links_and_a_name_below_a_file_name_nothing(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_bytes(b"")
    assert not any(ask(tmp_path / name) for ask in (exists, is_file, is_folder) for name in ("a", "file/below"))
    assert resolved(tmp_path / "a").name in ("a", "b")


def test_a_folder_that_may_not_be_looked_into_is_not_called_absent(monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("os.stat", refuse)
    with pytest.raises(UserError, match=r"cannot look at 'private/run' \(Permission denied\)"):
        is_folder("private/run")


@pytest.mark.parametrize("name", ["a\0b", "a\0/*", "a" * 5000 + "*", "a/" * 6000 + "*"])
def test_a_name_that_no_file_system_takes_is_resolved_to_itself_and_matches_nothing(name):
    assert str(resolved(name)).endswith(name.rstrip("/"))
    assert matching(name) == []


def test_files_and_folders_are_told_apart(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    assert [ask(tmp_path / "a") for ask in (exists, is_file, is_folder)] == [True, True, False]
    assert [ask(str(tmp_path)) for ask in (exists, is_file, is_folder)] == [True, False, True]


@pytest.mark.parametrize(
    "content",
    [
        POINTER,
        POINTER.rstrip(),
        POINTER.replace(b"\n", b"\r\n"),
        POINTER.replace(b"oid", b"ext-0-foo sha256:" + b"0" * 64 + b"\noid"),
        POINTER.replace(b"git-lfs", b"hawser"),
    ],
)
def test_git_lfs_pointers_are_recognised_and_named(tmp_path, content):
    assert is_lfs_pointer(content)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors' is a Git LFS pointer.*git lfs pull"):
        refuse_lfs_pointer(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", POINTER + b"is what a pointer looks like", b"x" + POINTER, POINTER[:60]])
def test_text_about_pointers_is_no_pointer(tmp_path, content):
    assert not is_lfs_pointer(content)
    (tmp_path / "a.txt").write_bytes(content)
    refuse_lfs_pointer(tmp_path / "a.txt")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with suppress(KeyError), replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_one_sentence_with_its_remedy(tmp_path):
    with pytest.raises(UserError, match=r"cannot write '.*no/a.txt' \(No such file or directory\); choose another"):
        write_text(tmp_path / "no" / "a.txt", "text", "choose another place")
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "no" / "a.txt", "text")


def test_json_of_a_file_keeps_names_that_are_not_utf8(tmp_path):
    content = {"name": "日本", "not utf-8": "a\udc80b"}
    write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_bytes()) == content
    assert "日本" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("busy", [0, 3, 99])
def test_windows_is_asked_again_while_another_process_has_a_file_open(tmp_path, monkeypatch, busy):
    (tmp_path / "new").write_text("new")
    monkeypatch.setattr(regpt.files, "os", SimpleNamespace(name="nt"))
    rename_now, tried, waited = Path.replace, [], []

    def refused(path, name):
        tried.append(name)
        if len(tried) <= busy:
            raise PermissionError(errno.EACCES, "in use")
        return rename_now(path, name)

    monkeypatch.setattr(Path, "replace", refused)
    with suppress(PermissionError):
        rename(tmp_path / "new", tmp_path / "old", wait=waited.append)
    assert (tmp_path / "old").exists() == (busy < 99)
    assert len(waited) == min(busy, 6)
    assert sum(waited) < 3


def test_windows_shells_know_double_quotes_alone(monkeypatch):
    assert [word(name) for name in ("runs/a", "my run")] == ["runs/a", "'my run'"]
    monkeypatch.setattr(regpt.errors, "os", SimpleNamespace(name="nt"))
    assert [word(name) for name in (r"runs\a", r"my runs\a")] == [r"runs\a", r'"my runs\a"']


@pytest.mark.skipif(os.name != "posix", reason="Windows has no pipes in the file system")
def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "all of it")
    assert os.read(reader, 100) == b"all of it"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_stdout_by_its_name_is_written_to_where_it_stands(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        regpt.files, "STREAMS", {str(tmp_path / "stdout"): 1}
    )  # /dev/stdout of the machine, should this fail
    os.write(1, b"before ")
    write_text(tmp_path / "stdout", "in between")
    os.write(1, b" after")
    assert capfd.readouterr().out == "before in between after"
    assert list(tmp_path.iterdir()) == []
