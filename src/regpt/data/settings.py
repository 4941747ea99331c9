"""The options of a preparation that shape the tokens."""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Literal


@dataclass(frozen=True)
class Filters:
    """What is left out.

    Attributes:
        min_chars: documents with fewer characters.
        dedup: `exact`: texts that occurred before; `near`: also those with about 80 % of their five-word runs in common
            with an earlier one.
        decontaminate: documents that share 13 words in a row with an item of these evaluation files.
    """

    min_chars: int = 0
    dedup: Literal["none", "exact", "near"] = "none"
    decontaminate: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What shapes the tokens, beside the text.

    Attributes:
        tokenizer: its `to_json`.
        tokenizer_sha256: its hash.
        n_vocab: its number of tokens.
        eot: its `<|endoftext|>`.
        encoder: `auto` for the fast one where it is installed, or `exact`.
        rule: how documents are held out: `documents`, `cut`, `sources` or `none`.
        val_fraction: of the rules `documents` and `cut`.
        text_column: of .jsonl and .parquet.
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
    text_column: str = "text"
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

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "Settings":
        return cls(**{**given, "evaluations": tuple(given["evaluations"])})
