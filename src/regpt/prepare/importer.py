"""Token files of other projects → a folder of our shards, token by token the same.

The files of a split are one stream in the order given: their writers cut it anywhere, so a document may go on in the
next file. It starts at every `<|endoftext|>`. Our shards start with one, so where a stream does not (the files of
nanoGPT end with theirs; the training files of llm.c go on where the validation file stopped) one token is inserted in
front of it, and nothing else is changed. The folder appears under its name when it is whole.
"""

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from regpt.data.manifest import Manifest, Shard
from regpt.errors import UserError
from regpt.files import exists, is_folder, locked, sync, write_text
from regpt.prepare.records import check_finished
from regpt.prepare.shards import ShardWriter
from regpt.prepare.sources import sha256_of
from regpt.prepare.token_files import TokenFile, check_vocabulary, find_token_files
from regpt.prepare.work import FULL, try_place
from regpt.text.open import NAMED
from regpt.text.tokenizer import Tokenizer

CHUNK_TOKENS = 4 << 20  # in memory at a time: tens of megabytes
VAL_NAME = re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)")
Split = Literal["train", "val"]


@dataclass(frozen=True)
class ImportProgress:
    """What has been copied so far."""

    file: str
    tokens: int
    total_tokens: int


def import_tokens(
    given: Sequence[str],
    out: Path,
    tokenizer: Tokenizer,
    *,
    val: Sequence[str] = (),
    file_format: str | None = None,
    guessed_tokenizer: bool = False,
    shard_tokens: int = 100_000_000,
    progress: Callable[[ImportProgress], None] | None = None,
) -> Manifest:
    """Write the tokens of the files `given` as shards into the new folder `out`, unless the same command has done so.

    `val` names the validation files; without it they are those with `val` in their names. `tokenizer` is the one that
    made the tokens: the files do not store which; `guessed_tokenizer`: the user named none. The manifest's
    option `inserted_eot` counts what was inserted into each split.

    Raises:
        UserError: files that cannot be found, recognized or read, tokens outside the vocabulary, an `out` that is there
            already, or a full disk.
    """
    if not given:
        raise UserError("no PATH given; give files, folders or globs of .npy or .bin")
    if shard_tokens < 1:
        raise UserError(f"shard tokens is {shard_tokens}, must be at least 1")
    left_out: Counter[str] = Counter()
    splits = split_files(given, val, file_format, tokenizer.n_vocab, left_out)
    files = [file for group in splits.values() for file in group]
    if guessed_tokenizer:
        check_vocabulary(files)
    options = {"imported": True, "val_rule": "sources" if val else "names", "shard_tokens": shard_tokens}
    if exists(out / "manifest.json"):
        return check_finished(out, tokenizer, options, known_records(splits), derived=("inserted_eot",))
    check_out(out)
    try_place(out.parent)
    with new_folder(out) as folder:
        copy = Copy(folder, tokenizer, shard_tokens, sum(file.tokens for file in files), progress)
        return write_folder(copy, splits, tokenizer, options, left_out)


def known_records(splits: dict[Split, list[TokenFile]]) -> list[dict[str, Any]]:
    """What a manifest would say of the files."""
    return [
        {
            "source": file.source,
            "file": file.file,
            "split": split,
            "format": file.format,
            "sha256": sha256_of(file.path),
        }
        for split, files in splits.items()
        for file in files
    ]


def split_files(
    given: Sequence[str], val: Sequence[str], file_format: str | None, n_vocab: int, left_out: Counter[str]
) -> dict[Split, list[TokenFile]]:
    """The files of each split; one that `val` names may also be in a folder of `given`."""
    others, held_out = find_token_files(given, val, file_format, n_vocab, left_out)
    if not val:
        held_out = [file for file in others if VAL_NAME.search(file.path.stem.lower())]
        others = [file for file in others if file not in held_out]
    if not others:
        why = "every file is held out by --val" if val else "every file has val in its name"
        raise UserError(
            f"{why}, so none is left to train on; give the training files too, or say which files validate with --val"
        )
    return {"train": others, "val": held_out}


