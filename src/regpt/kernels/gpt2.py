"""GPT-2's loss and its gradients as one hand-written function: the fast path behind `model/` and `model/loss.py`.

What it computes is `Transformer.hidden` and `linear_cross_entropy`; how:

- Products run in bfloat16 with float32 sums, on copies of the weights that are made once an update.
- The residual stream is kept in bfloat16; each residual is added inside the product that makes its other half, before
  rounding. (Under autocast the plain path keeps the stream in float32.)
- GELU and its derivative are part of the products beside them; LayerNorm's backward also adds the residual's gradient
  and sums the bias gradient of the product before it.
- The logits are written by one product, read once and overwritten by their gradient, and read by two products.
- Weight gradients are added in float32 to `parameter.grad` by the products themselves. So only `.grad` holds them:
  `torch.autograd.grad` finds nothing, and hooks on parameters do not run.

Shapes: the glossary in `regpt.model`; N = B·T.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regpt.model.masks import AttentionMask
from regpt.model.ops import IGNORE_INDEX
from regpt.model.transformer import NORM_EPS, Block, CausalSelfAttention, Transformer


@dataclass
class BlockState:
    """What the backward of one block needs: its inputs to products and norms, (N, …) bfloat16 and (N,) float32."""

    x: Tensor
    norm_1: tuple[Tensor, Tensor]  # mean and 1/standard deviation
    h_1: Tensor
    qkv: Tensor
    attended: Tensor
    stats: Tensor
    x_mid: Tensor
    norm_2: tuple[Tensor, Tensor]
    h_2: Tensor
    before_gelu: Tensor
    after_gelu: Tensor


@dataclass
class ForwardState:
    """What the backward of one micro-batch needs; the backward takes it apart, so that memory is freed as it goes."""

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
        overlap: compute the gradients of weights on a second stream, beside those of activations: what is bound by
            memory then runs while a product is bound by arithmetic.
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
        self.model, self.products, self.attention, self.between, self.dtype = model, products, attention, between, dtype
        self.blocks: list[Any] = list(model.h)
        matrices = [
            p for name, p in model.named_parameters() if not name.startswith(("wpe", "ln_")) and ".ln_" not in name
        ]
        self.copies: dict[Tensor, Tensor] = {p: torch.empty_like(p, dtype=dtype) for p in matrices}
        self.copied: list[tuple[int, int]] = []
        device = model.wte.weight.device
        self.side = torch.cuda.Stream(device) if overlap and device.type == "cuda" else None
        self.used_beside: list[Any] = []  # tensors that must not be freed before the side stream has used them
        self.before: tuple[Any, list[Any]] | None = None
        self.warm: set[tuple[torch.Size, int | None]] = set()  # shapes that have added to gradients: idx, cu_seqlens

    def loss_sum(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy in nats summed over the valid targets (B, T), a float32 scalar; arguments as in `Batch`."""
        self.copy_weights()
        self.join()  # if the last backward was broken off, by a lack of memory say
        inputs = idx, targets, positions, cu_seqlens

        def compute() -> tuple[Tensor, Callable[[Tensor], None]]:
            loss, state = self.forward(*inputs, gradient=True)
            return loss, partial(self.backward, state=state)

        if torch.is_grad_enabled():
            return HandWritten.apply(self.model.wte.weight, compute)  # type: ignore[return-value]
        return self.forward(*inputs, gradient=False)[0]

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Renew the copies when a parameter was changed since, by whoever writes to the parameter itself."""
        now = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        if now != self.copied:
            self.renew_copies()
            self.copied = now  # last: what ran out of memory is done again

    def renew_copies(self) -> None:
        """Make everything that is kept of the weights from the weights."""
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.copies.values()), list(self.copies)
        )

    def forward(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, *, gradient: bool
    ) -> tuple[Tensor, ForwardState]:
        """The loss, and what the backward needs; without `gradient` the state is of no use."""
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
        """The block's output, and what `block_backward` needs; here it is the same without `gradient`."""
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
        self.join()
        above: Any = model.ln_f
        for block in reversed(self.blocks):
            self.finish(sums, above, block.mlp.c_proj.bias)
            dx, sums = self.block_backward(block, dx, state.blocks.pop(), state.idx.shape, state.mask)
            self.join_previous()
            above = block.ln_1
        self.finish(sums, above, None)
        with self.beside():
            dwpe, add = self.gradient(model.wpe.weight)
            if not add:
                dwpe.zero_()
            self.between.embed_backward(dx, state.idx, state.positions, self.gradient(model.wte.weight)[0], dwpe)
        self.join()
        if adding:
            documents = state.mask.documents
            self.warm.add((state.idx.shape, None if documents is None else documents.numel()))

    def head_backward(self, scale: Tensor, state: ForwardState) -> Tensor:
        """Gradient of the last norm's result, (N, C); that of the head goes to the embedding."""
        weight, h, dlogits = self.model.wte.weight, state.h, state.dlogits
        assert h is not None
        assert dlogits is not None
        state.h = state.dlogits = None
        with self.beside(dlogits, h, scale):
            grad, add = self.gradient(weight)
            self.products(dlogits, h, grad, transpose_a=True, scale=scale, add=grad if add else None)
        return self.products(dlogits, self.copies[weight], torch.empty_like(h), scale=scale)

    def block_backward(
        self, block: Block, dx: Tensor, state: BlockState, shape: torch.Size, mask: AttentionMask
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the block's input, and the partial sums of its first norm; `dx` is that of its output."""
        attn, mlp = block.attn, block.mlp
        dbefore = torch.empty_like(state.before_gelu)
        weight = self.copies[mlp.c_proj.weight]
        self.products(dx, weight, dbefore, epilogue="dgelu", aux=state.before_gelu)
        self.weight_gradient(dx, state.after_gelu, mlp.c_proj.weight)
        with self.beside(dbefore):
            self.between.add_column_sums(dbefore, *self.gradient(mlp.c_fc.bias))
        self.weight_gradient(dbefore, state.h_2, mlp.c_fc.weight)
        dh = self.products(dbefore, self.copies[mlp.c_fc.weight], torch.empty_like(dx))
        dx, sums = self.norm_backward(dh, state.x_mid, block.ln_2, state.norm_2, dx)
        sums = self.finish(sums, block.ln_2, attn.c_proj.bias)
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
        return self.between.layer_norm_backward(dh, x, norm.weight, *statistics, dresidual)

    def attention_bias_gradient(self, dqkv: Tensor, sums: Tensor, attn: CausalSelfAttention) -> None:
        """Of the three parts of the bias only the queries' takes a pass over its gradient. The keys' has none: it adds
        the same number to all scores of a query. The weights of a query's values add up to 1, so the values' is the
        sum over the attended values' gradient, which is `c_proj` applied to the sum that the norm after it made.
        """
        C = attn.c_proj.in_features
        with self.beside(dqkv, sums):
            grad, add = self.gradient(attn.c_attn.bias)
            if not add:
                grad.zero_()
            self.between.add_column_sums(dqkv[:, :C], grad[:C], add=True)
            grad[2 * C :].addmv_(attn.c_proj.weight.T, sums[:, 2].sum(0))

    def weight_gradient(self, dy: Tensor, x: Tensor, weight: Tensor) -> None:
        with self.beside(dy, x):
            grad, add = self.gradient(weight)
            self.products(dy, x, grad, transpose_a=True, add=grad if add else None)

    def finish(self, sums: Tensor, norm: Any, bias_before: Tensor | None) -> Tensor:
        """Gradients of a norm's weight and bias, and of the bias of the product whose result it normalised; returns
        fewer partial sums.
        """
        outs = [norm.weight, norm.bias] + ([] if bias_before is None else [bias_before])
        with self.beside(sums):
            return self.between.add_partial_sums(sums, [self.gradient(p) for p in outs])

    @contextmanager
    def beside(self, *used: Tensor) -> Iterator[None]:
        """What is launched inside runs on the side stream, after all that was launched before; `used` stay alive."""
        if self.side is None:
            yield
            return
        self.used_beside.append(used)
        self.side.wait_stream(torch.cuda.current_stream(self.side.device))
        with torch.cuda.stream(self.side):
            yield

    def join_previous(self) -> None:
        """Wait for what the side stream was given up to the last call, not for what it was given since."""
        if self.side is None:
            return
        event = self.side.record_event()
        if self.before is not None:
            previous, tensors = self.before
            torch.cuda.current_stream(self.side.device).wait_event(previous)
            tensors.clear()
        self.before = event, self.used_beside
        self.used_beside = []

    def join(self) -> None:
        """Wait, on the device, for the side stream; then the memory it used may be used again."""
        if self.side is not None:
            torch.cuda.current_stream(self.side.device).wait_stream(self.side)
        self.forget_beside()

    def forget_beside(self) -> None:
        """Nothing that the side stream was given is to be waited for."""
        self.used_beside = []
        self.before = None

    def gradient(self, p: Tensor) -> tuple[Tensor, bool]:
        """The parameter's gradient, and whether it already holds something to add to."""
        if p.grad is not None:
            return p.grad, True
        p.grad = torch.empty_like(p)
        return p.grad, False


class HandWritten(torch.autograd.Function):
    """Ties a loss whose backward is written by hand to autograd, through one parameter; gradients go to `.grad`.

    `compute()` gives the loss, and what adds its gradients, times a scale, to the parameters'.
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
