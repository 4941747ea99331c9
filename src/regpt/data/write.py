"""Tokens → shards on disk: the writer of one split, files that appear only when they are whole."""

import contextlib
import hashlib
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from regpt.data.manifest import Shard

PARTIAL = ".partial"
OURS = re.compile(r"(((train|val)-\d{5,}\.(bin|idx))|tokenizer\.json|manifest\.json)(\.partial)?")


class ShardWriter:
    """Writes one split as shards of at most `shard_tokens` tokens; a document runs on into the next shard.

    `shards` describes the files that are finished; `finish` ends the last one. Used as a context manager, it closes the
    open file when something fails.
    """

    def __init__(
        self, folder: Path, split: Literal["train", "val"], dtype: Literal["uint16", "uint32"], shard_tokens: int
    ) -> None:
        self.shards: list[Shard] = []
        self._folder, self._shard_tokens = folder, shard_tokens
        self._split: Literal["train", "val"] = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = None
        self._begin()

    def write(self, tokens: np.ndarray, starts: bool) -> None:
        """Append `tokens`; `starts` says that the first of them starts a document."""
        while len(tokens):
            if self._tokens == self._shard_tokens:
                self._end(continues=not starts)
            if starts:
                self._starts.append(self._tokens)
                starts = False
            part, tokens = np.split(tokens, [self._shard_tokens - self._tokens])
            self._append(part.astype(self._dtype).tobytes())
            self._tokens += len(part)

    def finish(self) -> None:
        """End the last shard; a split without tokens has none."""
        if self._file is not None:
            self._end(continues=False)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self._file = (self._folder / (self._name + PARTIAL)).open("wb")
        self._file.write(data)
        self._digest.update(data)

    def _begin(self) -> None:
        self._name = f"{self._split}-{len(self.shards):05d}.bin"
        self._tokens, self._starts, self._digest = 0, [], hashlib.sha256()

    def _end(self, continues: bool) -> None:
        assert self._file is not None
        finish_file(self._file)
        self._file = None
        os.replace(self._folder / (self._name + PARTIAL), self._folder / self._name)
        index = np.array(self._starts, dtype="<i8").tobytes()
        shard = Shard(
            file=self._name,
            split=self._split,
            tokens=self._tokens,
            documents=len(self._starts),
            sha256=self._digest.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            continues=continues,
        )
        write_file(self._folder / shard.idx_file, index)
        self.shards.append(shard)
        self._begin()


def write_file(path: Path, data: bytes) -> None:
    """`data` at `path`, under another name until it is whole and on disk."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(data)
        finish_file(file)
    os.replace(partial, path)


def finish_file(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def sync_folder(folder: Path) -> None:
    """The renames in `folder` on disk; Windows cannot open a folder and orders renames itself."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted preparation left in `folder`, and the folder when nothing else is in it."""
    for path in sorted(folder.iterdir()):  # the manifest before the shards
        if OURS.fullmatch(path.name):
            path.unlink()
    with contextlib.suppress(OSError):  # the user's own files are there
        folder.rmdir()
