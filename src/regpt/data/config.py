"""`[data]`: which tokens, in which order."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from regpt.errors import UsageError
from regpt.ranges import MANY, SEED, Range, check_ranges

ShuffleRows = Literal["epoch", "none"] | int


@dataclass(frozen=True)
class DataConfig:
    __pydantic_config__ = {"extra": "forbid"}

    path: str = ""
    """Folder of token shards, made by `regpt data prepare`; --data sets it."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Several folders with their weights, in place of path; --data DIR=WEIGHT, repeated, sets it."""
    tokenizer: str = ""
    """Name of the tokenizer that the shards must have been made with; empty accepts any."""
    seq_len: Annotated[int, Range(1, MANY)] = 1024
    """Tokens a row."""
    order: Literal["shuffle", "sequential", "bos", "packed", "grouped"] = "shuffle"
    """shuffle: every document once an epoch, in a new order each epoch; sequential: as stored (the lecture); bos:
    shuffled, packed so that every row begins with a document, what does not fit cut off. Of conversations (regpt
    finetune): packed: several to a row, none cut, each masked from the others; grouped: one a row, like lengths
    together."""
    shuffle_rows: Annotated[ShuffleRows, Range(2, MANY)] = "epoch"
    """Of the orders shuffle and bos. epoch: rows are permuted over the whole epoch, so that a batch's rows come from
    different documents; a number: within windows of so many rows, for slow storage; none: in the documents' order."""
    document_mask: bool = False
    """Keep attention inside each document, and count positions from its beginning."""
    seed: Annotated[int, Range(-SEED, SEED)] = 1337
    """Seed of the document order."""

    def __post_init__(self) -> None:
        if self.path and self.mixture:
            raise UsageError(
                f"both data.path {self.path!r} and data.mixture are set; keep one of them (--data DIR replaces both)"
            )
        for path, weight in self.mixture.items():
            if not 0 < weight < math.inf:  # "not <": NaN fails too
                raise UsageError(f"data.mixture gives {path!r} the weight {weight}, must be a number above 0")
        check_shuffle_rows(self.shuffle_rows)
        check_ranges("data", self)


def check_shuffle_rows(shuffle_rows: ShuffleRows) -> None:
    if isinstance(shuffle_rows, int) and shuffle_rows < 2:
        raise UsageError(f"data.shuffle_rows is {shuffle_rows}, must be epoch, none, or a window of at least 2 rows")
