"""Every way to a micro-batch's loss, on a CPU: plain, compiled, and the fused ones with their pieces in PyTorch."""

from collections.abc import Callable

import pytest
import torch

import tiny
from kernels import reference
from kernels.reference_fp8 import Rounding
from kernels.test_graphs import Computed
from regpt.data.batch import Batch
from regpt.kernels.gpt2 import FusedGPT2
from regpt.kernels.gpt2_fp8 import FusedGPT2FP8
from regpt.kernels.graphs import GraphedLoss
from regpt.kernels.masked import TorchAttention
from regpt.model.transformer import Transformer
from regpt.train.backend import LossSum, make_loss_sum

PATHS = ["plain", pytest.param("compiled", marks=tiny.IMPORTS_COMPILER), "fused", "graphed", "fp8"]


def loss_path(path: str, model: Transformer) -> LossSum:
    """`loss_sum(batch)` of `model` in its own number format; nothing is rounded to FP8, but kept as if it were."""
    dtype = model.wte.weight.dtype
    plain = make_loss_sum(model, "fp64", tiny.CPU, compile=False)
    if path == "plain":
        return plain
    if path == "compiled":  # what the code generator adds takes half a minute, and is tried in test_compile.py
        return torch.compile(plain, dynamic=False, backend="aot_eager")
    pieces = reference.products, TorchAttention(), reference
    if path == "fp8":
        return of_batch(FusedGPT2FP8(model, *pieces, Rounding(torch.float64), dtype=dtype).loss_sum)
    fused = FusedGPT2(model, *pieces, dtype)
    if path == "fused":
        return of_batch(fused.loss_sum)
    assert path == "graphed"
    return of_batch(GraphedLoss(fused, type("Unlogged", (Computed,), {"log": []}), object).loss_sum)


def of_batch(of_tokens: Callable[..., torch.Tensor]) -> LossSum:
    def loss_sum(batch: Batch) -> torch.Tensor:
        return of_tokens(batch.idx, batch.targets, batch.positions, batch.cu_seqlens)

    return loss_sum
