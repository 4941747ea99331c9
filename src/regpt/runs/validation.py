"""Loss on held-out text, in training and in `regpt eval`: which rows are read, source by source."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.data.loader import row_batch
from regpt.data.manifest import Manifest
from regpt.data.mixture import MixedRows
from regpt.data.rows import Rows, StreamRows, open_rows
from regpt.data.stream import Span, document_starts, open_stream
from regpt.evals.perplexity import Validation, batch_losses, count_rows, loss_sums, validation_of
from regpt.parallel.mesh import Mesh
from regpt.ranges import MANY


@dataclass(frozen=True)
class ValidationPart:
    """The first `n_rows` of `rows`, all of one source; `name` is empty where the data has one source only."""

    name: str
    rows: Rows
    n_rows: int


@dataclass(frozen=True)
class Validated:
    """The result over all parts, and that of each where there are several."""

    whole: Validation
    sources: dict[str, Validation]


def folder_parts(folder: Path, manifest: Manifest, seq_len: int, limit_tokens: int = 0) -> list[ValidationPart]:
    """The split `val` of one folder, as stored.

    With one source the first rows of the split, so many that they hold `limit_tokens` (0: all). With several, the first
    rows of each source, which share the limit by their tokens; a row never holds two sources.

    Raises:
        UserError: not one row.
        UsageError: a limit below one row.
    """
    if manifest.has_parts:
        rows = open_rows(folder, manifest, "val", "sequential", 0, seq_len)
        return [ValidationPart("", rows, conversation_rows(rows, limit_tokens))]
    stream = open_stream(folder, manifest, "val", "sequential", seed=0)
    n_rows = count_rows(stream.epoch_tokens, seq_len, limit_tokens)
    spans = source_spans(folder, manifest)
    whole = {name: (end - begin - 1) // seq_len for name, (begin, end) in spans.items()}
    whole = {name: rows for name, rows in whole.items() if rows}
    if len(spans) < 2 or not whole:
        return [ValidationPart("", StreamRows(stream, seq_len), n_rows)]
    share = min(1.0, n_rows / sum(whole.values()))
    return [
        ValidationPart(name, StreamRows(Span(stream, *spans[name]), seq_len), max(1, int(rows * share)))
        for name, rows in whole.items()
    ]


def conversation_rows(rows: Rows, limit_tokens: int = 0) -> int:
    """Rows of a validation on conversations that hold at most `limit_tokens`, 0 for all of them; one at least."""
    return rows.epoch_rows(max(1, limit_tokens // rows.seq_len) if limit_tokens else MANY)


def source_spans(folder: Path, manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Source → its tokens [begin, end) in the split `val`, in the order stored; empty where that is not known."""
    documents: dict[str, int] = {}
    for record in manifest.sources:
        name = str(record.get("source", ""))
        if name in documents and name != next(reversed(documents)):
            return {}  # its documents lie in several places
        documents[name] = documents.get(name, 0) + int(record.get("val_documents", 0))
    if sum(documents.values()) != manifest.documents("val"):
        return {}
    starts, spans, at = document_starts(folder, manifest, "val"), {}, 0
    for name, count in documents.items():
        if count:
            spans[name] = (int(starts[at]), int(starts[at + count]))
        at += count
    return spans


def mixture_parts(rows: MixedRows, names: Sequence[str], n_rows: int) -> list[ValidationPart]:
    """The first `n_rows` of a mixture, folder by folder."""
    return [
        ValidationPart(name, part, rows.part_row(k, n_rows)) for k, (name, part) in enumerate(zip(names, rows.parts))
    ]


def part_batches(part: ValidationPart, mesh: Mesh, micro_batch_rows: int, eot: int | None = None) -> Iterator[Batch]:
    """This process's share of a part, every batch of the same shape.

    Rows beyond the part's carry no target: a compiled loss sees one shape only, and every process makes as many calls.
    """
    B = micro_batch_rows
    for call in range(math.ceil(part.n_rows / (B * mesh.world_size))):
        first = (call * mesh.world_size + mesh.rank) * B
        batch = row_batch(part.rows, first, B, eot)
        batch.targets[max(0, part.n_rows - first) :] = IGNORE_INDEX
        yield batch


def own_sums(
    parts: Sequence[ValidationPart],
    batches: Callable[[ValidationPart], Iterator[Batch]],
    loss_sum: Callable[[Batch], Tensor],
    byte_lengths: Any,
    device: torch.device,
    keep: Callable[[ValidationPart, Tensor], None] | None = None,
) -> Tensor:
    """(parts, 13): `loss_sums` of each part, over this process's batches; `keep` gets what each of them gave."""
    packed = []
    for part in parts:
        each = batch_losses(loss_sum, batches(part), byte_lengths, device)
        if keep is not None:
            keep(part, each)
        packed.append(loss_sums(each))
    return torch.stack(packed)


def batch_items(part: ValidationPart, each: Tensor, micro_batch_rows: int, mesh: Mesh) -> list[dict[str, Any]]:
    """An item for each batch of `part_batches`, by the rows that it holds: two runs that read the same are compared."""
    items = []
    for call, (nats, tokens, n_bytes) in enumerate(each.tolist()):
        first = (call * mesh.world_size + mesh.rank) * micro_batch_rows
        if not tokens:  # beyond the part's end
            continue
        last = min(first + micro_batch_rows, part.n_rows) - 1
        bits = nats / math.log(2) / n_bytes if n_bytes else None
        item = f"{part.name} rows {first}-{last}".strip()
        counts = {"tokens": int(tokens), "bytes": int(n_bytes)}
        items.append({"item": item, "source": part.name, "loss": nats / tokens, "bpb": bits, **counts})
    return items


def result(parts: Sequence[ValidationPart], sums: Tensor) -> Validated:
    """From the sums (parts, 13) over all processes."""
    named = {part.name: validation_of(row) for part, row in zip(parts, sums) if part.name and part.n_rows}
    return Validated(validation_of(sums.sum(dim=0)), named if len(named) > 1 else {})
