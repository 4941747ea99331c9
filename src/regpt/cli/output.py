"""What a long command shows: its progress, and its report as a table or as JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from regpt.errors import UserError
from regpt.files import is_folder

WIDTH = 140  # of a table that goes into a file or a pipe


def show(report: dict[str, Any], target: str | None, table: Callable[[dict[str, Any]], Any]) -> None:
    """The report as a table, and as JSON in the file `target`; only as JSON where that is `-`."""
    from rich.console import Console

    if target == "-":
        print(json.dumps(report, ensure_ascii=False))
        return
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table(report))
    if target is not None:
        write_json(Path(target), report)
        console.print(f"written: {target}", highlight=False)


def check_json(target: str | None) -> None:
    """Refuse a file that cannot be written, before minutes are spent on what it would hold."""
    if target not in (None, "-") and not is_folder(Path(target).absolute().parent):
        raise UserError(f"--json {target}: the folder does not exist; make it first")


def write_json(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror}); choose another file for --json") from None


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """`say(text)`: what is being done now, on the terminal's error stream; nothing where there is no terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda text: None
        return
    with console.status("starting") as status:
        yield lambda text: status.update(Text(text))
