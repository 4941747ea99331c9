"""Parse one command's arguments into its dataclass; a mistake becomes one sentence."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from regpt.console.lines import print_line
from regpt.errors import UsageError

Args = TypeVar("Args")
WRITTEN = ("out", "json", "items")  # flags that name a file or folder to write
USAGE = 2  # with which tyro ends
RULE = re.compile(r"^[╭╰│\s]*[─-]{3,}[╮╯│\s]*$")  # hyphens, and no frame, where output is not UTF-8


def parse(command: type[Args], args: Sequence[str], prog: str, default: Args | None = None) -> Args:
    """`args` as an instance of the dataclass `command`; `prog` is what the user typed, such as `regpt sample`.

    Raises:
        UsageError: an unknown flag, a missing argument or a value of the wrong type.
    """
    shown, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(command, args=list(args), prog=prog, default=default)
    except SystemExit as stop:
        if stop.code != USAGE:  # --help; or a signal (`parallel.signals`)
            print_line(shown.getvalue().rstrip("\n"))
            raise
        raise UsageError(one_sentence(complaint.getvalue(), prog)) from None
    assert parsed is not None
    refuse_nul(parsed)
    return parsed


def refuse_nul(parsed: object) -> None:
    """Raise a UsageError for a NUL character in the name of something to write: no file can have that name."""
    for flag in WRITTEN:
        value = str(getattr(parsed, flag, ""))
        if "\0" in value:
            raise UsageError(f"--{flag} {value!r} holds a NUL character, which no file name can; choose another name")


def one_sentence(box: str, prog: str) -> str:
    """tyro's framed message, several lines with rules between them, as one line; its title says nothing more."""
    parts, part = [], []
    for line in [*box.strip().splitlines()[1:], "───"]:
        if RULE.match(line):
            parts.append(" ".join(part))
            part = []
        elif text := line.strip("│ "):
            part.append(text)
    said = [part.rstrip(".") for part in parts if part and "helptext" not in part]
    return f"{prog}: {'; '.join(said)}; {prog} --help shows what is allowed"
