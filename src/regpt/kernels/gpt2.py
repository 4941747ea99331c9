"""GPT-2's loss and its gradients as one hand-written function: the fast version of `Transformer.hidden` and
`linear_cross_entropy`.

- Products run in bfloat16 with float32 sums, on copies of the weights that are made once an update.
- The residual stream is kept in bfloat16; each residual is added inside the product that makes its other half, before
  rounding. (Under autocast the plain path keeps the stream in float32.)
- GELU and its derivative are epilogues of products; LayerNorm's backward also adds the residual's gradient and sums the
  bias gradient of the product before it.
- The logits are written by one product, read once and overwritten by their gradient, and read by two products.
- Weight gradients are added in float32 to `parameter.grad` by the products themselves. So only `.grad` holds them:
  `torch.autograd.grad` finds nothing, and hooks on parameters do not run.

One block, row by row (N = B·T rows; shapes: the glossary in `regpt.model`):

    h₁ = LN₁(x)   qkv = h₁·Wₐᵀ + bₐ   y = attention(qkv)   m = x + y·Wₚᵀ + bₚ
    h₂ = LN₂(m)   u = h₂·W_fᵀ + b_f   g = GELU(u)          x' = m + g·Wₒᵀ + bₒ

With dz for ∂loss/∂z, a product z = a·Wᵀ + b has da = dz·W, dW = dzᵀ·a and db = Σₙ dz. The backward walks down the
da's, each of which the next step waits for; nothing waits for a dW or a db, so they run on a second stream.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regpt.model.gpt2 import GPT2, Block, CausalSelfAttention
from regpt.model.masks import AttentionMask
from regpt.model.ops import IGNORE_INDEX

NORM_EPS = 1e-5  # the value in OpenAI's code


@dataclass
class BlockState:
    """Activations of one block that its backward reads: inputs of products and norms, (N, …) bfloat16, (N,) float32."""

    x: Tensor
    norm_1: tuple[Tensor, Tensor]  # mean and 1/standard deviation of each row
    h_1: Tensor
    qkv: Tensor
    attended: Tensor  # y
    stats: Tensor  # of the softmax, as the attention made them
    x_mid: Tensor  # m
    norm_2: tuple[Tensor, Tensor]
    h_2: Tensor
    before_gelu: Tensor  # u
    after_gelu: Tensor  # g


@dataclass
class ForwardState:
    """Activations of one micro-batch; the backward takes it apart, so that memory is freed on the way."""

    idx: Tensor
    positions: Tensor | None
    mask: AttentionMask
    blocks: list[BlockState]
    x: Tensor  # the last norm's input, result, mean and 1/standard deviation
    h: Tensor | None
    norm: tuple[Tensor, Tensor]
    dlogits: Tensor | None  # (N, V)


class FusedGPT2:
    """The loss of `model`, a GPT-2 on one CUDA device with float32 weights.

    Args:
        model: its parameters are read, and their `.grad` written.
        products: a `cublaslt.Products` of the same device, or what has its signature.
        attention: a `CudnnAttention` or `TorchAttention`.
        between: the module `triton_ops`, or what has its functions.
        dtype: of products and activations.
        overlap: compute the gradients of weights on a second stream, next to those of activations: kernels that memory
            bounds then run while a product is bound by arithmetic.
    """

    def __init__(
        self,
        model: GPT2,
        products: Any,
        attention: Any,
        between: Any,
        dtype: torch.dtype = torch.bfloat16,
        *,
        overlap: bool = True,
    ):
        self.model, self.products, self.attention, self.between, self.dtype = model, products, attention, between, dtype
        self.blocks: list[Any] = list(model.h)
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        multiplied = [model.wte.weight, *(p for layer in layers for p in layer.parameters())]
        self.copies: dict[Tensor, Tensor] = {p: torch.empty_like(p, dtype=dtype) for p in multiplied}
        self.copied: list[tuple[int, int]] = []  # address and version of each parameter when it was copied
        self.side = SideStream(model.device, overlap)
        self.warm: set[tuple[torch.Size, int | None]] = set()  # shapes that have added to gradients: idx, cu_seqlens

    def loss_sum(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy in nats summed over the valid targets (B, T), a float32 scalar; arguments as in `Batch`."""
        self.copy_weights()
        self.side.join()  # the last backward may have been broken off, when out of memory
        inputs = idx, targets, positions, cu_seqlens

        def compute() -> tuple[Tensor, Callable[[Tensor], None]]:
            loss, state = self.forward(*inputs, gradient=True)
            return loss, partial(self.backward, state=state)

        if torch.is_grad_enabled():
            return HandWritten.apply(self.model.wte.weight, compute)  # type: ignore[return-value]
        return self.forward(*inputs, gradient=False)[0]

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Renew the copies when a parameter has changed since: whoever writes to a parameter raises its version."""
        now = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        if now != self.copied:
            self.renew_copies()
            self.copied = now  # last: after an out-of-memory error they are renewed again

    def renew_copies(self) -> None:
        """Recompute everything that is derived from the weights."""
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.copies.values()), list(self.copies)
        )

    def forward(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, *, gradient: bool
    ) -> tuple[Tensor, ForwardState]:
        """The loss, and the state for `backward`; without `gradient` the state is unusable."""
        model, mask = self.model, AttentionMask(documents=cu_seqlens)
        x = self.between.embed(idx, positions, model.wte.weight, model.wpe.weight, self.dtype)  # (N, C)
        states = []
        for block in self.blocks:
            x, state = self.block_forward(block, x, idx.shape, mask, gradient=gradient)
            states += [state] if gradient else []
        h, norm = self.between.layer_norm(x, model.ln_f.weight, model.ln_f.bias, NORM_EPS)
        head = self.copies[model.wte.weight]
        logits = self.products(h, head, h.new_empty(len(h), len(head)), transpose_b=True)  # (N, V)
        losses = self.between.cross_entropy(
            logits, targets.flatten(), model.config.vocab_size, IGNORE_INDEX, gradient=gradient
        )
        return losses.sum(), ForwardState(idx, positions, mask, states, x, h, norm, logits)

    def block_forward(
        self, block: Block, x: Tensor, shape: torch.Size, mask: AttentionMask, *, gradient: bool
    ) -> tuple[Tensor, BlockState]:
        """The block's output (N, C), and the state for `block_backward`; here `gradient` makes no difference."""
        attn, mlp = block.attn, block.mlp
        h_1, norm_1 = self.between.layer_norm(x, block.ln_1.weight, block.ln_1.bias, NORM_EPS)
        qkv = self.linear(h_1, attn.c_attn)  # (N, 3·C)
        attended, stats = self.attention.forward(qkv.view(*shape, -1), attn.n_head, mask)
        attended = attended.view(x.shape)
        x_mid = self.linear(attended, attn.c_proj, residual=x)
        h_2, norm_2 = self.between.layer_norm(x_mid, block.ln_2.weight, block.ln_2.bias, NORM_EPS)
        before_gelu, after_gelu = (h_2.new_empty(len(x), mlp.c_fc.out_features) for _ in range(2))
        weight, bias = self.copies[mlp.c_fc.weight], self.copies[mlp.c_fc.bias]
        self.products(h_2, weight, after_gelu, transpose_b=True, epilogue="gelu_aux_bias", bias=bias, aux=before_gelu)
        x_out = self.linear(after_gelu, mlp.c_proj, residual=x_mid)
        state = BlockState(
            x, norm_1, h_1, qkv, attended, stats, x_mid, norm_2, h_2, before_gelu, after_gelu
        )  # fmt: skip
        return x_out, state

    def linear(self, x: Tensor, layer: nn.Linear, residual: Tensor | None = None) -> Tensor:
        """x · weightᵀ + bias + residual, (N, out)."""
        out = x.new_empty(len(x), layer.out_features)
        weight, bias = self.copies[layer.weight], self.copies[layer.bias]
        return self.products(x, weight, out, transpose_b=True, epilogue="bias", bias=bias, add=residual)

    def backward(self, scale: Tensor, state: ForwardState) -> None:
        """Add `scale` times the gradient of the summed loss to every parameter's `.grad`; takes `state` apart."""
        model = self.model
        adding = all(p.grad is not None for p in model.parameters())
        dh = self.head_backward(scale, state)
        dx, sums = self.norm_backward(dh, state.x, model.ln_f, state.norm, None)
        self.side.join()  # the logits, the largest tensor of all, are freed before the blocks take memory
        above: Any = model.ln_f
        for block in reversed(self.blocks):
            # The norm above has read this block's output x', so its sums hold Σₙ dx', the gradient of bₒ.
            self.finish_sums(sums, above, block.mlp.c_proj.bias)
            dx, sums = self.block_backward(block, dx, state.blocks.pop(), state.idx.shape, state.mask)
            self.side.join_previous()
            above = block.ln_1
        self.finish_sums(sums, above, None)  # no product made the input of the first block
        with self.side():  # after the head's gradient, which is on the same stream and writes the tied weight
            dwpe, add = self.gradient(model.wpe.weight)
            if not add:
                dwpe.zero_()  # `embed_backward` only adds
            self.between.embed_backward(dx, state.idx, state.positions, self.gradient(model.wte.weight)[0], dwpe)
        self.side.join()
        if adding:  # every kernel of this shape is now tuned and compiled in its adding form: it may be captured
            documents = state.mask.documents
            self.warm.add((state.idx.shape, None if documents is None else documents.numel()))

    def head_backward(self, scale: Tensor, state: ForwardState) -> Tensor:
        """Gradient of the last norm's result h, (N, C); that of the head goes to the embedding, which it is tied to.

        logits = h·Wᵀ, and the loss left dlogits = softmax - onehot in their memory. `scale` (1 / valid targets) enters
        here, as a factor of both products, and reaches everything below through dh.
        """
        weight, h, dlogits = self.model.wte.weight, state.h, state.dlogits
        assert h is not None
        assert dlogits is not None
        state.h = state.dlogits = None
        with self.side(dlogits, h, scale):
            grad, add = self.gradient(weight)
            self.products(dlogits, h, grad, transpose_a=True, scale=scale, add=grad if add else None)
        return self.products(dlogits, self.copies[weight], torch.empty_like(h), scale=scale)

    def block_backward(
        self, block: Block, dx: Tensor, state: BlockState, shape: torch.Size, mask: AttentionMask
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the block's input x, and the partial sums of its first norm; `dx` is that of its output x'.

        Each weight gradient is launched as soon as its operands exist, after the product that the main stream waits
        for: it fills the gaps of the kernels that follow.
        """
        attn, mlp = block.attn, block.mlp
        # MLP: du = (dx'·Wₒ) ∘ GELU'(u) in one product, then dh₂ = du·W_f.
        dbefore = torch.empty_like(state.before_gelu)  # du
        weight = self.copies[mlp.c_proj.weight]
        self.products(dx, weight, dbefore, epilogue="dgelu", aux=state.before_gelu)
        self.weight_gradient(dx, state.after_gelu, mlp.c_proj.weight)
        with self.side(dbefore):
            self.between.add_column_sums(dbefore, *self.gradient(mlp.c_fc.bias))
        self.weight_gradient(dbefore, state.h_2, mlp.c_fc.weight)
        dh = self.products(dbefore, self.copies[mlp.c_fc.weight], torch.empty_like(dx))
        # x' = m + …: dm = dx' + the norm's part, in one kernel. It also leaves Σₙ dm, the gradient of bₚ.
        dx, sums = self.norm_backward(dh, state.x_mid, block.ln_2, state.norm_2, dx)
        sums = self.finish_sums(sums, block.ln_2, attn.c_proj.bias)
        # Attention: dy = dm·Wₚ, then dqkv, then dh₁ = dqkv·Wₐ; m = x + … again adds dm to the norm's part.
        dattended = self.products(dx, self.copies[attn.c_proj.weight], torch.empty_like(dx))
        self.weight_gradient(dx, state.attended, attn.c_proj.weight)
        given = (t.view(*shape, -1) for t in (dattended, state.qkv, state.attended))
        dqkv = self.attention.backward(*given, state.stats, attn.n_head, mask).view(state.qkv.shape)
        self.attention_bias_gradient(dqkv, sums, attn)
        self.weight_gradient(dqkv, state.h_1, attn.c_attn.weight)
        dh = self.products(dqkv, self.copies[attn.c_attn.weight], torch.empty_like(dx))
        return self.norm_backward(dh, state.x, block.ln_1, state.norm_1, dx)

    def norm_backward(
        self, dh: Tensor, x: Tensor, norm: Any, statistics: tuple[Tensor, Tensor], dresidual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the norm's input x, `dresidual` added; and partial column sums for `finish_sums`."""
        return self.between.layer_norm_backward(dh, x, norm.weight, *statistics, dresidual)

    def attention_bias_gradient(self, dqkv: Tensor, sums: Tensor, attn: CausalSelfAttention) -> None:
        """Gradients of the three parts of bₐ; only the queries' takes a pass over dqkv.

        Keys: a query's scores q·(k + b) all gain the same q·b, which the softmax takes out again, so the gradient is 0.
        Values: the weights of a query's values add up to 1, so y gains b, and db = Σₙ dy = (Σₙ dm)·Wₚ; the second norm
        has left Σₙ dm in `sums`.
        """
        C = attn.c_proj.in_features
        with self.side(dqkv, sums):
            grad, add = self.gradient(attn.c_attn.bias)
            if not add:
                grad.zero_()
            self.between.add_column_sums(dqkv[:, :C], grad[:C], add=True)
            grad[2 * C :].addmv_(attn.c_proj.weight.T, sums[:, 2].sum(0))

    def weight_gradient(self, dy: Tensor, x: Tensor, weight: Tensor) -> None:
        """dW = dyᵀ·x, added to `weight.grad` in float32."""
        with self.side(dy, x):
            grad, add = self.gradient(weight)
            self.products(dy, x, grad, transpose_a=True, add=grad if add else None)

    def finish_sums(self, sums: Tensor, norm: Any, bias_before: Tensor | None) -> Tensor:
        """Add the partial sums of `norm_backward` up: gradients of the norm's weight and bias, and of the bias of the
        product whose result it normalised; returns fewer partial sums.
        """
        outs = [norm.weight, norm.bias] + ([] if bias_before is None else [bias_before])
        with self.side(sums):
            return self.between.add_partial_sums(sums, [self.gradient(p) for p in outs])

    def gradient(self, p: Tensor) -> tuple[Tensor, bool]:
        """The parameter's gradient, and whether it already holds something to add to."""
        if p.grad is not None:
            return p.grad, True
        p.grad = torch.empty_like(p)  # the first to write it need not read it
        return p.grad, False


class SideStream:
    """A second CUDA stream. Without one (`overlap` off, or no GPU) everything runs in order on the current stream."""

    def __init__(self, device: torch.device, overlap: bool):
        self.stream = torch.cuda.Stream(device) if overlap and device.type == "cuda" else None
        # The allocator knows the main stream only: a tensor freed there while the side stream still reads it would be
        # overwritten. So they are held until the main stream has waited.
        self.held: list[tuple[Tensor, ...]] = []
        self.previous: tuple[Any, list[tuple[Tensor, ...]]] | None = None  # an event, what it waits to release

    @contextmanager
    def __call__(self, *used: Tensor) -> Iterator[None]:
        """Launch kernels on the side stream, after everything launched so far; holds the tensors that they use."""
        if self.stream is None:
            yield
            return
        self.held.append(used)
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def join_previous(self) -> None:
        """Let the main stream wait for the work up to the last call, not for later work: the side stream may lag one
        block behind, and at most two blocks' tensors are held."""
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
        """Let the main stream wait for all work of the side stream, and release what it used."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self.reset()

    def reset(self) -> None:
        """Release everything without waiting: after a capture that failed nothing was launched."""
        self.held = []
        self.previous = None


class HandWritten(torch.autograd.Function):
    """Ties a loss whose backward is written by hand to autograd, through one parameter; gradients go to `.grad`.

    `compute()` returns the loss, and a function that adds its gradients, times a scale, to the parameters'.
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
