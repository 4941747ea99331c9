"""Flags of every command that reads text: how files become documents."""

import re
from dataclasses import replace
from typing import Annotated

import tyro

from regpt.prepare.settings import TextOptions

TextFlags = Annotated[TextOptions, tyro.conf.arg(name="")]
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def as_meant(given: TextOptions) -> TextOptions:
    """The options as they were typed, with line ends and tabs for their escapes, and endings without a dot."""
    ending = given.format.removeprefix(".").lower() if given.format else None
    texts = {"template": unescaped(given.template), "separator": unescaped(given.separator)}
    return replace(given, format=ending, **texts)


def unescaped(text: str | None) -> str | None:
    r"""`text` with a line end for `\n`, a tab for `\t`: shells pass the two characters on."""
    return None if text is None else re.sub(r"\\([nt\\])", lambda found: ESCAPES[found[1]], text)
