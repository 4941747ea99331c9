"""In which number format a model computes, and keeps its weights."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from regpt.errors import UsageError
from regpt.model.transformer import Transformer
from regpt.train.config import PrecisionName, WeightDtype, WritingPrecision

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def autocast(precision: PrecisionName | WritingPrecision, device: torch.device) -> AbstractContextManager[object]:
    """The context that forward passes run in: matrix products of 16 bits under bf16 and fp16, nothing otherwise. Under
    fp8 that of bf16: the model's linear layers themselves (`kernels.fp8`) do the rest."""
    if precision in HALF_TYPES:
        return torch.autocast(device.type, dtype=HALF_TYPES[precision])
    return contextlib.nullcontext()


def parameter_dtype(precision: PrecisionName | WritingPrecision, weights: WeightDtype = "fp32") -> torch.dtype:
    if weights == "bf16":
        return torch.bfloat16
    return torch.float64 if precision == "fp64" else torch.float32


def inference_dtype(precision: PrecisionName | WritingPrecision, held: torch.dtype) -> torch.dtype:
    """In which weights are kept that were opened as `held`: bfloat16 stays where products are in it, too."""
    return held if (precision, held) == ("bf16", torch.bfloat16) else parameter_dtype(precision)


def check_precision(precision: WritingPrecision, device: torch.device) -> None:
    """Refuse a format that inference on this device does not have, before a model is read."""
    if precision == "int8" and device.type not in ("cpu", "cuda"):
        raise UsageError(f"precision int8 is for CPUs and CUDA, the device is {device}; choose bf16, or --device cpu")
    if precision == "bf16-invariant" and device.type != "cuda":
        raise UsageError(
            f"precision bf16-invariant is for CUDA, the device is {device}; choose fp32, in which texts do not "
            "depend on the batch either"
        )


def hold(model: Transformer, precision: WritingPrecision, dtype: torch.dtype) -> None:
    """Bring the weights of `model` into `dtype`, and where the precision has them in int8 there."""
    model.to(dtype)
    if precision == "int8":
        from regpt.engine.products import quantize

        quantize(model)


def writing(model: Transformer, precision: WritingPrecision, device: torch.device) -> AbstractContextManager[object]:
    """The context in which `model` writes texts, its weights in the format for that: on CUDA in the 16 bits of the
    products, of which a step reads half and rounds none; elsewhere that of autocast; or int8."""
    check_precision(precision, device)
    if precision == "bf16-invariant":
        from regpt.engine.products import fix_order

        fix_order(model.to(torch.bfloat16))
        return contextlib.nullcontext()
    if precision in HALF_TYPES and device.type == "cuda":
        model.to(HALF_TYPES[precision])
        return contextlib.nullcontext()
    hold(model, precision, parameter_dtype(precision))
    return autocast(precision, device)


def gradient_dtype(weights: WeightDtype, gradients: WeightDtype) -> torch.dtype | None:
    """In which gradients are summed; None where it is that of the weights."""
    return torch.float32 if (weights, gradients) == ("bf16", "fp32") else None


def set_matmul_precision(precision: PrecisionName | WritingPrecision | WritingPrecision) -> None:
    """Allow TensorFloat-32 for the float32 matrix products of this process, or forbid it."""
    torch.set_float32_matmul_precision("high" if precision in ("tf32", *HALF_TYPES) else "highest")


@contextlib.contextmanager
def matmul_precision(precision: PrecisionName | WritingPrecision) -> Iterator[None]:
    """`set_matmul_precision` while the context lasts: for a process that is not only ours."""
    before = torch.get_float32_matmul_precision()
    set_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
