"""`[checkpoint]`: when a run is saved and what is kept."""

from dataclasses import dataclass

from regpt.errors import UsageError


@dataclass(frozen=True)
class CheckpointConfig:
    __pydantic_config__ = {"extra": "forbid"}

    every_steps: int = 1000
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: int = 2
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for ever; 0 for none."""
    keep_best: bool = False
    """Also keep the checkpoint of the lowest validation loss; a validation that is the lowest so far is saved."""
    background: bool = True
    """Write while training goes on; otherwise training waits until the checkpoint is on the disk."""
    max_file_mib: int = 4096
    """Tensors beyond this size are stored in several files with an index."""
    staging: str = ""
    """Remote run folders (s3://…): local folder that holds the runs being written; "" is .cache/regpt/runs at home."""
    lease_seconds: int = 60
    """Remote run folders: a process that has not renewed its lease for so long may be replaced by another one."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last", "keep_every"):
            if getattr(self, name) < 0:
                raise UsageError(f"checkpoint.{name} is {getattr(self, name)}, must be 0 or more")
        for name in ("max_file_mib", "lease_seconds"):
            if getattr(self, name) < 1:
                raise UsageError(f"checkpoint.{name} is {getattr(self, name)}, must be 1 or more")
