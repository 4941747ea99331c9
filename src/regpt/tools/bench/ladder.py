"""The ladder of "Let's reproduce GPT-2 (124M)" (Karpathy 2024): the same step, made faster by one change at a time.

A rung is a set of changes that stay in force on all later rungs. To add one, append it to `LADDER`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regpt.model.config import ModelConfig
from regpt.model.ops import PLAIN

LECTURE_MODEL = ModelConfig()  # GPT-2 124M
LECTURE_ROWS, LECTURE_SEQ_LEN = 16, 1024
RECIPE = object()  # a change to the value that the recipe itself has
Setup = Mapping[str, object]


@dataclass(frozen=True)
class LadderRung:
    """One change, or several that belong together.

    Attributes:
        name: of the change.
        changes: values from here on, by configuration key (`train.precision`; `RECIPE` for the recipe's own value), and
            `attention`, `explicit` (softmax(q·kᵀ)·v written out) or `torch` (scaled_dot_product_attention), and
            `adamw`, `default` (PyTorch's own choice) or `fused`.
        lecture_ms: milliseconds on the lecture's A100 for 16,384 tokens of GPT-2 124M.
    """

    name: str
    changes: Setup
    lecture_ms: float | None = None


START = {"train.precision": "fp32", "train.compile": False, "train.kernels": "plain", "train.pad_vocab": False}
LADDER = (
    LadderRung("float32", START | {"attention": "explicit", "adamw": "default"}, 1000),
    LadderRung("TF32", {"train.precision": "tf32"}, 333),
    LadderRung("bfloat16", {"train.precision": "bf16"}, 300),
    LadderRung("torch.compile", {"train.compile": True}, 130),
    LadderRung("flash attention", {"attention": "torch"}, 96),
    LadderRung("padded vocabulary", {"train.pad_vocab": True}, 93),
    LadderRung("fused AdamW", {"adamw": "fused"}, 90),
    LadderRung("fused kernels", {"train.kernels": "fused"}),
    LadderRung("the recipe's batch", {"train.batch_tokens": RECIPE, "train.micro_batch_rows": RECIPE}),
)


def is_lectures(model: ModelConfig, tokens: int, seq_len: int) -> bool:
    """True when a ladder does the work of the lecture's, so that their times can be compared."""
    return model == LECTURE_MODEL and seq_len == LECTURE_SEQ_LEN and tokens == LECTURE_ROWS * LECTURE_SEQ_LEN


def lacks_tf32(device: torch.device) -> bool:
    """Whether `device` ignores the switch for TensorFloat-32, which needs an NVIDIA GPU of Ampere or newer."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√D)·v (Vaswani et al. 2017, eq. 1), every product written out: the form before flash attention.

    Arguments and result as in `regpt.model.ops.attention`. Memory: several times B·H·T·S numbers.
    """
    T, S = q.size(-2), k.size(-2)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(q.size(-1)))  # (B, H, T, S)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)  # autocast computes it in float32
    return weights @ v  # (B, H, T, D)


EXPLICIT = replace(PLAIN, attention=explicit_attention)


def unfused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same AdamW over the same parameters in PyTorch's own default form, as in a script that does not ask for
    `fused`: several kernels over lists of tensors on a GPU (foreach), one tensor after another on a CPU."""
    groups = [{**group, "fused": None} for group in optimizer.param_groups]
    return torch.optim.AdamW(groups, lr=optimizer.defaults["lr"])
