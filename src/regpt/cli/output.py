"""Files that a command writes besides its output."""

from __future__ import annotations

from pathlib import Path

from regpt.errors import UserError
from regpt.files import is_folder

OTHER_JSON = "choose another file for --json"


def check_json(target: str | None) -> None:
    """Refuse a file that cannot be written, before minutes are spent on what it would hold."""
    if target != "-":
        check_folder("--json", target)


def check_folder(flag: str, target: str | None) -> None:
    """Refuse a file in a folder that does not exist."""
    if target is not None and not is_folder(Path(target).absolute().parent):
        raise UserError(f"{flag} {target}: the folder does not exist; make it first")
