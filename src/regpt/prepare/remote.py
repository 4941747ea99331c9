"""Files of text elsewhere: on the Hugging Face hub, behind https, in buckets that fsspec knows (s3, gs and others).

An address becomes `RemoteFile`s, whose sizes and published hashes are known before anything is downloaded. The hub's
files are listed at one commit, so a run never mixes two versions.
"""

import hashlib
import re
import threading
import urllib.parse
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from regpt.errors import UserError
from regpt.network import reach
from regpt.prepare.buckets import list_bucket, open_bucket
from regpt.prepare.document import Document, Part
from regpt.prepare.download import PATIENCE, Checksum, Patience, compare, download, persistently
from regpt.prepare.hub import authorization, kept_by_hub, list_dataset
from regpt.prepare.listing import Wanted, choose, without_hidden
from regpt.prepare.settings import TEXT_OPTIONS, TextOptions
from regpt.prepare.sources import TEXT_FILES, Download, DownloadProgress, Source, SourceFile
from regpt.prepare.web import open_http, probe, shown

SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)  # two letters at least: C:\ is none
LISTING_TRIES = 3  # nobody waits minutes to hear that there is no network
T = TypeVar("T")


@dataclass(frozen=True)
class RemoteOptions:
    """Where downloads are kept and how patiently they are made; `endpoint` None is huggingface_hub's own."""

    cache: Path
    endpoint: str | None = None
    patience: Patience = PATIENCE


@dataclass(frozen=True)
class RemoteFile:
    """One file elsewhere.

    Attributes:
        source: what the user typed.
        file: its name in messages and in the manifest.
        bytes: its size.
        url: where it is, for the manifest: with the revision, without secrets.
        address: what is opened.
        options: how it is downloaded.
        checksum: the hash that its server publishes.
        version: what changes when the content does, where there is no hash.
        advice: said after an error.
    """

    source: str
    file: str
    bytes: int
    url: str
    address: str
    options: RemoteOptions
    checksum: Checksum | None = None
    version: str = ""
    advice: str = ""

    @property
    def identity(self) -> str:
        return self.address

    def localize(self, progress: DownloadProgress | None = None) -> SourceFile:
        if found := self._in_hub_cache():
            return found
        try:
            sha256 = download(
                self.url, self._open_at, self.path, self.bytes, self.checksum, self.options.patience, progress
            )
        except UserError as error:
            raise UserError(f"{error}{self.advice}") from None
        return SourceFile(self.source, self.file, self.path, self.url, sha256)

    @property
    def path(self) -> Path:
        """Where the download is kept: another folder for another version."""
        key = hashlib.sha256("\n".join((self.address, self.version, str(self.bytes))).encode()).hexdigest()[:16]
        return self.options.cache / "downloads" / key / PurePosixPath(self.file).name

    def parts(self, target_bytes: int, options: TextOptions = TEXT_OPTIONS) -> list[Part]:
        return self.localize().parts(target_bytes, options)

    def documents(self, options: TextOptions = TEXT_OPTIONS, part: Part | None = None) -> Iterator[Document]:
        return self.localize().documents(options, part)

    def known(self) -> dict[str, Any]:
        record = {"source": self.source, "file": self.file, "bytes": self.bytes, "url": self.url}
        is_sha256 = self.checksum is not None and self.checksum.kind == "sha256"
        return {**record, "sha256": self.checksum.hex} if self.checksum and is_sha256 else record

    def record(self) -> dict[str, Any]:
        return self.localize().record()

    def _open_at(self, offset: int) -> AbstractContextManager[tuple[BinaryIO, int]]:
        if self.address.startswith(("http://", "https://")):
            secret = authorization() if self.url.startswith("hf://") else None
            if not offset:
                reach(self.address)
            return open_http(self.address, offset, secret, self.options.patience.timeout_s)
        return open_bucket(self.address, offset)

    def _in_hub_cache(self) -> SourceFile | None:
        """The file in huggingface_hub's own folder, if it is there and whole."""
        kept = Path((self.url.startswith("hf://") and kept_by_hub(self.url)) or "")
        if not kept.is_file() or kept.stat().st_size != self.bytes:
            return None
        matches, sha256 = compare(kept, self.checksum)
        return SourceFile(self.source, self.file, kept, self.url, sha256) if matches else None


