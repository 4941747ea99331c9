"""Stores for the tests of remote runs: in memory, with faults on request, and a server that imitates S3."""

import base64
import hashlib
import json
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from regpt.remote.retry import Patience
from regpt.remote.store import Store

PATIENT = Patience(tries=3, wait_s=0.0, longest_wait_s=0.0, sleep=lambda seconds: None)

# Trains as argv says: address, configuration, and how many files with tensors are copied before SIGKILL.
COPY_UNTIL_KILLED = """
import os, signal, sys
from pathlib import Path
import tiny
from regpt.remote.store import Store
from regpt.config import read_config
from regpt.runs.pretrain import pretrain
from regpt.runs.remote import RemoteRun

put, left = Store.put, [int(sys.argv[3])]
def killing(self, name, path):
    if name.endswith(".safetensors"):
        left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, name, path)
Store.put = killing
config = read_config(sys.argv[2])
remote = RemoteRun(sys.argv[1], config.checkpoint)
sys.exit(pretrain(config, remote.folder, remote=remote))
"""


class Killed(BaseException):
    """The process ends here, as by SIGKILL: nothing catches it."""


class FaultyStore(Store):
    """Keeps a journal of what is written and deleted; `before(kind, name)` runs before each, and may raise."""

    def __init__(self, url: str, before: Callable[[str, str], None] = lambda kind, name: None) -> None:
        super().__init__(url, PATIENT)
        self.journal: list[tuple[str, str]] = []
        self.before = before

    def note(self, kind: str, name: str) -> None:
        self.before(kind, name)
        self.journal.append((kind, name))

    def write(self, name: str, data: bytes) -> None:
        self.note("write", name)
        super().write(name, data)

    def put(self, name: str, path: Path) -> None:
        self.note("write", name)
        super().put(name, path)

    def remove(self, name: str) -> None:
        self.note("remove", name)
        super().remove(name)

    def content(self) -> dict[str, bytes]:
        """Every file but the lease's."""
        return {name: self.read(name) or b"" for name in self.files() if not name.startswith("lease/")}


@dataclass
class Hand:
    """Time that passes only while somebody sleeps; `meanwhile()` happens then."""

    meanwhile: Callable[[], object] = lambda: None
    slept: list[float] = field(default_factory=list)

    @property
    def patience(self) -> Patience:
        return replace(PATIENT, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.meanwhile()


@contextmanager
def memory_bucket() -> Iterator[str]:
    """The address of a folder in fsspec's file system in memory, deleted afterwards."""
    import fsspec

    fs = fsspec.filesystem("memory")
    try:
        yield "memory://bucket/runs/a"
    finally:
        fs.store.clear()
        fs.pseudo_dirs[:] = [""]


@contextmanager
def s3_bucket() -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a bucket on moto's server, and the environment in which it is reached."""
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()  # its servers share their objects
    try:
        client = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="bucket")
        client.close()
        forget_s3()
        yield "s3://bucket", environment
    finally:
        forget_s3()
        server.stop()


def forget_s3() -> None:
    """Drop the connections that s3fs keeps, and with them the credentials and servers of other tests."""
    pytest.importorskip("s3fs", reason="needs regpt[buckets]").S3FileSystem.clear_instance_cache()


class Google(BaseHTTPRequestHandler):
    """Google's JSON interface (cloud.google.com/storage/docs/json_api), as far as small objects go."""

    objects: dict[str, bytes] = {}

    def handle_any(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        _, _, rest = url.path.partition("/b/bucket/o")
        name, _, target = rest.removeprefix("/").partition("/rewriteTo/b/bucket/o/")
        name, target = urllib.parse.unquote(name), urllib.parse.unquote(target)
        if url.path.startswith("/upload/"):
            self.upload(body, query)
        elif not name:
            prefix = query.get("prefix", "")
            self.answer(200, {"items": [self.describe(one) for one in self.objects if one.startswith(prefix)]})
        elif name not in self.objects:
            self.answer(404, {"error": {"code": 404, "message": "not found"}})
        elif target:
            self.objects[target] = self.objects[name]
            self.answer(200, {"done": True})
        elif self.command == "DELETE":
            del self.objects[name]
            self.answer(204, None)
        else:
            self.answer(200, self.objects[name] if query.get("alt") == "media" else self.describe(name))

    do_GET = do_POST = do_DELETE = handle_any

    def upload(self, body: bytes, query: dict[str, str]) -> None:
        """A body of two parts: metadata and content."""
        _, metadata, content = body.split(b"--==0==\n" if b"--==0==\n" in body else b"--==0==", 2)
        name = json.loads(metadata.partition(b"\n\n")[2])["name"]
        if query.get("ifGenerationMatch") == "0" and name in self.objects:
            self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            return
        self.objects[name] = content.partition(b"\n\n")[2].removesuffix(b"\n--==0==--")
        self.answer(200, self.describe(name))

    def describe(self, name: str) -> dict[str, str]:
        content = self.objects[name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        return {"name": name, "bucket": "bucket", "size": str(len(content)), "md5Hash": md5, "generation": "1"}

    def answer(self, status: int, content: dict[str, Any] | bytes | None) -> None:
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...


@contextmanager
def google_bucket() -> Iterator[str]:
    """The address of a bucket on a server that imitates Google's storage."""
    fsspec = pytest.importorskip("fsspec")
    core = pytest.importorskip("gcsfs.core", reason="needs regpt[buckets]")
    with pytest.MonkeyPatch.context() as patched, ThreadingHTTPServer(("127.0.0.1", 0), Google) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        options = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "token": "anon"}
        patched.setitem(fsspec.config.conf, "gs", options)
        patched.setattr(Google, "objects", {})
        # Another class of it asks a second interface, gRPC, of what kind a bucket is.
        patched.setitem(sys.modules["fsspec.registry"]._registry, "gs", core.GCSFileSystem)
        try:
            yield "gs://bucket"
        finally:
            server.shutdown()
            thread.join()
