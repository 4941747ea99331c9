"""One listing for every command: each file once, in its split; what is left out is counted by kind."""

import os
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from regpt.data.manifest import read_manifest
from regpt.errors import UserError
from regpt.prepare.importer import import_tokens
from regpt.prepare.listing import counted_kinds, printable, without_hidden
from regpt.prepare.named import list_sources
from regpt.prepare.prepare import prepare
from regpt.prepare.sources import find_files
from regpt.remote.download import RemoteOptions
from regpt.text.bpe import train_bpe

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 301966000\n"
TOKENIZER = train_bpe(["the cat sat on the mat\n"] * 4, 260)
posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and names of bytes as on POSIX")


def write(folder: Path, *names: str, text: str = "a story") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def listed(*sources: Path, val: tuple[Path, ...] = ()) -> tuple[list[str], list[str], Counter[str]]:
    listing = list_sources([*map(str, sources)], [*map(str, val)])
    return [file.file for file in listing.train], [file.file for file in listing.val], listing.left_out


def test_a_folder_counts_what_it_leaves_out_by_kind(tmp_path):
    write(tmp_path, "a.txt", "b.py", "c/d.PY", "e.tar.gz", "Makefile", "f.12345", ".g.txt", ".git/h.txt", "._a.txt")
    train, _, left_out = listed(tmp_path)
    assert train == ["a.txt"]
    assert left_out == {".py": 2, ".tar.gz": 1, "other": 2, "hidden": 3}
    assert counted_kinds(left_out) == "8 files: hidden 3, .py 2, other 2, .tar.gz 1"


@posix
def test_links_pipes_and_locked_files_of_a_folder_are_counted(tmp_path, monkeypatch):
    write(tmp_path / "in", "a.txt", "locked.txt")
    write(tmp_path / "elsewhere", "b.txt")
    for name, target in {
        "gone.txt": "nowhere",
        "self.txt": "self.txt",
        "up": "..",
        "here": ".",
        "more": "../elsewhere",
    }.items():
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "in" / "again").symlink_to("../elsewhere")
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path / "in")
        server.bind("socket.txt")
    access = os.access  # root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked.txt" and access(path, mode))
    train, _, left_out = listed(tmp_path / "in")
    assert train == ["a.txt", "again/b.txt"]
    assert left_out == {
        "broken link": 1,
        "link loop": 3,
        "given twice": 1,
        "pipe, socket or device": 2,
        "unreadable": 1,
    }


@posix
def test_a_file_with_several_names_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "in/a.txt", "b.txt")
    os.link("in/a.txt", "in/hard.txt")
    Path("in/soft.txt").symlink_to("a.txt")
    train, _, left_out = listed(Path("in"), Path("in/a.txt"), Path("in"), Path("b.txt"), tmp_path / "b.txt")
    assert train == ["a.txt", "b.txt"]
    assert left_out == {"given twice": 7}
    assert len(list_sources(["pydocs", "pydocs"]).train) == 1


def test_what_is_held_out_is_not_trained_on(tmp_path):
    write(tmp_path, "a.txt", "b.txt", "v/c.txt")
    train, val, left_out = listed(tmp_path, val=(tmp_path / "v", tmp_path / "b.txt", tmp_path / "v"))
    assert (train, val) == (["a.txt"], ["c.txt", str(tmp_path / "b.txt")])
    assert left_out == {"validation file": 2, "given twice": 1}
    with pytest.raises(UserError, match="every source is held out by --val"):
        listed(tmp_path / "v", val=(tmp_path,))


def test_a_folder_of_token_shards_is_not_text(tmp_path):
    write(tmp_path, "a.txt", "out/manifest.json", "out/train-00000.idx", "out/removed.jsonl")
    assert listed(tmp_path)[::2] == (["a.txt"], {"folder of token shards": 1})


