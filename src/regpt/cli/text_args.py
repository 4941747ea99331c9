"""Flags of every command that reads text: how files become documents."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from regpt.prepare.settings import TextOptions

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True, kw_only=True)
class TextArgs:
    """To be inherited by the arguments of a command."""

    text_column: str = "text"
    """Key or column that holds the text; doc.text is the key text inside doc."""
    template: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    r"""Make the text of several columns, such as '{question}\n{answer}'."""
    include: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN")] = ()
    """Read these files of folders, such as '*.py'; what has an unknown ending is read as plain text."""
    format: Annotated[str | None, tyro.conf.arg(metavar="ENDING")] = None
    """Read every file like one with this ending, such as jsonl.gz, whatever its name; needed for stdin."""
    encoding: str = "utf-8"
    """Encoding of the text, such as latin-1; byte-order marks of UTF-8, UTF-16 and UTF-32 are recognized."""
    separator: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Cut texts into documents here, such as '<|endoftext|>'."""
    on_error: Literal["stop", "skip"] = "stop"
    """Stop at a document that cannot be read, or leave it out and count it."""

    def text_options(self) -> TextOptions:
        from regpt.prepare.settings import TextOptions

        return TextOptions(
            text_column=self.text_column,
            template=unescaped(self.template),
            format=self.format.removeprefix(".").lower() if self.format else None,
            include=self.include,
            encoding=self.encoding,
            separator=unescaped(self.separator),
            on_error=self.on_error,
        )


def unescaped(text: str | None) -> str | None:
    r"""`text` with a line end for `\n`, a tab for `\t`: shells pass the two characters on."""
    return None if text is None else re.sub(r"\\([nt\\])", lambda found: ESCAPES[found[1]], text)
