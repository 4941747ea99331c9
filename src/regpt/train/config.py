"""`[train]`, `[optim]` and `[log]`: how a model is updated."""

import math
from dataclasses import dataclass
from typing import Literal

from regpt.errors import UsageError
from regpt.kernels.select import KernelsName

LEAST_EPS = 2.0**-126  # the smallest normal float32; a smaller one is 0 in the update
InferencePrecision = Literal["fp64", "fp32", "tf32", "bf16", "fp16"]
PrecisionName = Literal[InferencePrecision, "fp8"]


def require_finite(section: str, config: object, names: tuple[str, ...]) -> None:
    """Raise a UsageError for the first field of `config` that is infinite."""
    for name in names:
        value = getattr(config, name)
        if math.isinf(value):
            raise UsageError(f"{section}.{name} is {value}, must be a finite number")


def require(section: str, config: object, at_least: dict[str, float]) -> None:
    """Raise a UsageError for the first field of `config` that lies below its bound."""
    for name, bound in at_least.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:  # "not >=": NaN fails too
            raise UsageError(f"{section}.{name} is {value}, must be {bound} or more")


@dataclass(frozen=True)
class TrainConfig:
    __pydantic_config__ = {"extra": "forbid"}

    steps: int = 19073
    """Updates in the whole run (the lecture: 10 billion tokens)."""
    batch_tokens: int = 524288
    """Tokens an update, over all processes (GPT-3 paper, table 2.1: 0.5 M for 125M)."""
    micro_batch_rows: Literal["auto"] | int = 64
    """Rows that one process computes at once; the rest of the batch is accumulated. auto: what fits, tried at the
    start and kept in config.toml."""
    precision: PrecisionName = "bf16"
    """fp32; tf32: float32 with TensorFloat-32 products; bf16: bfloat16 autocast, float32 weights; fp16: float16
    autocast and a loss scale, for devices without bfloat16; fp8: as bf16, the products of the blocks' linear layers in
    8 bits, where the device has units for them; fp64 for tests."""
    compile: bool = True
    """Compile the training step with torch.compile; of no effect with the fused kernels."""
    kernels: KernelsName = "auto"
    """plain: the model as it is written; fused: the hand-written path for one NVIDIA GPU each; auto: fused where it was
    measured to be faster."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and compute the rest again in the backward: a third more time, much less
    memory."""
    grad_clip: float = 1.0
    """Largest gradient norm, larger ones are scaled down (GPT-3 paper, appendix B); 0 clips nothing."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights with this decay, validated and stored beside them (0.999, say);
    0 keeps none."""
    pad_vocab: bool = True
    """Pad the embedding to a multiple of 128 rows while training; no result depends on it."""
    deterministic: bool = False
    """A run that is stopped and resumed is bitwise the run that is not, at a cost in speed: deterministic algorithms, a
    fixed order of sums, pinned micro-batch and threads."""
    on_non_finite: Literal["stop", "skip", "rewind"] = "stop"
    """A loss or gradient that is not finite is never applied. stop: the run ends; skip: the same update with the next
    batch; rewind: back to the last checkpoint, and on with the batch after the bad one."""
    on_spike: Literal["record", "skip"] = "record"
    """A loss that jumps up is recorded; skip: the same update with the next batch."""
    spike_score: float = 7.0
    """Standard deviations above the median of the last 128 losses, robustly estimated, that make a spike (OLMo 2,
    Walsh et al. 2024, counts spikes from 7); 0 looks for none."""
    max_refused: int = 3
    """Updates in a row that may be skipped or rewound before the run stops."""
    stop_seconds: int = 300
    """After Ctrl-C or SIGTERM the step is finished and saved; a process that has not ended by then ends at once."""
    hang_seconds: int = 600
    """A process that waits so long for the others names those missing and ends; the launcher starts all again."""
    seed: int = 1337
    """Seed of the initial weights, and of dropout."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""

    @property
    def first_rows(self) -> int:
        """Rows at once before `auto` has been decided: one, which divides every batch."""
        return 1 if self.micro_batch_rows == "auto" else self.micro_batch_rows

    def __post_init__(self) -> None:
        require("train", self, {"steps": 1, "batch_tokens": 1, "grad_clip": 0, "ema_decay": 0, "spike_score": 0})
        require("train", self, {"max_refused": 1, "stop_seconds": 1, "hang_seconds": 1})
        if self.ema_decay >= 1:
            raise UsageError(f"train.ema_decay is {self.ema_decay}, must be below 1")
        if self.micro_batch_rows != "auto":
            require("train", self, {"micro_batch_rows": 1})


@dataclass(frozen=True)
class OptimConfig:
    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["adamw"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019)."""
    lr: float = 6e-4
    """Peak learning rate (GPT-3 paper, table 2.1, 125M)."""
    min_lr_ratio: float = 0.1
    """The schedule ends at this share of lr (GPT-3 paper, appendix B)."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine; wsd: constant, then linear decay over the last decay_steps; constant."""
    warmup_steps: int = 715
    """Steps of linear warmup (GPT-3 paper, appendix B: 375 M tokens)."""
    decay_steps: int | None = None
    """cosine: the step that ends it (default train.steps); wsd: its length (default a tenth of train.steps)."""
    weight_decay: float = 0.1
    """Decay of tensors with two or more dimensions; the others have none (GPT-3 paper, appendix B)."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.95
    """Decay rate of the second moment (GPT-3 paper, appendix B)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    offload: bool = False
    """Keep the moments in the host's memory, on the device only for the update: for models that do not fit."""

    def __post_init__(self) -> None:
        require("optim", self, {"lr": 0, "min_lr_ratio": 0, "warmup_steps": 0, "decay_steps": 1, "weight_decay": 0})
        require("optim", self, {"beta1": 0, "beta2": 0})
        require_finite("optim", self, ("lr", "weight_decay", "eps"))
        if not self.eps >= LEAST_EPS:  # "not >=": NaN fails too
            raise UsageError(
                f"optim.eps is {self.eps}, must be {LEAST_EPS:.2e} or more (1e-8 is usual): weights without a gradient "
                "divide zero by it"
            )
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise UsageError(f"optim.{name} is {getattr(self, name)}, must be below 1")
        if self.min_lr_ratio > 1:
            raise UsageError(f"optim.min_lr_ratio is {self.min_lr_ratio}, must be between 0 and 1")


@dataclass(frozen=True)
class LogConfig:
    __pydantic_config__ = {"extra": "forbid"}

    every_steps: int = 1
    """Steps between rows of metrics.jsonl; the terminal follows every step."""
    update_ratios_every_steps: int = 20
    """Steps between measurements of the updates' size beside the weights'; 0 measures none."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into RUN/tensorboard (extra tensorboard)."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also log to Weights & Biases (extra wandb); offline: into RUN/wandb, nothing is sent."""
    wandb_project: str = "regpt"
    """Project of Weights & Biases."""

    def __post_init__(self) -> None:
        require("log", self, {"every_steps": 1, "update_ratios_every_steps": 0})
