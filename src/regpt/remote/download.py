"""Remote bytes → a file on this machine: resumed at its offset, retried, compared with the published hash.

A `RemoteFile` gives a stream that starts at an offset. The bytes that have arrived are kept under `NAME.partial`, so
another attempt, also one of a later process, continues there.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from regpt.errors import UserError
from regpt.files import file_sha256, rename
from regpt.remote.retry import PATIENCE, Patience, persistently

CHUNK = 1 << 20


@dataclass(frozen=True)
class Download:
    """News of one download; `total` is 0 while unknown, `note` is the reason of a wait."""

    file: str
    bytes: int
    total: int
    note: str = ""


DownloadProgress = Callable[[Download], None]


@dataclass(frozen=True)
class RemoteOptions:
    """Where downloads are kept, `.cache/regpt` in the home folder by default; the address of the Hugging Face hub,
    huggingface_hub's own by default (HF_ENDPOINT sets it); how long downloads are tried."""

    cache: Path | None = None
    endpoint: str | None = None
    patience: Patience = PATIENCE

    @property
    def folder(self) -> Path:
        return self.cache or Path.home() / ".cache" / "regpt"


REMOTE_OPTIONS = RemoteOptions()


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
        address: passed to `open_at`.
        open_at: `open_at(address, offset, timeout_s)`, the stream and where it starts: 0 where it cannot elsewhere.
        options: how it is downloaded.
        sha256: the hash that its server publishes; empty without one.
        version: changes with the content, where there is no hash.
        advice: the end of the sentence about an error.
    """

    name: str
    bytes: int
    url: str
    address: str
    open_at: Callable[[str, int, float], AbstractContextManager[tuple[BinaryIO, int]]]
    options: RemoteOptions
    sha256: str = ""
    version: str = ""
    advice: str = ""

    @property
    def path(self) -> Path:
        """Where the download is kept: another folder for another version."""
        key = hashlib.sha256("\n".join((self.address, self.version, str(self.bytes))).encode()).hexdigest()[:16]
        return self.options.folder / "downloads" / key / PurePosixPath(self.name).name

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    def fetch(self, progress: DownloadProgress | None = None) -> Fetched:
        """The file on this machine, downloaded unless it is there; of several processes that ask at once one downloads.

        Raises:
            UserError: refused, not there, unreachable after all tries, another hash than the published one (twice), or
                a full disk.
        """

        progress = progress or (lambda news: None)

        def tell(note: str) -> None:
            progress(Download(self.url, size_of(self.partial), self.bytes, note=note))

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with download_lock(self.path, lambda: tell("another process downloads it")):
            there = self.path.is_file() and self.bytes in (0, size_of(self.path))
            if there and self.sha256 in ("", found := self.hash_of(self.path)):
                return Fetched(self.path, found)
            for _ in range(2):  # a wrong hash may be the fault of the part that an earlier attempt left
                try:
                    name, patience = self.url, self.options.patience
                    persistently(lambda: self.append(progress), name, patience, lambda: size_of(self.partial), tell)
                except UserError as error:
                    raise UserError(f"{error}{self.advice}") from None
                if self.sha256 in ("", found := self.hash_of(self.partial)):
                    rename(self.partial, self.path)
                    return Fetched(self.path, found)
                self.partial.unlink()
        raise UserError(
            f"{self.url} arrived twice with another sha256 hash than the published one, so it was not kept; try again "
            f"later or download it in another way and give the file{self.advice}"
        )

    def hash_of(self, path: Path) -> str | None:
        """The SHA-256 of `path`; None where there is no other to compare it with."""
        return file_sha256(path) if self.sha256 else None

    def append(self, progress: DownloadProgress) -> None:
        """Download the rest of `partial`, to the disk."""
        have, total = size_of(self.partial), self.bytes
        if total and have == total:
            return
        have = have if have <= total else 0  # also when the total is unknown: the part may belong to another version
        opened = self.open_at(self.address, have, self.options.patience.timeout_s)
        with opened as (stream, start), self.partial.open("ab") as out:
            out.truncate(start)
            done = start
            while chunk := stream.read(CHUNK):
                out.write(chunk)
                done += len(chunk)
                progress(Download(self.url, done, total))
            out.flush()
            os.fsync(out.fileno())
        if total and done != total:
            raise ConnectionError(f"the connection was cut after {done:,} of {total:,} bytes")


@contextmanager
def download_lock(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """The right to write `path`; `waiting` is called every second until it is there, and may raise to give up."""
    lock = FileLock(path.with_name(path.name + ".lock"))
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1.0)
        except Timeout:
            waiting()
    try:
        yield
    finally:
        lock.release()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
