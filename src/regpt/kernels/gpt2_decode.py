"""GPT-2's decode step in few kernels: seven a block instead of fourteen, for one text five; float32 residuals.

Matrix products stay cuBLAS's, with biases and GELU in their epilogues; each residual sum and the norm after it are one
kernel, and so are the cache write and attention. The reference is `model.gpt2` with `engine.cache.DecodeView`.
Shapes: the glossary in `regpt.model`; B rows, one new token each.
"""
# pyright: reportIndexIssue=false, reportPossiblyUnboundVariable=false

import math
from collections.abc import Callable
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]

from regpt.kernels.paged import attend_to_own, launches_early, load_positions
from regpt.model.gpt2 import GPT2

NORM_WARPS = 4
# Up to so many programs: positions that each reads at once, and its warps.
ATTENTION = (528, (256, 8)), (1584, (64, 2)), (math.inf, (32, 1))
LARGEST_HEAD = 128
LARGEST_VECTOR, VECTOR_SHORT, VECTOR_LONG = 1024, (4, 4), (2, 8)  # a program's rows and warps up to it, and above


@triton.jit
def norm_into(x, weight_ptr, bias_ptr, h_ptr, at, column, real, C: tl.constexpr, eps):
    mean = tl.sum(tl.where(real, x, 0.0), 0) / C
    centred = tl.where(real, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=real, other=0.0).to(tl.float32)
    tl.store(h_ptr + at, (centred * rstd * weight + bias).to(h_ptr.dtype.element_ty), mask=real)


