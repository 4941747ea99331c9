"""The shape of a model: everything that is needed to build it, nothing about how it is trained."""

from dataclasses import dataclass
from typing import Annotated, Literal

from regpt.errors import UsageError
from regpt.ranges import Range, check_ranges

# Beyond any machine; a file that asks for more is damaged or made to fill the memory.
LARGEST_SIZE = 1 << 24
LARGEST_DEPTH = 1 << 12
GPT2_VOCAB_SIZE = 50257  # Radford et al. 2019, section 2.3


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer; the defaults are GPT-2 124M (Radford et al. 2019, table 2)."""

    __pydantic_config__ = {"extra": "forbid"}

    family: Literal["gpt2"] = "gpt2"
    """Architecture."""
    n_layer: Annotated[int, Range(1, LARGEST_DEPTH)] = 12
    """Transformer blocks."""
    n_head: Annotated[int, Range(1, LARGEST_SIZE)] = 12
    """Attention heads; must divide n_embd."""
    n_embd: Annotated[int, Range(1, LARGEST_SIZE)] = 768
    """Width of the residual stream."""
    vocab_size: Annotated[int, Range(0, LARGEST_SIZE)] = GPT2_VOCAB_SIZE
    """The tokenizer's real vocabulary size; padding for speed is derived, never stored. 0, in the configuration of a
    run: that of the data."""
    max_seq_len: Annotated[int, Range(1, LARGEST_SIZE)] = 1024
    """Learned positions: the longest sequence that the model reads."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Rate of dropout in training: of attention's probabilities, of what each block adds, of the embeddings (Radford et
    al. 2018, section 4.1, has 0.1; from GPT-2's size on 0 is usual)."""

    def __post_init__(self) -> None:
        if self.vocab_size < 0:
            raise UsageError(
                f"model.vocab_size is {self.vocab_size}, must be at least 1, or 0 for the vocabulary of the data"
            )
        check_ranges("model", self)
        if self.n_embd % self.n_head:
            fits = [n for n in range(1, min(self.n_embd, 4 * self.n_head) + 1) if self.n_embd % n == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - self.n_head))[:3])
            raise UsageError(
                f"model.n_embd = {self.n_embd} is not divisible by model.n_head = {self.n_head}; "
                f"n_head = {', '.join(map(str, near))} would fit"
            )
