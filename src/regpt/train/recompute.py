"""What is done to the blocks of a model from outside it: activation checkpointing, and compilation of one for all."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regpt.kernels.select import compile_for
from regpt.model.transformer import Transformer


def recompute_blocks(model: Transformer) -> Transformer:
    """Keep only the input of each block of `model` for the backward, which computes the rest of the block again
    (Chen et al. 2016, section 4): one more forward of the blocks, about a third more time, for the memory of one block.

    The results stay what they are, bitwise where the operations are deterministic. Without gradients nothing changes.
    """
    for block in model.blocks:
        block.forward = partial(recomputed, block.forward)
    return model


def mlps_in_pieces(model: Transformer, tokens: int) -> Transformer:
    """Compute the MLPs of `model` for `tokens` tokens at once, and again in the backward, which keeps their inputs
    alone: of long rows, they take most of the memory of a block. Call it before `compile_blocks`."""
    for block in model.blocks:
        mlp: Any = block.mlp
        mlp.__class__ = class_in_pieces(type(mlp), tokens)
    return model


@cache
def class_in_pieces(mlp: type[Any], tokens: int) -> type[Any]:
    """`mlp` with another forward: one class for all blocks, which then share what is compiled."""

    def forward(self: Any, x: Tensor) -> Tensor:  # (B, T, C), whose tokens do not see each other
        if not torch.is_grad_enabled() or x.size(0) * x.size(1) <= tokens:
            return whole(self, x)
        pieces = x.split(max(1, tokens // x.size(0)), dim=1)
        return torch.cat([recomputed(whole, self, piece) for piece in pieces], dim=1)

    whole = mlp.forward
    return type(mlp.__name__, (mlp,), {"forward": forward})


def compile_blocks(model: Transformer, *, deterministic: bool = False) -> Transformer:
    """Compile what the blocks of `model` compute with gradients; all blocks of one kind share two graphs (the first
    block's, and one with the block's number as an input). Without gradients they are as they were: samples have many
    lengths. Call it before `recompute_blocks`.

    A step as one graph takes minutes to compile for tens of blocks, and its backward returns the gradients of all
    weights at once; here those of a block are added, and freed, when its backward is done.
    """
    import torch._dynamo  # takes seconds

    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # else each block's number is a constant of its graph
    options: dict[str, Any] | None = {"deterministic": True} if deterministic else None
    for block in model.blocks:
        block.forward = partial(with_gradients, block.forward, compile_for(block, block.forward, options=options))
    return model


def with_gradients(plain: Callable[..., Tensor], compiled: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)


def recomputed(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Dropout is a function of keys: there is no random state to restore, which would wait for the device.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
