"""Text → token shards, from Python."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from regpt.api.arguments import check_options, checked, hints_of
from regpt.data.manifest import Manifest
from regpt.errors import UsageError, UserError
from regpt.files import at_home, write_text
from regpt.prepare.named import open_sources
from regpt.prepare.prepare import SHARD_TOKENS
from regpt.prepare.prepare import prepare as write_shards
from regpt.prepare.settings import Filters, TextOptions
from regpt.prepare.work import try_place, writing_to
from regpt.text.bpe import train_bpe
from regpt.text.open import open_tokenizer
from regpt.text.tokenizer import Tokenizer

Place = str | os.PathLike[str]

OWN = {"sources", "out", "tokenizer", "val_sources", "val_fraction", "text", "shard_tokens", "filters", "return"}
OPTIONS = {  # of `prepare`, besides its own parameters
    name: hint
    for owner in (TextOptions, write_shards)
    for name, hint in hints_of(owner).items()
    if name not in OWN | {"text_column"}
}


@checked
def prepare(
    sources: Place | Iterable[Place],
    out: Place,
    *,
    tokenizer: Place | Tokenizer = "gpt2",
    val: Place | Iterable[Place] = (),
    val_fraction: float | None = None,
    text_column: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    filters: Filters | Mapping[str, Any] | None = None,
    **options: Any,
) -> Manifest:
    """Write the token shards of `sources` into the new folder `out`; returns its manifest.

    Args:
        sources: files, folders, globs, addresses or named sets, as for `regpt data prepare`.
        tokenizer: `gpt2`, a folder or file that `train_tokenizer` wrote, or the tokenizer itself.
        val: sources to hold out; otherwise `val_fraction` of the documents (0.1 below 10 MB of text, 0.005 above).
        filters: what is left out, by the fields of `regpt.prepare.settings.Filters`: `{"dedup": "near"}`.
        options: how files become documents (the rest of `regpt.prepare.settings.TextOptions`: `template`, `separator`,
            `encoding`, …), and the rest of what `regpt.prepare.prepare.prepare` takes, such as `workers`.

    Raises:
        UsageError: an unknown option, or a value of another type.
        UserError: sources that cannot be read or are empty, options out of range, a folder that holds other data.
    """
    if isinstance(filters, Mapping):
        filters = Filters(**check_options("filters", filters, hints_of(Filters)))
    options = check_options("prepare", options, OPTIONS)
    text = {field.name: options.pop(field.name) for field in fields(TextOptions) if field.name in options}
    return write_shards(
        names(sources),
        Path(out),
        opened(tokenizer),
        val_sources=names(val),
        val_fraction=val_fraction,
        text=TextOptions(text_column=text_column, **text),
        shard_tokens=shard_tokens,
        filters=filters or Filters(),
        **options,
    )


@checked
def train_tokenizer(
    sources: Place | Iterable[Place], vocab_size: int, out: Place | None = None, *, text_column: str = "text"
) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens learned from `sources`; `out`, where given, gets its tokenizer.json.

    Raises:
        UserError: `out` holds a tokenizer already, sources that cannot be read, too little text for so many tokens.
    """
    file = None if out is None else Path(out) / "tokenizer.json"
    if file is not None and file.exists():
        raise UserError(f"{file} exists already; choose another folder or delete it")
    if file is not None:
        try_place(file.parent)
    text = TextOptions(text_column)
    found = open_sources(names(sources), text=text)
    if not found:
        raise UsageError("no source was given; give files, folders, globs or a named set")
    texts = (document.text for source in found for document in source.documents(text))
    tokenizer = train_bpe(texts, vocab_size)
    if file is not None:
        with writing_to(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, tokenizer.to_json())
    return tokenizer


def opened(tokenizer: Place | Tokenizer) -> Tokenizer:
    if isinstance(tokenizer, os.PathLike):
        return open_tokenizer(Path(tokenizer))
    return open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer


def names(given: Place | Iterable[Place]) -> list[str]:
    """One place, or several, as text."""
    places = [given] if isinstance(given, str | os.PathLike) else list(given)
    if wrong := [one for one in places if not isinstance(one, str | os.PathLike)]:
        raise UsageError(f"a source is {wrong[0]!r}, must be text or a path")
    return [at_home(os.fspath(one)) for one in places]
