"""Sets of text that have a name: `pydocs` (always there) and `tinyshakespeare` (one download, or a local file)."""

import functools
import hashlib
import http.client
import os
import platform
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regpt.data.formats import Document, Part
from regpt.data.pydocs import pydocs
from regpt.data.sources import DownloadProgress, Source, SourceFile, find_files
from regpt.errors import UserError

# The lecture's debugging text: 40,000 lines of Shakespeare in one file (karpathy/char-rnn).
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
TIMEOUT_S = 30


@dataclass(frozen=True)
class NamedOptions:
    """How named sets are found.

    Attributes:
        cache: folder that keeps downloads; None is `.cache/regpt` in the home folder.
        file: tinyshakespeare from this file instead of the download.
        url: where tinyshakespeare is downloaded from.
    """

    cache: Path | None = None
    file: Path | None = None
    url: str = SHAKESPEARE_URL


NAMED_OPTIONS = NamedOptions()


@dataclass(frozen=True)
class TextSet:
    """Documents made in memory; `details` says what they depend on."""

    source: str
    texts: tuple[str, ...]
    details: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)

    @property
    def file(self) -> str:
        return self.source

    def localize(self, progress: DownloadProgress | None = None) -> "TextSet":
        return self

    def parts(self, target_bytes: int) -> list[Part]:
        return [Part(0, 1, self.bytes)]

    def record(self) -> dict[str, Any]:
        """`sha256` is that of the texts, each followed by a zero byte."""
        digest = hashlib.sha256(b"".join(text.encode() + b"\0" for text in self.texts)).hexdigest()
        return {"source": self.source, "bytes": self.bytes, "sha256": digest, **self.details}

    def documents(self, text_column: str, part: Part | None = None) -> Iterator[Document]:
        return (Document(text, len(text.encode())) for text in self.texts)


def open_sources(given: Sequence[str], options: NamedOptions = NAMED_OPTIONS) -> list[Source]:
    """Everything that the user's SOURCE arguments name, in the order given.

    Raises:
        UserError: nothing readable under one of them, or a download that failed.
    """
    found: list[Source] = []
    for source in given:
        if source == "pydocs":
            found.append(python_docs())
        elif source == "tinyshakespeare":
            path = local_shakespeare(options.file) if options.file else fetch_shakespeare(options)
            found.append(SourceFile(source, "input.txt", path))
        else:
            found.extend(find_files(source))
    return found


@functools.cache
def python_docs() -> TextSet:
    """Read once: the quickstart trains a tokenizer on it and then prepares it."""
    return TextSet("pydocs", tuple(pydocs()), {"python": platform.python_version()})


def local_shakespeare(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"tinyshakespeare's file {path} does not exist; leave the option out to download it")
    if not is_shakespeare(path.read_bytes()):
        raise UserError(
            f"{path} is not tinyshakespeare (its SHA-256 differs); prepare it as a file: give its path as SOURCE"
        )
    return path


def fetch_shakespeare(options: NamedOptions) -> Path:
    """The cached file, downloaded if it is not there or damaged."""
    cache = options.cache or Path.home() / ".cache" / "regpt"
    path = cache / "tinyshakespeare.txt"
    if path.is_file() and is_shakespeare(path.read_bytes()):
        return path
    data = download(options.url)
    if not is_shakespeare(data):
        raise UserError(
            f"{options.url} returned {len(data):,} bytes that are not tinyshakespeare "
            f"({SHAKESPEARE_BYTES:,} bytes of SHA-256 {SHAKESPEARE_SHA256[:12]}…); give a local copy with --file"
        )
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may download at once
    with partial.open("wb") as stream:
        stream.write(data)
        os.fsync(stream.fileno())
    os.replace(partial, path)
    return path


def is_shakespeare(data: bytes) -> bool:
    return len(data) == SHAKESPEARE_BYTES and hashlib.sha256(data).hexdigest() == SHAKESPEARE_SHA256


def download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            return response.read(SHAKESPEARE_BYTES + 1)  # no more than needed to see that it is another file
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} could not be downloaded ({error}); give a local copy with --file") from None
