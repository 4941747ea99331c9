"""`regpt data`: prepare, import, describe and check folders of token shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt.cli import data_import, data_info, data_prepare
from regpt.cli.parse import parse, run_subcommand
from regpt.console.lines import print_line, status
from regpt.errors import UserError


@dataclass(frozen=True)
class DataVerifyArgs:
    """Compare every file of a data folder with the manifest and the format; exit code 1 if one is damaged."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of token shards."""


def main(args: list[str]) -> int:
    """Call the subcommand."""
    commands = {
        "prepare": (data_prepare.main, "make token shards from text"),
        "import": (data_import.main, "make token shards from the token files of other projects"),
        "info": (data_info.main, "show what a data folder holds"),
        "verify": (verify_main, "check every file of a data folder"),
    }
    return run_subcommand("regpt data", args, commands)


def verify_main(args: list[str]) -> int:
    given = parse(DataVerifyArgs, args, prog="regpt data verify")
    from regpt.data.verify import verify

    with status() as say:
        damage = verify(Path(given.folder), lambda file: say(f"reading {file}"))
    if damage:
        raise UserError("; ".join(damage) + "; restore the file or prepare the folder again")
    print_line(f"{given.folder} is intact")
    return 0
