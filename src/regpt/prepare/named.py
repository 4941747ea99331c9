"""Sets of text that have a name: `pydocs` (always there), `tinyshakespeare`, `fineweb-edu-10B`, `fineweb-10B`."""

import functools
import hashlib
import platform
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regpt.errors import UsageError, UserError
from regpt.files import is_file
from regpt.prepare.listing import Wanted, split_once
from regpt.prepare.pydocs import pydocs
from regpt.prepare.readers import ending_of, is_text, suffix_of
from regpt.prepare.settings import TEXT_OPTIONS, TextOptions
from regpt.prepare.sources import (
    TEXT_FILES,
    RemoteSource,
    Source,
    SourceFile,
    TextSet,
    find_files,
    find_remote,
    localized,
    text_files,
)
from regpt.remote import is_address
from regpt.remote.download import REMOTE_OPTIONS, RemoteFile, RemoteOptions
from regpt.remote.web import open_http

# Of conversations: by their endings; .json, .csv and .tsv of a folder only where there is nothing better.
TABLE_FILES = TEXT_FILES._replace(rank=lambda name: TEXT_FILES.rank(name) * (not is_text(suffix_of(name) or ".txt")))
# The lecture's debugging text: 40,000 lines of Shakespeare in one file (karpathy/char-rnn).
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
# Samples of about 10 billion GPT-2 tokens that the authors of FineWeb drew; their text is in the column `text`.
HUB_SETS = {
    "fineweb-edu-10B": "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet",
    "fineweb-10B": "hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet",
}


STDIN = "-"
ON_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*?)(?::([\w.-]+))?")  # OWNER/NAME, perhaps a split
TRAIN = "train"  # the split of a data set on the hub, unless another is named
# data/train-00000-of-00002.parquet, train/0.parquet, train.jsonl
OF_SPLIT = re.compile(r"(?:.*/)?([A-Za-z][A-Za-z_]*?)(?:-\d{5}-of-.*|/[^/]*|\.[^/]*)")


@dataclass(frozen=True)
class Listing:
    """What a command reads: every file once, in the split it belongs to; `left_out` counts the others by kind."""

    train: list[Source]
    val: list[Source]
    left_out: Counter[str]

    @property
    def files(self) -> list[Source]:
        return [*self.train, *self.val]

    def known(self) -> list[dict[str, Any]]:
        """The manifest's records of the sources; of remote files as much as is known without a download."""
        splits = ["train"] * len(self.train) + ["val"] * len(self.val)
        return [{**source.known(), "split": split} for source, split in zip(self.files, splits)]

    def discard(self) -> None:
        """Delete what was kept of stdin."""
        for source in self.files:
            if isinstance(source, SourceFile) and source.source == STDIN:
                source.path.unlink(missing_ok=True)


def list_sources(
    given: Sequence[str],
    val: Sequence[str] = (),
    options: RemoteOptions = REMOTE_OPTIONS,
    text: TextOptions = TEXT_OPTIONS,
) -> Listing:
    """Everything that the SOURCE arguments name, in the order given; remote files are not downloaded yet.

    Raises:
        UserError: nothing readable under one of them, a place that cannot be reached, or all of it is held out.
    """
    left_out: Counter[str] = Counter()
    if [*given, *val].count(STDIN) > 1:
        raise UsageError(f"stdin ({STDIN}) is given twice, but can be read once; leave one out")
    wanted = text_files(text)
    opened = [
        [found for source in names for found in open_source(source, options, left_out, text, wanted)]
        for names in (given, val)
    ]
    refuse_unused([*opened[0], *opened[1]], text)
    train, held_out = split_once(opened[0], opened[1], lambda source: source.identity, left_out)
    if given and not train:
        raise UserError("every source is held out by --val, so nothing is left to train on; give other files too")
    return Listing(train, held_out, left_out)


def table_files(names: Sequence[str], options: RemoteOptions = REMOTE_OPTIONS) -> list[SourceFile]:
    """The tables that `names` mean, on this machine: a file, an address, or OWNER/NAME[:SPLIT] of the hub.

    Raises:
        UserError: nothing there, or no file of that split.
    """
    found: list[Source] = []
    for name in names:
        on_hub = ON_HUB.fullmatch(name)
        if is_address(name):
            found += find_remote(name, options, Counter(), wanted=TABLE_FILES)
        elif is_file(name) or on_hub is None or suffix_of(name):
            found.append(SourceFile(name, name, Path(name)))
        else:
            listed = find_remote(f"hf://datasets/{on_hub[1]}", options, Counter(), name, TABLE_FILES)
            found += files_of_split(name, on_hub[2], listed)
    return [one for one in localized(found) if isinstance(one, SourceFile)]


