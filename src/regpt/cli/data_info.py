"""`regpt data info`: what a folder of token shards holds, in numbers and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import print_json, print_line, print_rows
from regpt.console.text import counted
from regpt.data.config import ShuffleRows
from regpt.errors import UserError
from regpt.ranges import MANY, SEED, Range

if TYPE_CHECKING:
    from regpt.data.info import SplitInfo
    from regpt.data.manifest import Manifest

SHOWN_ROWS, SHOWN_TOKENS, FREQUENT_TOKENS = 3, 60, 10
BAR_WIDTH = 40
ALL = 1 << 62  # more rows than any epoch has


@dataclass(frozen=True)
class InfoArgs:
    """Show what a data folder holds."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of token shards."""
    order: Literal["shuffle", "sequential", "bos"] = "shuffle"
    """Show rows in this order; bos also says how many tokens its rows leave out."""
    shuffle_rows: Annotated[ShuffleRows, Range(2, MANY)] = "epoch"
    """As data.shuffle_rows: epoch, none, or a window in rows."""
    seq_len: Annotated[int, Range(1, MANY)] = 1024
    """Tokens a row."""
    seed: Annotated[int, Range(-SEED, SEED)] = 1337
    """Seed of the document order."""
    json: bool = False
    """Print one JSON object instead."""


@dataclass(frozen=True)
class Content:
    """What is shown of the text: of the first split that has documents.

    Attributes:
        split: its name.
        counted: tokens that were counted: all, or an evenly spread sample.
        frequent: the most frequent tokens: id, bytes, share of the tokens counted.
        seq_len: tokens of a row: those asked for, or as many as there are.
        rows: beginnings of the first rows, decoded.
        problem: why there is no text, instead of texts.
        bos: of the order bos, rows of the first epoch and the share of the tokens that they leave out.
    """

    split: str
    counted: int
    frequent: Sequence[tuple[int, bytes | None, float]]
    seq_len: int
    rows: Sequence[str]
    problem: str | None
    bos: dict[str, Any]


def main(args: list[str]) -> int:
    given = parse(InfoArgs, args, prog="regpt data info")
    from regpt.data.info import describe_shards
    from regpt.data.manifest import read_manifest

    folder = Path(given.folder)
    manifest = read_manifest(folder)
    splits = describe_shards(folder, manifest)
    if not splits:
        raise UserError(f"data folder {given.folder!r} has no documents; prepare it from more text")
    content = read_content(given, manifest, splits[0].split)
    if given.json:
        print_json(info_dict(manifest, splits, content))
    else:
        print_info(given, manifest, splits, content)
    return 0


def read_content(given: InfoArgs, manifest: Manifest, split: str) -> Content:
    """Count and decode; a tokenizer that is not here costs the texts, not the numbers."""
    from regpt.data.bos import PackedRows
    from regpt.data.info import count_tokens, first_rows, most_frequent, tokenizer_of
    from regpt.data.rows import open_rows

    folder = Path(given.folder)
    counts = count_tokens(folder, manifest, split)
    seq_len = given.seq_len if given.order == "bos" else min(given.seq_len, manifest.tokens(split))
    rows = open_rows(folder, manifest, split, given.order, given.seed, seq_len, given.shuffle_rows)
    bos = {}
    if isinstance(rows, PackedRows):
        bos = {"seq_len": seq_len, "rows": rows.epoch_rows(ALL), "left_out": round(rows.left_out(), 6)}
    tokenizer, texts, problem = None, [], None
    try:
        tokenizer = tokenizer_of(folder, manifest)
        texts = first_rows(rows, tokenizer, SHOWN_ROWS, SHOWN_TOKENS)
    except UserError as error:
        problem = str(error)
    frequent = [
        (i, tokenizer.token_bytes(i) if tokenizer else None, share)
        for i, share in most_frequent(counts, FREQUENT_TOKENS)
    ]
    return Content(split, int(counts.sum()), frequent, seq_len, texts, problem, bos)


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
        "rows": content.rows,
        **({"bos": content.bos} if content.bos else {}),
        "sources": manifest.sources,
        "options": manifest.options,
    }


def print_info(given: InfoArgs, manifest: Manifest, splits: list[SplitInfo], content: Content) -> None:
    vocabulary = f"tokenizer {manifest.tokenizer}, {manifest.vocab_size:,} tokens, {manifest.dtype}"
    print_line(f"{given.folder}: {vocabulary}")
    print_splits(splits)
    for split in splits:
        print_histogram(split)
    if content.bos:
        rows, left_out = counted(content.bos["rows"], "row"), content.bos["left_out"]
        what = f"{rows} of {given.seq_len:,} an epoch, which leave out {left_out:.2%} of the tokens"
        print_line(f"\n{content.split} in the order bos: {what}")
    print_content(given, content, whole=content.counted == splits[0].tokens)


def print_splits(splits: list[SplitInfo]) -> None:
    head = ("split", "documents", "tokens", "MB", "bytes/token", "median tokens", "shards")
    rows = []
    for split in splits:
        numbers = (f"{split.documents:,}", f"{split.tokens:,}", f"{split.text_bytes / 1e6:,.1f}")
        median = split.to_dict()["document_tokens"]["median"]
        rows.append((split.split, *numbers, f"{split.bytes_per_token:.3f}", f"{median:,.0f}", str(split.shards)))
    print_rows(head, rows)


def print_histogram(split: SplitInfo) -> None:
    from regpt.data.info import histogram

    bins = histogram(split.lengths)
    largest = max(count for _, _, count in bins)
    print_line(f"\n{split.split}: documents by length in tokens")
    for low, high, count in bins:
        print_line(f"{low:>10,} – {high - 1:<10,} {'█' * round(BAR_WIDTH * count / largest):{BAR_WIDTH}} {count:,}")


def print_content(given: InfoArgs, content: Content, whole: bool) -> None:
    from regpt.text.tokenizer import quoted

    sample = "" if whole else f", of {content.counted:,} tokens spread over it"
    print_line(f"\n{content.split}: the most frequent tokens{sample}")
    for i, data, share in content.frequent:
        print_line(f"{i:>10}  {share:6.2%}  {'' if data is None else quoted(data)}")
    if content.problem:
        print_line(f"\nno text shown: {content.problem}")
        return
    short = "" if content.seq_len == given.seq_len else f" (there are no more, {given.seq_len:,} were asked for)"
    print_line(
        f"\n{content.split}: the first rows of {content.seq_len:,} tokens{short} in the order {given.order} begin with"
    )
    for text in content.rows:
        print_line(f"  {text!r}")
