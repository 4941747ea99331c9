"""In which number format a model computes, and keeps its weights."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from regpt.train.config import PrecisionName, WeightDtype

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def autocast(precision: PrecisionName, device: torch.device) -> AbstractContextManager[object]:
    """The context that forward passes run in: matrix products of 16 bits under bf16 and fp16, nothing otherwise. Under
    fp8 that of bf16: the model's linear layers themselves (`kernels.fp8`) do the rest."""
    if precision in HALF_TYPES:
        return torch.autocast(device.type, dtype=HALF_TYPES[precision])
    return contextlib.nullcontext()


def parameter_dtype(precision: PrecisionName, weights: WeightDtype = "fp32") -> torch.dtype:
    if weights == "bf16":
        return torch.bfloat16
    return torch.float64 if precision == "fp64" else torch.float32


def inference_dtype(precision: PrecisionName, held: torch.dtype) -> torch.dtype:
    """In which weights are kept that were opened as `held`: bfloat16 stays where products are in it, too."""
    return held if (precision, held) == ("bf16", torch.bfloat16) else parameter_dtype(precision)


def writing(model: torch.nn.Module, precision: PrecisionName, device: torch.device) -> AbstractContextManager[object]:
    """The context in which `model` writes texts, its weights in the format for that: on CUDA in the 16 bits of the
    products, of which a step reads half and rounds none; elsewhere that of autocast."""
    halved = precision in HALF_TYPES and device.type == "cuda"
    model.to(HALF_TYPES[precision] if halved else parameter_dtype(precision))
    return contextlib.nullcontext() if halved else autocast(precision, device)


def gradient_dtype(weights: WeightDtype, gradients: WeightDtype) -> torch.dtype | None:
    """In which gradients are summed; None where it is that of the weights."""
    return torch.float32 if (weights, gradients) == ("bf16", "fp32") else None


def set_matmul_precision(precision: PrecisionName) -> None:
    """Allow TensorFloat-32 for the float32 matrix products of this process, or forbid it."""
    torch.set_float32_matmul_precision("high" if precision in ("tf32", *HALF_TYPES) else "highest")


@contextlib.contextmanager
def matmul_precision(precision: PrecisionName) -> Iterator[None]:
    """`set_matmul_precision` while the context lasts: for a process that is not only ours."""
    before = torch.get_float32_matmul_precision()
    set_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
