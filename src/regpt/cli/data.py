"""`regpt data`: prepare, import, describe and check folders of token shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from regpt.cli import data_import, data_info
from regpt.cli.parse import parse
from regpt.errors import UsageError, UserError, nearest

if TYPE_CHECKING:
    from regpt.data.manifest import Manifest


@dataclass(frozen=True)
class PrepareArgs:
    """Make token shards from text. A SOURCE is a file, a folder or a glob of .txt, .md, .jsonl[.gz|.zst] or .parquet,
    or a named set: pydocs, tinyshakespeare."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """What to read, in this order."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder to write; it must not hold a data set already."""
    tokenizer: str = "gpt2"
    """gpt2, or the folder or file that `regpt tokenizer train` wrote."""
    val: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE")] = ()
    """Hold out these sources instead of a part of the others."""
    val_fraction: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Part of the documents held out, 0 for none; default: 0.1 below 10 MB of sources, 0.005 above."""
    text_column: str = "text"
    """Key of .jsonl and column of .parquet that holds the text."""
    shard_tokens: int = 100_000_000
    """Tokens in each shard but the last."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Threads that encode; default: one a core. The files do not depend on it."""
    file: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Take tinyshakespeare from this file instead of downloading it."""


@dataclass(frozen=True)
class VerifyArgs:
    """Compare every file of a data folder with the manifest and the format; exit code 1 if one is damaged."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of token shards."""


def main(args: list[str]) -> int:
    """Hand over to the subcommand."""
    commands = {"prepare": prepare_main, "import": data_import.main, "info": data_info.main, "verify": verify_main}
    if args[:1] in (["--help"], ["-h"]):
        print("usage: regpt data {prepare,import,info,verify} …\n\n  prepare  make token shards from text")
        print("  import   make token shards from the token files of other projects")
        print("  info     show what a data folder holds\n  verify   check every file of a data folder")
        return 0
    if not args:
        raise UsageError(f"regpt data needs a command; choose from {', '.join(commands)}")
    if args[0] not in commands:
        hint = nearest(args[0], commands)
        raise UsageError(f"regpt data has no command {args[0]!r}{hint}; choose from {', '.join(commands)}")
    return commands[args[0]](args[1:])


def prepare_main(args: list[str]) -> int:
    given = parse(PrepareArgs, args, prog="regpt data prepare")
    from regpt.data.named import NamedOptions
    from regpt.data.prepare import prepare
    from regpt.text.open import open_tokenizer

    tokenizer = open_tokenizer(given.tokenizer)
    with ProgressLine() as line:
        manifest = prepare(
            given.sources,
            Path(given.out),
            tokenizer,
            val_sources=given.val,
            val_fraction=given.val_fraction,
            text_column=given.text_column,
            shard_tokens=given.shard_tokens,
            workers=given.workers,
            named=NamedOptions(cache=cache_folder(), file=Path(given.file) if given.file else None),
            progress=line.show,
        )
    print_prepared(given.out, manifest)
    return 0


def cache_folder() -> Path | None:
    """Where downloads are kept when the environment says so; None for the default."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(base) / "regpt" if base else None


class ProgressLine:
    """One line in the terminal: part done, documents, text, tokens, speed, time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[done]}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("", total=1.0, done="reading")

    def __enter__(self) -> ProgressLine:
        return self  # the line appears with the first news: an error before stands alone

    def __exit__(self, *error: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def show(self, now: Any) -> None:
        """`now` is a `regpt.data.prepare.Progress`."""
        self._progress.start()  # again and again: only the first counts
        seconds = max(self._progress.tasks[0].elapsed or 0.0, 1e-9)
        megabytes = now.text_bytes / 1e6
        done = (
            f"{now.documents:,} documents  {megabytes:,.1f} MB ({megabytes / seconds:.1f} MB/s)  "
            f"{now.tokens:,} tokens ({now.tokens / seconds:,.0f}/s)"
        )
        self._progress.update(self._task, completed=now.done, done=done)


def print_prepared(out: str, manifest: Manifest) -> None:
    for split in ("train", "val"):
        if shards := manifest.split(split):
            tokens, documents = manifest.tokens(split), manifest.documents(split)
            print(f"{split:5}  {documents:>12,} documents  {tokens:>15,} tokens  {len(shards):>4} shards")
    if empty := sum(source["empty"] for source in manifest.sources):
        print(f"left out {empty:,} empty documents")
    print(f"wrote {out} with the tokenizer {manifest.tokenizer}; look inside with: regpt data info {out}")


def verify_main(args: list[str]) -> int:
    given = parse(VerifyArgs, args, prog="regpt data verify")
    from rich.console import Console

    from regpt.data.verify import verify

    with Console(stderr=True).status("reading") as status:
        damage = verify(Path(given.folder), lambda file: status.update(f"reading {file}"))
    if damage:
        raise UserError("; ".join(damage) + "; restore the file or prepare the folder again")
    print(f"{given.folder} is intact")
    return 0
