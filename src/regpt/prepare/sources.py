"""Where text comes from, one object a file, in the order in which the user named them.

1. `source`, `file`, `bytes` are known at once, nothing is downloaded for them.
2. `localize(progress)`: the same file on this machine. A remote one is downloaded (resumed, retried, compared with
   its published hash), a local one returns itself. Safe from several threads and processes: one downloads, the others
   wait. `localized(sources)` does it one file ahead of the reader.
3. Of a file on this machine: `parts(target_bytes)`, its division for several readers; a function of the file and
   `target_bytes` alone. `documents(options, part)` reads one part: the parts in their order are the file.
   `record()` is what the manifest keeps: it hashes the file.

Sources and parts are small and can be pickled, so that another process reads them.
"""

import hashlib
import threading
import urllib.parse
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from regpt.compression import packing_of
from regpt.errors import UserError
from regpt.files import file_sha256, identity
from regpt.prepare.documents import Document, FilePart
from regpt.prepare.listing import Wanted, choose, find_local, printable, without_hidden
from regpt.prepare.readers import ALLOWED, TABLES, has_mark, parts_of, read_documents, suffix_of
from regpt.prepare.settings import TEXT_OPTIONS, TextOptions
from regpt.remote.buckets import list_bucket
from regpt.remote.download import Download, DownloadProgress, RemoteFile, RemoteOptions
from regpt.remote.hub import list_dataset
from regpt.remote.web import shown_address, web_file

# Sets that prepare/named.py opens; ./pydocs is a folder.
NAMED = ("pydocs", "tinyshakespeare", "fineweb-edu-10B", "fineweb-10B")
OTHERS = "other text files with --include '*.ENDING'"


def text_files(options: TextOptions) -> Wanted:
    """The files that are read as text: by their endings, or those that the options name."""

    def included(name: str) -> bool:
        names = (name, name.rpartition("/")[2])
        return any(fnmatchcase(one, pattern) for pattern in options.include for one in names)

    def rank(name: str) -> int:
        ending = suffix_of(name)
        if options.include or options.format:
            return int(included(name) if options.include else True)
        return (2 if ending.removesuffix(packing_of(ending)) in TABLES else 1) if ending else 0

    def accepts(name: str) -> bool:
        return bool(options.format or suffix_of(name) or included(name))

    return Wanted(rank, accepts, f"{ALLOWED}; {OTHERS}", known=NAMED)


TEXT_FILES = text_files(TEXT_OPTIONS)


@dataclass(frozen=True)
class SourceFile:
    """One file on this machine.

    Attributes:
        source: what the user typed.
        file: its path inside that folder, or the name as it was given.
        path: where it is.
        url: where it was downloaded from, with the revision if there is one.
        sha256: its hash, when the download has computed it.
    """

    source: str
    file: str
    path: Path
    url: str | None = None
    sha256: str | None = None

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def identity(self) -> Any:
        """Equal for two names of one file."""
        return identity(self.path)

    def localize(self, progress: DownloadProgress | None = None) -> "SourceFile":
        return self

    def parts(self, target_bytes: int, options: TextOptions = TEXT_OPTIONS) -> list[FilePart]:
        return parts_of(self.path, target_bytes, options)

    def documents(self, options: TextOptions = TEXT_OPTIONS, part: FilePart | None = None) -> Iterator[Document]:
        return read_documents(self.path, options, part)

    def known(self) -> dict[str, Any]:
        """As much of the record as needs no download."""
        return self.record()

    def record(self) -> dict[str, Any]:
        """Where the text came from, for the manifest: never an absolute path that the user did not type."""
        record = {
            "source": self.source,
            "file": self.file,
            "bytes": self.bytes,
            "sha256": self.sha256 or sha256_of(self.path),
        }
        mark = has_mark(self.path)
        return {**record, **({"url": self.url} if self.url else {}), **({"byte_order_mark": 1} if mark else {})}


def sha256_of(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def find_files(source: str, left_out: Counter[str] | None = None, wanted: Wanted = TEXT_FILES) -> list[SourceFile]:
    """The files of one local SOURCE: a file, a folder (searched recursively) or a glob, in sorted order.

    Raises:
        UserError: nothing there, nothing readable there, or a file of a kind that is not read.
    """
    found = find_local(source, wanted, Counter() if left_out is None else left_out)
    return [SourceFile(printable(source), name, path) for path, name in found]


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

    def documents(self, options: TextOptions = TEXT_OPTIONS) -> Iterator[Document]:
        return self.localize().documents(options)

    def known(self) -> dict[str, Any]:
        record = {"source": self.source, "file": self.file, "bytes": self.bytes, "url": self.remote.url}
        return {**record, "sha256": self.remote.sha256} if self.remote.sha256 else record

    def record(self) -> dict[str, Any]:
        return self.localize().record()


@dataclass(frozen=True)
class TextSet:
    """Documents made in memory; `details` are what they depend on."""

    source: str
    texts: tuple[str, ...]
    details: dict[str, Any]

    @property
    def file(self) -> str:
        return self.source

    @property
    def bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)

    @property
    def identity(self) -> str:
        return self.source

    def localize(self, progress: DownloadProgress | None = None) -> "TextSet":
        return self

    def parts(self, target_bytes: int, options: TextOptions = TEXT_OPTIONS) -> list[FilePart]:
        return [FilePart(0, 1, self.bytes)]

    def known(self) -> dict[str, Any]:
        return self.record()

    def record(self) -> dict[str, Any]:
        """`sha256` is that of the texts, each followed by a zero byte."""
        digest = hashlib.sha256(b"".join(text.encode() + b"\0" for text in self.texts)).hexdigest()
        return {"source": self.source, "bytes": self.bytes, "sha256": digest, **self.details}

    def documents(self, options: TextOptions = TEXT_OPTIONS, part: FilePart | None = None) -> Iterator[Document]:
        return (Document(text, len(text.encode())) for text in self.texts)


LocalSource = SourceFile | TextSet
Source = LocalSource | RemoteSource


class Stopped(Exception):
    """The reader of `localized` has gone."""


def localized(sources: Iterable[Source], progress: DownloadProgress | None = None) -> Iterator[LocalSource]:
    """Every source on this machine, in order; while one is read, the next is downloaded."""
    stop = threading.Event()

    def watch(news: Download) -> None:
        if stop.is_set():
            raise Stopped
        if progress:
            progress(news)

    pool = ThreadPoolExecutor(1, thread_name_prefix="download")
    try:
        following = deque[Future[LocalSource]]()
        for source in sources:
            following.append(pool.submit(source.localize, watch))
            if len(following) > 1:
                yield following.popleft().result()
        yield from (source.result() for source in following)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def find_remote(
    address: str,
    options: RemoteOptions,
    left_out: Counter[str],
    source: str | None = None,
    wanted: Wanted = TEXT_FILES,
) -> list[Source]:
    """The files at `address`: one file, a folder (recursively) or a glob, in the order of their names; those of the hub
    are listed at one commit, so that a run never mixes two versions.

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
    url = shown_address(urllib.parse.urldefrag(address)[0])
    if not wanted.accepts(urllib.parse.urlsplit(address).path):
        raise UserError(f"{url} is not the address of one file that is read; allowed are {wanted.allowed}")
    source = RemoteSource(url, web_file(address, options))
    return source if source.bytes else source.localize()  # its size must be known to plan the work
