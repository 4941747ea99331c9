"""A web server on this machine that misbehaves on request, and one that imitates the Hugging Face hub."""

import base64
import hashlib
import json
import threading
import urllib.parse
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest

NO_HEADERS: dict[str, str] = {}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Asked(NamedTuple):
    path: str
    start: int | None
    host: str
    token: str | None


class Web:
    """Serves `files` by their paths, with Range unless `ranges` is off; `asked` are the requests for them.

    `faults` are used up one a request for a file: an int n sends n bytes of the body and cuts the connection; a tuple
    (status, headers) is the answer instead of the file.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.faults: deque[int | tuple[int, dict[str, str]]] = deque()
        self.asked: list[Asked] = []
        self.ranges = True

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urllib.parse.urlsplit(request.path).path
        wanted = request.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted.startswith("bytes=") else None
        self.asked.append(Asked(path, start, request.headers["Host"], request.headers.get("Authorization")))
        fault = self.faults.popleft() if self.faults else None
        if isinstance(fault, tuple):
            send(request, fault[0], b"", fault[1])
        elif path not in self.files:
            send(request, 404, b"")
        else:
            self.send_file(request, self.files[path], start if self.ranges else None, wanted, fault)

    def send_file(
        self, request: BaseHTTPRequestHandler, content: bytes, start: int | None, wanted: str, cut: int | None
    ) -> None:
        total, headers = len(content), dict(self.headers)
        if start is None:
            send(request, 200, content, headers, cut)
        elif start >= total:
            send(request, 416, b"", {"Content-Range": f"bytes */{total}"})
        else:
            end = wanted.split("-")[1]
            body = content[start : int(end) + 1 if end else total]
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{total}"
            send(request, 206, body, headers, cut)


class Hub(Web):
    """The hub's pages that a listing and a download ask for; files lie at another host name, as on a CDN."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.repos: dict[str, list[dict[str, Any]]] = {}

    def add(self, repo: str, files: dict[str, bytes], lfs: bool = True) -> None:
        for path, content in files.items():
            self.files[f"/cdn/{repo}/{path}"] = content
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
            if lfs:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"size": len(content), "oid": sha256, "pointerSize": 134}
            self.repos.setdefault(repo, []).append(entry)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path).strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[1:3])
        if parts[0] == "cdn":
            super().answer(request)
        elif repo not in self.repos:
            send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "datasets":
            assert parts[3:5] == ["resolve", COMMIT]
            self.asked.append(Asked(request.path, None, request.headers["Host"], request.headers.get("Authorization")))
            cdn = self.url.replace("127.0.0.1", "localhost")
            send(request, 302, b"", {"Location": f"{cdn}/cdn/{repo}/{'/'.join(parts[5:])}"})
        elif parts[4:5] == ["tree"]:
            send_json(request, self.below(repo, "/".join(parts[6:])))
        elif parts[4:5] == ["paths-info"]:
            form = request.rfile.read(int(request.headers["Content-Length"])).decode()
            paths = json.loads(form)["paths"] if form[0] == "{" else urllib.parse.parse_qs(form)["paths"]
            send_json(request, [entry for entry in self.repos[repo] if entry["path"] in paths])
        else:
            send_json(request, {"id": repo, "sha": COMMIT})

    def below(self, repo: str, folder: str) -> list[dict[str, Any]]:
        entries = [entry for entry in self.repos[repo] if entry["path"].startswith(f"{folder}/" if folder else "")]
        return [{"type": "directory", "path": folder or "sample", "oid": "0" * 40}, *entries]


class Bucket(Web):
    """A bucket `bkt` that holds `objects`."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.objects: dict[str, bytes] = {}

    def send_object(self, request: BaseHTTPRequestHandler, name: str) -> None:
        path = urllib.parse.urlsplit(request.path).path
        self.files = {path: self.objects[name]} if name in self.objects else {}
        super().answer(request)

    def below(self, query: str) -> tuple[list[str], list[str]]:
        """Names that begin as `query` asks, and the folders in which others lie."""
        asked = dict(urllib.parse.parse_qsl(query))
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
        rest = [name.removeprefix(prefix) for name in sorted(self.objects) if name.startswith(prefix)]
        files = [prefix + name for name in rest if not delimiter or delimiter not in name]
        folders = {prefix + name.split(delimiter)[0] + delimiter for name in rest if delimiter and delimiter in name}
        return files, sorted(folders)


class GoogleStorage(Bucket):
    """Google's JSON interface (cloud.google.com/storage/docs/json_api), as far as reading goes."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlsplit(request.path)
        _, inside, name = url.path.partition("/b/bkt/o")
        name = urllib.parse.unquote(name.removeprefix("/"))
        if not inside or (name and name not in self.objects):
            send(
                request, 404, b'{"error": {"code": 404, "message": "not found"}}', {"Content-Type": "application/json"}
            )
        elif name and "alt=media" in url.query:
            self.send_object(request, name)
        elif name:
            send_json(request, self.describe(name))
        else:
            files, folders = self.below(url.query)
            send_json(request, {"items": [*map(self.describe, files)], "prefixes": folders})

    def describe(self, name: str) -> dict[str, Any]:
        content = self.objects[name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        times = dict.fromkeys(("updated", "timeCreated"), "2024-01-01T00:00:00Z")
        return {"name": name, "bucket": "bkt", "size": str(len(content)), "md5Hash": md5, "generation": "17", **times}


class S3(Bucket):
    """Amazon's interface (docs.aws.amazon.com/AmazonS3/latest/API), as far as reading goes."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlsplit(request.path)
        bucket, _, name = urllib.parse.unquote(url.path).strip("/").partition("/")
        if bucket != "bkt":
            send(request, 404, b"<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>")
        elif name:
            self.headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "ETag": '"17"'}
            self.send_object(request, name)
        else:
            files, folders = self.below(url.query)
            times = "<LastModified>2024-01-01T00:00:00.000Z</LastModified><ETag>&quot;17&quot;</ETag>"
            sizes = [f"<Key>{name}</Key><Size>{len(self.objects[name])}</Size>{times}" for name in files]
            content = "".join(f"<Contents>{size}</Contents>" for size in sizes)
            content += "".join(f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in folders)
            listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{content}</ListBucketResult>"
            send(request, 200, listing.encode(), {"Content-Type": "application/xml"})


def send(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: dict[str, str] | None = None,
    cut: int | None = None,
) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body[:cut])
    request.close_connection = request.close_connection or cut is not None


def send_json(request: BaseHTTPRequestHandler, answer: Any) -> None:
    send(request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})


def serve(kind: type[Web]) -> Iterator[Any]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.answer(self)

        do_POST = do_HEAD = do_GET

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site = kind(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        server.shutdown()
        thread.join()


@pytest.fixture
def web() -> Iterator[Web]:
    yield from serve(Web)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """Also: no token and no downloads of the user's own."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield from serve(Hub)
