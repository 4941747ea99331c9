"""Files in buckets: fsspec's file system in memory stands for all of them."""

import gzip
import hashlib
import io
import json
import sys
from collections.abc import Iterator

import pytest
from remote_servers import S3, Bucket, GoogleStorage, serve

from regpt.errors import UserError
from regpt.prepare.named import open_sources
from regpt.remote.buckets import bucket_file
from regpt.remote.download import RemoteOptions
from regpt.remote.retry import Patience, problem_of

TEXT = "".join(f"line {i}\n" for i in range(4000)).encode()


@pytest.fixture
def options(tmp_path) -> RemoteOptions:
    return RemoteOptions(cache=tmp_path / "cache", patience=Patience(tries=3, sleep=lambda seconds: None))


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
        return [document.text for source in open_sources([path], options) for document in source.documents()]

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


def test_another_version_of_an_object_is_another_download(tmp_path):
    options = RemoteOptions(tmp_path)
    files = [bucket_file("gs://b/a.txt", {"size": 7, "generation": version}, options) for version in ("17", "18")]
    assert [file.version for file in files] == ["17", "18"]
    assert files[0].path != files[1].path


@pytest.mark.parametrize(("address", "package"), [("s3://bucket/a.txt", "s3fs"), ("gs://bucket/*.parquet", "gcsfs")])
def test_a_missing_package_is_named(monkeypatch, options, address, package):
    monkeypatch.setitem(sys.modules, package, None)
    registry = pytest.importorskip("fsspec.registry")
    monkeypatch.delitem(registry._registry, address.partition(":")[0], raising=False)  # where it was found before
    with pytest.raises(UserError, match=rf"needs {package}; install it with: pip install 'regpt\[buckets\]'"):
        open_sources([address], options)


def test_a_server_that_does_not_answer_is_one_sentence(options):
    pytest.importorskip("fsspec")
    with pytest.raises(UserError, match=r"ftp://127\.0\.0\.1:1/a\.txt could not be read: Connection refused"):
        open_sources(["ftp://127.0.0.1:1/a.txt"], options)


def test_without_fsspec_it_says_what_to_install(monkeypatch, options):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"reading s3://b/a\.txt needs fsspec; install it with: pip install 'regpt"):
        open_sources(["s3://b/a.txt"], options)


@pytest.fixture(params=["gs", "s3"])
def served(request, monkeypatch) -> Iterator[tuple[str, Bucket]]:
    """A scheme, and a server that imitates the storage behind it, with four objects."""
    fsspec = pytest.importorskip("fsspec")
    package = pytest.importorskip({"gs": "gcsfs.core", "s3": "s3fs"}[request.param], reason="needs regpt[buckets]")
    serving = serve(GoogleStorage if request.param == "gs" else S3)
    site = next(serving)
    site.objects = {"d/1.txt": b"one", "d/x/2.jsonl": jsonl(["two"]), "d/z.docx": b"1", "long.txt": TEXT * 40}
    options = {"endpoint_url": site.url, **({"token": "anon"} if request.param == "gs" else {})}
    monkeypatch.setitem(fsspec.config.conf, request.param, options)
    if request.param == "gs":  # gcsfs asks a second interface, gRPC, of what kind a bucket is
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gs", package.GCSFileSystem)
    else:
        for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y"), ("DEFAULT_REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
    yield request.param, site
    next(serving, None)


@pytest.mark.filterwarnings("default")  # theirs
def test_google_and_amazon_are_read_by_file_folder_and_glob(served, options):
    scheme, _ = served

    def found(path: str) -> list[str]:
        sources = open_sources([f"{scheme}://bkt/{path}"], options)
        return [document.text for source in sources for document in source.documents()]

    assert found("d") == ["one", "two"]
    assert found("d/*.txt") == ["one"]
    assert found("d/x/2.jsonl") == ["two"]
    assert found("**/*.jsonl") == ["two"]
    assert found("long.txt") == [(TEXT * 40).decode()]
    (source,) = open_sources([f"{scheme}://bkt/d/1.txt"], options)
    assert source.localize().record() == {
        "source": f"{scheme}://bkt/d/1.txt",
        "file": f"{scheme}://bkt/d/1.txt",
        "bytes": 3,
        "sha256": hashlib.sha256(b"one").hexdigest(),
        "url": f"{scheme}://bkt/d/1.txt",
    }


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("bkt/none.txt", r"bkt/none\.txt could not be read: there is no such file"),
        ("other/a.txt", r"other/a\.txt could not be read: there is no such file"),
        ("bkt/d/z.docx", r"z\.docx' is of a kind that is not read"),
        ("bkt/*.md", r"no file matches .*://bkt/\*\.md"),
    ],
)
def test_what_google_and_amazon_do_not_hold_is_one_sentence(served, options, path, said):
    scheme, _ = served
    with pytest.raises(UserError, match=said):
        open_sources([f"{scheme}://{path}"], options)


@pytest.mark.parametrize("text", ["Forbidden: b/bkt/o", "Forbidden"])
def test_missing_rights_are_not_tried_again(text):
    assert problem_of(OSError(text)) == (f"{text}; log in, or ask for access", True, 0.0)
