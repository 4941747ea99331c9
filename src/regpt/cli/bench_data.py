"""`regpt bench data`: how fast a data folder is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from regpt.cli.output import check_json, show
from regpt.cli.parse import parse
from regpt.console.lines import status
from regpt.data.config import DataConfig, ShuffleRows
from regpt.ranges import MANY, SEED, Range
from regpt.train.config import TrainConfig

DATA, TRAIN = DataConfig(), TrainConfig()


@dataclass(frozen=True)
class BenchDataArgs:
    """Time how fast one process makes batches from a folder of token shards, as it does while training."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of token shards."""
    order: Literal["shuffle", "sequential", "bos"] = DATA.order
    """As data.order."""
    shuffle_rows: Annotated[ShuffleRows, Range(2, MANY)] = DATA.shuffle_rows
    """As data.shuffle_rows."""
    document_mask: tyro.conf.FlagCreatePairsOff[bool] = False
    """As data.document_mask: find the documents in each row."""
    seq_len: Annotated[int, Range(1, MANY)] = DATA.seq_len
    """Tokens a row."""
    batch_tokens: Annotated[int, Range(1, MANY)] = TRAIN.batch_tokens
    """Tokens a step."""
    micro_batch_rows: Annotated[int, Range(1, MANY)] = 64
    """Rows of a micro-batch."""
    seed: Annotated[int, Range(-SEED, SEED)] = DATA.seed
    """Seed of the document order."""
    seconds: Annotated[float, Range(0, 3600, above=True)] = 3.0
    """How long to read, after the first two steps."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report to this file; - prints it as JSON instead."""


def main(args: list[str]) -> int:
    """Parse, read, print."""
    given = parse(BenchDataArgs, args, prog="regpt bench data")
    check_json(given.json)
    from regpt.tools.bench.data import BatchReading, bench_data
    from regpt.tools.bench.tables import data_table

    sizes = (given.seq_len, given.batch_tokens, given.micro_batch_rows)
    reading = BatchReading(Path(given.folder), given.order, given.shuffle_rows, given.document_mask, given.seed, *sizes)
    with status() as say:
        report = bench_data(reading, given.seconds, say)
    show(report, given.json, data_table)
    return 0
