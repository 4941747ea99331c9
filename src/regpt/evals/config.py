"""`[eval]`: how often and on how much the model is evaluated while it trains."""

from dataclasses import dataclass

from regpt.errors import UsageError


@dataclass(frozen=True)
class EvalConfig:
    __pydantic_config__ = {"extra": "forbid"}

    every_steps: int = 250
    """Steps between validations; 0 validates only at the end."""
    val_tokens: int = 655360
    """Validation tokens read each time, from the start of the split; 0 reads all."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "val_tokens"):
            if getattr(self, name) < 0:
                raise UsageError(f"eval.{name} is {getattr(self, name)}, must be 0 or more")
