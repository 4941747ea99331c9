"""What is asked for: sections of the run's configuration, flags of `regpt plan`, facts of the data."""

from dataclasses import dataclass
from typing import Protocol

from regpt.checkpoint.config import CheckpointConfig
from regpt.data.config import DataConfig
from regpt.evals.config import EvalConfig
from regpt.model.config import ModelConfig
from regpt.train.config import OptimConfig, TrainConfig


@dataclass(frozen=True)
class RunSections:
    """Of the run's configuration."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig


class LossLaw(Protocol):
    """A fitted scaling law (`report.scaling_law`): the loss for parameters and tokens, in `unit`."""

    @property
    def unit(self) -> str: ...
    @property
    def parameters(self) -> str: ...
    def loss(self, parameters: float, tokens: float) -> float: ...
    def standard_error(self, parameters: float, tokens: float) -> float | None: ...


@dataclass(frozen=True)
class PlanRequest:
    """Flags of `regpt plan` next to the configuration.

    Attributes:
        gpu: a name from the table, `cpu`, or empty for this machine.
        price: of an hour of one GPU, in whatever currency.
        mfu: to reckon with, instead of the predicted one.
        law: that predicts the loss.
    """

    recipe: str
    gpu: str = ""
    gpus: int = 1
    price: float | None = None
    mfu: float | None = None
    law: LossLaw | None = None


@dataclass(frozen=True)
class DataFacts:
    """Of the data that was given."""

    path: str
    train_tokens: int
    val_tokens: int
    disk_bytes: int
