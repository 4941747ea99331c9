"""`[train]`, `[optim]` and `[log]`: how a model is updated."""

from dataclasses import dataclass
from typing import Annotated, Literal

from regpt.data.ramp import RampEntry, check_ramp
from regpt.errors import UsageError
from regpt.kernels.config import KernelsName
from regpt.ranges import LARGE, LONG, MANY, SEED, Range, check_ranges

LEAST_EPS = 2.0**-126  # the smallest normal float32; a smaller one is 0 in the update
InferencePrecision = Literal["fp64", "fp32", "tf32", "bf16", "fp16"]
EvalPrecision = Literal[InferencePrecision, "int8"]  # int8: weights in Q8_0 (`engine.products`)
WritingPrecision = Literal[EvalPrecision, "bf16-invariant"]  # on CUDA; bits of a text that do not depend on the batch
PrecisionName = Literal[InferencePrecision, "fp8"]
WeightDtype = Literal["fp32", "bf16"]
StateDtype = Literal["fp32", "bf16", "int8"]


@dataclass(frozen=True)
class TrainConfig:
    __pydantic_config__ = {"extra": "forbid"}

    steps: Annotated[int, Range(1, MANY)] = 19073
    """Updates in the whole run (the lecture: 10 billion tokens)."""
    batch_tokens: Annotated[int, Range(1, MANY)] = 524288
    """Tokens an update, over all processes (GPT-3 paper, table 2.1: 0.5 M for 125M)."""
    batch_ramp: tuple[RampEntry, ...] = ()
    """[[tokens, batch_tokens, seq_len], …]: from so many tokens on another batch and row length (Llama 3: 4 M × 4,096,
    8 M × 8,192, 16 M); before the first, train.batch_tokens and data.seq_len."""
    micro_batch_rows: Annotated[Literal["auto"] | int, Range(1, MANY)] = "auto"
    """Rows that one process computes at once; the rest of the batch is accumulated. auto: what fits, tried at the
    start and kept in config.toml."""
    precision: PrecisionName = "bf16"
    """fp32; tf32: float32 with TensorFloat-32 products; bf16: bfloat16 autocast, float32 weights; fp16: float16
    autocast and a loss scale, for devices without bfloat16; fp8: as bf16, the products of the blocks' linear layers in
    8 bits, where the device has units for them; fp64 for tests."""
    weight_dtype: WeightDtype = "fp32"
    """bf16: weights and activations in bfloat16, without autocast; updates in float32, rounded stochastically. Norms,
    softmax and loss stay float32 inside. With train.precision bf16; plain kernels only."""
    grad_dtype: WeightDtype = "fp32"
    """Sums of gradients over micro-batches and processes, with bfloat16 weights. bf16: 2 bytes a parameter less, and
    small addends are lost in sums of many micro-batches."""
    compile: bool = True
    """Compile the training step with torch.compile; of no effect with the fused kernels."""
    compile_blocks: bool = False
    """Compile one block, used by all, instead of the step as one graph: starts in seconds, and takes less memory, in
    deep models. The head is not compiled."""
    kernels: KernelsName = "auto"
    """plain: the model as it is written; fused: the hand-written path for one NVIDIA GPU each; auto: fused where it was
    measured to be faster."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and compute the rest again in the backward: a third more time, much less
    memory."""
    activation_offload: bool = False
    """Keep in the host's memory what the forward keeps for the backward; with activation_checkpointing the inputs of
    blocks alone. Not with a step compiled as one graph; train.compile_blocks goes with it."""
    mlp_tokens: Annotated[int, Range(0, MANY)] = 0
    """Tokens whose MLPs are computed at once, and again in the backward: less memory where rows are very long; plain
    kernels, models without experts, adapters without dropout. 0: all."""
    z_loss: Annotated[float, Range(0, LARGE)] = 0.0
    """Coefficient of log² Z in the training loss, which keeps logits from drifting (PaLM: 1e-4); plain kernels only."""
    balance: Literal["loss", "bias"] = "loss"
    """What evens out the loads of experts. loss: balance_loss; bias: the bias of model.expert_bias, moved after each
    update (DeepSeek-AI 2024, section 2.1.2)."""
    balance_loss: Annotated[float, Range(0, LARGE)] = 0.01
    """Coefficient of the balance loss of experts (Fedus et al. 2022, section 2.2)."""
    balance_rate: Annotated[float, Range(0, LARGE)] = 0.001
    """What an update moves a bias of balance = bias by (DeepSeek-AI 2024, section 4.2)."""
    router_z_loss: Annotated[float, Range(0, LARGE)] = 0.0
    """Coefficient of log² Z of the routers of experts (Zoph et al. 2022, section 3.3: 1e-3)."""
    grad_clip: Annotated[float, Range(0, LARGE)] = 1.0
    """Largest gradient norm, larger ones are scaled down (GPT-3 paper, appendix B); 0 clips nothing."""
    ema_decay: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Keep an exponential moving average (EMA) of the weights with this decay (0.999, say), validated and stored;
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
    spike_score: Annotated[float, Range(0, LARGE)] = 7.0
    """Standard deviations above the median of the last 128 losses, robustly estimated, that make a spike (OLMo 2,
    Walsh et al. 2024, counts spikes from 7); 0 looks for none."""
    max_refused: Annotated[int, Range(1, MANY)] = 3
    """Updates in a row that may be skipped or rewound before the run stops."""
    stop_seconds: Annotated[int, Range(1, LONG)] = 300
    """After Ctrl-C, SIGTERM or SIGHUP the step is finished and saved; a process still here by then ends at once."""
    hang_seconds: Annotated[int, Range(1, LONG)] = 600
    """A process that waits so long for the others names those missing and ends; the launcher starts all again."""
    seed: Annotated[int, Range(-SEED, SEED)] = 1337
    """Seed of the initial weights, and of dropout."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""

    @property
    def first_rows(self) -> int:
        """Rows at once before `auto` has been decided: one, which divides every batch."""
        return 1 if self.micro_batch_rows == "auto" else self.micro_batch_rows

    @property
    def autocast_precision(self) -> PrecisionName:
        """`precision` where the computation casts float32 weights; bfloat16 weights need no autocast."""
        return "fp32" if self.weight_dtype == "bf16" else self.precision

    def __post_init__(self) -> None:
        check_ranges("train", self)
        check_ramp(self.batch_ramp)
        if self.compile_blocks and not self.compile:
            raise UsageError("train.compile_blocks is true and train.compile false; set both to true, or both to false")
        if self.activation_offload and ((self.compile and not self.compile_blocks) or self.kernels == "fused"):
            raise UsageError(
                "train.activation_offload moves what separate operations keep, and a step compiled as one graph, or "
                "fused, keeps all of it at once; set train.compile_blocks to true, or train.compile to false, and "
                "train.kernels to plain or auto"
            )
        if self.weight_dtype == "bf16" and self.precision != "bf16":
            raise UsageError(
                f"train.weight_dtype bf16 computes in bfloat16, train.precision is {self.precision}; set it to bf16, "
                "or train.weight_dtype to fp32"
            )
        if self.grad_dtype == "bf16" and self.weight_dtype == "fp32":
            raise UsageError(
                "train.grad_dtype bf16 is for bfloat16 weights, train.weight_dtype is fp32; set both to bf16, or "
                "neither"
            )
        if self.weight_dtype == "bf16" and self.kernels == "fused":
            raise UsageError(
                "train.kernels is fused, which trains float32 weights, and train.weight_dtype is bf16; set "
                "train.kernels to plain or auto"
            )


@dataclass(frozen=True)
class OptimGroup:
    """Parameters that are updated in their own way: `[[optim.groups]]` of a recipe; what is left out is [optim]'s."""

    __pydantic_config__ = {"extra": "forbid"}

    pattern: str
    """Names of parameters, with * and ?; the first group that matches counts, then the model family's own groups."""
    lr_scale: Annotated[float, Range(0, LARGE)] = 1.0
    """Times optim.lr."""
    weight_decay: Annotated[float | None, Range(0, LARGE)] = None
    beta1: Annotated[float | None, Range(0, 1, below=True)] = None
    beta2: Annotated[float | None, Range(0, 1, below=True)] = None

    def __post_init__(self) -> None:
        check_ranges("optim.groups", self)