class Stopped(Exception):
    """The reader of `localized` has gone."""


def localized(sources: Iterable[Source], progress: DownloadProgress | None = None, ahead: int = 1) -> Iterator[Source]:
    """Every source on this machine, in order; while one is read, the next `ahead` are downloaded, one at a time."""
    stop = threading.Event()

    def watch(news: Download) -> None:
        if stop.is_set():
            raise Stopped
        if progress:
            progress(news)

    pool = ThreadPoolExecutor(1, thread_name_prefix="download")
    queue: deque[Future[Source]] = deque()
    try:
        for source in sources:
            queue.append(pool.submit(source.localize, watch))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def is_remote(source: str) -> bool:
    return bool(SCHEME.match(source))


def find_remote(
    address: str,
    options: RemoteOptions,
    left_out: Counter[str],
    source: str | None = None,
    wanted: Wanted = TEXT_FILES,
) -> list[Source]:
    """The files at `address`: one file, a folder (recursively) or a glob, in the order of their names.

    `source` is what the user typed for it, if that is not the address.

    Raises:
        UserError: an address of an unknown kind, a package that is missing, no network, or nothing readable there.
    """
    scheme = address.split("://")[0].lower()
    if scheme in ("http", "https"):
        return [find_over_http(address, options, wanted)]
    patience, source = listing_patience(options), source or address
    if scheme == "hf":
        on_hub, root = list_dataset(address, options.endpoint, patience)
        return [
            RemoteFile(source, file.name, file.bytes, file.url, file.address, options, file.checksum)
            for file in chosen({file.name: file for file in on_hub}, address, root, left_out, wanted)
        ]
    in_bucket, root = list_bucket(address, patience)
    return [
        RemoteFile(source, file.url, file.bytes, file.url, file.url, options, file.checksum, file.version)
        for file in chosen({file.url: file for file in in_bucket}, address, root, left_out, wanted)
    ]


def listing_patience(options: RemoteOptions) -> Patience:
    return replace(options.patience, tries=min(LISTING_TRIES, options.patience.tries))


def chosen(files: dict[str, T], address: str, root: str | None, left_out: Counter[str], wanted: Wanted) -> list[T]:
    """Those of `files` that are read, in the order of their names. In a folder `root`, others are counted; without, all
    must be readable."""
    names = sorted(files, key=lambda name: name.split("/"))
    if root is not None:
        readable = choose(without_hidden(names, root, left_out), wanted.rank, left_out)
        if not readable:
            raise UserError(f"{address} holds no readable file; allowed are {wanted.allowed}")
        return [files[name] for name in readable]
    if not names:
        raise UserError(f"no file matches {address}; give a file, a folder or a glob of {wanted.allowed}")
    if other := next((name for name in names if not wanted.accepts(name)), None):
        raise wanted.refuse(other)
    return [files[name] for name in names]


def find_over_http(given: str, options: RemoteOptions, wanted: Wanted) -> Source:
    address, fragment = urllib.parse.urldefrag(given)
    url = shown(address)
    if not wanted.accepts(urllib.parse.urlsplit(address).path):
        raise UserError(f"{url} is not the address of one file that is read; allowed are {wanted.allowed}")
    size, version, checksum = persistently(
        lambda: probe(address, options.patience.timeout_s), url, listing_patience(options)
    )
    if fragment.startswith("sha256="):
        checksum = Checksum("sha256", fragment.removeprefix("sha256=").lower())
    file = RemoteFile(url, url, size, url, address, options, checksum, version)
    return file if size else file.localize()  # its size must be known to plan the work