def check_out(out: Path) -> None:
    if not out.name or out.name == "..":
        raise UserError(f"--out {out} is no new folder; give a name")
    if exists(out) and not (is_folder(out) and not any(out.iterdir())):
        raise UserError(f"--out {out} exists already; choose another name or delete it")


def write_folder(
    copy: "Copy",
    splits: dict[Split, list[TokenFile]],
    tokenizer: Tokenizer,
    options: dict[str, Any],
    left_out: Counter[str],
) -> Manifest:
    shards = [*copy.split("train", splits["train"]), *copy.split("val", splits["val"])]
    if tokenizer.name not in NAMED:
        write_text(copy.folder / "tokenizer.json", tokenizer.to_json())
    manifest = Manifest(
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.n_vocab,
        eot=tokenizer.eot,
        dtype=copy.dtype,
        shards=tuple(shards),
        text_bytes=copy.text_bytes,
        sources=tuple(copy.records),
        options={**options, "inserted_eot": copy.inserted},
        left_out=dict(left_out),
    )
    write_text(copy.folder / "manifest.json", manifest.to_json())
    return manifest


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write; it becomes `out` when the block ends and is gone when it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(out.name + ".importing")
    with locked(out.with_name(out.name + ".lock"), out):
        shutil.rmtree(work, ignore_errors=True)  # of an import that was killed
        work.mkdir()
        try:
            yield work
            if exists(out):
                out.rmdir()  # empty; Windows renames onto nothing that exists
            os.replace(work, out)
            sync(out.parent)
        except OSError as error:
            if error.errno in FULL:
                raise UserError(f"the disk of {out} is full; free space or choose another --out") from None
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


class Copy:
    """Copies splits into `folder`; what it learns on the way is for the manifest."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        shard_tokens: int,
        total_tokens: int,
        progress: Callable[[ImportProgress], None] | None,
    ) -> None:
        self.text_bytes = {"train": 0, "val": 0}
        self.inserted = {"train": 0, "val": 0}
        self.records: list[dict[str, Any]] = []
        self.dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.n_vocab <= 1 << 16 else "uint32"
        self.folder, self.shard_tokens, self._progress = folder, shard_tokens, progress
        self._eot, self._bytes_of = tokenizer.eot, tokenizer.byte_lengths()
        self._done, self._total = 0, total_tokens

    def split(self, split: Split, files: Sequence[TokenFile]) -> list[Shard]:
        with ShardWriter(self.folder, split, self.dtype, self.shard_tokens) as writer:
            for i, file in enumerate(files):
                self._copy(split, file, writer, first=i == 0)
            writer.finish()
        return writer.shards

    def _copy(self, split: Split, file: TokenFile, writer: ShardWriter, first: bool) -> None:
        with file.path.open("rb") as head:
            digest = hashlib.sha256(head.read(file.offset))
        documents = 0
        for chunk in chunks(file.array()):
            digest.update(chunk.tobytes())
            self._check(chunk, file)
            if first and chunk[0] != self._eot:
                writer.write(np.array([self._eot], self.dtype), np.zeros(1, np.int64))
                self.inserted[split] = 1
            first = False
            starts = np.flatnonzero(chunk == self._eot)
            writer.write(chunk, starts)
            documents += len(starts)
            self.text_bytes[split] += int(self._bytes_of[chunk].sum())
            self._done += len(chunk)
            if self._progress:
                self._progress(ImportProgress(file.file, self._done, self._total))
        record = {
            "source": file.source,
            "file": file.file,
            "bytes": file.path.stat().st_size,
            "sha256": digest.hexdigest(),
        }
        what = {"split": split, "format": file.format, "tokens": file.tokens, "documents": documents, "empty": 0}
        self.records.append({**record, **what})

    def _check(self, chunk: np.ndarray, file: TokenFile) -> None:
        low, high, n_vocab = int(chunk.min()), int(chunk.max()), len(self._bytes_of)
        if low < 0 or high >= n_vocab:
            raise UserError(
                f"{file.path} holds the token {low if low < 0 else high}, but the tokenizer has only {n_vocab:,}; "
                "name the one that made the file with --tokenizer"
            )


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    for i in range(0, len(array), CHUNK_TOKENS):
        yield array[i : i + CHUNK_TOKENS]
