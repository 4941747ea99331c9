"""Tokens → shards on disk: the writer of one split, files that appear only when they are whole."""

import contextlib
import errno
import hashlib
import re
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from regpt.data.manifest import Shard
from regpt.errors import UserError
from regpt.files import PARTIAL, finish_file, write_bytes

# No space, no quota, no larger file: the user can mend all three.
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
OURS = re.compile(r"(((train|val)-\d{5,}\.(bin|idx))|tokenizer\.json|removed\.jsonl|manifest\.json)(\.partial)?")


class ShardWriter:
    """Writes one split as shards of at most `shard_tokens` tokens; a document runs on into the next shard.

    `shards` describes the files that are finished, those of an earlier attempt first; `finish` ends the last one. Used
    as a context manager, it closes the open file when something fails. A thread hashes what is written.
    """

    def __init__(
        self,
        folder: Path,
        split: Literal["train", "val"],
        dtype: Literal["uint16", "uint32"],
        shard_tokens: int,
        shards: Sequence[Shard] = (),
    ) -> None:
        self.shards = list(shards)
        self._folder, self._shard_tokens = folder, shard_tokens
        self._split: Literal["train", "val"] = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = None
        self._hasher = ThreadPoolExecutor(1)  # hashlib lets other threads run meanwhile
        self._hashed: deque[Future[None]] = deque()
        self._begin()

    def write(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Append `tokens` (n,); documents start at the positions `starts` (d,) in them, ascending."""
        while len(tokens):
            if self._tokens == self._shard_tokens:
                self._end(continues=not (len(starts) and starts[0] == 0))
            part, tokens = np.split(tokens, [self._shard_tokens - self._tokens])
            here, starts = np.split(starts, [np.searchsorted(starts, len(part))])
            self._starts.append(here + self._tokens)
            starts = starts - len(part)
            self._append(part.astype(self._dtype, copy=False).view(np.uint8).data)
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
        self._hasher.shutdown(cancel_futures=True)
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk says so again
                self._file.close()

    def _append(self, data: memoryview) -> None:
        if self._file is None:
            self._file = (self._folder / (self._name + PARTIAL)).open("wb")
        self._file.write(data)
        self._hashed.append(self._hasher.submit(self._digest.update, data))
        if len(self._hashed) > 2:  # bounds what is in memory
            self._hashed.popleft().result()

    def _begin(self) -> None:
        self._name = f"{self._split}-{len(self.shards):05d}.bin"
        self._tokens, self._starts, self._digest = 0, [], hashlib.sha256()

    def _end(self, continues: bool) -> None:
        assert self._file is not None
        finish_file(self._file, self._folder / self._name)
        self._file = None
        while self._hashed:
            self._hashed.popleft().result()
        starts = np.concatenate(self._starts).astype("<i8")
        index = starts.tobytes()
        shard = Shard(
            file=self._name,
            split=self._split,
            tokens=self._tokens,
            documents=len(starts),
            sha256=self._digest.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            continues=continues,
        )
        write_bytes(self._folder / shard.idx_file, index)
        self.shards.append(shard)
        self._begin()


def try_place(folder: Path) -> None:
    """Make `folder`, and see that files can be written there, before work is spent on what they would hold.

    Raises:
        UserError: it cannot be made or written to.
    """
    above = [one for one in (folder, *folder.parents) if not one.exists()]
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".regpt-try"
        try:
            write_bytes(probe, b"regpt")
        finally:
            with contextlib.suppress(OSError):  # what is in use, or cannot be changed
                for one in (probe, probe.with_name(probe.name + PARTIAL)):
                    one.unlink(missing_ok=True)
                for one in above:
                    one.rmdir()


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """What the disk refuses in the body is a UserError that names `out`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"the disk of {out} is full; free space or choose another --out") from None
        raise UserError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from None


def remove_leftovers(folder: Path, keep: Collection[str] = ()) -> None:
    """Delete what an interrupted preparation left in `folder`, but the files named in `keep`."""
    for path in sorted(folder.iterdir()):  # the manifest before the shards
        if OURS.fullmatch(path.name) and path.name not in keep:
            path.unlink()
