"""`regpt data`: prepare, import, describe and check folders of token shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt.cli import data_import, data_info, data_prepare
from regpt.cli.parse import parse
from regpt.console.lines import print_line, status
from regpt.errors import UsageError, UserError, nearest


@dataclass(frozen=True)
class DataVerifyArgs:
    """Compare every file of a data folder with the manifest and the format; exit code 1 if one is damaged."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of token shards."""


def main(args: list[str]) -> int:
    """Hand over to the subcommand."""
    commands = {"prepare": data_prepare.main, "import": data_import.main, "info": data_info.main, "verify": verify_main}
    if args[:1] in (["--help"], ["-h"]):
        print_line("usage: regpt data {prepare,import,info,verify} …\n\n  prepare  make token shards from text")
        print_line("  import   make token shards from the token files of other projects")
        print_line("  info     show what a data folder holds\n  verify   check every file of a data folder")
        return 0
    if not args:
        raise UsageError(f"regpt data needs a command; choose from {', '.join(commands)}")
    if args[0] not in commands:
        hint = nearest(args[0], commands)
        raise UsageError(f"regpt data has no command {args[0]!r}{hint}; choose from {', '.join(commands)}")
    return commands[args[0]](args[1:])


def verify_main(args: list[str]) -> int:
    given = parse(DataVerifyArgs, args, prog="regpt data verify")
    from regpt.data.verify import verify

    with status() as say:
        damage = verify(Path(given.folder), lambda file: say(f"reading {file}"))
    if damage:
        raise UserError("; ".join(damage) + "; restore the file or prepare the folder again")
    print_line(f"{given.folder} is intact")
    return 0