def files_of_split(name: str, split: str | None, listed: Sequence[Source]) -> list[Source]:
    """Those of split `split` by their names; without one, of `train`, or the only files that there are."""
    splits = {one.file: split_name[1] if (split_name := OF_SPLIT.fullmatch(one.file)) else "" for one in listed}
    chosen = [one for one in listed if splits[one.file] == (split or TRAIN)]
    if chosen or (split is None and len(listed) == 1):
        return chosen or list(listed)
    there = ", ".join(dict.fromkeys(value or file for file, value in splits.items()))
    raise UserError(f"{name} has no files of split {split or TRAIN}; there are {there}: give one, as OWNER/NAME:SPLIT")


def refuse_unused(sources: Sequence[Source], text: TextOptions) -> None:
    """Raise a UsageError for an option about columns, or about marks in text, where no source is of such a kind."""
    kinds = {not isinstance(one, TextSet) and is_text(ending_of(Path(one.file), text)) for one in sources}
    kinds -= {False} if all(isinstance(one, TextSet) for one in sources) else set()
    column = text.template is not None or text.text_column != TEXT_OPTIONS.text_column
    if column and False not in kinds:
        name = "--text-column" if text.template is None else "--template"
        raise UsageError(f"{name} is about columns, and no source has any: all are plain text; leave it out")
    if text.separator is not None and True not in kinds:
        raise UsageError("--separator cuts plain text into documents, and no source is plain text; leave it out")


def open_sources(
    given: Sequence[str], options: RemoteOptions = REMOTE_OPTIONS, text: TextOptions = TEXT_OPTIONS
) -> list[Source]:
    """The files of each SOURCE, each once; see `list_sources`."""
    return list_sources(given, options=options, text=text).train


def open_source(
    source: str, options: RemoteOptions, left_out: Counter[str], text: TextOptions, wanted: Wanted
) -> Sequence[Source]:
    if source == STDIN:
        return [standard_input(options.folder / "stdin", text.format)]
    if source == "pydocs":
        return [python_docs()]
    if source == "tinyshakespeare":
        return [shakespeare(options)]
    if source in HUB_SETS:
        return find_remote(HUB_SETS[source], options, left_out, source)
    if is_address(source):
        return find_remote(source, options, left_out, wanted=wanted)
    return find_files(source, left_out, wanted)


def standard_input(folder: Path, ending: str | None) -> SourceFile:
    """What arrives on stdin, kept in `folder` under its hash: it is read more than once, and again after a stop.

    Raises:
        UsageError: no format is given, or it is a terminal.
    """
    if not ending:
        raise UsageError(f"stdin ({STDIN}) has no name that says what it is; add --format, such as --format jsonl")
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(f"stdin ({STDIN}) is a terminal; pipe text into the command")
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        partial = Path(file.name)
        try:
            while block := sys.stdin.buffer.read(1 << 20):
                digest.update(block)
                file.write(block)
        except BaseException:
            partial.unlink()
            raise
    path = folder / f"{digest.hexdigest()[:16]}.{ending}"
    partial.unlink() if path.exists() else partial.replace(path)
    return SourceFile(STDIN, "stdin", path, sha256=digest.hexdigest())


@functools.cache
def python_docs() -> TextSet:
    """Read once: the quickstart trains a tokenizer on it and then prepares it."""
    return TextSet("pydocs", tuple(pydocs()), {"python": platform.python_version()})


def shakespeare(options: RemoteOptions) -> RemoteSource:
    file = RemoteFile(
        name="input.txt",
        bytes=SHAKESPEARE_BYTES,
        url=SHAKESPEARE_URL,
        address=SHAKESPEARE_URL,
        open_at=open_http,
        options=options,
        sha256=SHAKESPEARE_SHA256,
        advice="; or give a local copy as SOURCE",
    )
    return RemoteSource("tinyshakespeare", file)
