"""Named sets: what each name stands for, and tinyshakespeare never anything else than the file whose hash is pinned."""

import hashlib
from pathlib import Path

import pytest

from regpt.errors import UserError
from regpt.files import file_sha256
from regpt.prepare import named
from regpt.prepare.named import open_sources
from regpt.remote.download import RemoteOptions
from regpt.remote.retry import Patience

TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 3
SHARED = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"
ONCE = Patience(tries=1)


@pytest.fixture
def pinned(monkeypatch):
    """`TEXT` is tinyshakespeare."""
    monkeypatch.setattr(named, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT).hexdigest())
    monkeypatch.setattr(named, "SHAKESPEARE_BYTES", len(TEXT))


def test_the_download_is_kept_and_a_damaged_copy_replaced(web, pinned, tmp_path, monkeypatch):
    web.files["/input.txt"] = TEXT
    monkeypatch.setattr(named, "SHAKESPEARE_URL", web.url + "/input.txt")
    options = RemoteOptions(cache=tmp_path / "cache")
    (source,) = open_sources(["tinyshakespeare"], options)
    assert not web.asked, "nothing is downloaded before it is read"
    kept = source.localize().path
    for damage in (False, True):
        if damage:
            kept.write_bytes(b"x" * len(TEXT))
        assert [document.text for document in source.documents()] == [TEXT.decode()]
    assert len(web.asked) == 2
    assert source.record()["source"] == "tinyshakespeare"
    assert str(tmp_path) not in str(source.record())


def test_a_download_of_another_file_is_refused_and_not_kept(web, tmp_path, monkeypatch):
    web.files["/input.txt"] = bytes(named.SHAKESPEARE_BYTES)
    monkeypatch.setattr(named, "SHAKESPEARE_URL", web.url + "/input.txt")
    (source,) = open_sources(["tinyshakespeare"], RemoteOptions(cache=tmp_path))
    with pytest.raises(UserError, match="twice with another sha256 hash than the published one, so it was not kept"):
        source.localize()
    assert not [path for path in tmp_path.rglob("*input.txt*") if path.suffix != ".lock"]


def test_no_network_is_one_sentence_that_names_the_way_out(web, tmp_path, monkeypatch):
    for url in (web.url + "/missing", "http://127.0.0.1:9/"):
        monkeypatch.setattr(named, "SHAKESPEARE_URL", url)
        (source,) = open_sources(["tinyshakespeare"], RemoteOptions(cache=tmp_path, patience=ONCE))
        with pytest.raises(
            UserError, match=r"(could not be read|no connection to 127.0.0.1): .*; or give a local copy as SOURCE"
        ):
            source.localize()


def test_a_named_set_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pydocs").mkdir()
    Path("pydocs/a.txt").write_text("mine", encoding="utf-8")
    (named_set,) = open_sources(["pydocs"])
    (folder,) = open_sources(["./pydocs"])
    assert named_set.bytes > 1_000_000
    assert folder.bytes == 4


@pytest.mark.parametrize(
    ("name", "repo"), [("fineweb-edu-10B", "HuggingFaceFW/fineweb-edu"), ("fineweb-10B", "HuggingFaceFW/fineweb")]
)
def test_fineweb_is_the_parquet_files_of_its_sample(hub, tmp_path, name, repo):
    hub.add(
        repo, {"sample/10BT/001_00000.parquet": b"B", "sample/10BT/000_00000.parquet": b"A", "data/x.parquet": b"C"}
    )
    found = open_sources([name], RemoteOptions(cache=tmp_path, endpoint=hub.url))
    assert [(file.source, file.file) for file in found] == [
        (name, "sample/10BT/000_00000.parquet"),
        (name, "sample/10BT/001_00000.parquet"),
    ]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_file(), reason="no tinyshakespeare.txt beside the repository")
def test_the_pinned_hash_is_that_of_the_real_file():
    assert file_sha256(SHARED) == named.SHAKESPEARE_SHA256
    assert SHARED.stat().st_size == named.SHAKESPEARE_BYTES
