"""Update-to-weight ratio ‖Δw‖ / ‖w‖ by kind of matrix."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regpt.model.head import wide
from regpt.parallel.mesh import Mesh
from regpt.train.trainer import Trainer, due

BLOCK = re.compile(r"^\w+\.\d+\.")  # `h.3.` of `h.3.attn.query.weight`


class UpdateRatios:
    """Measures some of an optimizer's steps, through its own hooks: whatever the optimizer does, the weights before and
    after are compared. The other steps cost one comparison of integers.

    A measured step copies the matrices (their size in memory until the step is made) and reads them twice more; nothing
    waits for the device until `take` reads the result.

    Args:
        model: its trainable parameters of two or more dimensions are measured, by name without block and number.
        optimizer: over the model's parameters.
        mesh: the processes of this run; each may hold all of a parameter or a part of it.
        due: whether the step about to be made is to be measured; the same answer in every process.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, due: Callable[[], bool]):
        named = [(kind(name), p) for name, p in model.named_parameters() if p.requires_grad and p.dim() >= 2]
        self.kinds = list(dict.fromkeys(name for name, _ in named))
        self.parameters = [p for _, p in named]
        self.kind_of = torch.tensor([self.kinds.index(name) for name, _ in named], dtype=torch.long)
        self.mesh, self.due = mesh, due
        self.before: list[Tensor] | None = None
        self.squares: Tensor | None = None  # (2, kinds): of the updates, of the weights before them
        optimizer.register_step_pre_hook(self.remember)
        optimizer.register_step_post_hook(self.measure)

    @torch.no_grad()
    def remember(self, *_: Any) -> None:
        self.before = [local(p).clone() for p in self.parameters] if self.due() and self.parameters else None

    @torch.no_grad()
    def measure(self, *_: Any) -> None:
        if self.before is None:
            return
        weights = norms(self.before)
        for old, p in zip(self.before, self.parameters):
            old.sub_(local(p))
        each = torch.stack([norms(self.before), weights]).square()  # (2, parameters)
        self.before = None
        sums = torch.zeros(2, len(self.kinds), device=each.device)
        sums.index_add_(1, self.kind_of.to(each.device), each)
        # Parameters that every process holds are counted once a process above and below: the ratio stays the same.
        self.squares = self.mesh.sum(sums)

    def take(self) -> dict[str, object] | None:
        """`ratio` of all matrices together and `ratios` by kind, of the step last measured, once; None without one.

        Waits for the device. A kind whose weights are all zero has null.
        """
        if self.squares is None:
            return None
        with self.mesh.pulse.waiting("the sizes of the updates"):
            squares = self.squares.cpu()
        updates, weights = squares.sqrt().tolist()
        whole = squares.sum(dim=1).sqrt().tolist()
        self.squares = None
        ratios = {name: u / w if w else None for name, u, w in zip(self.kinds, updates, weights)}
        return {"ratio": whole[0] / whole[1] if whole[1] else None, "ratios": ratios}


def watch_updates(trainer: Trainer, every: int) -> UpdateRatios:
    """Measure every `every`-th update of `trainer`; 0 is none."""
    return UpdateRatios(trainer.model, trainer.optimizer, trainer.mesh, lambda: due(trainer.step + 1, every))


def kind(name: str) -> str:
    """The name without its block and `.weight`: `attn.query` for `h.3.attn.query.weight`."""
    return BLOCK.sub("", name).removesuffix(".weight")


def local(p: Tensor) -> Tensor:
    """This process's part of a parameter that is spread over several, the parameter itself otherwise."""
    to_local = getattr(p, "to_local", None)
    return p.detach() if to_local is None else to_local().detach()


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each tensor in float32, (tensors,)."""
    return torch.stack([torch.linalg.vector_norm(x, dtype=wide(x.dtype)).float() for x in tensors])
