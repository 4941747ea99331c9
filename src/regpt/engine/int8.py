"""WEIGHTS → Q8_0: matrices in 8.5 bits a weight on a CPU, where reading them is what a token costs.

The format is llama.cpp's: 32 weights share a scale in float16, so a model computes what its GGUF file of type q8_0
says. Products are float32 of the rounded weights; nothing else is rounded, so texts stay exact in the engine's sense.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from regpt.errors import UserError
from regpt.hf.gguf import CHUNK, quantize_q8_0
from regpt.kernels.few_rows import GROUP, FewRows, load_few_rows
from regpt.model.layers import Linear
from regpt.model.ops import PLAIN
from regpt.model.transformer import Transformer


class Int8Product:
    """`ops.linear` of a weight (F, C), C a multiple of 32.

    Attributes:
        whole: (F, C) int8.
        scales: (F, C / 32) float16.
    """

    def __init__(self, weight: Tensor, kernel: FewRows):
        n_out, n_in = weight.shape
        self.whole = torch.empty(n_out, n_in, dtype=torch.int8)
        self.scales = torch.empty(n_out, n_in // GROUP, dtype=torch.float16)
        self.kernel = kernel
        for start in range(0, n_out, rows := max(1, CHUNK // n_in)):
            part = slice(start, start + rows)
            blocks = torch.from_numpy(quantize_q8_0(weight[part].detach().float().reshape(-1, GROUP).numpy()))
            self.scales[part] = blocks[:, :2].contiguous().view(torch.float16).view(-1, n_in // GROUP)
            self.whole[part] = blocks[:, 2:].view(torch.int8).reshape(-1, n_in)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
    """`model` (float32 on a CPU) itself, its linear layers and its head in Q8_0. Rows that 32 does not divide, norms,
    position embeddings and the matrices of experts stay as they are.

    Raises:
        UserError: no C compiler.
    """
    if (kernel := load_few_rows()) is None:
        raise UserError(
            "precision int8 needs a C compiler (cc, gcc or clang), and none works here; install one, or use fp32"
        )
    for module in model.modules():
        if isinstance(module, Linear) and module.in_features % GROUP == 0:
            product = Int8Product(module.weight, kernel)
            module.ops = replace(module.ops, linear=product)
            module.weight = nn.Parameter(torch.zeros(()).expand(module.weight.shape), requires_grad=False)  # no memory
    head = model.head_weight
    if head.size(1) % GROUP == 0:
        product = Int8Product(head, kernel)
        head.data.copy_(product.weight())  # losses and a tied embedding read it
        model.ops = replace(model.ops, head=product)
    return model
