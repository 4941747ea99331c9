"""What a plan is asked for: the run's sections, the machine by name, prices; facts of the data."""

import math
from dataclasses import dataclass

from regpt.checkpoint.config import CheckpointConfig
from regpt.data.config import DataConfig
from regpt.errors import UsageError
from regpt.evals.config import EvalConfig
from regpt.model.config import ModelConfig
from regpt.tools.plan.scaling import Law
from regpt.train.config import OptimConfig, TrainConfig


@dataclass(frozen=True)
class Sections:
    """Of the run's configuration."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig


@dataclass(frozen=True)
class Request:
    """What is asked for beside the configuration.

    Attributes:
        gpu: a name from the table, `cpu`, or empty for this machine.
        price: of an hour of one GPU, in whatever currency.
        mfu: to reckon with, in place of the predicted one.
        law: that predicts the loss.
    """

    recipe: str
    gpu: str = ""
    gpus: int = 1
    price: float | None = None
    mfu: float | None = None
    law: Law | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UsageError(f"--gpus is {self.gpus}, must be at least 1")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise UsageError(f"--price is {self.price}, must be 0 or more, for an hour of one GPU")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise UsageError(f"--mfu is {self.mfu}, must be above 0 and at most 1, such as 0.4")


@dataclass(frozen=True)
class DataFacts:
    """Of the data that was given."""

    path: str
    train_tokens: int
    val_tokens: int
    disk_bytes: int
