"""torch.compile, Triton, FlexAttention, process groups: what is built or started when it is first used."""

import time
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from regpt.parallel.backends import sum_alone
from regpt.tools.doctor.device import SHAPE, TOLERANCE, close, devices, exact_attention, name_of, numbers
from regpt.tools.doctor.trial import Trial, attempt


def compile_trials() -> Iterator[Trial]:
    device = devices()[0]
    yield attempt("compiler", "torch.compile", lambda: compiled(device))
    yield attempt("compiler", "Triton", triton)


def flex_trials() -> Iterator[Trial]:
    device = devices()[0]
    yield attempt(name_of(device), "attention FlexAttention", lambda: flex_attention(device))


def process_trials() -> Iterator[Trial]:
    yield attempt("processes", "gloo", lambda: f"sum of one process: {sum_alone('gloo', torch.device('cpu')):g}")
    if torch.cuda.is_available():
        yield attempt("processes", "nccl", lambda: f"sum of one process: {sum_alone('nccl', devices()[0]):g}")


def compiled(device: torch.device) -> str:
    """A function with a gradient, compiled without a cache of it in this process, against itself uncompiled."""

    def function(x: Tensor) -> Tensor:
        return (torch.nn.functional.gelu(x) * x.sin()).sum()

    x, y = (numbers(0, 64, 64).to(device).requires_grad_() for _ in range(2))
    begin = time.perf_counter()
    torch.compile(function)(x).backward()
    seconds = time.perf_counter() - begin
    function(y).backward()
    assert x.grad is not None
    assert y.grad is not None
    return f"on {name_of(device)} in {seconds:.1f} s, {close(x.grad.double().cpu(), y.grad.double().cpu(), 1e-4)}"


def triton() -> str:
    if find_spec("triton") is None:
        raise ModuleNotFoundError("triton is not installed; torch.compile needs it on GPUs (it comes with torch there)")
    import triton  # pyright: ignore[reportMissingImports]

    return str(triton.__version__)


def flex_attention(device: torch.device) -> str:
    """Causal by a block mask; compiled on GPUs, where it is of use only so."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    T = SHAPE[2]
    mask = create_block_mask(causal, None, None, T, T, device=device.type)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k, v = (numbers(seed, *SHAPE).to(device, dtype) for seed in range(3))
    gradient = device.type == "cuda"
    leaves = [x.requires_grad_(gradient) for x in (q, k, v)]
    run = torch.compile(flex) if device.type == "cuda" else flex
    out = run(*leaves, block_mask=mask)  # type: ignore[call-overload]  # pyright: ignore
    assert isinstance(out, Tensor)
    if gradient:
        out.sum().backward()
    how = "compiled, forward and backward" if gradient else "forward, uncompiled"
    exact = exact_attention(*(x.detach().double().cpu() for x in leaves))
    return f"{how}, {close(out.detach().double().cpu(), exact, TOLERANCE['bf16'])}"
