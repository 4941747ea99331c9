"""Choice of the path that computes a model's loss: the plain one or, where it works, its family's fused one."""

import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from regpt.errors import UsageError, UserError
from regpt.kernels import fp8
from regpt.kernels.config import FP8_MULTIPLE, KernelsName
from regpt.kernels.masked import TorchAttention, with_masks_as_data
from regpt.model.config import ModelConfig
from regpt.model.gpt2 import GPT2
from regpt.model.ops import PLAIN, Ops
from regpt.model.transformer import Transformer

if TYPE_CHECKING:
    from regpt.kernels.fused import FusedLoss

# Measured on Hopper, where `auto` takes it. It should work from Ampere on: there it is taken when asked for.
MEASURED_CAPABILITY, LEAST_CAPABILITY = (9, 0), (8, 0)
# From this width on each product fills the GPU, and two at a time are slower. Measured: 768 wide 0.6 to 2.2 % faster,
# 2,048 wide 0.9 % slower (docs/log.md).
WIDE = 2048
P = ParamSpec("P")
R = TypeVar("R")
LossOfTokens = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class Kernels:
    """The chosen path and the reason, which is stored with the run and shown at its start."""

    name: Literal["plain", "fused"]
    reason: str


def has_triton() -> bool:
    """Whether kernels in Triton run on this machine's NVIDIA GPUs."""
    return bool(torch.version.cuda) and find_spec("triton") is not None


def ops_of(precision: str, device: torch.device, ops: Ops = PLAIN) -> Ops:
    """`ops` as a model that trains in `precision` on `device` needs them: masks as data where a kernel takes them,
    heads in chunks whose softmax is one kernel where there is Triton, and linear layers of FP8 for fp8.

    Raises:
        UsageError: fp8 was asked for and `device` cannot.
    """
    if precision in ("bf16", "fp16", "fp8"):
        ops = with_masks_as_data(ops, device)
    if device.type == "cuda" and has_triton():
        from regpt.kernels import triton_head  # Triton is an import that only this needs

        ops = triton_head.in_one_kernel(ops)
    if precision != "fp8":
        return ops
    reason = fp8.obstacle(device)
    if reason is not None:
        raise UsageError(f"train.precision is fp8, but {reason}; set train.precision to bf16 or fp32")
    return replace(ops, linear=fp8.linear)


def select_kernels(
    wanted: KernelsName,
    model: Transformer,
    device: torch.device,
    precision: str,
    *,
    deterministic: bool = False,
    recompute: bool = False,
    offload: bool = False,
) -> Kernels:
    """The path to take.

    Raises:
        UsageError: `fused` was asked for and cannot be had.
    """
    if wanted == "plain":
        return Kernels("plain", "asked for")
    how = {"deterministic": deterministic, "recompute": recompute, "offload": offload}
    reason = device_obstacle(device, precision) or model_obstacle(model, precision, **how)
    if reason is None and wanted == "auto" and torch.cuda.get_device_capability(device) < MEASURED_CAPABILITY:
        reason = f"not measured on {torch.cuda.get_device_name(device)}; train.kernels fused tries it"
    if reason is None and precision == "fp8":
        reason = rounding_obstacle(device, model.config.n_embd)
    if reason is not None and wanted == "fused":
        raise UsageError(f"train.kernels is fused, but {reason}; set train.kernels to plain or auto")
    if reason is not None:
        return Kernels("plain", reason)
    return Kernels("fused", f"cuBLASLt, Triton, CUDA graphs, attention by {attention_library()}")


def device_obstacle(device: torch.device, precision: str) -> str | None:
    """Why no fused path works on `device`; None when one can."""
    if device.type != "cuda" or not torch.version.cuda:
        return f"the fused path needs an NVIDIA GPU, this is {device.type}"
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if capability < LEAST_CAPABILITY:
        return f"the fused path needs compute capability 8.0 or more, {name} has less"
    if precision == "fp8" and capability < fp8.LEAST_CAPABILITY:
        return f"in FP8 the fused path needs compute capability 8.9 or more, {name} has less"
    if not find_spec("triton"):
        return "the fused path needs the package triton"
    return None


def model_obstacle(
    model: Transformer, precision: str, *, deterministic: bool = False, recompute: bool = False, offload: bool = False
) -> str | None:
    """Why no fused path can train `model` so, on whatever device; None when its family's can."""
    family = FAMILIES.get(model.config.family)
    if family is None:
        return f"there is no fused path for models of the family {model.config.family}"
    if model.dtype != torch.float32:
        return f"the fused path trains float32 weights, these are {str(model.dtype).removeprefix('torch.')}"
    if not all(p.requires_grad for p in model.parameters()):
        return "the fused path trains all parameters; this model has frozen ones"
    if deterministic:
        return "the order of its sums is not fixed, train.deterministic is true"
    if recompute:
        return "it keeps what its backward needs, train.activation_checkpointing is true"
    if offload:
        return "it keeps what its backward needs on the GPU, train.activation_offload is true"
    return family.obstacle(model, precision)


def rounding_obstacle(device: torch.device, n_embd: int) -> str | None:
    from regpt.kernels import triton_fp8  # Triton is an import that only this needs

    return triton_fp8.obstacle(device, n_embd)


def attention_library() -> str:
    return "cuDNN" if find_spec("cudnn") else "torch (pip install 'regpt[hopper]' for the faster cuDNN)"


