"""`[checkpoint]`: when a run is saved and what is kept."""

from dataclasses import dataclass
from typing import Annotated

from regpt.ranges import LONG, MANY, Range, check_ranges


@dataclass(frozen=True)
class CheckpointConfig:
    __pydantic_config__ = {"extra": "forbid"}

    every_steps: Annotated[int, Range(0, MANY)] = 1000
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: Annotated[int, Range(0, MANY)] = 2
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: Annotated[int, Range(0, MANY)] = 0
    """Checkpoints at multiples of this step are kept for ever; 0 for none."""
    keep_best: bool = False
    """Also keep the checkpoint of the lowest validation loss; a validation that is the lowest so far is saved."""
    background: bool = True
    """Write while training goes on; otherwise training waits until the checkpoint is on the disk."""
    max_file_mib: Annotated[int, Range(1, MANY)] = 4096
    """Tensors beyond this size are stored in several files with an index."""
    staging: str = ""
    """Remote run folders (s3://…): local folder that holds the runs being written; "" is .cache/regpt/runs at home."""
    lease_seconds: Annotated[int, Range(1, LONG)] = 60
    """Remote run folders: a process that has not renewed its lease for so long may be replaced by another one."""

    def __post_init__(self) -> None:
        check_ranges("checkpoint", self)
