"""`[data]`: which tokens, in which order."""

from dataclasses import dataclass
from typing import Literal

from regpt.errors import UsageError


@dataclass(frozen=True)
class DataConfig:
    __pydantic_config__ = {"extra": "forbid"}

    path: str = ""
    """Folder of token shards, made by `regpt data prepare`; --data sets it."""
    tokenizer: str = ""
    """Name of the tokenizer that the shards must have been made with; empty accepts any."""
    seq_len: int = 1024
    """Tokens a row."""
    order: Literal["shuffle", "sequential"] = "shuffle"
    """shuffle: every document once an epoch, in a new order each epoch; sequential: as stored (the lecture)."""
    seed: int = 1337
    """Seed of the document order."""

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise UsageError(f"data.seq_len is {self.seq_len}, must be at least 1")
