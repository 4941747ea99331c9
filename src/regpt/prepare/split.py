"""What is held out for validation, and by which rule."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regpt.errors import UserError
from regpt.prepare.documents import Document
from regpt.prepare.settings import TextOptions
from regpt.prepare.sources import Source
from regpt.remote.download import DownloadProgress

SMALL_BYTES = 10_000_000  # of sources; below it a two-hundredth would be too little to measure a loss on
SMALL_FRACTION, LARGE_FRACTION = 0.1, 0.005


class Unusable(UserError):
    """What was encoded cannot become a data set, so a second attempt shall find nothing of it."""


def default_fraction(sources: Sequence[Source]) -> float:
    return SMALL_FRACTION if sum(source.bytes for source in sources) < SMALL_BYTES else LARGE_FRACTION


def split_rule(
    sources: Sequence[Source],
    has_val_sources: bool,
    val_fraction: float,
    options: TextOptions,
    download: DownloadProgress | None = None,
) -> str:
    """`sources` when others are held out, `none` when nothing is, `cut` for a corpus of one document, otherwise
    `documents`. Reads the first two documents."""
    if has_val_sources:
        return "sources"
    if not val_fraction:
        return "none"
    texts = (document.text for source in sources for document in source.localize(download).documents(options))
    return "cut" if len(list(itertools.islice(filter(None, texts), 2))) == 1 else "documents"


def fraction(digest: bytes) -> float:
    """A number in [0, 1) that depends on the text with this SHA-256 alone."""
    return int.from_bytes(digest[:8], "big") / 2**64


def cut_in_two(document: Document, val_fraction: float, name: str) -> tuple[Document, Document]:
    """The two parts of the only document, the last about `val_fraction` of it, cut after a line."""
    text = document.text
    target = int(len(text) * (1 - val_fraction))
    at = (text.rfind("\n", 0, target) + 1) or (text.find("\n", target) + 1)
    if at in (0, len(text)):
        raise UserError(
            f"{name!r} holds one document of one line, so no part can be held out; "
            "give validation files with --val, or --val-fraction 0"
        )
    share = document.source_bytes * at / len(text)
    return Document(text[:at], share), Document(text[at:], document.source_bytes - share)


def check_texts(records: Iterable[Mapping[str, Any]], skip: bool) -> None:
    """Raise Unusable, naming a source without any text; `records` are the manifest's. `skip`: only if no source has."""
    read: dict[str, int] = {}
    for record in records:
        read[record["source"]] = read.get(record["source"], 0) + record["documents"]
    for name, documents in () if skip and any(read.values()) else read.items():
        if not documents:
            raise Unusable(
                f"{name!r} holds no text: every document is empty or cannot be read, or there is none; leave it out"
            )


def check_splits(rule: str, val_fraction: float, documents: Mapping[str, int], lowest: float) -> None:
    """Raise Unusable when a split that there should be has no documents; `lowest` is the smallest fraction that
    would have held out one."""
    total = sum(documents.values())
    if not total:
        raise Unusable("every document was left out by --min-chars, --dedup or --decontaminate; ask for less")
    if rule != "documents" or all(documents.values()):
        return
    given = f"at --val-fraction {val_fraction:g}"
    if not documents["train"]:
        raise Unusable(
            f"all {total:,} documents fell into the validation split {given}; "
            "use a smaller fraction or name validation files with --val"
        )
    enough = int(lowest * 100 + 1) / 100  # the next hundredth above
    fix = f"--val-fraction {enough:g}" if enough < 1 else "more documents"
    raise Unusable(
        f"none of the {total:,} documents fell into the validation split {given}; "
        f"use {fix}, name validation files with --val, or do without: --val-fraction 0"
    )