@triton.jit
def embed_norm_kernel(
    token_ptr, position_ptr, stride, wte_ptr, wpe_ptr, weight_ptr, bias_ptr, x_ptr, h_ptr, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Never early itself: what the kernels after it read before they wait is as the last step left it."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    token, position = tl.load(token_ptr + row * stride), tl.load(position_ptr + row * stride)
    column = tl.arange(0, BLOCK_C)
    real = column < C
    x = tl.load(wte_ptr + token * C + column, mask=real, other=0.0).to(tl.float32)
    x += tl.load(wpe_ptr + position * C + column, mask=real, other=0.0).to(tl.float32)
    at = row * C + column
    tl.store(x_ptr + at, x, mask=real)
    norm_into(x, weight_ptr, bias_ptr, h_ptr, at, column, real, C, eps)


@triton.jit
def add_norm_kernel(
    x_ptr, y_ptr, y_bias_ptr, weight_ptr, bias_ptr, h_ptr, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    real = column < C
    at = row * C + column
    x = tl.load(x_ptr + at, mask=real, other=0.0)
    x += tl.load(y_ptr + at, mask=real, other=0.0).to(tl.float32)
    x += tl.load(y_bias_ptr + column, mask=real, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, x, mask=real)
    norm_into(x, weight_ptr, bias_ptr, h_ptr, at, column, real, C, eps)


@triton.jit
def attend_and_write_kernel(
    qkv_ptr, k_ptr, v_ptr, table_ptr, position_ptr, out_ptr, kv_head, table_row, position_row, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table_ptr += row * table_row
    position = tl.load(position_ptr + row * position_row).to(tl.int32)
    own_page = tl.load(table_ptr + position // PAGE)
    feature, within = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK)
    real = feature < D
    k_ptr += head.to(tl.int64) * kv_head
    v_ptr += head.to(tl.int64) * kv_head
    seen = within < position
    k, v = load_positions(k_ptr, v_ptr, table_ptr, within, seen, D, BLOCK_D, PAGE)  # none of them written in this step
    if PDL:
        gdc_wait()
    own = qkv_ptr + row * 3 * H * D + head * D + feature
    q = tl.load(own, mask=real, other=0.0).to(tl.float32) * scale
    k_own = tl.load(own + H * D, mask=real, other=0.0).to(k_ptr.dtype.element_ty)  # which may be fp8
    v_own = tl.load(own + 2 * H * D, mask=real, other=0.0).to(v_ptr.dtype.element_ty)
    slot = (own_page * PAGE + position % PAGE) * D + feature
    tl.store(k_ptr + slot, k_own, mask=real)
    tl.store(v_ptr + slot, v_own, mask=real)
    y = attend_to_own(q, k, v, seen, k_own, v_own, k_ptr, v_ptr, table_ptr, position, D, BLOCK_D, PAGE, BLOCK)
    tl.store(out_ptr + (row * H + head) * D + feature, y.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def write_kernel(qkv_ptr, k_ptr, v_ptr, slot_ptr, kv_head, H: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row)
    column = tl.arange(0, BLOCK_C)
    real = column < H * D
    own = qkv_ptr + row * 3 * H * D + column
    to = (column // D).to(tl.int64) * kv_head + slot * D + column % D
    tl.store(k_ptr + to, tl.load(own + H * D, mask=real, other=0.0), mask=real)
    tl.store(v_ptr + to, tl.load(own + 2 * H * D, mask=real, other=0.0), mask=real)


@triton.jit
def vector_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, added_ptr, out_ptr, N, eps,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (N,) = weight (N, K) · x (K,) + bias, of the normed x, through GELU, or added to another vector. Weights,
    which no kernel writes, are on their way before the kernel that computes x ends."""
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    inside, real = n < N, k < K
    at = n[:, None].to(tl.int64) * K + k[None, :]
    weight = tl.load(weight_ptr + at, mask=inside[:, None] & real[None, :], other=0.0)
    bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(norm_weight_ptr + k, mask=real, other=0.0)
        shift = tl.load(norm_bias_ptr + k, mask=real, other=0.0)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + k, mask=real, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(added_ptr + n, mask=inside, other=0.0)
    if NORM:
        mean, square = tl.sum(x, 0) / K, tl.sum(x * x, 0) / K  # at once: float32 has digits enough
        rstd = 1.0 / tl.sqrt(square - mean * mean + eps)
        x = (x - mean) * rstd * scale.to(tl.float32) + shift.to(tl.float32)
        x = x.to(weight_ptr.dtype.element_ty).to(tl.float32)  # as the product of a whole batch rounds it
    y = tl.sum(weight.to(tl.float32) * x[None, :], 1) + bias
    if GELU:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y / (1.0 + tl.exp(-2.0 * inner))  # y/2 · (1 + tanh(inner))
    if ADD:
        y += added
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=inside)


def fits(model: GPT2) -> bool:
    """Whether `FusedDecode` computes this model."""
    shape = model.config.resolved()
    plain = shape.activation == "gelu_tanh" and shape.bias == "all" and not shape.attention_scale_by_layer
    return plain and shape.head_size <= LARGEST_HEAD and model.dtype in (torch.bfloat16, torch.float16)


class FusedDecode:
    """Hidden states of one new token of B texts; `model` is in half precision (`fits`)."""

    most_rows, reads_prompts = math.inf, True

    def __init__(self, model: GPT2):
        shape = model.config.resolved()
        self.model, self.C, self.H, self.D = model, shape.n_embd, shape.n_head, shape.head_size
        self.eps, self.inner = shape.norm_eps, shape.n_inner
        self.block_c, self.block_d = triton.next_power_of_2(self.C), triton.next_power_of_2(self.D)
        pdl = launches_early(model.device)
        self.early: dict[str, Any] = {"PDL": pdl, "launch_pdl": pdl}

    def hidden(self, state: Tensor, tables: Tensor, keys: Tensor, values: Tensor, page_size: int) -> Tensor:
        """(B, C) after the last norm of the tokens and positions in the first columns of `state`; keys and values
        (L, G, slots, D) get the new ones, where `tables` (B, pages) have their pages."""
        B = len(state)
        if B == 1 and self.block_c <= LARGEST_VECTOR:
            return self.hidden_of_one(state, tables, keys, values, page_size)
        blocks: list[Any] = list(self.model.h)
        tokens, positions = state[:, 0], state[:, 1]
        x = torch.empty(B, self.C, device=state.device)
        h = torch.empty(B, self.C, device=state.device, dtype=self.model.dtype)
        first = blocks[0]
        embed_norm_kernel[(B,)](
            tokens, positions, state.stride(0), self.model.wte.weight, self.model.wpe.weight, first.ln_1.weight,
            first.ln_1.bias, x, h, self.eps, C=self.C, BLOCK_C=self.block_c, PDL=self.early["PDL"],
            num_warps=NORM_WARPS,
        )  # fmt: skip
        after = [*(block.ln_1 for block in blocks[1:]), self.model.ln_f]
        for layer, block in enumerate(blocks):
            attn = block.attn
            qkv = torch.addmm(attn.c_attn.bias, h, attn.c_attn.weight.t())  # (B, 3·C)
            y = torch.empty_like(h)
            self.attend(qkv, y, state, tables, keys[layer], values[layer], page_size)
            self.finish(x, y, block, after[layer], h)
        return h

    def prefill(
        self,
        given: Tensor,
        new: Tensor,
        lengths: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        held: Any,
        kernel: Callable[..., Tensor],
        slots: Tensor | None = None,
    ) -> Tensor:
        """(N, C) after the last norm of the tokens and positions `given` (2, N), with keys and values in the slots
        `new` (N,) of `held`; the other arguments are those of `kernels.paged.prefill_attention`, which reads the keys
        and values in `slots` where given."""
        blocks: list[Any] = list(self.model.h)
        N = given.size(1)
        x = torch.empty(N, self.C, device=given.device)
        h = torch.empty(N, self.C, device=given.device, dtype=self.model.dtype)
        first = blocks[0].ln_1
        embed_norm_kernel[(N,)](
            given, given[1], 1, self.model.wte.weight, self.model.wpe.weight, first.weight, first.bias, x, h, self.eps,
            C=self.C, BLOCK_C=self.block_c, PDL=self.early["PDL"], num_warps=NORM_WARPS,
        )  # fmt: skip
        after = [*(block.ln_1 for block in blocks[1:]), self.model.ln_f]
        for layer, block in enumerate(blocks):
            attn, keys, values = block.attn, held.k[layer], held.v[layer]
            qkv = torch.addmm(attn.c_attn.bias, h, attn.c_attn.weight.t())  # (N, 3·C)
            write_kernel[(N,)](
                qkv, keys, values, new, keys.stride(0), H=self.H, D=self.D, BLOCK_C=self.block_c,
                num_warps=NORM_WARPS,
            )  # fmt: skip
            q, k, v = (y.view(N, self.H, self.D).transpose(0, 1)[None] for y in qkv.chunk(3, dim=1))
            if slots is not None:
                k, v = (y[None] for y in held.read(layer, slots))
            elif held.narrow:
                k, v = (held.rounded(y).to(q.dtype) for y in (k, v))
            y = kernel(q, k, v, lengths, longest, None).transpose(1, 2).reshape(N, self.C)
            self.finish(x, y, block, after[layer], h)
        return h

    def finish(self, x: Tensor, y: Tensor, block: Any, after: Any, h: Tensor) -> None:
        """What follows attention's outputs `y` (N, C) in a block, up to the next norm."""
        attn, mlp = block.attn, block.mlp
        self.add_norm(x, y @ attn.c_proj.weight.t(), attn.c_proj.bias, block.ln_2, h)
        wide = torch.ops.aten._addmm_activation(mlp.c_fc.bias, h, mlp.c_fc.weight.t(), use_gelu=True)  # tanh's on CUDA
        self.add_norm(x, wide @ mlp.c_proj.weight.t(), mlp.c_proj.bias, after, h)

    def hidden_of_one(self, state: Tensor, tables: Tensor, keys: Tensor, values: Tensor, page_size: int) -> Tensor:
        """The same for one text: five kernels a block, the products among them, which read each weight once."""
        device, dtype, C = state.device, self.model.dtype, self.C
        blocks: list[Any] = list(self.model.h)
        x = torch.empty(1, C, device=device)
        h, y = (torch.empty(1, C, device=device, dtype=dtype) for _ in range(2))
        qkv, wide = (torch.empty(1, n, device=device, dtype=dtype) for n in (3 * C, self.inner))
        ln_f: Any = self.model.ln_f
        embed_norm_kernel[(1,)](
            state, state[:, 1:], state.stride(0), self.model.wte.weight, self.model.wpe.weight, ln_f.weight,
            ln_f.bias, x, h, self.eps, C=C, BLOCK_C=self.block_c, PDL=self.early["PDL"], num_warps=NORM_WARPS,
        )  # fmt: skip
        for layer, block in enumerate(blocks):
            attn, mlp = block.attn, block.mlp
            self.product(x, attn.c_attn, qkv, norm=block.ln_1)
            self.attend(qkv, y, state, tables, keys[layer], values[layer], page_size)
            middle = torch.empty_like(x)
            self.product(y, attn.c_proj, middle, added=x)
            self.product(middle, mlp.c_fc, wide, norm=block.ln_2, gelu=True)
            x = torch.empty_like(x)
            self.product(wide, mlp.c_proj, x, added=middle)
        add_norm_kernel[(1,)](
            x, torch.zeros_like(h), torch.zeros_like(ln_f.bias), ln_f.weight, ln_f.bias, h, self.eps, C=C,
            BLOCK_C=self.block_c, num_warps=NORM_WARPS, **self.early,
        )  # fmt: skip
        return h

    def product(
        self, x: Tensor, layer: Any, out: Tensor, norm: Any = None, added: Tensor | None = None, gelu: bool = False
    ) -> None:
        """`layer` of one vector, of its norm where given; `added` to another one."""
        N, K = layer.weight.shape
        block = triton.next_power_of_2(K)
        rows, warps = VECTOR_LONG if block > LARGEST_VECTOR else VECTOR_SHORT
        vector_kernel[(triton.cdiv(N, rows),)](
            x, layer.weight, layer.bias, layer.bias if norm is None else norm.weight,
            layer.bias if norm is None else norm.bias, x if added is None else added, out, N, self.eps, K=K,
            BLOCK_K=block, ROWS=rows, NORM=norm is not None, GELU=gelu, ADD=added is not None,
            num_warps=warps, **self.early,
        )  # fmt: skip

    def attend(
        self, qkv: Tensor, y: Tensor, state: Tensor, tables: Tensor, keys: Tensor, values: Tensor, page_size: int
    ) -> None:
        B = len(state)
        block, warps = next(sizes for most, sizes in ATTENTION if most >= B * self.H)
        attend_and_write_kernel[(B, self.H)](
            qkv, keys, values, tables, state[:, 1:], y, keys.stride(0), tables.stride(0), state.stride(0),
            self.D**-0.5, H=self.H, D=self.D, BLOCK_D=self.block_d, PAGE=page_size,
            BLOCK=block, num_warps=warps, **self.early,
        )  # fmt: skip

    def add_norm(self, x: Tensor, y: Tensor, bias: Tensor, norm: Any, h: Tensor) -> None:
        add_norm_kernel[(len(x),)](
            x, y, bias, norm.weight, norm.bias, h, self.eps, C=self.C, BLOCK_C=self.block_c, num_warps=NORM_WARPS,
            **self.early,
        )  # fmt: skip
