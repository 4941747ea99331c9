"""Stores for the tests of remote runs: in memory, with faults on request, and a server that imitates S3."""

import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from regpt.checkpoint.lease import Clock
from regpt.checkpoint.store import Store
from regpt.data.download import Patience

PATIENT = Patience(tries=3, wait_s=0.0, longest_wait_s=0.0, sleep=lambda seconds: None)


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

    def copy(self, name: str, other: str) -> None:
        self.note("write", other)
        super().copy(name, other)

    def remove(self, names: Any) -> None:
        for name in names:
            self.note("remove", name)
            super().remove([name])

    def content(self) -> dict[str, bytes]:
        """Every file but the lease's."""
        return {name: self.read(name) or b"" for name in self.files() if not name.startswith("lease/")}


@dataclass
class Hand:
    """Time that passes only while somebody sleeps; `meanwhile()` happens then."""

    meanwhile: Callable[[], object] = lambda: None
    start: float = 1e9
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.meanwhile()

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: sum(self.slept), sleep=self.sleep, wall=lambda: self.start + sum(self.slept))


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
        yield "s3://bucket", environment
    finally:
        server.stop()
