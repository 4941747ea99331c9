"""torch's AdamW, without what its update does not need."""

import inspect
from collections.abc import Callable
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that starts sooner; its update is the same, and cannot be compiled.

    torch guards these methods against torch.compile, and for that imports all of its compiler: 1 to 6 seconds, which
    a run that compiles nothing has no use for. Here they are called without the guard.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(torch.optim.AdamW.add_param_group)(self, param_group)

    def allocate_state(self) -> None:
        """Make the state of every parameter now, not in its first update."""
        for group in self.param_groups:
            for p in group["params"]:
                # The fused step wants its counter next to the parameter, the plain one keeps it on the host.
                counter = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                self.state[p] = {"step": counter, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def zero_grad(self, set_to_none: bool = True) -> None:
        inspect.unwrap(torch.optim.AdamW.zero_grad)(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)
