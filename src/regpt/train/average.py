"""Exponential moving average (EMA) of the weights (Polyak & Juditsky 1992; Morales-Brotons et al. 2024).

It changes no update. Its weights are often better than the last ones while the learning rate is high.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from regpt.errors import UserError
from regpt.model.head import wide
from regpt.model.transformer import Transformer
from regpt.model.weights import real_shape, unpadded


class Average:
    """The average of those parameters of `model` that learn; follows `optimizer` through its own hooks.

    After update t, `average = d · average + (1 - d) · weight` with d = min(decay, (1 + t) / (10 + t)), so that the
    first weights are soon forgotten (the rule of TensorFlow's ExponentialMovingAverage). t counts from 1.

    Attributes:
        updates: t, the updates averaged so far.
    """

    def __init__(self, model: Transformer, optimizer: torch.optim.Optimizer, decay: float):
        self.model, self.decay, self.updates = model, decay, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # In float32 at least: in bfloat16 a share of 1 - decay is mostly below the last digit.
        self.averages = {name: p.detach().to(wide(p.dtype), copy=True) for name, p in self.parameters.items()}
        self.weights: dict[str, Tensor] = {}  # in bfloat16, while the model computes with the averages
        optimizer.register_step_post_hook(self.follow)

    @torch.no_grad()
    def follow(self, *_: Any) -> None:
        """Take in the weights after an update."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average = get_ema_multi_avg_fn(decay)
        if all(self.averages[name].dtype == p.dtype for name, p in self.parameters.items()):
            average(list(self.averages.values()), [p.detach() for p in self.parameters.values()], self.updates)
            return
        for name, p in self.parameters.items():  # one at a time: a wide copy of one parameter
            average([self.averages[name]], [p.detach().to(self.averages[name].dtype)], self.updates)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While it lasts the model computes with the averages; the weights come back bit for bit."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for name, p in self.parameters.items():
            if name in self.weights:
                p.copy_(self.weights.pop(name))
                continue
            weight, average = p.detach().clone(), self.averages[name]
            p.copy_(average)
            if average.dtype == p.dtype:
                average.copy_(weight)
            else:
                self.weights[name] = weight

    def tensors(self) -> dict[str, Tensor]:
        """Name → average at its real shape, views."""
        return {name: unpadded(self.model, name, average) for name, average in self.averages.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Restore what `tensors` returned after `updates`.

        Raises:
            UserError: a tensor is missing or of another shape.
        """
        for name, average in self.averages.items():
            shape = real_shape(self.model, name, average)
            if name not in tensors or tuple(tensors[name].shape) != shape:
                raise UserError(f"the average lacks {name!r} of shape {shape}; resume from another checkpoint")
            unpadded(self.model, name, average).copy_(tensors[name])
        self.updates = updates
