"""tinyshakespeare: one download, kept, and never anything else than the file whose hash is pinned."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from regpt.data import named
from regpt.data.named import NamedOptions, open_sources
from regpt.errors import UserError

TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 3
SHARED = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture
def server():
    """A local server of `TEXT` at any path but /missing; `server.requests` counts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            missing = self.path == "/missing"
            self.send_response(404 if missing else 200)
            self.send_header("Content-Length", "0" if missing else str(len(TEXT)))
            self.end_headers()
            self.wfile.write(b"" if missing else TEXT)

        def log_message(self, *args: object) -> None: ...

    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/", asked
        http.shutdown()
        thread.join()


@pytest.fixture
def pinned(monkeypatch):
    """`TEXT` is tinyshakespeare."""
    monkeypatch.setattr(named, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT).hexdigest())
    monkeypatch.setattr(named, "SHAKESPEARE_BYTES", len(TEXT))


def test_the_download_is_kept_and_a_damaged_copy_replaced(server, pinned, tmp_path):
    url, asked = server
    options = NamedOptions(cache=tmp_path / "cache", url=url)
    for damage in (False, False, True):
        if damage:
            (tmp_path / "cache" / "tinyshakespeare.txt").write_bytes(b"damaged")
        (source,) = open_sources(["tinyshakespeare"], options)
        assert [document.text for document in source.documents("text")] == [TEXT.decode()]
    assert len(asked) == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tinyshakespeare.txt"]
    assert source.record()["source"] == "tinyshakespeare"
    assert str(tmp_path) not in str(source.record())


def test_a_download_of_another_file_is_refused_and_not_kept(server, tmp_path):
    with pytest.raises(UserError, match=r"not tinyshakespeare \(1,115,394 bytes of SHA-256 86c4e6aa9db7"):
        open_sources(["tinyshakespeare"], NamedOptions(cache=tmp_path, url=server[0]))
    assert not list(tmp_path.iterdir())


def test_no_network_is_one_sentence_that_names_the_way_out(server, tmp_path):
    for url in (server[0] + "missing", "http://127.0.0.1:9/", "file:///no/such/file"):
        with pytest.raises(UserError, match=r"could not be downloaded .*; give a local copy with --file"):
            open_sources(["tinyshakespeare"], NamedOptions(cache=tmp_path, url=url))


def test_a_local_file_must_be_the_real_one(pinned, tmp_path):
    path = tmp_path / "mine.txt"
    with pytest.raises(UserError, match="does not exist"):
        open_sources(["tinyshakespeare"], NamedOptions(file=path))
    path.write_bytes(TEXT + b"x")
    with pytest.raises(UserError, match="not tinyshakespeare"):
        open_sources(["tinyshakespeare"], NamedOptions(file=path))
    path.write_bytes(TEXT)
    (source,) = open_sources(["tinyshakespeare"], NamedOptions(file=path))
    assert source.bytes == len(TEXT)


def test_a_named_set_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pydocs").mkdir()
    Path("pydocs/a.txt").write_text("mine", encoding="utf-8")
    (named_set,) = open_sources(["pydocs"])
    (folder,) = open_sources(["./pydocs"])
    assert named_set.bytes > 1_000_000
    assert folder.bytes == 4


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_file(), reason="no tinyshakespeare.txt beside the repository")
def test_the_pinned_hash_is_that_of_the_real_file():
    (source,) = open_sources(["tinyshakespeare"], NamedOptions(file=SHARED))
    assert source.record()["sha256"] == named.SHAKESPEARE_SHA256
    assert source.bytes == named.SHAKESPEARE_BYTES
