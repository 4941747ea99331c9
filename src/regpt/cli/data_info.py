"""`regpt data info`: what a folder of token shards holds, in numbers and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import print_json, print_line, print_rows
from regpt.errors import UserError

if TYPE_CHECKING:
    from regpt.data.info import SplitInfo
    from regpt.data.manifest import Manifest

SHOWN_TEXTS, SHOWN_TOKENS, FREQUENT_TOKENS = 3, 60, 10
BAR_WIDTH = 40


@dataclass(frozen=True)
class InfoArgs:
    """Show what a data folder holds."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of token shards."""
    json: bool = False
    """Print one JSON object instead."""


@dataclass(frozen=True)
class Content:
    """What is shown of the text: of the first split that has documents.

    Attributes:
        split: its name.
        counted: tokens that were counted: all, or an evenly spread sample.
        frequent: the most frequent tokens: id, bytes, share of the tokens counted.
        texts: beginnings of the first documents, decoded.
        problem: why there is no text, instead of texts.
    """

    split: str
    counted: int
    frequent: Sequence[tuple[int, bytes | None, float]]
    texts: Sequence[str]
    problem: str | None


def main(args: list[str]) -> int:
    given = parse(InfoArgs, args, prog="regpt data info")
    from regpt.data.info import describe_shards
    from regpt.data.manifest import read_manifest

    folder = Path(given.folder)
    manifest = read_manifest(folder)
    splits = describe_shards(folder, manifest)
    if not splits:
        raise UserError(f"data folder {given.folder!r} has no documents; prepare it from more text")
    content = read_content(folder, manifest, splits[0].split)
    if given.json:
        print_json(info_dict(manifest, splits, content))
    else:
        print_info(given.folder, manifest, splits, content)
    return 0


def read_content(folder: Path, manifest: Manifest, split: str) -> Content:
    """Count and decode; a tokenizer that is not here costs the texts, not the numbers."""
    from regpt.data.info import count_tokens, first_texts, most_frequent, tokenizer_of

    counts = count_tokens(folder, manifest, split)
    tokenizer, texts, problem = None, [], None
    try:
        tokenizer = tokenizer_of(folder, manifest)
        texts = first_texts(folder, manifest, split, tokenizer, SHOWN_TEXTS, SHOWN_TOKENS)
    except UserError as error:
        problem = str(error)
    frequent = [
        (i, tokenizer.token_bytes(i) if tokenizer else None, share)
        for i, share in most_frequent(counts, FREQUENT_TOKENS)
    ]
    return Content(split, int(counts.sum()), frequent, texts, problem)


def info_dict(manifest: Manifest, splits: list[SplitInfo], content: Content) -> dict[str, Any]:
    from regpt.text.tokenizer import with_bytes

    return {
        "tokenizer": manifest.tokenizer,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "splits": {split.split: split.to_dict() for split in splits},
        "frequent_tokens": [
            {"id": i, "text": None if data is None else with_bytes(data), "share": round(share, 6)}
            for i, data, share in content.frequent
        ],
        "tokens_counted": content.counted,
        "texts": content.texts,
        "sources": manifest.sources,
        "options": manifest.options,
    }


def print_info(folder: str, manifest: Manifest, splits: list[SplitInfo], content: Content) -> None:
    vocabulary = f"tokenizer {manifest.tokenizer}, {manifest.vocab_size:,} tokens, {manifest.dtype}"
    print_line(f"{folder}: {vocabulary}")
    print_splits(splits)
    for split in splits:
        print_histogram(split)
    print_content(content, whole=content.counted == splits[0].tokens)


def print_splits(splits: list[SplitInfo]) -> None:
    head = ("split", "documents", "tokens", "MB", "bytes/token", "median tokens", "shards")
    rows = []
    for split in splits:
        numbers = (f"{split.documents:,}", f"{split.tokens:,}", f"{split.text_bytes / 1e6:,.1f}")
        median = split.to_dict()["document_tokens"]["median"]
        rows.append((split.split, *numbers, f"{split.bytes_per_token:.3f}", f"{median:,.0f}", str(split.shards)))
    print_rows(head, rows)
    for split in (split for split in splits if split.trained_tokens is not None):
        share = f"{split.trained_tokens:,} of {split.tokens:,} tokens are trained on"
        print_line(f"{split.split}: {share} ({(split.trained_tokens or 0) / split.tokens:.0%})")


def print_histogram(split: SplitInfo) -> None:
    from regpt.data.info import histogram

    bins = histogram(split.lengths)
    largest = max(count for _, _, count in bins)
    print_line(f"\n{split.split}: documents by length in tokens")
    for low, high, count in bins:
        print_line(f"{low:>10,} – {high - 1:<10,} {'█' * round(BAR_WIDTH * count / largest):{BAR_WIDTH}} {count:,}")


def print_content(content: Content, whole: bool) -> None:
    from regpt.text.tokenizer import quoted

    sample = "" if whole else f", of {content.counted:,} tokens spread over it"
    print_line(f"\n{content.split}: the most frequent tokens{sample}")
    for i, data, share in content.frequent:
        print_line(f"{i:>10}  {share:6.2%}  {'' if data is None else quoted(data)}")
    if content.problem:
        print_line(f"\nno text shown: {content.problem}")
        return
    print_line(f"\n{content.split}: the first documents begin with")
    for text in content.texts:
        print_line(f"  {text!r}")
