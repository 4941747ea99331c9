"""Files in buckets: fsspec's file system in memory stands for all of them."""

import base64
import gzip
import hashlib
import io
import json
import sys

import pytest

from regpt.data.buckets import bucket_file
from regpt.data.download import Patience, compare
from regpt.data.named import NamedOptions, open_sources
from regpt.errors import UserError

TEXT = "".join(f"line {i}\n" for i in range(4000)).encode()


@pytest.fixture
def options(tmp_path) -> NamedOptions:
    return NamedOptions(cache=tmp_path / "cache", patience=Patience(tries=3, sleep=lambda seconds: None))


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.fixture
def bucket():
    """fsspec's file system in memory, with three files."""
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    fs.pipe({"/b/2.txt": b"two", "/b/1.jsonl.gz": gzip.compress(jsonl(["one"])), "/b/c/3.txt": b"three"})
    yield fs
    fs.rm("/b", recursive=True)


def test_a_bucket_is_read_by_file_folder_and_glob(bucket, options):
    def found(path: str) -> list[str]:
        return [document.text for source in open_sources([path], options) for document in source.documents("text")]

    assert found("memory://b") == ["one", "two", "three"]
    assert found("memory://b/*.txt") == ["two"]
    assert found("memory://b/c/3.txt") == ["three"]
    with pytest.raises(UserError, match=r"memory://b/nothing\.txt could not be read: there is no such file"):
        found("memory://b/nothing.txt")
    with pytest.raises(UserError, match="no file matches memory://b/"):
        found("memory://b/*.md")


def test_a_bucket_goes_on_where_the_connection_was_cut(bucket, options, monkeypatch):
    bucket.pipe("/b/long.txt", TEXT)
    (source,) = open_sources(["memory://b/long.txt"], options)
    asked = []
    opened = type(bucket).open

    def flaky(self, path, *args, **kwargs):
        stream = opened(self, path, *args, **kwargs)
        if not asked:
            stream = io.BytesIO(TEXT[:1000])
        asked.append(stream)
        return stream

    monkeypatch.setattr(type(bucket), "open", flaky)
    assert source.localize().path.read_bytes() == TEXT
    assert len(asked) == 2


def test_googles_md5_is_checked(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT)
    md5 = base64.b64encode(hashlib.md5(TEXT).digest()).decode()
    file = bucket_file("gs://b/a.txt", {"size": len(TEXT), "md5Hash": md5, "generation": "17"})
    assert file.version == "17"
    assert compare(tmp_path / "a.txt", file.checksum) == (True, hashlib.sha256(TEXT).hexdigest())
    (tmp_path / "a.txt").write_bytes(TEXT[:-1])
    assert compare(tmp_path / "a.txt", file.checksum)[0] is False


@pytest.mark.parametrize(("address", "package"), [("s3://bucket/a.txt", "s3fs"), ("gs://bucket/*.parquet", "gcsfs")])
def test_a_missing_package_is_named(monkeypatch, options, address, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package}; install it with: pip install {package}"):
        open_sources([address], options)
