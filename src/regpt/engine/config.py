"""`[sample]`: text written while training."""

from dataclasses import dataclass
from typing import Annotated

from regpt.errors import UsageError
from regpt.ranges import LARGE, MANY, SEED, Range, check_ranges


@dataclass(frozen=True)
class SampleConfig:
    __pydantic_config__ = {"extra": "forbid"}

    every_steps: Annotated[int, Range(0, MANY)] = 250
    """Steps between samples; 0 writes them only at the end."""
    prompt: str = "Hello, I'm a language model,"
    """Text that every sample continues (the lecture's)."""
    more_prompts: tuple[str, ...] = ()
    """Further texts, each continued as often."""
    n: Annotated[int, Range(1, 1 << 20)] = 4
    """Samples of each prompt each time."""
    max_new_tokens: Annotated[int, Range(1, MANY)] = 32
    """Tokens a sample."""
    top_k: Annotated[int, Range(0, MANY)] = 50
    """Draw from the k likeliest tokens; 0 from all, 1 is greedy."""
    temperature: Annotated[float, Range(0, LARGE, above=True)] = 1.0
    """Logits are divided by it before the softmax."""
    seed: Annotated[int, Range(0, SEED)] = 1337
    """Seed of the draws; training's random state is never touched."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """All of them."""
        return (self.prompt, *self.more_prompts)

    def __post_init__(self) -> None:
        if len(set(self.prompts)) < len(self.prompts):
            raise UsageError("sample.more_prompts names a prompt twice; name each once")
        check_ranges("sample", self)
