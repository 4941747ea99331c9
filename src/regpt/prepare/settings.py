"""The options of a preparation that shape the tokens."""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Annotated, Any, Literal

from regpt.ranges import MANY, Range


@dataclass(frozen=True)
class TextOptions:
    """How files become documents."""

    text_column: str = "text"
    """Key or column that holds the text; doc.text is the key text inside doc."""
    template: str | None = None
    r"""Make the text of several columns, such as '{question}\n{answer}'."""
    include: tuple[str, ...] = ()
    """Read these files of folders, such as '*.py'; what has an unknown ending is read as plain text."""
    format: str | None = None
    """Read every file like one with this ending, such as jsonl.gz, whatever its name; needed for stdin."""
    encoding: str = "utf-8"
    """Encoding of the text, such as latin-1; byte-order marks of UTF-8, UTF-16 and UTF-32 are recognized."""
    separator: str | None = None
    """Cut texts into documents here, such as '<|endoftext|>'."""
    on_error: Literal["stop", "skip"] = "stop"
    """Stop at a document that cannot be read, or leave it out and count it."""

    def changed(self) -> dict[str, Any]:
        """Those that are not the default."""
        return {name: value for name, value in asdict(self).items() if value != getattr(TEXT_OPTIONS, name)}


TEXT_OPTIONS = TextOptions()


@dataclass(frozen=True)
class Filters:
    """What is left out."""

    min_chars: Annotated[int, Range(0, MANY)] = 0
    """Leave out documents with fewer characters."""
    dedup: Literal["none", "exact", "near"] = "none"
    """Leave out documents that occurred before: the same text, or also with about 80 % of their five-word runs in
    common."""
    decontaminate: tuple[str, ...] = ()
    """Leave out documents that share 13 words in a row with an item of these evaluation files."""


NO_FILTERS = Filters()


@dataclass(frozen=True)
class Settings:
    """Everything but the text that shapes the tokens.

    Attributes:
        tokenizer: its `to_json`.
        tokenizer_sha256: its hash.
        n_vocab: its number of tokens.
        eot: its `<|endoftext|>`.
        encoder: `auto` for the fast one where it is installed, or `exact`.
        rule: how documents are held out: `documents`, `cut`, `sources` or `none`.
        val_fraction: of the rules `documents` and `cut`.
        text: how files become documents.
        min_chars: shorter documents are left out.
        dedup: `none`, `exact` or `near`.
        evaluations: SHA-256 of each evaluation file whose text is left out.
    """

    tokenizer: str
    tokenizer_sha256: str
    n_vocab: int
    eot: int
    encoder: str = "auto"
    rule: str = "documents"
    val_fraction: float = 0.0
    text: TextOptions = TEXT_OPTIONS
    min_chars: int = 0
    dedup: str = "none"
    evaluations: tuple[str, ...] = ()

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """Of the tokens in shards."""
        return "uint16" if self.n_vocab <= 1 << 16 else "uint32"

    def key(self) -> str:
        """Changes with the tokens: not with the encoder, which makes the same ones."""
        shaping = {**asdict(self), "tokenizer": "", "encoder": ""}
        return sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()
