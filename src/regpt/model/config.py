"""The shape of a model: everything that is needed to build it, nothing about how it is trained."""

from dataclasses import dataclass
from typing import Literal

from regpt.errors import UsageError

# Beyond any machine; a file that asks for more is damaged or made to fill the memory.
LARGEST_SIZE = 1 << 24
LARGEST = {"n_layer": 1 << 12}
GPT2_VOCAB_SIZE = 50257  # Radford et al. 2019, section 2.3


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer; the defaults are GPT-2 124M (Radford et al. 2019, table 2)."""

    __pydantic_config__ = {"extra": "forbid"}

    family: Literal["gpt2"] = "gpt2"
    """Architecture."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads; must divide n_embd."""
    n_embd: int = 768
    """Width of the residual stream."""
    vocab_size: int = GPT2_VOCAB_SIZE
    """The tokenizer's real vocabulary size; padding for speed is derived, never stored. 0, in the configuration of a
    run: that of the data."""
    max_seq_len: int = 1024
    """Learned positions: the longest sequence that the model reads."""
    dropout: float = 0.0
    """Rate of dropout in training: of attention's probabilities, of what each block adds, of the embeddings (Radford et
    al. 2018, section 4.1, has 0.1; from GPT-2's size on 0 is usual)."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "vocab_size", "max_seq_len"):
            if getattr(self, name) < (name != "vocab_size"):
                least = "at least 1" if name != "vocab_size" else "at least 1, or 0 for the vocabulary of the data"
                raise UsageError(f"model.{name} is {getattr(self, name)}, must be {least}")
            if getattr(self, name) > LARGEST.get(name, LARGEST_SIZE):
                raise UsageError(
                    f"model.{name} is {getattr(self, name)}, must be at most {LARGEST.get(name, LARGEST_SIZE)}"
                )
        if not 0 <= self.dropout < 1:  # NaN fails too
            raise UsageError(f"model.dropout is {self.dropout}, must be 0 or more and below 1")
        if self.n_embd % self.n_head:
            fits = [n for n in range(1, min(self.n_embd, 4 * self.n_head) + 1) if self.n_embd % n == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - self.n_head))[:3])
            raise UsageError(
                f"model.n_embd = {self.n_embd} is not divisible by model.n_head = {self.n_head}; "
                f"n_head = {', '.join(map(str, near))} would fit"
            )
