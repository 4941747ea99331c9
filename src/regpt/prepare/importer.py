"""Token files of other projects → a folder of our shards, token by token the same.

The files of a split are one stream in the order given: their writers cut it anywhere, so a document may continue in the
next file. It starts at every `<|endoftext|>`. Our shards start with one, so where a stream does not (the files of
nanoGPT end with theirs; the training files of llm.c continue where the validation file stopped) one token is inserted
in front of it, and nothing else is changed.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regpt.data.manifest import WORK, Manifest, Shard
from regpt.errors import UserError
from regpt.files import exists, is_folder
from regpt.prepare.partition import Split
from regpt.prepare.records import check_finished
from regpt.prepare.shards import ShardWriter, finish_folder
from regpt.prepare.token_files import TokenFile, check_vocabulary, find_token_files
from regpt.prepare.work import is_finished, naming_full_disk, try_place, work_folder
from regpt.text.tokenizer import Tokenizer

CHUNK_TOKENS = 4 << 20  # in memory at a time: tens of megabytes
VAL_NAME = re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)")
Splits = dict[Split, list[TokenFile]]


class ImportProgress(NamedTuple):
    """The file in hand, and the tokens copied so far."""

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
        raise UserError(f"--shard-tokens is {shard_tokens}, must be at least 1")
    left_out: Counter[str] = Counter()
    splits = split_files(given, val, file_format, tokenizer.n_vocab, left_out)
    if guessed_tokenizer:
        check_vocabulary([file for files in splits.values() for file in files])
    options = {"imported": True, "val_rule": "sources" if val else "names", "shard_tokens": shard_tokens}
    if is_finished(out):
        known = [file.record(split) for split, files in splits.items() for file in files]
        return check_finished(out, tokenizer, options, known, derived=("inserted_eot",))
    if exists(out) and not (is_folder(out) and ((out / WORK).exists() or not any(out.iterdir()))):
        raise UserError(f"--out {out} exists already; choose another name or delete it")
    try_place(out.parent)
    with naming_full_disk(out), work_folder(out):
        return copy_files(splits, out, tokenizer, options, left_out, progress)


def split_files(
    given: Sequence[str], val: Sequence[str], file_format: str | None, n_vocab: int, left_out: Counter[str]
) -> Splits:
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


def copy_files(
    splits: Splits,
    out: Path,
    tokenizer: Tokenizer,
    options: Mapping[str, Any],
    left_out: Mapping[str, int],
    progress: Callable[[ImportProgress], None] | None,
) -> Manifest:
    """Copy the tokens, check them, and insert `<|endoftext|>` in front of a split that lacks it."""
    dtype, lengths = "uint16" if tokenizer.n_vocab <= 1 << 16 else "uint32", tokenizer.byte_lengths()
    text_bytes, inserted = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
    shards, records = list[Shard](), list[dict[str, Any]]()
    done, total = 0, sum(file.tokens for files in splits.values() for file in files)
    for split, files in splits.items():
        with ShardWriter(out, split, dtype, options["shard_tokens"]) as writer:
            for i, file in enumerate(files):
                documents, tokens = 0, file.array()
                if i == 0 and tokens[0] != tokenizer.eot:
                    writer.write(np.array([tokenizer.eot], dtype), np.zeros(1, np.int64))
                    inserted[split] = 1
                for at in range(0, len(tokens), CHUNK_TOKENS):
                    chunk = tokens[at : at + CHUNK_TOKENS]
                    check_tokens(chunk, file, len(lengths))
                    starts = np.flatnonzero(chunk == tokenizer.eot)
                    writer.write(chunk, starts)
                    documents += len(starts)
                    text_bytes[split] += int(lengths[chunk].sum())
                    done += len(chunk)
                    if progress:
                        progress(ImportProgress(file.file, done, total))
                records.append({**file.record(split), "documents": documents, "empty": 0})
            writer.finish()
        shards += writer.shards
    facts = {"text_bytes": text_bytes, "sources": tuple(records), "left_out": dict(left_out)}
    return finish_folder(out, tokenizer, dtype, shards, options={**options, "inserted_eot": inserted}, **facts)


def check_tokens(chunk: np.ndarray, file: TokenFile, n_vocab: int) -> None:
    low, high = int(chunk.min()), int(chunk.max())
    if low < 0 or high >= n_vocab:
        raise UserError(
            f"{file.path} holds the token {low if low < 0 else high}, but the tokenizer has only {n_vocab:,}; "
            "name the one that made the file with --tokenizer"
        )
