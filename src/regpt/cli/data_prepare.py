"""`regpt data prepare`: text to token shards."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import print_line, print_note
from regpt.console.text import counted
from regpt.errors import word
from regpt.files import exists
from regpt.prepare.settings import NO_FILTERS, TEXT_OPTIONS, Filters, TextOptions
from regpt.ranges import MANY, PROCESSES, Range

if TYPE_CHECKING:
    from regpt.data.manifest import Manifest

# Flags of every command that reads text: how files become documents.
TextFlags = Annotated[TextOptions, tyro.conf.arg(name="")]
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
REASONS = {  # for the manifest's names: one of them, and why
    "short": ("document", "below --min-chars"),
    "contaminated": ("document", "with evaluation text (which: removed.jsonl)"),
    "exact_duplicates": ("exact duplicate", ""),
    "near_duplicates": ("near duplicate", "(which: removed.jsonl)"),
    "not_utf8": ("document", "with bytes outside UTF-8 (which: removed.jsonl)"),
    "not_json": ("document", "of damaged JSON (which: removed.jsonl)"),
    "no_column": ("document", "without the column (which: removed.jsonl)"),
    "not_text": ("document", "whose column is not text (which: removed.jsonl)"),
    "ragged": ("row", "of more or fewer cells than the table (which: removed.jsonl)"),
    "damaged": ("file", "from the damaged place on (which: removed.jsonl)"),
}

MARKS = {  # counts of the sources in the manifest
    "byte_order_mark": "with a byte-order mark, which is left out",
    "crlf": "with {count} Windows line ends (CRLF), which are kept",
    "endoftext": "with {count} times <|endoftext|> as ordinary characters; if it stands between documents, prepare "
    "again with --separator '<|endoftext|>'",
    "long_lines": "with texts of more than a million characters without a line end ({count})",
}


@dataclass(frozen=True)
class PrepareArgs:
    """Make token shards from text. A SOURCE is a file, folder or glob of .txt, .md, .jsonl, .json, .csv, .tsv or
    .parquet, here or at hf://, https://, s3://, gs://; a named set: pydocs, tinyshakespeare, fineweb-edu-10B,
    fineweb-10B; or - for stdin. Stopped at any moment, the same command continues."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """What to read, in this order."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder to write; where the same command has finished it, nothing is done."""
    tokenizer: str = "gpt2"
    """gpt2; bytes, one token a byte, for models of characters; or what `regpt tokenizer train` wrote."""
    val: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE")] = ()
    """Hold out these sources instead of a part of the others."""
    val_fraction: Annotated[float | None, tyro.conf.arg(metavar="FLOAT"), Range(0, 1, below=True)] = None
    """Part of the documents held out, 0 for none; default: 0.1 below 10 MB of sources, 0.005 above."""
    shard_tokens: Annotated[int, Range(1, MANY)] = 100_000_000
    """Tokens in each shard but the last."""
    filters: Annotated[Filters, tyro.conf.arg(name="")] = NO_FILTERS
    workers: Annotated[int | None, tyro.conf.arg(metavar="INT"), Range(1, PROCESSES)] = None
    """Processes that encode; default: one a core, 16 at most. The files do not depend on it."""
    encoder: Literal["auto", "exact"] = "auto"
    """auto: gigatoken where it is installed (pip install 'regpt[fast]'), the same tokens sooner; exact: without it."""
    restart: bool = False
    """Give up what an earlier attempt with other options has done."""
    text: TextFlags = TEXT_OPTIONS


def main(args: list[str]) -> int:
    given = parse(PrepareArgs, args, prog="regpt data prepare")
    from regpt.data.manifest import WORK
    from regpt.prepare.prepare import is_finished, prepare
    from regpt.remote.download import RemoteOptions
    from regpt.text.open import open_tokenizer

    tokenizer = open_tokenizer(given.tokenizer)
    done = is_finished(Path(given.out))
    try:
        with ProgressLine() as line:
            manifest = prepare(
                given.sources,
                Path(given.out),
                tokenizer,
                val_sources=given.val,
                val_fraction=given.val_fraction,
                text=as_meant(given.text),
                shard_tokens=given.shard_tokens,
                filters=given.filters,
                workers=given.workers,
                encoder=given.encoder,
                restart=given.restart,
                remote=RemoteOptions(download_folder()),
                progress=line.show,
                download=line.show_download,
            )
    except KeyboardInterrupt:
        if exists(Path(given.out) / WORK):
            print_note(f"{given.out} is unfinished; the same command goes on")
        raise
    if done:
        print_line(f"nothing to do: {given.out} holds the shards of these sources already")
    else:
        print_prepared(given.out, manifest)
    return 0


