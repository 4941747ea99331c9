"""`[adapter]`: low-rank adapters on a frozen base."""

from dataclasses import dataclass
from typing import Annotated, Literal

from regpt.errors import UsageError
from regpt.ranges import Range, check_ranges

BaseFormat = Literal["none", "nf4", "int8", "ternary"]
LARGEST_RANK = 65_536
EMBEDDING, HEAD = "embedding", "head"  # targets that are no linear layers of blocks


@dataclass(frozen=True)
class AdapterConfig:
    __pydantic_config__ = {"extra": "forbid"}

    r: Annotated[int, Range(0, LARGEST_RANK)] = 0
    """Rank of the adapters (LoRA, Hu et al. 2021): the base is frozen and they alone are trained; 0: none, all weights
    are trained."""
    alpha: Annotated[float, Range(0, 1e6, above=True)] = 16.0
    """Adapters are multiplied by alpha / r."""
    targets: tuple[str, ...] = ("*",)
    """Which linear layers of blocks have adapters: names or patterns, such as q_proj or *.attn.*; besides, `embedding`
    and `head` where they are named."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Rate of dropout of what adapters read, in training."""
    rslora: bool = False
    """Multiply by alpha / √r instead (rsLoRA, Kalajdzievski 2023)."""
    dora: bool = False
    """Train the length of each row of the weights apart from its direction (DoRA, Liu et al. 2024)."""
    base: BaseFormat = "none"
    """Format of the frozen linear layers of blocks. none: as train.weight_dtype says; nf4: 4 bits (QLoRA, Dettmers et
    al. 2023); int8: 8 bits; ternary: -1, 0 or 1 times a scale, 2.06 bits (BitNet b1.58, Ma et al. 2024)."""
    tied: Literal["", "shared"] = ""
    """Of an embedding that is the head, too: shared adapts both at once; without it `embedding` and `head` are refused
    there."""

    def __post_init__(self) -> None:
        check_ranges("adapter", self)
        if self.r == 0:
            changed = [
                name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(AdapterConfig, name)
            ]
            if changed:
                raise UsageError(
                    f"adapter.{changed[0]} is {getattr(self, changed[0])!r}, but adapter.r is 0: there are no "
                    "adapters; set --adapter.r 16, say, or leave it out"
                )
        if not self.targets or not all(self.targets):
            raise UsageError('adapter.targets names nothing to adapt; give patterns of linear layers, such as "*"')
        if self.dora and (EMBEDDING in self.targets or HEAD in self.targets):
            raise UsageError(
                "adapter.dora is for linear layers of blocks, adapter.targets names the embedding or the head; leave "
                "one of them out"
            )

    @property
    def scale(self) -> float:
        return self.alpha / (self.r**0.5 if self.rslora else self.r)
