"""`[eval]`: how often and on how much the model is evaluated while it trains."""

from dataclasses import dataclass
from typing import Annotated

from regpt.errors import UsageError
from regpt.evals.specs import Spec, parse_tasks
from regpt.ranges import MANY, Range, check_ranges


@dataclass(frozen=True)
class EvalConfig:
    __pydantic_config__ = {"extra": "forbid"}

    every_steps: Annotated[int, Range(0, MANY)] = 250
    """Steps between validations; 0 validates only at the end."""
    val_tokens: Annotated[int, Range(0, MANY)] = 655360
    """Validation tokens read each time, from the start of the split (of each source); 0 reads all."""
    tasks: str = ""
    """Tasks evaluated with each validation, as regpt eval --tasks names them: hellaswag; core:DIR; mc:FILE; needle."""
    max_items: Annotated[int, Range(0, MANY)] = 0
    """Items of each task, the first of a fixed order; 0 takes all."""
    ema: bool = False
    """Tasks also with the average of the weights (train.ema_decay), as acc_ema, …; that takes twice the time."""

    def __post_init__(self) -> None:
        check_ranges("eval", self)
        for spec in self.specs():
            if spec.kind == "val":
                raise UsageError("eval.tasks names val, which is evaluated anyway (eval.val_tokens); leave it out")
            if spec.kind in ("lm-eval", "conversations"):
                raise UsageError(
                    f"eval.tasks names {spec.kind}, whose tasks are for a finished model; leave it out, and give it to "
                    "regpt eval --tasks"
                )

    def specs(self) -> list[Spec]:
        """The tasks; raises what `parse_tasks` does."""
        return parse_tasks(self.tasks) if self.tasks.strip() else []
