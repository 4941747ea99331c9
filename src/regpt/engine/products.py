"""WEIGHTS → PRODUCTS: other ways to multiply by the weights of a model, put in the place of its operations.

`quantize`: matrices in Q8_0, 8.5 bits a weight, where reading them is what a token costs. The format is llama.cpp's: 32
weights share a scale in float16, so a model computes what its GGUF file of type q8_0 says. Nothing but the weights is
rounded: on a CPU products are float32, and texts stay exact in the engine's sense; on a GPU they are bfloat16.

`fix_order`: products in half precision whose bits do not depend on the batch.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from regpt.errors import UsageError, UserError
from regpt.hf.gguf import CHUNK, quantize_q8_0
from regpt.kernels.few_rows import GROUP, FewRows, load_few_rows
from regpt.kernels.select import has_triton
from regpt.model.layers import Linear
from regpt.model.ops import PLAIN, Ops
from regpt.model.transformer import Transformer


class Int8Product:
    """`ops.linear` of a weight (F, C), C a multiple of 32.

    Attributes:
        whole: (F, C) int8.
        scales: (F, C / 32) float16.
        kernel: for few rows on a CPU.
        out_dtype: of the results, default that of the rows.
    """

    def __init__(self, weight: Tensor, kernel: FewRows | None, out_dtype: torch.dtype | None = None):
        n_out, n_in = weight.shape
        whole = torch.empty(n_out, n_in, dtype=torch.int8)
        scales = torch.empty(n_out, n_in // GROUP, dtype=torch.float16)
        self.kernel, self.out_dtype = kernel, out_dtype
        for start in range(0, n_out, rows := max(1, CHUNK // n_in)):
            part = slice(start, start + rows)
            blocks = torch.from_numpy(quantize_q8_0(weight[part].detach().float().cpu().reshape(-1, GROUP).numpy()))
            scales[part] = blocks[:, :2].contiguous().view(torch.float16).view(-1, n_in // GROUP)
            whole[part] = blocks[:, 2:].view(torch.int8).reshape(-1, n_in)
        self.whole, self.scales = whole.to(weight.device), scales.to(weight.device)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.kernel is None:
            from regpt.kernels.product import multiply_rows  # imports Triton

            return multiply_rows(x, self.whole, bias, self.scales, self.out_dtype)
        if self.kernel.fits(x, self.whole.size(1)):
            return self.kernel.product(x, self.whole, self.scales, bias)
        return PLAIN.linear(x, self.weight(), bias)

    def weight(self) -> Tensor:
        """(F, C) float32: the rounded weights."""
        grouped = self.whole.view(*self.scales.shape, GROUP) * self.scales.float()[:, :, None]
        return grouped.view_as(self.whole)

    def __deepcopy__(self, memo: Any) -> "Int8Product":
        return self


def quantize(model: Transformer) -> Transformer:
    """`model` (float32) itself, its linear layers and its head in Q8_0, on CUDA all else in bfloat16. Rows that 32 does
    not divide, norms, position embeddings and the matrices of experts are not quantized.

    Raises:
        UserError: no C compiler, or on CUDA no Triton.
    """
    on_gpu = model.device.type == "cuda"
    kernel, dtype = None if on_gpu else load_few_rows(), torch.bfloat16 if on_gpu else model.dtype
    if on_gpu and not has_triton():
        raise UserError("precision int8 needs Triton on a GPU (pip install triton); or use bf16")
    if not on_gpu and kernel is None:
        raise UserError(
            "precision int8 needs a C compiler (cc, gcc or clang), and none works here; install one, or use fp32"
        )
    for module in model.modules():
        if isinstance(module, Linear) and module.in_features % GROUP == 0:
            product = Int8Product(module.weight, kernel)
            module.ops = replace(module.ops, linear=product)
            no_memory = torch.zeros((), dtype=dtype, device=model.device).expand(module.weight.shape)
            module.weight = nn.Parameter(no_memory, requires_grad=False)
    head = model.head_weight
    if head.size(1) % GROUP == 0:
        product = Int8Product(head, kernel, torch.float32 if on_gpu else None)
        head.data.copy_(product.weight())  # losses and a tied embedding read it
        model.ops = replace(model.ops, head=product)
    return model.to(dtype)


class FixedOrder:
    """`ops.linear` whose bits of a row do not depend on the others; results in `out_dtype`."""

    def __init__(self, out_dtype: torch.dtype | None = None):
        self.out_dtype = out_dtype

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from regpt.kernels.product import multiply_rows  # imports Triton

        return multiply_rows(x, weight, bias, out_dtype=self.out_dtype)


def fix_order(model: Transformer) -> Transformer:
    """`model` (in half precision, on CUDA) itself, its products and norms such that a row's bits depend on it alone.

    Raises:
        UsageError: a mixture of experts, whose products have as many rows as tokens were routed to an expert.
        UserError: no Triton.
    """
    if not has_triton():
        raise UserError("precision bf16-invariant needs Triton (pip install triton); or use bf16")
    if model.idle_parameters():
        raise UsageError("precision bf16-invariant is not for mixtures of experts; choose bf16 or fp32")
    from regpt.kernels.product import norm_rows

    modules: list[Any] = [one for one in model.modules() if isinstance(getattr(one, "ops", None), Ops)]
    for module in modules:
        module.ops = replace(module.ops, linear=FixedOrder(), head=FixedOrder(torch.float32), rms_norm=norm_rows)
    return model