def test_a_git_lfs_pointer_is_refused_by_name(tmp_path):
    for name in ("a.txt", "b.parquet", "c.bin"):
        write(tmp_path / name[0], name, text=POINTER)
    for source in ("a", "a/a.txt", "b"):
        with pytest.raises(UserError, match=r"is a Git LFS pointer .*git lfs pull"):
            list_sources([str(tmp_path / source)])
    with pytest.raises(UserError, match=r"is a Git LFS pointer .*git lfs pull"):
        import_tokens([str(tmp_path / "c")], tmp_path / "out", TOKENIZER)


def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path):
    for name in ("a" * 5000, f"{tmp_path}/{'b/' * 6000}", "a\0b", "a\ud800b", f"{tmp_path}/{'a' * 300}/*.txt"):
        with pytest.raises(UserError, match="no file matches"):
            find_files(name)
        with pytest.raises(UserError, match="no file matches"):
            import_tokens([name], tmp_path / "out", TOKENIZER)


@posix
def test_what_is_no_file_is_one_sentence(tmp_path):
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, said in (
        ("gone", "is a link to a file that does not"),
        ("self", "back to itself"),
        ("pipe", "is a pipe"),
    ):
        with pytest.raises(UserError, match=said):
            find_files(str(tmp_path / f"{name}.txt"))
    write(tmp_path, "a.txt")
    left_out: Counter[str] = Counter()
    assert [file.path.name for file in find_files(str(tmp_path / "*.txt"), left_out)] == ["a.txt"]
    assert left_out == {"broken link": 1, "link loop": 1, "pipe, socket or device": 1}


@posix
def test_a_name_that_is_not_utf8_is_escaped_in_the_manifest(tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    for name in (b"\xff.txt", b"a.txt"):
        with open(folder + b"/" + name, "w", encoding="utf-8") as file:
            file.write("the cat\n" * (3 if name == b"a.txt" else 2))
    prepare([str(tmp_path / "in")], tmp_path / "out", TOKENIZER, val_fraction=0)
    assert [source["file"] for source in read_manifest(tmp_path / "out").sources] == ["a.txt", r"\xff.txt"]
    assert printable("é\ud800") == r"é\ud800"


def test_prepare_and_import_store_what_they_left_out(tmp_path):
    write(tmp_path, "in/a.txt", "in/b.csv.bak")
    np.arange(20, dtype="<u2").tofile(tmp_path / "in" / "train.bin")
    assert prepare([str(tmp_path / "in")], tmp_path / "out", TOKENIZER, val_fraction=0).left_out == {
        ".bak": 1,
        ".bin": 1,
    }
    (tmp_path / "in" / "more").mkdir()
    given = [str(tmp_path / "in"), str(tmp_path / "in" / "train.bin")]
    left_out = {".txt": 1, ".bak": 1, "folder": 1, "given twice": 1}
    assert import_tokens(given, tmp_path / "tokens", TOKENIZER).left_out == left_out
    assert read_manifest(tmp_path / "tokens").left_out == left_out


def test_an_address_without_a_bucket_is_one_sentence(tmp_path):
    pytest.importorskip("fsspec")
    for address in ("s3://", "s3:///a.txt", "gs://"):
        with pytest.raises(UserError, match=rf"names no bucket; an address looks like {address[:2]}://BUCKET/PATH"):
            list_sources([address], options=RemoteOptions(cache=tmp_path))


def test_files_below_a_hidden_name_elsewhere_are_hidden():
    left_out: Counter[str] = Counter()
    names = [".a/b/c.txt", ".a/b/.c.txt", ".a/b/.d/e.txt"]
    assert without_hidden(names, ".a/b", left_out) == [".a/b/c.txt"]
    assert left_out == {"hidden": 2}


@posix
def test_folders_that_link_to_each_other_are_searched_once(tmp_path):
    write(tmp_path, "a/a.txt", "b/b.txt")
    (tmp_path / "a" / "to_b").symlink_to("../b")
    (tmp_path / "b" / "to_a").symlink_to("../a")
    train, _, left_out = listed(tmp_path)
    assert train == ["a/a.txt", "b/b.txt"]
    assert left_out == {"given twice": 2}
