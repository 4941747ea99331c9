"""Experts in Hugging Face's files, one matrix an expert or fused, and in ours, all experts of a layer in one tensor."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from regpt.errors import UserError

OURS = ("gate_proj", "up_proj", "down_proj")
Names = tuple[str, str, str, str]  # their module of a mixture; an expert's gate, up and down


class StackedExperts(Mapping[str, Tensor]):
    """Their tensors, experts stacked under our names: `mlp.experts.gate_proj.weight`, (E, F, C).

    Also fused ones, as transformers 5 holds them in memory: `mlp.experts.gate_up_proj`, (E, 2·F, C).

    Raises:
        UserError: an expert lacks a matrix, or a matrix is there in both forms.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Names):
        self.tensors = tensors
        module, *matrices = (re.escape(name) for name in names)
        one = re.compile(rf"(.*\.)?(?:{module}|mlp)\.experts\.(\d+)\.({'|'.join(matrices)})\.weight")
        fused = re.compile(rf"(.*\.)?(?:{module}|mlp)\.experts\.(gate_up_proj|down_proj)")
        ours = dict(zip(names[1:], OURS))
        self.experts: dict[str, dict[int, str]] = {}
        self.fused: dict[str, tuple[str, int]] = {}  # our name → theirs, and which half of it
        self.others: dict[str, str] = {}
        for name in tensors:
            if found := one.fullmatch(name):
                where, expert, matrix = found.groups()
                self.experts.setdefault(of_all(where, ours[matrix]), {})[int(expert)] = name
            elif found := fused.fullmatch(name):
                where, matrix = found.groups()
                halves = OURS[:2] if matrix == "gate_up_proj" else OURS[2:]
                self.fused |= {of_all(where, half): (name, k) for k, half in enumerate(halves)}
            else:
                self.others[name.replace(f".{names[0]}.gate.", ".mlp.gate.")] = name
        self.check()

    def check(self) -> None:
        for name, experts in self.experts.items():
            missing = set(range(len(experts))) - experts.keys()
            if name in self.fused or missing:
                what = "twice" if name in self.fused else f"without that of expert {min(missing)}"
                raise UserError(f"the weights hold {name!r} {what}; restore the folder or choose another model")

    def __getitem__(self, name: str) -> Tensor:
        if name in self.experts:
            each = [self.tensors[self.experts[name][expert]] for expert in range(len(self.experts[name]))]
            if len({(one.shape, one.dtype) for one in each}) > 1:
                raise UserError(
                    f"the experts of {name!r} differ in shape or type; restore the folder or choose another model"
                )
            return torch.stack(each)
        if name in self.fused:
            theirs, half = self.fused[name]
            tensor = self.tensors[theirs]
            return tensor.chunk(2, dim=1)[half] if theirs.endswith("gate_up_proj") else tensor
        return self.tensors[self.others[name]]

    def __iter__(self) -> Iterator[str]:
        yield from self.experts
        yield from self.fused
        yield from self.others

    def __len__(self) -> int:
        return len(self.experts) + len(self.fused) + len(self.others)


def of_all(where: str | None, matrix: str) -> str:
    return f"{where or ''}mlp.experts.{matrix}.weight"


def divided_experts(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Our `weights` with one matrix an expert under their names, views."""
    theirs: dict[str, str] = dict(zip(OURS, names[1:]))
    divided: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        found = re.fullmatch(r"(.*)\.mlp\.experts\.(\w+)\.weight", name)
        if found is None:
            divided[name.replace(".mlp.gate.", f".{names[0]}.gate.")] = tensor
            continue
        where, matrix = found.groups()
        divided |= {f"{where}.{names[0]}.experts.{k}.{theirs[matrix]}.weight": one for k, one in enumerate(tensor)}
    return divided
