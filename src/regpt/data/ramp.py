"""Stages of a run whose batch and row length change with the tokens it has read. Specified in docs/data-order.md."""

from collections.abc import Sequence
from dataclasses import dataclass

from regpt.errors import UsageError
from regpt.ranges import MANY

RampEntry = tuple[int, int, int]  # from so many tokens on: tokens a batch, tokens a row


@dataclass(frozen=True)
class Stage:
    """Steps of one batch and row length.

    Attributes:
        first_step, first_token: where it begins, counted from 0.
    """

    first_step: int
    first_token: int
    batch_tokens: int
    seq_len: int

    def step_at(self, tokens: int) -> int:
        """The first step of the stage that begins when `tokens` or more have been read."""
        return self.first_step + -(-(tokens - self.first_token) // self.batch_tokens)


def stages_of(batch_tokens: int, seq_len: int, ramp: Sequence[RampEntry]) -> tuple[Stage, ...]:
    """The stages of a run that begins with `batch_tokens` and `seq_len`.

    An entry takes effect at the first step before which its tokens have been read; one that another has overtaken by
    then has no step.
    """
    stages = [Stage(0, 0, batch_tokens, seq_len)]
    for tokens, following_batch, following_len in ramp:
        last = stages.pop()
        step = max(last.first_step, last.step_at(tokens))
        begun = last.first_token + (step - last.first_step) * last.batch_tokens
        stages += [last] * (step > last.first_step)
        stages.append(Stage(step, begun, following_batch, following_len))
    return tuple(stages)


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    return next(stage for stage in reversed(stages) if stage.first_step <= max(step, 0))


def tokens_before(stages: Sequence[Stage], step: int) -> int:
    """Tokens of the steps before `step`, counted from 0."""
    stage = stage_at(stages, step)
    return stage.first_token + (step - stage.first_step) * stage.batch_tokens


def step_at(stages: Sequence[Stage], tokens: int) -> int:
    """The first step before which `tokens` have been read."""
    return next(stage for stage in reversed(stages) if stage.first_token <= tokens).step_at(tokens)


def check_ramp(ramp: Sequence[RampEntry]) -> None:
    """Raise a UsageError for entries that contradict each other or themselves."""
    before = 0
    for entry in ramp:
        tokens, batch_tokens, seq_len = entry
        shown = f"train.batch_ramp has [{tokens}, {batch_tokens}, {seq_len}]"
        if not all(1 <= number <= MANY for number in entry):
            raise UsageError(f"{shown}; give whole numbers from 1 on: tokens trained, tokens a batch, tokens a row")
        if tokens <= before:
            raise UsageError(f"{shown} after {before} tokens; let the tokens at which entries begin increase")
        if batch_tokens % seq_len:
            near = max(1, batch_tokens // seq_len) * seq_len
            raise UsageError(f"{shown}, a batch that is not divisible into rows of {seq_len}; set it to {near}, say")
        before = tokens


def rows_in_stage(rows: int, seq_len: int, stage: Stage, dp_size: int) -> int:
    """Micro-batch rows of a stage with about as many tokens as `rows` of `seq_len`: a divisor of a process's rows."""
    most = 1 if rows == 1 else max(1, rows * seq_len // stage.seq_len)
    own = stage.batch_tokens // stage.seq_len // dp_size
    return max(n for n in range(1, min(most, own) + 1) if own % n == 0)
