"""AdamW with weights in bfloat16, and moments in float32, bfloat16 or 8 bits (`train.rounding`)."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from regpt.errors import UserError
from regpt.train.adamw import AdamW
from regpt.train.config import StateDtype
from regpt.train.rounding import BLOCK, Moment, Part, RoundedUpdate

LEAST_QUANTIZED = 4096  # smaller parameters keep float32 moments (as torchao and bitsandbytes)
PIECE = {True: 2**26, False: 2**22}  # elements updated at once, compiled or not: what bounds temporary tensors
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALE = "_scale"  # of the moment whose name it follows, one float32 a block
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MISSING = "optim.state_dtype is int8, which needs the package torchao: pip install 'regpt[lowmem]'"


class LowMemoryAdamW(AdamW):
    """AdamW over float32 or bfloat16 parameters with moments of `state_dtype`, by `rule`.

    `state[p]` holds `step`, `exp_avg` and `exp_avg_sq`; in int8 these are codes, and `exp_avg_scale` and
    `exp_avg_sq_scale` hold their scales: blocks of 256 numbers inside a row, with torchao's tables and rounding.
    Parameters of fewer than 4,096 elements, or with rows that 256 does not divide, have float32 moments then.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], *, state_dtype: StateDtype, rule: RoundedUpdate, **options: Any
    ):
        self.state_dtype: StateDtype = state_dtype
        self.rule = rule
        self.tables = tables(rule.device) if state_dtype == "int8" else {}
        super().__init__(groups, **options)

    def allocate_state(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                assert p.is_contiguous()
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32)}
                for name in MOMENTS:
                    self.state[p] |= zeros(p, name, self.state_dtype)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter; all of them must have a gradient."""
        for state in self.state.values():
            state["step"] += 1
        self.rule.begin(self.param_groups, int(next(iter(self.state.values()))["step"]))
        size = PIECE[self.rule.compiled]
        for group in self.param_groups:
            for p in group["params"]:
                for start in range(0, p.numel(), size):
                    part = Part(p, start, min(start + size, p.numel()))
                    self.rule(part, group, *(self.moment(part, name) for name in MOMENTS))

    def moment(self, part: Part, name: str) -> Moment:
        state = self.state[part.parameter]
        if (scale := state.get(name + SCALE)) is None:
            return Moment(part.of(state[name]))
        blocks = scale.view(-1)[part.start // BLOCK : part.stop // BLOCK]
        return Moment(part.of(state[name]), blocks, self.tables[name])


def zeros(p: Tensor, name: str, state_dtype: StateDtype) -> dict[str, Tensor]:
    """The moment `name` of `p` before the first update."""
    if state_dtype != "int8":
        return {name: torch.zeros_like(p, dtype=STATE_DTYPES[state_dtype])}
    if not may_be_quantized(p):
        return {name: torch.zeros_like(p, dtype=torch.float32)}
    scale = torch.zeros(*p.shape[:-1], p.size(-1) // BLOCK, dtype=torch.float32, device=p.device)
    return {name: torch.zeros_like(p, dtype=torch.uint8), name + SCALE: scale}


def may_be_quantized(p: Tensor) -> bool:
    """Whether moments of `p` may be in 8 bits."""
    return p.numel() >= LEAST_QUANTIZED and p.size(-1) % BLOCK == 0


def tables(device: torch.device) -> dict[str, Tensor]:
    """The numbers that the codes of each moment stand for (Dettmers et al. 2022, section 2.1), signed and not.

    Raises:
        UserError: torchao is not installed.
    """
    if not find_spec("torchao"):
        raise UserError(MISSING)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of kernels of torchao that are not for this machine, and are not used
    try:
        from torchao.optim.quant_utils import create_dynamic_map  # pyright: ignore[reportMissingImports]
    finally:
        logging.disable(before)
    signed = dict(zip(MOMENTS, (True, False)))
    return {name: torch.tensor(create_dynamic_map(signed=sign), device=device) for name, sign in signed.items()}
