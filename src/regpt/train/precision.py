"""In which number format a model computes. Weights, gradients and optimizer state stay float32 (float64 under fp64)."""

import contextlib
from contextlib import AbstractContextManager

import torch

from regpt.train.config import PrecisionName


def autocast(precision: PrecisionName, device: torch.device) -> AbstractContextManager[object]:
    """The context that forward passes run in: bfloat16 matrix products under bf16, nothing otherwise."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def parameter_dtype(precision: PrecisionName) -> torch.dtype:
    return torch.float64 if precision == "fp64" else torch.float32


def set_matmul_precision(precision: PrecisionName) -> None:
    """Allow TensorFloat-32 for the float32 matrix products of this process, or forbid it."""
    torch.set_float32_matmul_precision("high" if precision in ("tf32", "bf16") else "highest")
