"""Llama's decode step of one text in five kernels a block: norm, queries, keys and values; rotation, cache write and
attention; output; norm, gate, up and SwiGLU; down. Each reads its weights once, float32 residuals.

The reference is `model.llama` with `engine.cache.DecodeView`. Shapes: the glossary in `regpt.model`.
"""
# pyright: reportIndexIssue=false, reportPossiblyUnboundVariable=false

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]

from regpt.kernels.paged import attend_to_own, launches_early, load_positions
from regpt.model import layers
from regpt.model.config import FAMILIES
from regpt.model.llama import Llama

HALF_TYPES = (torch.bfloat16, torch.float16)
ROWS_AND_WARPS = (1024, (4, 4)), (2048, (4, 8)), (4096, (2, 8)), (16384, (1, 8))  # of a program, up to a size of inputs
ATTENTION_BLOCK, ATTENTION_WARPS = 256, 8
LARGEST_HEAD = 128


@triton.jit
def products_kernel(
    x_ptr, norm_ptr, first_ptr, second_ptr, third_ptr, first_bias_ptr, second_bias_ptr, third_bias_ptr,
    added_ptr, out_ptr, first_rows, second_rows, eps,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of up to three matrices (…, K) times x (K,) or its norm, one after another; gated: silu(first) · second."""
    if PDL:
        gdc_launch_dependents()
    at = tl.program_id(0) * ROWS
    n, weight_ptr, bias_ptr = at, first_ptr, first_bias_ptr
    if not GATED:
        if at >= first_rows + second_rows:
            n, weight_ptr, bias_ptr = at - first_rows - second_rows, third_ptr, third_bias_ptr
        elif at >= first_rows:
            n, weight_ptr, bias_ptr = at - first_rows, second_ptr, second_bias_ptr
    row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    real = k < K
    place = (n + row)[:, None].to(tl.int64) * K + k[None, :]
    weight = tl.load(weight_ptr + place, mask=real[None, :], other=0.0)
    if GATED:
        second = tl.load(second_ptr + place, mask=real[None, :], other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + n + row).to(tl.float32)
    if NORM:
        scale = tl.load(norm_ptr + k, mask=real, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + k, mask=real, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(added_ptr + at + row)
    if NORM:
        x = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / K + eps)) * scale
        x = x.to(weight_ptr.dtype.element_ty).to(tl.float32)
    y = tl.sum(weight.to(tl.float32) * x[None, :], 1)
    if BIAS:
        y += bias
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * tl.sum(second.to(tl.float32) * x[None, :], 1)
    if ADD:
        y += added
    tl.store(out_ptr + at + row, y.to(out_ptr.dtype.element_ty))


@triton.jit
def rotated(own, cos, sin, feature, D: tl.constexpr):
    """A head at `own`, turned, in the format that it had: pairs (i, i + D/2)."""
    x = tl.load(own + feature)
    other = tl.load(own + (feature + D // 2) % D).to(tl.float32)
    turned = x.to(tl.float32) * cos + tl.where(feature < D // 2, -other, other) * sin
    return turned.to(x.dtype)


@triton.jit
def rotate_and_attend_kernel(
    qkv_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, page_ptr, position_ptr, out_ptr, kv_head, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    head = tl.program_id(0)
    group = head // (H // G)
    position = tl.load(position_ptr).to(tl.int32)
    own_page = tl.load(page_ptr + position // PAGE)
    feature, within = tl.arange(0, D), tl.arange(0, BLOCK)
    cos, sin = tl.load(cos_ptr + feature % (D // 2)), tl.load(sin_ptr + feature % (D // 2))
    k_ptr += group.to(tl.int64) * kv_head
    v_ptr += group.to(tl.int64) * kv_head
    seen = within < position
    k, v = load_positions(k_ptr, v_ptr, page_ptr, within, seen, D, D, PAGE)  # none of them written in this step
    if PDL:
        gdc_wait()
    q = rotated(qkv_ptr + head * D, cos, sin, feature, D).to(tl.float32) * scale
    k_own = rotated(qkv_ptr + (H + group) * D, cos, sin, feature, D).to(k_ptr.dtype.element_ty)  # which may be fp8
    v_own = tl.load(qkv_ptr + (H + G + group) * D + feature).to(v_ptr.dtype.element_ty)
    if head % (H // G) == 0:
        slot = (own_page * PAGE + position % PAGE) * D + feature
        tl.store(k_ptr + slot, k_own)
        tl.store(v_ptr + slot, v_own)
    y = attend_to_own(q, k, v, seen, k_own, v_own, k_ptr, v_ptr, page_ptr, position, D, D, PAGE, BLOCK)
    tl.store(out_ptr + head * D + feature, y.to(out_ptr.dtype.element_ty))


def fits(model: Llama) -> bool:
    """Whether `LlamaDecode` computes this model: Llama, Mistral without a window, Qwen 2."""
    shape, family = model.config.resolved(), FAMILIES[model.config.family]
    unusual = family.qk_norm or family.norm_after or family.experts or family.norm_offset or not family.gated
    unusual = unusual or shape.no_rope_every or shape.window or shape.query_pre_attn_scalar or shape.rope_fraction != 1
    plain = not unusual and shape.activation == "silu" and shape.bias in ("none", "qkv")
    head = shape.head_size in (16, 32, 64, LARGEST_HEAD)
    sizes = shape.n_embd % 16 == 0 and shape.n_inner % 16 == 0 and max(shape.n_embd, shape.n_inner) <= 16384
    return plain and head and sizes and model.dtype in HALF_TYPES


class LlamaDecode:
    """Hidden states of the new token of one text; `model` is in half precision (`fits`)."""

    most_rows, reads_prompts = 1, False

    def __init__(self, model: Llama):
        self.model, self.shape = model, model.config.resolved()
        self.pdl = launches_early(model.device)

    def hidden(self, state: Tensor, tables: Tensor, keys: Tensor, values: Tensor, page_size: int) -> Tensor:
        """(1, C) after the last norm; arguments as in `FusedDecode.hidden`."""
        shape, model, dtype = self.shape, self.model, self.model.dtype
        C, H, G, D = shape.n_embd, shape.n_head, shape.n_kv_head, shape.head_size
        x = model.embed_tokens.weight[state[:, 0]].float()  # (1, C)
        cos, sin = layers.rotation(shape, state[0, 1:2])
        new = x.new_empty
        qkv, y, gated = (new(n, dtype=dtype) for n in ((H + 2 * G) * D, H * D, shape.n_inner))
        blocks: list[Any] = list(model.layers)
        for layer, block in enumerate(blocks):
            attn, mlp = block.self_attn, block.mlp
            self.products(x, (attn.q_proj, attn.k_proj, attn.v_proj), qkv, norm=block.input_layernorm)
            rotate_and_attend_kernel[(H,)](
                qkv, cos, sin, keys[layer], values[layer], tables, state[:, 1:], y, keys.stride(1), D**-0.5,
                H=H, G=G, D=D, PAGE=page_size, BLOCK=ATTENTION_BLOCK, PDL=self.pdl, num_warps=ATTENTION_WARPS,
                launch_pdl=self.pdl,
            )  # fmt: skip
            middle = torch.empty_like(x)
            self.products(y, (attn.o_proj,), middle, added=x)
            self.products(middle, (mlp.gate_proj, mlp.up_proj), gated, norm=block.post_attention_layernorm, gated=True)
            x = new(1, C)
            self.products(gated, (mlp.down_proj,), x, added=middle)
        return torch.nn.functional.rms_norm(x, (C,), model.norm.weight.float(), shape.norm_eps).to(dtype)

    def products(
        self,
        x: Tensor,
        linears: tuple[Any, ...],
        out: Tensor,
        norm: Any = None,
        added: Tensor | None = None,
        gated: bool = False,
    ) -> None:
        weights = [layer.weight for layer in linears] + [linears[-1].weight] * (3 - len(linears))
        bias = linears[0].bias is not None
        biases = [layer.bias for layer in linears] + [linears[-1].bias] * (3 - len(linears)) if bias else weights
        K, first, second = weights[0].size(1), len(weights[0]), len(weights[1])
        rows, warps = next(sizes for most, sizes in ROWS_AND_WARPS if most >= K)
        products_kernel[(out.numel() // rows,)](
            x, x if norm is None else norm.weight, *weights, *biases, x if added is None else added, out, first, second,
            self.shape.norm_eps, K=K, BLOCK_K=triton.next_power_of_2(K), ROWS=rows, NORM=norm is not None, BIAS=bias,
            GATED=gated, ADD=added is not None, PDL=self.pdl, num_warps=warps, launch_pdl=self.pdl,
        )  # fmt: skip
