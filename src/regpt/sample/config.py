"""`[sample]`: text written while training."""

from dataclasses import dataclass

from regpt.errors import UsageError


@dataclass(frozen=True)
class SampleConfig:
    __pydantic_config__ = {"extra": "forbid"}

    every_steps: int = 250
    """Steps between samples; 0 writes them only at the end."""
    prompt: str = "Hello, I'm a language model,"
    """Text that every sample continues (the lecture's)."""
    more_prompts: tuple[str, ...] = ()
    """Further texts, each continued as often."""
    n: int = 4
    """Samples of each prompt each time."""
    max_new_tokens: int = 32
    """Tokens a sample."""
    top_k: int = 50
    """Draw from the k likeliest tokens; 0 from all, 1 is greedy."""
    temperature: float = 1.0
    """Logits are divided by it before the softmax."""
    seed: int = 1337
    """Seed of the sampling generator; training's random state is never touched."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """All of them."""
        return (self.prompt, *self.more_prompts)

    def __post_init__(self) -> None:
        if len(set(self.prompts)) < len(self.prompts):
            raise UsageError("sample.more_prompts names a prompt twice; name each once")
        for name in ("every_steps", "top_k"):
            if getattr(self, name) < 0:
                raise UsageError(f"sample.{name} is {getattr(self, name)}, must be 0 or more")
        for name in ("n", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"sample.{name} is {getattr(self, name)}, must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"sample.seed is {self.seed}, must be between 0 and 2^64 - 1")
        if not self.temperature > 0:
            raise UsageError(f"sample.temperature is {self.temperature}, must be above 0; top_k = 1 samples greedily")
