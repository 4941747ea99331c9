"""Remote bytes → a file on this machine: resumed where it stopped, tried again, compared with the published hash.

A `RemoteFile` gives a stream that starts at an offset. What has arrived is kept under `NAME.partial`, so another
attempt, also one of a later process, continues there.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from regpt.errors import UserError
from regpt.remote.retry import PATIENCE, Patience, persistently

CHUNK = 1 << 20
WAITING = "another process downloads it"


class Checksum(NamedTuple):
    """A published hash: `sha256`, `md5`, or git's `blob` (SHA-1 of a header and the content)."""

    kind: str
    hex: str


@dataclass(frozen=True)
class Download:
    """News of one download; `total` and `bytes_per_s` are 0 while they are unknown, `note` says why it waits."""

    file: str
    bytes: int
    total: int
    bytes_per_s: float = 0.0
    note: str = ""

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.bytes) / self.bytes_per_s if self.total and self.bytes_per_s else None


DownloadProgress = Callable[[Download], None]
Stream = AbstractContextManager[tuple[BinaryIO, int]]  # the second is where it starts: 0 where it cannot elsewhere
Opener = Callable[[int], Stream]


@dataclass(frozen=True)
class RemoteOptions:
    """Where downloads are kept and how patiently they are made; `endpoint` None is huggingface_hub's own."""

    cache: Path
    endpoint: str | None = None
    patience: Patience = PATIENCE


class Fetched(NamedTuple):
    """A file on this machine, and its SHA-256 if it was computed."""

    path: Path
    sha256: str | None


@dataclass(frozen=True)
class RemoteFile:
    """One file elsewhere; small, and can be pickled.

    Attributes:
        name: in messages and manifests.
        bytes: its size; 0 when unknown.
        url: for people and manifests: with the revision, without secrets.
        address: what is opened.
        open_at: `open_at(address, offset, timeout_s)`, the stream.
        options: how it is downloaded.
        checksum: the hash that its server publishes.
        version: what changes when the content does, where there is no hash.
        kept: a copy in the folder of another program.
        advice: the end of the sentence about an error.
    """

    name: str
    bytes: int
    url: str
    address: str
    open_at: Callable[[str, int, float], Stream]
    options: RemoteOptions
    checksum: Checksum | None = None
    version: str = ""
    kept: Path | None = None
    advice: str = ""

    def fetch(self, progress: DownloadProgress | None = None) -> Fetched:
        """The file on this machine, downloaded unless it is there; errors as in `download`."""
        if self.kept and self.kept.is_file() and self.kept.stat().st_size == self.bytes:
            matches, sha256 = compare_hash(self.kept, self.checksum)
            if matches:
                return Fetched(self.kept, sha256)
        patience = self.options.patience

        def open_at(offset: int) -> Stream:
            return self.open_at(self.address, offset, patience.timeout_s)

        try:
            sha256 = download(self.url, open_at, self.path, self.bytes, self.checksum, patience, progress)
        except UserError as error:
            raise UserError(f"{error}{self.advice}") from None
        return Fetched(self.path, sha256)

    @property
    def path(self) -> Path:
        """Where the download is kept: another folder for another version."""
        key = hashlib.sha256("\n".join((self.address, self.version, str(self.bytes))).encode()).hexdigest()[:16]
        return self.options.cache / "downloads" / key / PurePosixPath(self.name).name


def download(
    name: str,
    open_at: Opener,
    path: Path,
    total: int,
    checksum: Checksum | None,
    patience: Patience,
    progress: DownloadProgress | None = None,
) -> str | None:
    """`path` with the bytes of `name`, downloaded unless they are there; returns their SHA-256 if it was computed.

    Several processes may ask at once: one downloads. `total` is 0 when unknown.

    Raises:
        UserError: refused, not there, unreachable after all tries, another hash than the published one (twice), or a
            full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with download_lock(path, lambda: progress and progress(Download(name, size_of(partial), total, note=WAITING))):
        if path.is_file() and (not total or path.stat().st_size == total):
            matches, sha256 = compare_hash(path, checksum)
            if matches:
                return sha256
        for _ in range(2):  # a wrong hash may be the fault of the part that an earlier attempt left
            arrive(name, open_at, partial, total, patience, progress)
            matches, sha256 = compare_hash(partial, checksum)
            if matches:
                os.replace(partial, path)
                return sha256
            partial.unlink()
    raise UserError(
        f"{name} arrived twice with another {checksum.kind if checksum else ''} hash than the published one, "
        "so it was not kept; try again later or download it in another way and give the file"
    )


@contextmanager
def download_lock(path: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """The right to write `path`; `waiting` is called every second until it is there, and may raise to give up."""
    lock = FileLock(path.with_name(path.name + ".lock"))
    while True:
        try:
            lock.acquire(timeout=1.0)
            break
        except Timeout:
            waiting()
    try:
        yield
    finally:
        lock.release()


def arrive(
    name: str, open_at: Opener, partial: Path, total: int, patience: Patience, progress: DownloadProgress | None
) -> None:
    """Append to `partial` until it is whole and on disk."""

    def attempt() -> None:
        if not total or size_of(partial) != total:
            append(name, open_at, partial, total, progress)

    def waiting(note: str) -> None:
        if progress:
            progress(Download(name, size_of(partial), total, note=note))

    persistently(attempt, name, patience, lambda: size_of(partial), waiting)


def append(name: str, open_at: Opener, partial: Path, total: int, progress: DownloadProgress | None) -> None:
    have, began = size_of(partial), time.monotonic()
    have = have if have <= total else 0  # also when the total is unknown: nothing says whether the part belongs to it
    with open_at(have) as (stream, start), partial.open("ab") as out:
        out.truncate(start)
        done = start
        while chunk := stream.read(CHUNK):
            out.write(chunk)
            done += len(chunk)
            if progress:
                progress(Download(name, done, total, (done - start) / max(1e-3, time.monotonic() - began)))
        out.flush()
        os.fsync(out.fileno())
    if total and done != total:
        raise ConnectionError(f"the connection was cut after {done:,} of {total:,} bytes")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def compare_hash(path: Path, checksum: Checksum | None) -> tuple[bool, str | None]:
    """Whether `path` has that hash, and its SHA-256 if it was computed."""
    if checksum is None:
        return True, None
    sha256, other = hashlib.sha256(), hasher(checksum.kind, path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            sha256.update(block)
            if other:
                other.update(block)
    return (other or sha256).hexdigest() == checksum.hex, sha256.hexdigest()


def hasher(kind: str, size: int) -> Any:
    if kind == "md5":
        return hashlib.md5(usedforsecurity=False)
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if kind == "blob" else None