@dataclass(frozen=True)
class OptimConfig:
    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["adamw"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019)."""
    lr: Annotated[float, Range(0, LARGE)] = 6e-4
    """Peak learning rate (GPT-3 paper, table 2.1, 125M)."""
    min_lr_ratio: Annotated[float, Range(0, 1)] = 0.1
    """The schedule ends at this share of lr (GPT-3 paper, appendix B)."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine; wsd: constant, then linear decay over the last decay_steps; constant."""
    warmup_steps: Annotated[int, Range(0, MANY)] = 715
    """Steps of linear warmup (GPT-3 paper, appendix B: 375 M tokens)."""
    decay_steps: Annotated[int | None, Range(1, MANY)] = None
    """cosine: the step that ends it (default train.steps); wsd: its length (default a tenth of train.steps)."""
    weight_decay: Annotated[float, Range(0, LARGE)] = 0.1
    """Decay of tensors with two or more dimensions; the others have none (GPT-3 paper, appendix B)."""
    beta1: Annotated[float, Range(0, 1, below=True)] = 0.9
    """Decay rate of the first moment."""
    beta2: Annotated[float, Range(0, 1, below=True)] = 0.95
    """Decay rate of the second moment (GPT-3 paper, appendix B)."""
    eps: Annotated[float, Range(LEAST_EPS, LARGE)] = 1e-8
    """Added to the root of the second moment."""
    groups: tuple[OptimGroup, ...] = ()
    """Parameters with a learning rate, weight decay or betas of their own; in a recipe, as [[optim.groups]]."""
    state_dtype: StateDtype = "fp32"
    """Moments: fp32; bf16: rounded stochastically; int8: blocks of 256 with a scale (Dettmers et al. 2022; extra
    lowmem)."""
    offload: bool = False
    """Keep the moments in the host's memory, on the device only for the update: for models that do not fit."""

    def __post_init__(self) -> None:
        if not self.eps >= LEAST_EPS:  # "not >=": NaN fails too
            raise UsageError(
                f"optim.eps is {self.eps}, must be {LEAST_EPS:.2e} or more (1e-8 is usual): weights without a gradient "
                "divide zero by it"
            )
        check_ranges("optim", self)
        if self.offload and self.state_dtype == "int8":
            raise UsageError(
                "optim.offload moves moments of fp32 or bf16, optim.state_dtype is int8; set optim.offload to false, "
                "or optim.state_dtype to bf16"
            )


