"""FastPaths instead of plain operations: chosen here, compared with them in tests, left out by `kernels=False`."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regpt.kernels.few_rows import FewRows, load_few_rows
from regpt.model.gpt2 import GPT2
from regpt.model.transformer import Transformer


class FastPaths(NamedTuple):
    """Each None where the plain operation stays.

    Attributes:
        attention, prefill: of `DecodeView` and `PrefillView` (`kernels.paged`).
        model: a decode step's forward (`kernels.gpt2_decode`).
        draw: of rows with common options (`kernels.sampler`).
        few_rows: products on a CPU (`kernels.few_rows`).
    """

    attention: Callable[..., Tensor] | None = None
    prefill: Callable[..., Tensor] | None = None
    model: Any = None
    draw: Callable[[Tensor, Tensor, int], Tensor] | None = None
    few_rows: FewRows | None = None


NO_KERNELS = FastPaths()


def load_kernels(model: Transformer, dtype: torch.dtype, *, fused: bool = False) -> FastPaths:
    """What there is for a model that computes in `dtype`: on CUDA with Triton, on a CPU in float32 with a C compiler.
    `fused`: the whole step of GPT-2 too."""
    if model.device.type == "cpu" and dtype == torch.float32:
        return FastPaths(few_rows=load_few_rows())
    if model.device.type != "cuda" or not torch.version.cuda or find_spec("triton") is None:
        return NO_KERNELS
    from regpt.kernels.paged import decode_attention, prefill_attention, prefills  # imports Triton

    prefill = prefill_attention if prefills(model.device, dtype, model.config.resolved().head_size) else None
    if not fused or not isinstance(model, GPT2) or dtype != model.dtype:
        return FastPaths(decode_attention, prefill)
    from regpt.kernels.gpt2_decode import FusedDecode, fits
    from regpt.kernels.sampler import draw_into

    if not fits(model):
        return FastPaths(decode_attention, prefill)
    return FastPaths(decode_attention, prefill, FusedDecode(model), draw_into)


def half_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy of `model` with weights in `dtype`: what a step reads is halved, and no weight is rounded in each."""
    return copy.deepcopy(model).to(dtype).eval()