def as_meant(given: TextOptions) -> TextOptions:
    """The options as they were typed, with line ends and tabs for their escapes, and endings without a dot."""
    ending = given.format.removeprefix(".").lower() if given.format else None
    texts = {"template": unescaped(given.template), "separator": unescaped(given.separator)}
    return replace(given, format=ending, **texts)


def unescaped(text: str | None) -> str | None:
    r"""`text` with a line end for `\n`, a tab for `\t`: shells pass the two characters on."""
    return None if text is None else re.sub(r"\\([nt\\])", lambda found: ESCAPES[found[1]], text)


def download_folder() -> Path | None:
    """Where downloads are kept when the environment says so; None for the default."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(base) / "regpt" if base else None


class ProgressLine:
    """One line in the terminal: part done, documents, text, tokens, speed, time left."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

        from regpt.console.drawing import field, progress_bar

        self._progress = progress_bar(BarColumn(), TaskProgressColumn(), field("done"), TimeRemainingColumn())
        self._task = self._progress.add_task("", total=1.0, done="reading")
        self._download = ""

    def __enter__(self) -> ProgressLine:
        return self  # the line appears with the first news: an error before stands alone

    def __exit__(self, *error: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def show(self, now: Any) -> None:
        """`now` is a `regpt.prepare.prepare.Progress`."""
        self._progress.start()  # again and again: only the first counts
        seconds = max(self._progress.tasks[0].elapsed or 0.0, 1e-9)
        speed = (now.text_bytes - now.found_bytes) / 1e6 / seconds
        done = (
            f"{counted(now.documents, 'document')}  {now.text_bytes / 1e6:,.1f} MB ({speed:.1f} MB/s)  "
            f"{now.tokens:,} tokens ({(now.tokens - now.found_tokens) / seconds:,.0f}/s){self._download}"
        )
        self._progress.update(self._task, completed=now.done, done=done)

    def show_download(self, news: Any) -> None:
        """`news` is a `regpt.remote.download.Download`."""
        self._progress.start()
        whole = news.bytes >= news.total > 0
        size = f"{news.bytes / 1e6:,.0f} of {news.total / 1e6:,.0f} MB" if news.total else f"{news.bytes / 1e6:,.0f} MB"
        self._download = "" if whole else f"  downloading {news.file}: {size}"
        shown = self._progress.tasks[0].fields["done"].split("  downloading ")[0]
        self._progress.update(self._task, done=shown + self._download)


def print_marks(manifest: Manifest) -> None:
    """A line for each thing in the text that may be a mistake."""
    for name, said in MARKS.items():
        counts = [source[name] for source in manifest.sources if source.get(name)]
        if counts:
            print_line(f"{counted(len(counts), 'file')} {said.format(count=f'{sum(counts):,}')}")


def print_separated(manifest: Manifest) -> None:
    """How many documents the files are with --separator, and whether it cut none of them."""
    mark = manifest.options.get("separator")
    if mark is None:
        return
    counts = [sum(source.get(name, 0) for name in ("documents", "empty", "skipped")) for source in manifest.sources]
    uncut = manifest.options["val_rule"] == "cut" or sum(counts) <= len(counts)
    said = f"--separator {mark!r}: {counted(sum(counts), 'document')} from {counted(len(counts), 'file')}"
    print_line(f"{said}; it stands between no documents, check how it is spelled" if uncut else said)


def print_left_out(left_out: Mapping[str, int]) -> None:
    """One line on the files that were found and not read."""
    from regpt.prepare.listing import counted_kinds as listed

    if left_out:
        print_line(f"left out {listed(left_out)}")


def print_split(split: str, documents: int, tokens: int, shards: int) -> None:
    parts = (f"{counted(documents, 'document'):<22}", f"{counted(tokens, 'token'):<22}", counted(shards, "shard"))
    print_line("  ".join([f"{split:5}", *parts]))


def print_prepared(out: str, manifest: Manifest) -> None:
    for split in ("train", "val"):
        if shards := manifest.split(split):
            tokens, documents = manifest.tokens(split), manifest.documents(split)
            print_split(split, documents, tokens, len(shards))
    print_left_out(manifest.left_out)
    if empty := sum(source["empty"] for source in manifest.sources):
        print_line(f"left out {counted(empty, 'empty document')}")
    for reason, count in manifest.removed.items():
        size = f", {count['text_bytes'] / 1e6:,.1f} MB" if count["text_bytes"] else ""
        noun, why = REASONS[reason]
        print_line(f"left out {counted(count['documents'], noun)} {why}".rstrip() + size)
    print_marks(manifest)
    print_separated(manifest)
    with_what = f"the tokenizer {manifest.tokenizer} ({manifest.made_with['encoder']})"
    print_line(f"wrote {out} with {with_what}; look inside with: regpt data info {word(out)}")