@dataclass(frozen=True)
class PreferenceConfig:
    __pydantic_config__ = {"extra": "forbid"}

    method: Literal["", "dpo", "ipo", "orpo", "simpo", "reward"] = ""
    """Learn from pairs of a chosen and a rejected answer. dpo: Rafailov et al. 2023; ipo: Azar et al. 2023, by means
    over tokens; orpo: Hong et al. 2024, and simpo: Meng et al. 2024, without a reference model; reward: a model that
    gives answers a number (Bradley & Terry 1952; Ouyang et al. 2022, equation 1); empty: not at all."""
    beta: Annotated[float, Range(0, LARGE, above=True)] = 0.1
    """How far the model may go from the reference: a small one lets it go far; of orpo the weight of the odds, of simpo
    the scale of the difference (2 in its paper)."""
    nll: Annotated[float, Range(0, LARGE)] = 0.2
    """Weight of the mean loss of the chosen answer's tokens, of dpo, ipo and simpo (Llama Team 2024, section 4.1.4)."""
    gamma: Annotated[float, Range(0, LARGE)] = 0.5
    """Of simpo: by how much the chosen answer is to be ahead."""
    format_tokens: bool = False
    """Count the tokens of the template, such as the end of the turn, as part of an answer: they are in both, and to
    make them unlikely in one teaches answers without an end (Llama Team 2024)."""

    @property
    def reference(self) -> bool:
        """Whether the loss compares with the model that the run begins with."""
        return self.method in ("dpo", "ipo")

    def __post_init__(self) -> None:
        check_ranges("preference", self)


