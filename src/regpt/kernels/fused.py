"""A loss and its gradients as one hand-written function: what the fused paths of all families share.

- Matrix products (GEMMs) run in bfloat16 with float32 accumulation, on bfloat16 copies of the weights, renewed once an
  update.
- The logits are written by one product and overwritten in place by their gradient during the forward. Up to 65,536
  logits a token they are kept whole, and the backward's two products read them, times the loss's gradient. Of larger
  vocabularies each chunk of rows is read at once, as in `model.head`: the forward keeps the gradients of a loss of 1.
- Weight gradients are added in float32 to `parameter.grad` by the products themselves. So they exist only in
  `.grad`: `torch.autograd.grad` returns nothing, and hooks on parameters do not run.
- The backward's critical path is the chain of the activations' gradients; no other kernel needs those of weights, so
  they run on a side stream.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regpt.model.head import CHUNK_MULTIPLE, SMALL_VOCAB
from regpt.model.masks import AttentionMask
from regpt.model.transformer import Transformer

CHUNK_BYTES = 2**30  # of a chunk's logits: 4,096 rows of 128,256 in bfloat16


class FusedLoss:
    """The loss of `model` on one CUDA device with float32 weights; families add `matmul_weights`, `forward` and
    `backward`.

    Args:
        model: its parameters are read, and their `.grad` written.
        products: matrix multiplication, a `cublaslt.Products` of the same device or a callable with its signature.
        attention: a `CudnnAttention` or `TorchAttention`.
        between: kernels between the products, the module `triton_ops` or an object with its functions.
        dtype: of products and activations.
        overlap: compute the gradients of weights on a side stream: memory-bound kernels of one stream then overlap with
            compute-bound products of the other.
    """

    def __init__(
        self,
        model: Transformer,
        products: Any,
        attention: Any,
        between: Any,
        dtype: torch.dtype = torch.bfloat16,
        *,
        overlap: bool = True,
    ):
        self.model: Any = model
        self.products, self.attention, self.between, self.dtype = products, attention, between, dtype
        self.blocks: list[Any] = list(model.blocks)
        self.copies: dict[Tensor, Tensor] = {}  # those of one group are one matrix, in `joined` under the first
        self.joined: dict[Tensor, Tensor] = {}
        for group in self.matmul_weights():
            rows = [len(p) for p in group]
            whole = group[0].new_empty(sum(rows), *group[0].shape[1:], dtype=dtype)
            self.joined[group[0]] = whole
            self.copies |= dict(zip(group, whole.split(rows)))
        self.copied: list[tuple[int, int]] = []  # address and version of each parameter at its last copy
        self.side = SideStream(model.device, overlap)
        self.warm: set[tuple[torch.Size, int | None]] = set()  # shapes ready for CUDA graph capture: idx, cu_seqlens

    def matmul_weights(self) -> list[list[Tensor]]:
        """What products read, in groups of which one product reads all, one below the other."""
        raise NotImplementedError

    def forward(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, *, gradient: bool
    ) -> tuple[Tensor, Any]:
        """Return the loss and the state for `backward`, which is valid only with `gradient`."""
        raise NotImplementedError

    def backward(self, scale: Tensor, state: Any) -> None:
        """Add `scale` times the gradient of the summed loss to every parameter's `.grad`; consumes `state`."""
        raise NotImplementedError

    def loss_sum(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy in nats summed over the valid targets (B, T), a float32 scalar; arguments as in `Batch`."""
        self.copy_weights()
        self.side.join()  # an OOM may have interrupted the last backward
        inputs = idx, targets, positions, cu_seqlens

        def compute() -> tuple[Tensor, Callable[[Tensor], None]]:
            loss, state = self.forward(*inputs, gradient=True)
            return loss, partial(self.backward, state=state)

        if torch.is_grad_enabled():
            return HandWritten.apply(self.model.head_weight, compute)  # type: ignore[return-value]
        return self.forward(*inputs, gradient=False)[0]

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Renew the copies if a parameter has changed: every in-place write increments the tensor's `_version`."""
        now = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        if now != self.copied:
            self.renew_copies()
            self.copied = now  # last, so that an OOM above leaves the copies marked as stale

    def renew_copies(self) -> None:
        """Recompute everything that is derived from the weights."""
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.copies.values()), list(self.copies)
        )

    # ---- the head --------------------------------------------------------------------------------------------------

    def head_forward(self, h: Tensor, targets: Tensor, *, gradient: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The summed loss of the last norm's output h (N, C), and what `head_backward` takes: dlogits = softmax -
        onehot (N, V), unscaled; or, in chunks, the gradients of h and of the weight of a loss of 1."""
        head = self.copies[self.model.head_weight]
        n_vocab, targets = self.model.config.vocab_size, targets.flatten()
        if len(head) <= SMALL_VOCAB:
            logits = self.products(h, head, h.new_empty(len(h), len(head)), transpose_b=True)  # (N, V)
            losses = self.between.cross_entropy(logits, targets, n_vocab, gradient=gradient)
            return losses.sum(), (logits,)
        rows = even_chunks(len(h), CHUNK_BYTES // (len(head) * h.itemsize))
        buffer = h.new_empty(rows, len(head))
        dh = torch.empty_like(h if gradient else h[:0])
        dweight = torch.empty_like(head if gradient else head[:0], dtype=self.model.head_weight.dtype)
        losses = []
        for first in range(0, len(h), rows):
            part = slice(first, min(first + rows, len(h)))
            logits = self.products(h[part], head, buffer[: part.stop - first], transpose_b=True)
            losses.append(self.between.cross_entropy(logits, targets[part], n_vocab, gradient=gradient))
            if gradient:
                self.products(logits, head, dh[part])
                self.products(logits, h[part], dweight, transpose_a=True, add=dweight if first else None)
        return torch.cat(losses).sum(), (dh, dweight)

    def head_backward(self, scale: Tensor, state: Any) -> Tensor:
        """Return the gradient (N, C) of the last norm's output h; add the head's to its weight's. Both `state.h` and
        `state.head` are taken: the side stream holds them until it has used them.

        `scale`, the gradient of the summed loss (1 / valid targets), is a factor of both; all other gradients get it
        through dh.
        """
        h, kept, state.h, state.head = state.h, state.head, None, ()
        weight = self.model.head_weight
        if len(kept) == 1:
            (dlogits,) = kept
            with self.side(dlogits, h, scale):
                grad, add = self.gradient(weight)
                self.products(dlogits, h, grad, transpose_a=True, scale=scale, add=grad if add else None)
            return self.products(dlogits, self.copies[weight], torch.empty_like(h), scale=scale)
        dh, dweight = kept
        with self.side(dweight, scale):
            grad, add = self.gradient(weight)
            if add:
                grad.addcmul_(dweight, scale)
            else:
                torch.mul(dweight, scale, out=grad)
        return dh.mul_(scale)

    # ---- gradients of weights --------------------------------------------------------------------------------------

    def weight_gradient(self, dy: Tensor, x: Tensor, *weights: Tensor) -> None:
        """Add dW = dyᵀ·x to the `.grad` of one group of weights, in float32."""
        with self.side(dy, x):
            grad, add = self.gradient(weights[0]) if len(weights) == 1 else self.joined_gradient(weights)
            self.products(dy, x, grad, transpose_a=True, add=grad if add else None)

    def gradient(self, p: Tensor) -> tuple[Tensor, bool]:
        """Return the parameter's gradient, and whether to add to it; a new one is uninitialised: overwrite it."""
        if p.grad is not None:
            return p.grad, True
        p.grad = torch.empty_like(p)  # not zeroed: the first kernel overwrites it
        return p.grad, False

    def joined_gradient(self, weights: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """`gradient` of a group: one matrix, of which each weight's `.grad` is a slice from here on."""
        grads = [p.grad for p in weights]
        whole = grads[0]._base if grads[0] is not None else None
        rows = [len(p) for p in weights]
        if whole is not None and whole.shape == (sum(rows), *weights[0].shape[1:]):
            parts = whole.split(rows)
            if all(g is not None and g.data_ptr() == part.data_ptr() for g, part in zip(grads, parts)):
                return whole, True
        whole = weights[0].new_empty(sum(rows), *weights[0].shape[1:])
        add = any(g is not None for g in grads)
        for p, g, part in zip(weights, grads, whole.split(rows)):
            if g is not None:
                part.copy_(g)
            elif add:
                part.zero_()
            p.grad = part
        return whole, add

    def adding(self) -> bool:
        """Whether every gradient is there to be added to."""
        return all(p.grad is not None for p in self.model.parameters())

    def note_warm(self, idx: Tensor, mask: AttentionMask) -> None:
        """Kernels that accumulate are now tuned and compiled for this shape: it may be captured."""
        self.warm.add((idx.shape, None if mask.documents is None else mask.documents.numel()))


def even_chunks(n: int, most: int) -> int:
    """Rows of equal chunks of n, at most `most`, in whole tiles of products where that is possible."""
    rows = math.ceil(n / math.ceil(n / max(1, most)))
    tiled = math.ceil(rows / CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    return min(tiled if tiled <= most else rows, n)


class SideStream:
    """A second CUDA stream; without `overlap` or without a GPU, its work runs in order on the current stream."""

    def __init__(self, device: torch.device, overlap: bool):
        self.stream = torch.cuda.Stream(device) if overlap and device.type == "cuda" else None
        # The caching allocator tracks only the stream that allocated a tensor: one freed while the side stream still
        # reads it would be overwritten. So tensors are held until the main stream has waited for the side stream.
        self.held: list[tuple[Tensor, ...]] = []
        self.previous: tuple[Any, list[tuple[Tensor, ...]]] | None = None  # an event; tensors to release after it

    @contextmanager
    def __call__(self, *used: Tensor) -> Iterator[None]:
        """Launch kernels on the side stream, after all work launched so far; hold the tensors that they use."""
        if self.stream is None:
            yield
            return
        self.held.append(used)
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def join_previous(self) -> None:
        """Make the main stream wait for the work before the previous call only.

        The side stream may lag by one block, and the tensors of at most two blocks are held.
        """
        if self.stream is None:
            return
        event = self.stream.record_event()
        if self.previous is not None:
            previous, tensors = self.previous
            torch.cuda.current_stream(self.stream.device).wait_event(previous)
            tensors.clear()
        self.previous = event, self.held
        self.held = []

    def join(self) -> None:
        """Make the main stream wait for all work of the side stream; release the held tensors."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self.reset()

    def reset(self) -> None:
        """Release the held tensors without waiting: a failed CUDA graph capture has launched nothing."""
        self.held = []
        self.previous = None


class HandWritten(torch.autograd.Function):
    """Connects a loss with a hand-written backward to autograd, through one parameter (`anchor`).

    `compute()` returns the loss and a function that adds its gradients, times a scale, to the `.grad` of all
    parameters; autograd itself receives no gradient.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, compute: Callable[[], tuple[Tensor, Callable[[Tensor], None]]]) -> Tensor:
        loss, ctx.add_gradients = compute()
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.add_gradients is None:
            raise RuntimeError("the fused path allows one backward through a loss: its logits were overwritten")
        add_gradients, ctx.add_gradients = ctx.add_gradients, None
        add_gradients(scale)
        return None, None
