"""Gradients of a step: the loss of its micro-batches on one path (plain, compiled or fused), differentiated, summed."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, Protocol

import torch
from torch import Tensor

from regpt.data.batch import Batch
from regpt.kernels.select import check_compiler, compile_for, fused_loss
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import Mesh
from regpt.train.activation_offload import OnHost
from regpt.train.config import PrecisionName, WritingPrecision
from regpt.train.objective import LARGEST, NextToken, Objective, Sums
from regpt.train.precision import autocast

LossSum = Callable[[Batch], Sums]


class Backend(Protocol):
    """Where the gradients of a step come from: this process's micro-batches, then the sum over ranks.

    Attributes:
        parameters: those that learn.
    """

    parameters: list[Tensor]

    def forward_backward(self, batches: Iterable[Batch], divisor: Tensor) -> Sums:
        """Set the gradients to those of this process's summed losses over `divisor`; the sums over it, detached, counts
        as they are."""
        ...

    def sum_gradients(self, scale: float = 1.0) -> Tensor:
        """Sum the gradients over ranks, divide by `scale`; their norm."""
        ...

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale the gradients, whose norm is `norm`, to a norm of at most `max_norm`."""
        ...

    def evaluate(self, batch: Batch) -> Tensor:
        """Sum the loss over a micro-batch, as the training step computes it."""
        ...


class DataParallel:
    """Whole parameters in every process; gradients in `.grad`, allocated once and summed over ranks.

    Args:
        loss_sum: an objective's, as it is written, compiled or by fused kernels.
        parameters: those that learn.
        mesh: the processes of this run.
        context: entered around `loss_sum`: autocast, where it does not enter it itself.
        grad_dtype: in which gradients are summed, over micro-batches and ranks; None for that of the parameters.
    """

    def __init__(
        self,
        loss_sum: LossSum,
        parameters: Sequence[Tensor],
        mesh: Mesh,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        grad_dtype: torch.dtype | None = None,
    ):
        self.loss_sum, self.mesh, self.context = loss_sum, mesh, context
        self.parameters = [p for p in parameters if p.requires_grad]
        for p in self.parameters:
            if grad_dtype not in (None, p.grad_dtype):
                p.grad = None  # of an earlier backend
                p.grad_dtype = grad_dtype  # autograd widens each gradient before it adds it
            p.grad = torch.zeros_like(p, dtype=grad_dtype)  # once: backward adds to it, the fused path writes into it

    def forward_backward(self, batches: Iterable[Batch], divisor: Tensor) -> Sums:
        """Each loss is divided *before* its backward: the gradient does not depend on how the batch is split."""
        self.clear_gradients()
        total, extras = torch.zeros_like(divisor), dict[str, Tensor]()
        for batch in batches:
            with self.context():
                loss, further = self.loss_sum(batch.to(self.mesh.device))
            loss = loss / divisor
            loss.backward()
            total += loss.detach()
            for name, value in further.items():  # whole numbers are counts, which stay exact
                if name.startswith(LARGEST):
                    extras[name] = torch.maximum(extras.get(name, value), value)
                    continue
                part = value / divisor if value.is_floating_point() else value
                extras[name] = extras[name] + part if name in extras else part
        return total, extras

    def sum_gradients(self, scale: float = 1.0) -> Tensor:
        self.mesh.sum_gradients(self.parameters)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if scale != 1:  # a power of two: the division is exact
            torch._foreach_mul_(grads, 1 / scale)  # pyright: ignore[reportPrivateImportUsage]
        if grads[0].dtype != torch.bfloat16:
            return torch.nn.utils.get_total_norm(grads)
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        return torch.linalg.vector_norm(torch.stack(norms))

    def clip(self, max_norm: float, norm: Tensor) -> None:
        torch.nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)

    @torch.no_grad()
    def clear_gradients(self) -> None:
        torch._foreach_zero_([p.grad for p in self.parameters])  # pyright: ignore

    def evaluate(self, batch: Batch) -> Tensor:
        with self.context():
            return self.loss_sum(batch)[0]


def make_backend(
    model: Transformer,
    objective: Objective,
    mesh: Mesh,
    precision: PrecisionName,
    *,
    compile: bool = False,
    kernels: Literal["plain", "fused"] = "plain",
    deterministic: bool = False,
    grad_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> DataParallel:
    """The path of `objective` that the arguments name; `deterministic`: compiled without choices by timing; `offload`:
    on the plain path, what forward keeps for backward is in the host's memory."""
    parameters = list(model.parameters())
    if not compile and kernels == "plain":
        on_host = OnHost(parameters, mesh.device) if offload else nullcontext()

        @contextmanager
        def context() -> Iterator[None]:
            with autocast(precision, mesh.device), on_host:
                yield

        return DataParallel(objective.loss_sum, parameters, mesh, context, grad_dtype)
    of_path = path_of(model, objective, precision, mesh.device, compile, kernels, deterministic=deterministic)
    return DataParallel(of_path, parameters, mesh, grad_dtype=grad_dtype)


def make_loss_sum(
    model: Transformer,
    precision: PrecisionName | WritingPrecision,
    device: torch.device,
    compile: bool,
    kernels: Literal["plain", "fused"] = "plain",
) -> Callable[[Batch], Tensor]:
    """`loss_sum(batch)` for evaluation: next-token cross-entropy in nats over valid targets, a float32 scalar."""
    of_path = path_of(model, NextToken(model), precision, device, compile, kernels)
    return lambda batch: of_path(batch)[0]


def path_of(
    model: Transformer,
    objective: Objective,
    precision: PrecisionName | WritingPrecision,
    device: torch.device,
    compile: bool,
    kernels: Literal["plain", "fused"],
    *,
    deterministic: bool = False,
) -> LossSum:
    """`objective.loss_sum` in `precision`, on one path.

    Compiled, it is the forward and the loss in one graph; the model itself is left as it is, so sampling and evaluation
    go on using it. Fused (`kernels.gpt2`) computes next-token cross-entropy; gradients go straight to `.grad`.
    """
    if kernels == "fused":
        of_tokens = fused_loss(model, device, precision)
        return lambda batch: (of_tokens(batch.idx, batch.targets, batch.positions, batch.cu_seqlens), {})

    def loss_sum(batch: Batch) -> Sums:
        with autocast(precision, device):
            return objective.loss_sum(batch)

    if compile:
        check_compiler(device)
    return compiled(loss_sum, model, deterministic) if compile else loss_sum


def compiled(loss_sum: LossSum, model: Transformer, deterministic: bool = False) -> LossSum:
    """`loss_sum`, compiled once for a shape of idx, however many documents a batch holds."""
    # Inductor's option leaves out every choice that is made by timing kernels and changes results.
    options: dict[str, str | int | bool | Callable[..., object]] = {"deterministic": True}
    static = compile_for(model, loss_sum, dynamic=False, options=options if deterministic else None)

    @functools.wraps(loss_sum)
    def call(batch: Batch) -> Sums:
        if batch.cu_seqlens is not None:
            torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)  # else each new length would compile everything again
        return static(batch)

    return call
