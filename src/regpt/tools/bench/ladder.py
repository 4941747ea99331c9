"""The ladder of "Let's reproduce GPT-2 (124M)" (Karpathy 2024): the same step, made faster by one change at a time.

A rung is a list of changes that stay in force on all later rungs. To add one, append it to `LADDER`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from regpt.kernels.select import select_kernels
from regpt.model.config import ModelConfig
from regpt.model.ops import PLAIN
from regpt.model.transformer import VOCAB_MULTIPLE, Transformer
from regpt.model.weights import without_memory

LECTURE_MODEL = ModelConfig()  # GPT-2 124M
LECTURE_ROWS, LECTURE_SEQ_LEN = 16, 1024

AttentionForm = Literal["explicit", "torch"]
AdamWForm = Literal["default", "fused"]
RungNeed = Literal["tf32", "bf16", "compile", "flash", "kernels"]
RECIPE = object()  # a change to the value that the recipe itself has
PADDING = "train.pad_vocab"


@dataclass(frozen=True)
class LadderRung:
    """One change, or several that belong together.

    Attributes:
        name: what is changed.
        changes: configuration keys (`train.precision`) and their values from here on; `RECIPE` for the recipe's own.
        attention: from here on; `explicit` is softmax(q·kᵀ)·v written out, `torch` scaled_dot_product_attention.
        adamw: from here on; `default` is what PyTorch does when it is not asked for `fused`.
        needs: what the device must be able to do; without it the rung is skipped and changes nothing.
        lecture_ms: milliseconds on the lecture's A100 for 16,384 tokens of GPT-2 124M.
    """

    name: str
    changes: Mapping[str, object] = field(default_factory=dict)
    attention: AttentionForm | None = None
    adamw: AdamWForm | None = None
    needs: RungNeed | None = None
    lecture_ms: float | None = None


LADDER = (
    LadderRung(
        "float32",
        {"train.precision": "fp32", "train.compile": False, "train.kernels": "plain", PADDING: False},
        attention="explicit",
        adamw="default",
        lecture_ms=1000,
    ),
    LadderRung("TF32", {"train.precision": "tf32"}, needs="tf32", lecture_ms=333),
    LadderRung("bfloat16", {"train.precision": "bf16"}, needs="bf16", lecture_ms=300),
    LadderRung("torch.compile", {"train.compile": True}, needs="compile", lecture_ms=130),
    LadderRung("flash attention", attention="torch", needs="flash", lecture_ms=96),
    LadderRung("padded vocabulary", {PADDING: True}, lecture_ms=93),
    LadderRung("fused AdamW", adamw="fused", lecture_ms=90),
    LadderRung("fused kernels", {"train.kernels": "auto"}, needs="kernels"),
    LadderRung("the recipe's batch", {"train.batch_tokens": RECIPE, "train.micro_batch_rows": RECIPE}),
)


@dataclass(frozen=True)
class RungSetup:
    """Everything that is in force on a rung; fields as in `LadderRung`."""

    changes: Mapping[str, object]
    attention: AttentionForm
    adamw: AdamWForm


def climb(
    rungs: Sequence[LadderRung],
    missing: Callable[[RungNeed], str | None],
    recipe: Callable[[str], object],
    vocab_size: int,
) -> list[tuple[LadderRung, RungSetup | str]]:
    """Each rung with what is in force on it, or with the reason why it is skipped, and then changes nothing later.

    Args:
        missing: what the device lacks for a need, None where it lacks nothing.
        recipe: the recipe's own value of a configuration key.
        vocab_size: of the model: one that needs no padding has no rung of it.
    """
    state = RungSetup({}, "torch", "fused")
    climbed: list[tuple[LadderRung, RungSetup | str]] = []
    for rung in rungs:
        changes = {key: recipe(key) if value is RECIPE else value for key, value in rung.changes.items()}
        setup = RungSetup({**state.changes, **changes}, rung.attention or state.attention, rung.adamw or state.adamw)
        lacking = missing(rung.needs) if rung.needs else None
        if lacking:
            climbed.append((rung, f"not on this device: {lacking}"))
        elif setup == state:
            climbed.append((rung, "no change here: all of it is so already"))
        elif changes == {PADDING: True} and vocab_size % VOCAB_MULTIPLE == 0:
            climbed.append((rung, f"no change here: {vocab_size:,} is a multiple of {VOCAB_MULTIPLE}"))
        else:
            climbed.append((rung, setup))
            state = setup
    return climbed


def with_factors(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with `factor`, how much faster than the rung measured before, and `total`, than the first one measured.

    Rows without `ms` were skipped and get neither.
    """
    done: list[dict[str, Any]] = []
    times = [row["ms"] for row in rows if row.get("ms")]
    before = None
    for row in rows:
        if row.get("ms"):
            row = row | {"factor": before / row["ms"] if before else 1.0, "total": times[0] / row["ms"]}
            before = row["ms"]
        done.append(row)
    return done


def is_lectures(model: ModelConfig, tokens: int, seq_len: int) -> bool:
    """True when a ladder does the work of the lecture's, so that the two can stand side by side."""
    return model == LECTURE_MODEL and seq_len == LECTURE_SEQ_LEN and tokens == LECTURE_ROWS * LECTURE_SEQ_LEN


def missing_for(need: RungNeed, device: torch.device, model: ModelConfig) -> str | None:
    """Why `device` does not do `need` for `model`, found by trying; None when it does."""
    if need == "kernels":
        return lacks_kernels(device, model)
    return {"tf32": lacks_tf32, "bf16": lacks_bf16, "compile": lacks_compile, "flash": lacks_flash}[need](device)


def lacks_kernels(device: torch.device, model: ModelConfig) -> str | None:
    with without_memory():
        kernels = select_kernels("auto", Transformer(model), device, "bf16")
    return None if kernels.name == "fused" else kernels.reason


def lacks_tf32(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    return "TensorFloat-32 needs an NVIDIA GPU of the Ampere generation or newer"  # elsewhere the switch is ignored


def lacks_bf16(device: torch.device) -> str | None:
    x = torch.ones(8, 8, device=device, requires_grad=True)
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            (x @ x).float().sum().backward()
    except RuntimeError as error:
        return f"no bfloat16 here ({first_line(error)})"
    return None


def lacks_compile(device: torch.device) -> str | None:
    x = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(lambda y: (y.sin() * 2).sum())(x).backward()
    except (RuntimeError, ImportError) as error:
        return f"torch.compile does not work here ({first_line(error)})"
    return None


def lacks_flash(device: torch.device) -> str | None:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q = torch.ones(1, 1, 64, 64, device=device, dtype=dtype, requires_grad=True)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
            F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    except RuntimeError as error:
        return f"no flash attention here ({first_line(error)})"
    return None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


# ---- the lecture's first forms: attention written out, an optimizer that is not fused --------------------------------


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√D)·v (Vaswani et al. 2017, eq. 1), every product written out: what flash attention replaces.

    Arguments and result as in `regpt.model.ops.attention`. Memory: several times B·H·T·S numbers.
    """
    T, S = q.size(-2), k.size(-2)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(q.size(-1)))  # (B, H, T, S)
    return (
        scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
    )  # (B, H, T, D); autocast takes the softmax in float32


EXPLICIT = replace(PLAIN, attention=explicit_attention)


def unfused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same AdamW over the same parameters in PyTorch's own default form, as a script has it that does not ask for
    `fused`: several kernels over lists of tensors on a GPU (foreach), one tensor after another on a CPU."""
    groups = [{**group, "fused": None} for group in optimizer.param_groups]
    return torch.optim.AdamW(groups, lr=optimizer.defaults["lr"])
