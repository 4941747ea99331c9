"""AdamW for bfloat16 weights and for moments of 16 or 8 bits: the update in float32, stored with stochastic rounding.

bfloat16 has 8 significant bits. Rounded to nearest, a weight stays where it is while its updates are below 2⁻⁹ of it,
and a second moment never decays where 1 - beta2 is below 2⁻⁹ (beta2 = 0.999): both stall. Rounded up with the
probability of the part that is cut off, the mean of what is stored is the number itself (Gupta et al. 2015, section
3). So weights and both moments in bfloat16 are rounded stochastically. Numbers that bfloat16 holds are never changed.

The random bits are a hash, not a generator's: a pure function of the seed, the update, the parameter's name and the
number of the element. A resumed run, every rank, every device and any division into pieces have the same bits.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regpt.model.dropout import GOLDEN, WORD, mix

BLOCK = 256  # numbers of a moment in 8 bits that share a scale (Dettmers et al. 2022, section 2; torchao's default)


class Part(NamedTuple):
    """Elements [start, stop) of a parameter, flattened."""

    parameter: Tensor
    start: int
    stop: int

    def of(self, tensor: Tensor | None) -> Tensor:
        """The same elements of `tensor`, the parameter or its gradient."""
        assert tensor is not None
        return tensor.detach().view(-1)[self.start : self.stop]


class Moment(NamedTuple):
    """Elements of a moment: `values` (n,) float32 or bfloat16; or codes, the `scale` of each block of them, and the
    `table` of the numbers that the codes stand for."""

    values: Tensor
    scale: Tensor | None = None
    table: Tensor | None = None


def update(p: Tensor, grad: Tensor, first: Moment, second: Moment, numbers: Tensor, key: Tensor, start: int) -> None:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on the elements from `start` on of a parameter, in place.

    Args:
        p, grad: (n,) float32 or bfloat16, each.
        first, second: the moments of the same elements.
        numbers: (7,) float32, from `numbers_of`.
        key: () int64 below 2³², of this parameter in this update.
    """
    kept, step_size, root_scale, first_share, beta2, second_share, eps = numbers.unbind()
    g = grad.float()
    m = read(first)
    m = m + first_share * (g - m)
    v = read(second) * beta2 + second_share * g * g
    w = p.float() * kept - step_size * m / (v.sqrt() * root_scale + eps)
    words = mix(((torch.arange(p.numel(), device=p.device) + start) & WORD) ^ key)
    store(p, w, words)
    write(first, m, words >> 16)
    write(second, v, mix(words ^ GOLDEN))


def read(moment: Moment) -> Tensor:
    if moment.scale is None or moment.table is None:
        return moment.values.float()
    return (moment.table[moment.values.int()].view(-1, BLOCK) * moment.scale[:, None]).view(-1)


def write(moment: Moment, x: Tensor, words: Tensor) -> None:
    if moment.scale is None or moment.table is None:
        store(moment.values, x, words)
        return
    from torchao.optim.quant_utils import (  # pyright: ignore[reportMissingImports]
        quantize_8bit_with_qmap,
        scale_tensor,
    )

    scaled, scale = scale_tensor(x, BLOCK)
    moment.values.copy_(quantize_8bit_with_qmap(scaled, moment.table))
    moment.scale.copy_(scale)


def store(into: Tensor, x: Tensor, words: Tensor) -> None:
    """Copy float32 `x`; into bfloat16 rounded by the lowest 16 bits of `words`."""
    into.copy_(x if into.dtype != torch.bfloat16 else round_stochastically(x, words))


def round_stochastically(x: Tensor, words: Tensor) -> Tensor:
    """float32 `x` in bfloat16: of the two neighbours the one farther from zero with the probability of the part that
    the nearer one cuts off, decided by the lowest 16 bits of `words` (int64)."""
    raised = (x.view(torch.int32) + (words & 0xFFFF).to(torch.int32)) & -0x10000
    return torch.where(x.isnan(), x, raised.view(torch.float32)).to(torch.bfloat16)  # NaN's bits may overflow


def numbers_of(group: Mapping[str, Any], step: int) -> list[float]:
    """Factors of `update` that depend on the group and on the number of the update, computed in float64."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    corrections = 1 - beta1**step, 1 - beta2**step
    kept = 1 - lr * group["weight_decay"]
    return [kept, lr / corrections[0], corrections[1] ** -0.5, 1 - beta1, beta2, 1 - beta2, group["eps"]]


def key_of(seed: int, step: int, name: str) -> int:
    """The first 4 bytes of SHA-256(`seed/round/step/name`)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/round/{step}/{name}".encode()).digest()[:4], "little")


class RoundedUpdate:
    """`update` for the parts of a model's parameters, compiled on CUDA.

    Args:
        names: of the parameters.
        seed: of the random bits.
    """

    def __init__(self, names: Mapping[Tensor, str], seed: int, device: torch.device):
        self.names, self.seed, self.device = names, seed, device
        self.compiled = device.type == "cuda" and find_spec("triton") is not None
        self.update: Callable[..., None] = torch.compile(update, dynamic=True) if self.compiled else update
        self.numbers: dict[int, Tensor] = {}  # by group
        self.keys: dict[Tensor, Tensor] = {}

    def begin(self, groups: Sequence[dict[str, Any]], step: int) -> None:
        """Prepare update number `step`: one copy to the device, not one a parameter."""
        numbers = torch.tensor([numbers_of(group, step) for group in groups], dtype=torch.float32)
        keys = torch.tensor([key_of(self.seed, step, name) for name in self.names.values()])
        self.numbers = dict(zip(map(id, groups), numbers.to(self.device, non_blocking=True).unbind()))
        self.keys = dict(zip(self.names, keys.to(self.device, non_blocking=True).unbind()))

    def __call__(self, part: Part, group: dict[str, Any], first: Moment, second: Moment) -> None:
        p, key = part.parameter, self.keys[part.parameter]
        self.update(part.of(p), part.of(p.grad), first, second, self.numbers[id(group)], key, part.start)
