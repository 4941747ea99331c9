"""Parse one command's arguments into its dataclass; a mistake becomes one sentence."""

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from regpt.cli.flags import Flag, flags_of, normalized
from regpt.console.lines import print_line
from regpt.errors import UsageError, UserError, nearest
from regpt.files import address_of, is_folder
from regpt.remote import is_address

Args = TypeVar("Args")
OTHER_JSON = "choose another file for --json"
WRITTEN = ("out", "json", "items")  # flags that name a file or folder to write
USAGE = 2  # with which tyro ends
RULE = re.compile(r"^[╭╰│\s]*[─-]{3,}[╮╯│\s]*$")  # hyphens, and no frame, where output is not UTF-8
NO_DEFAULT = re.compile(r"\(default:((?:\s|│|None)*)\)")  # "" and None, whose meaning the text before says


def parse(
    command: type[Args], args: Sequence[str], prog: str, default: Args | None = None, stores: Sequence[str] = ()
) -> Args:
    """`args` as an instance of the dataclass `command`; `prog` is what the user typed, such as `regpt sample`.

    `stores` are the flags among `WRITTEN` that take addresses, too.

    Raises:
        UsageError: an unknown flag, a missing argument or a value of the wrong type or out of range.
    """
    known = flags_of(command)
    given = normalized(known, args, prog)
    shown, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(command, args=given, prog=prog, default=default)
    except SystemExit as stop:
        if stop.code != USAGE:  # --help; or a signal (`parallel.signals`)
            print_line(without_empty_defaults(shown.getvalue()).rstrip("\n"))
            raise
        raise UsageError(one_sentence(complaint.getvalue(), known, prog)) from None
    assert parsed is not None
    refuse_names(parsed, stores)
    return parsed


def refuse_names(parsed: object, stores: Sequence[str]) -> None:
    """Raise a UsageError for a name of something to write that no file can have (a NUL character), or that is an
    address: as a path it would be a folder `s3:` here."""
    for flag in WRITTEN:
        value = str(getattr(parsed, flag, ""))
        if "\0" in value:
            raise UsageError(f"--{flag} {value!r} holds a NUL character, which no file name can; choose another name")
        if flag not in stores and (address := address_of(value)):
            raise UsageError(
                f"--{flag} takes a path of this machine and {address} is an address; write to a path, and copy what is "
                "there afterwards"
            )


def without_empty_defaults(help_text: str) -> str:
    """`help_text` with blanks of the same width where it says that the default is nothing."""
    return NO_DEFAULT.sub(lambda found: " " * 9 + found[1].replace("None", "    ") + " ", help_text)


def one_sentence(box: str, known: Mapping[str, Flag], prog: str) -> str:
    """tyro's framed message, several lines with rules between them, as one line; its title says nothing more."""
    parts, part = [], []
    for line in [*box.strip().splitlines()[1:], "───"]:
        if RULE.match(line):
            parts.append(" ".join(part))
            part = []
        elif text := line.strip("│ "):
            part.append(text)
    said = "; ".join(part.rstrip(".") for part in parts if part and "helptext" not in part)
    if ours := re.match(r"Error parsing config\.\w+: (.*)", said):  # a section's own sentence
        return ours[1]
    if said.startswith("Missing from"):
        words = said.split()
        missing = [flag.name for flag in known.values() if flag.required and flag.name in words]
        verb = "is" if len(missing) == 1 else "are"
        return f"{' and '.join(missing)} {verb} missing; {prog} --help shows what it takes"
    if extra := re.match(r"Unrecognized options: ([^;]*)", said):
        return f"{extra[1]} is too much for {prog}; {prog} --help shows what it takes"
    return f"{said}; {prog} --help shows what is allowed"


def check_json(target: str | None, flag: str = "--json") -> None:
    """Raise a UserError for a folder, or a file in one that does not exist, before minutes are spent on its content."""
    if target in (None, "-"):
        return
    if not is_folder(Path(target).absolute().parent):
        raise UserError(f"{flag} {target}: the folder does not exist; make it first")
    if is_folder(target):
        raise UserError(f"{flag} {target} is a folder; give the name of a file")


def local_folder(name: str, command: str, *, written: bool = False) -> Path:
    """The folder `name`; a UsageError where it is an address, which `command` does not read, or write."""
    if is_address(name) and written:
        raise UsageError(
            f"{command} writes to a folder of this machine and --out {name} is an address; give a path, and copy the "
            "run there when it has ended"
        )
    if is_address(name):
        raise UsageError(
            f"{command} reads folders of this machine and {name} is an address; copy the run here and give that folder"
        )
    return Path(name)


def run_subcommand(group: str, args: list[str], commands: Mapping[str, tuple[Callable[[list[str]], int], str]]) -> int:
    """Call the subcommand of `group` (`regpt data`) that `args` begin with; `--help` lists them with their purposes."""
    if args[:1] in (["--help"], ["-h"]):
        print_line(f"usage: {group} {{{','.join(commands)}}} …\n")
        print_line("\n".join(f"  {name:<8} {purpose}" for name, (_, purpose) in commands.items()))
        return 0
    if not args:
        raise UsageError(f"{group} needs a command; choose from {', '.join(commands)}")
    if args[0] not in commands:
        hint = nearest(args[0], commands)
        raise UsageError(f"{group} has no command {args[0]!r}{hint}; choose from {', '.join(commands)}")
    return commands[args[0]][0](args[1:])
