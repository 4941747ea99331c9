"""Files of text elsewhere: on the Hugging Face hub, behind https, in buckets that fsspec knows (s3, gs and others).

An address becomes `RemoteSource`s, whose sizes and published hashes are known before anything is downloaded. The hub's
files are listed at one commit, so a run never mixes two versions.
"""

import re
import threading
import urllib.parse
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from regpt.errors import UserError
from regpt.prepare.document import Document, Part
from regpt.prepare.listing import Wanted, choose, without_hidden
from regpt.prepare.settings import TEXT_OPTIONS, TextOptions
from regpt.prepare.sources import TEXT_FILES, Source, SourceFile
from regpt.remote.buckets import list_bucket
from regpt.remote.download import Download, DownloadProgress, RemoteFile, RemoteOptions
from regpt.remote.hub import list_dataset
from regpt.remote.web import shown, web_file

SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)  # two letters at least: C:\ is none


@dataclass(frozen=True)
class RemoteSource:
    """A file elsewhere as a `Source`; `source` is what the user typed."""

    source: str
    remote: RemoteFile

    @property
    def file(self) -> str:
        return self.remote.name

    @property
    def bytes(self) -> int:
        return self.remote.bytes

    @property
    def identity(self) -> str:
        return self.remote.address

    def localize(self, progress: DownloadProgress | None = None) -> SourceFile:
        path, sha256 = self.remote.fetch(progress)
        return SourceFile(self.source, self.file, path, self.remote.url, sha256)

    def parts(self, target_bytes: int, options: TextOptions = TEXT_OPTIONS) -> list[Part]:
        return self.localize().parts(target_bytes, options)

    def documents(self, options: TextOptions = TEXT_OPTIONS, part: Part | None = None) -> Iterator[Document]:
        return self.localize().documents(options, part)

    def known(self) -> dict[str, Any]:
        record = {"source": self.source, "file": self.file, "bytes": self.bytes, "url": self.remote.url}
        checksum = self.remote.checksum
        return {**record, "sha256": checksum.hex} if checksum and checksum.kind == "sha256" else record

    def record(self) -> dict[str, Any]:
        return self.localize().record()


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
    files, root = (list_dataset if scheme == "hf" else list_bucket)(address, options)
    names = chosen([file.name for file in files], address, root, left_out, wanted)
    by_name = {file.name: file for file in files}
    return [RemoteSource(source or address, by_name[name]) for name in names]


def chosen(given: list[str], address: str, root: str | None, left_out: Counter[str], wanted: Wanted) -> list[str]:
    """Those of the names `given` that are read, in their order. In a folder `root`, others are counted; without, all
    must be readable."""
    names = sorted(given, key=lambda name: name.split("/"))
    if root is not None:
        readable = choose(without_hidden(names, root, left_out), wanted.rank, left_out)
        if not readable:
            raise UserError(f"{address} holds no readable file; allowed are {wanted.allowed}")
        return readable
    if not names:
        raise UserError(f"no file matches {address}; give a file, a folder or a glob of {wanted.allowed}")
    if other := next((name for name in names if not wanted.accepts(name)), None):
        raise wanted.refuse(other)
    return names


def find_over_http(address: str, options: RemoteOptions, wanted: Wanted) -> Source:
    url = shown(urllib.parse.urldefrag(address)[0])
    if not wanted.accepts(urllib.parse.urlsplit(address).path):
        raise UserError(f"{url} is not the address of one file that is read; allowed are {wanted.allowed}")
    source = RemoteSource(url, web_file(address, options))
    return source if source.bytes else source.localize()  # its size must be known to plan the work