@dataclass(frozen=True)
class GrpoConfig:
    __pydantic_config__ = {"extra": "forbid"}

    tasks: str = ""
    """Learn from rewards of the model's own replies (Shao et al. 2024): chat tasks whose checkers give them, as regpt
    eval --tasks names them, such as chat:addition:difficulty=2:items=2000; empty: not at all."""
    replies: Annotated[int, Range(2, 1024)] = 16
    """Replies to each question of an update; train.batch_tokens / data.seq_len is a multiple of it."""
    max_new_tokens: Annotated[int, Range(1, MANY)] = 64
    """Tokens of a reply at most, the one that ends it included; with the question's at most data.seq_len."""
    temperature: Annotated[float, Range(0, LARGE, above=True)] = 1.0
    """Of the draws, from all tokens; the log-probabilities that are trained are those at this temperature."""
    loss: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """dapo: the mean over all tokens of a batch (Yu et al. 2025); grpo: over replies of their mean (Shao et al. 2024);
    dr_grpo: over replies of their sum, advantages not divided by the standard deviation (Liu et al. 2025)."""
    clip_low: Annotated[float, Range(0, 1)] = 0.2
    """A ratio of probabilities below 1 - this has no gradient in bad replies (Schulman et al. 2017)."""
    clip_high: Annotated[float, Range(0, LARGE)] = 0.28
    """A ratio above 1 + this has none in good ones (Yu et al. 2025: higher than clip_low, so that rare tokens may
    become likely)."""
    resample: Annotated[int, Range(0, 64)] = 0
    """So many times at most, other questions take the places of those whose replies all have one reward (Yu et al.
    2025, section 3.2)."""
    overlong: Annotated[int, Range(0, MANY)] = 0
    """Tokens before max_new_tokens within which the reward falls by up to 1 (Yu et al. 2025, equation 13); 0: none."""
    updates: Annotated[int, Range(1, 1024)] = 1
    """Updates from replies of the same weights; each takes its share of them."""
    beta: Annotated[float, Range(0, LARGE)] = 0.0
    """Weight of the divergence (KL) from the model that the run begins with; 0: none, and no such model is kept."""

    def __post_init__(self) -> None:
        check_ranges("grpo", self)
        if self.overlong >= self.max_new_tokens:
            raise UsageError(
                f"grpo.overlong is {self.overlong}, must be below grpo.max_new_tokens, {self.max_new_tokens}"
            )


@dataclass(frozen=True)
class LogConfig:
    __pydantic_config__ = {"extra": "forbid"}

    every_steps: Annotated[int, Range(1, MANY)] = 1
    """Steps between rows of metrics.jsonl; the terminal follows every step."""
    update_ratios_every_steps: Annotated[int, Range(0, MANY)] = 20
    """Steps between measurements of the update-to-weight ratio; 0: never."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into RUN/tensorboard (extra tensorboard)."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also log to Weights & Biases (extra wandb); offline: into RUN/wandb, nothing is sent."""
    wandb_project: str = "regpt"
    """Project of Weights & Biases."""

    def __post_init__(self) -> None:
        check_ranges("log", self)
