"""Activation checkpointing: memory for time, from outside the model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regpt.model.transformer import Transformer


def recompute_blocks(model: Transformer) -> Transformer:
    """Keep only the input of each block of `model` for the backward, which computes the rest of the block again
    (Chen et al. 2016, section 4): one more forward of the blocks, about a third more time, for the memory of one block.

    The results stay what they are, bitwise where the operations are deterministic. Without gradients nothing changes.
    """
    for block in model.blocks:
        block.forward = partial(recomputed, block.forward)
    return model


def recomputed(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Dropout is a function of keys: there is no random state to restore, which would wait for the device.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
