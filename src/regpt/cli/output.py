"""The report of a command, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from regpt.console.lines import print_json, print_line
from regpt.errors import UserError
from regpt.files import is_folder, write_json

OTHER_JSON = "choose another file for --json"


def show(report: dict[str, Any], target: str | None, table: Callable[[dict[str, Any]], Any]) -> None:
    """The report as a table, and as JSON in the file `target`; only as JSON where that is `-`."""
    if target == "-":
        print_json(report)
        return
    if target is not None:
        write_json(Path(target), report, OTHER_JSON)
    from regpt.console.tables import print_table

    print_table(table(report))
    if target is not None:
        print_line(f"written: {target}")


def check_json(target: str | None) -> None:
    """Refuse a file that cannot be written, before minutes are spent on what it would hold."""
    if target != "-":
        check_folder("--json", target)


def check_folder(flag: str, target: str | None) -> None:
    """Refuse a file in a folder that does not exist."""
    if target is not None and not is_folder(Path(target).absolute().parent):
        raise UserError(f"{flag} {target}: the folder does not exist; make it first")