def fused_loss(model: Transformer, device: torch.device, precision: str = "bf16") -> LossOfTokens:
    """The fused `loss_sum(idx, targets, positions, cu_seqlens)` of `model` in bf16 or fp8, where that was selected."""
    return FAMILIES[model.config.family].loss(model, device, precision)


# ---- families --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FusedFamily:
    """The fused path of a family of models.

    Attributes:
        obstacle: why it cannot train this model in this precision, on whatever device; None when it can.
        loss: makes its `loss_sum`; imports the kernels.
    """

    obstacle: Callable[[Transformer, str], str | None]
    loss: Callable[[Transformer, torch.device, str], LossOfTokens]


def gpt2_obstacle(model: Transformer, precision: str) -> str | None:
    config, standard = model.config, ModelConfig().resolved()
    for name in ("activation", "bias", "norm_eps", "tie_embeddings", "attention_scale_by_layer"):
        if (value := getattr(config.resolved(), name)) != getattr(standard, name):
            return f"the fused path computes model.{name} = {getattr(standard, name)!r}, the model has {value!r}"
    if config.resolved().n_inner != 4 * config.n_embd:
        return f"the fused path computes MLPs of 4 n_embd, model.n_inner is {config.n_inner}"
    if precision not in ("bf16", "fp8"):
        return f"the fused path computes in bfloat16 or FP8, train.precision is {precision}"
    if precision == "fp8" and config.n_embd % FP8_MULTIPLE:
        return f"in FP8 the fused path needs n_embd to be a multiple of {FP8_MULTIPLE}"
    return size_obstacle(model)


def llama_obstacle(model: Transformer, precision: str) -> str | None:
    shape = model.config.resolved()
    for name, computed in {"activation": "silu", "bias": "none", "rope_fraction": 1.0, "no_rope_every": 0}.items():
        if (value := getattr(shape, name)) != computed:
            return f"the fused path computes model.{name} = {computed!r}, the model has {value!r}"
    if precision != "bf16":
        return f"the fused path of this family computes in bfloat16, train.precision is {precision}"
    if shape.n_inner % 8:
        return f"the fused path needs n_inner to be a multiple of 8, model.n_inner is {shape.n_inner}"
    return size_obstacle(model)


def size_obstacle(model: Transformer) -> str | None:
    config = model.config.resolved()
    if config.dropout:
        return f"the fused path computes no dropout, model.dropout is {config.dropout}"
    if config.n_embd % 8 or len(model.head_weight) % 8:
        return "the fused path needs n_embd and the (padded) vocabulary to be multiples of 8; set train.pad_vocab"
    if config.head_size % 8 or config.head_size > 128:
        return f"the fused path needs heads of a multiple of 8, up to 128; they are of {config.head_size}"
    return None


def loss_of(make: "Callable[..., FusedLoss]", device: torch.device, *more: Any) -> LossOfTokens:
    """Of a family's `FusedLoss`; see there for what it keeps."""
    from regpt.kernels import triton_ops
    from regpt.kernels.attention import CudnnAttention
    from regpt.kernels.cublaslt import Products, tuned_on
    from regpt.kernels.graphs import GraphedLoss

    attention = CudnnAttention(device) if find_spec("cudnn") else TorchAttention()
    return GraphedLoss(make(Products(device, tuned=tuned_on(device)), attention, triton_ops, *more)).loss_sum


def gpt2_loss(model: Transformer, device: torch.device, precision: str) -> LossOfTokens:
    from regpt.kernels.gpt2 import FusedGPT2

    assert isinstance(model, GPT2)
    if precision == "fp8":
        from regpt.kernels import triton_fp8
        from regpt.kernels.gpt2_fp8 import FusedGPT2FP8

        return loss_of(partial(FusedGPT2FP8, model), device, triton_fp8)
    return loss_of(partial(FusedGPT2, model), device)


def llama_loss(model: Transformer, device: torch.device, precision: str) -> LossOfTokens:
    from regpt.kernels.llama import FusedLlama

    return loss_of(partial(FusedLlama, model, overlap=model.config.n_embd < WIDE), device)


FAMILIES = {  # by `ModelConfig.family`
    "gpt2": FusedFamily(gpt2_obstacle, gpt2_loss),
    "llama": FusedFamily(llama_obstacle, llama_loss),
}


def check_compiler(device: torch.device) -> None:
    """Raise a UserError where torch.compile cannot work: on the CPU it gives g++ the paths of its temporary files
    unquoted (torch 2.13: `torch._inductor.cpp_builder`)."""
    folder = tempfile.gettempdir()
    if device.type == "cpu" and os.name == "posix" and len(folder.split()) > 1:
        raise UserError(
            f"torch.compile cannot use the temporary folder {folder!r}, whose name holds a space; set TMPDIR to a "
            "folder without one, or add --train.compile false (eval: --compile off)"
        )


def compile_for(module: nn.Module, function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """`torch.compile` of a function that reads the parameters of `module`.

    Dynamo traces no tensor whose gradient has another format (bfloat16 weights, sums in float32): it leaves every
    operation with one to the eager path, and says nothing. So it never sees those gradients.
    """
    compiled, parameters = torch.compile(function, **options), list(module.parameters())

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        mixed = [(p, p.grad) for p in parameters if p.grad is not None and p.grad.dtype != p.dtype]
        for p, _ in mixed:
            p.grad = None
        try:
            return compiled(*args, **kwargs)
        finally:
            for p, grad in mixed:
                p.grad = grad

    return call
