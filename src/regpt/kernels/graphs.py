"""The fused micro-batch as CUDA graphs: two launches instead of some 570, so that Python is never waited for.

A shape runs as usual the first time, which tunes and compiles its kernels; the second time it is captured, and replayed
from then on. All graphs share one pool of memory, for only one of them is at work at any time. Whatever a graph cannot
do (gradients that were replaced, a second loss before the backward of the first) runs as it would without graphs.
"""

import gc
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regpt.kernels.fused import FusedLoss, HandWritten

MOST_CAPTURES = 16  # in a process: shapes that keep changing are not worth capturing
Key = tuple[torch.Size, bool, int | None, bool]  # idx, whether positions, length of cu_seqlens, with gradient


class CapturedStep:
    """One shape: the inputs' places, and the graphs that read them.

    Args:
        fused: what is captured; its kernels have run with these shapes before.
        inputs: idx, targets, positions and cu_seqlens as in `Batch`; copied into places of their own.
        gradient: capture the backward, too.
        pool: of the graphs' memory.
    """

    def __init__(self, fused: FusedLoss, inputs: tuple[Tensor | None, ...], gradient: bool, pool: Any):
        self.inputs = [None if given is None else given.clone() for given in inputs]
        device = fused.model.device
        self.scale = torch.ones((), device=device)
        self.graphs = [torch.cuda.CUDAGraph() for _ in range(2 if gradient else 1)]
        # thread_local: other threads (loader, checkpoint) continue with their own calls.
        options: dict[str, Any] = {"pool": pool, "capture_error_mode": "thread_local"}
        idx, targets, positions, cu_seqlens = self.inputs
        assert idx is not None
        assert targets is not None
        with torch.no_grad(), torch.cuda.device(device):
            torch.cuda.current_blas_handle()  # each thread has one of its own, and it cannot be made in a capture
            with torch.cuda.graph(self.graphs[0], **options):
                self.loss, state = fused.forward(idx, targets, positions, cu_seqlens, gradient=gradient)
            if gradient:
                with torch.cuda.graph(self.graphs[1], **options):
                    fused.backward(self.scale, state)

    def forward(self, *inputs: Tensor | None) -> Tensor:
        """The loss, in memory of its own."""
        for place, given in zip(self.inputs, inputs):
            if place is not None and given is not None:
                place.copy_(given, non_blocking=True)
        self.graphs[0].replay()
        return self.loss.clone()

    def backward(self, scale: Tensor) -> None:
        """Add `scale` times the gradient of the loss last computed to every parameter's `.grad`."""
        self.scale.copy_(scale)
        self.graphs[1].replay()


class GraphedLoss:
    """`loss_sum` of `fused`, through graphs where possible.

    Args:
        fused: on a CUDA device.
        capture: makes what has the methods of `CapturedStep`.
        pool: makes a pool of memory.
    """

    def __init__(
        self,
        fused: FusedLoss,
        capture: Callable[..., Any] = CapturedStep,
        pool: Callable[[], Any] = torch.cuda.graph_pool_handle,
    ):
        self.fused, self.capture, self.make_pool = fused, capture, pool
        self.steps: dict[Key, Any] = {}
        self.where: dict[Key, list[int]] = {}  # the weights and gradients that a graph was captured with
        self.seen: set[Key] = set()
        self.refused: set[Key] = set()  # what could not be captured
        self.pool: Any = None
        self.captures_left = MOST_CAPTURES
        # The backward of the last forward, while something still holds it: until then its results must stay.
        self.outstanding: Callable[[], object] = lambda: None

    def loss_sum(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """As `FusedLoss.loss_sum`."""
        gradient = torch.is_grad_enabled()
        key = idx.shape, positions is not None, None if cu_seqlens is None else cu_seqlens.numel(), gradient
        inputs = idx, targets, positions, cu_seqlens
        step = self.step_for(key, inputs)
        if step is None:
            loss = self.fused.loss_sum(*inputs)
            if not gradient:
                self.seen.add(key)
            return loss
        self.fused.copy_weights()

        def compute() -> tuple[Tensor, Callable[[Tensor], None]]:
            loss, backward = step.forward(*inputs), partial(step.backward)
            self.outstanding = weakref.ref(backward)
            return loss, backward

        return HandWritten.apply(self.fused.model.head_weight, compute) if gradient else step.forward(*inputs)  # type: ignore[return-value]

    def step_for(self, key: Key, inputs: tuple[Tensor | None, ...]) -> Any:
        """The captured step of this key, captured now if its kernels are warm; None to run without graphs."""
        shape, *_, gradient = key
        if gradient and any(known[-1] and known[0] != shape for known in self.steps):
            self.release()  # rows of another number: the memory of the former graphs is needed
        if self.outstanding() is not None:
            return None
        where = self.places(gradient)
        if key in self.steps and self.where[key] == where:
            return self.steps[key]
        if key in self.steps and gradient:
            self.release()
        warm = (shape, key[2]) in self.fused.warm if gradient else key in self.seen and self.pool is not None
        if key in self.steps or key in self.refused or not warm or 0 in where or not self.captures_left:
            return None
        return self.captured(key, inputs, where)

    def captured(self, key: Key, inputs: tuple[Tensor | None, ...], where: list[int]) -> Any:
        self.captures_left -= 1
        self.pool = self.pool or self.make_pool()
        self.fused.side.join()
        reason = ""
        try:
            self.steps[key] = self.capture(self.fused, inputs, key[-1], self.pool)
        except Exception as error:  # whatever it is: without graphs the step has worked
            while error.__context__ is not None:  # the first one: to leave a capture that has failed fails, too
                error = error.__context__
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        if reason:  # outside that block: an exception holds on to the tensors of its frames
            self.give_up(key, reason)
            return None
        self.where[key] = where
        return self.steps[key]

    def give_up(self, key: Key, reason: str) -> None:
        self.release()
        self.refused.add(key)
        self.fused.side.reset()
        gc.collect()
        device = self.fused.model.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            end_capture(device)
        warnings.warn(
            f"the step could not be captured as CUDA graphs ({reason}); steps of its shape continue without",
            RuntimeWarning,
            stacklevel=4,
        )

    def places(self, gradient: bool) -> list[int]:
        """Addresses of the weights, and with `gradient` of their gradients; 0 for a missing gradient."""
        parameters = list(self.fused.model.parameters())
        where = [p.data_ptr() for p in parameters]
        return where + [0 if p.grad is None else p.grad.data_ptr() for p in parameters] if gradient else where

    def release(self) -> None:
        """Free all graphs and their memory."""
        self.steps.clear()
        self.where.clear()
        self.pool = None


def end_capture(device: torch.device) -> None:
    """Let `device` draw random numbers again: after a capture that failed its generator waits for one that succeeds."""
    with torch.cuda.device(device), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros((), device=device)
