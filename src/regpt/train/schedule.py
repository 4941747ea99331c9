"""The learning-rate schedule: a factor for each update."""

import math
from collections.abc import Callable

from regpt.errors import UsageError
from regpt.train.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> Callable[[int], float]:
    """`factor(k)`, which multiplies the learning rates of the k-th update, k from 1, in a run of `steps` updates.

    Linear warmup to 1 (update k has k/warmup_steps), then one of: cosine to `min_lr_ratio`, which is reached
    after update `decay_steps` and kept (Loshchilov & Hutter 2017; Brown et al. 2020, appendix B); wsd, constant
    until the last `decay_steps` updates, which fall linearly to the minimum (Hu et al. 2024, section 4.2); constant.

    Raises:
        UsageError: a decay that would begin before the warmup ends.
    """
    shape = {"cosine": cosine, "wsd": wsd, "constant": constant}[config.schedule](config, steps)

    def factor(step: int) -> float:
        if step <= config.warmup_steps:
            return step / config.warmup_steps
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape(step)

    return factor


def cosine(config: OptimConfig, steps: int) -> Callable[[int], float]:
    """1 for the first update after the warmup, 0 for every update after the first `decay_steps`."""
    end = config.decay_steps or max(steps, config.warmup_steps + 1)
    if end <= config.warmup_steps:
        raise UsageError(
            f"optim.decay_steps is {end} but the warmup takes {config.warmup_steps} steps; "
            f"set decay_steps above {config.warmup_steps} or shorten optim.warmup_steps"
        )
    warmup = config.warmup_steps

    def share(step: int) -> float:
        # The lecture counts updates from 0: its update `it` is our it + 1; progress is (it - warmup) / (end - warmup).
        progress = min(1.0, (step - 1 - warmup) / (end - warmup))
        return 0.5 * (1 + math.cos(math.pi * progress))

    return share


def wsd(config: OptimConfig, steps: int) -> Callable[[int], float]:
    """1 until the last `decay_steps` (default: a tenth of the run) updates, then linearly to 0."""
    length = config.decay_steps or max(1, steps // 10)
    if config.warmup_steps + length > steps:
        raise UsageError(
            f"optim.warmup_steps {config.warmup_steps} and optim.decay_steps {length} are together more than the "
            f"{steps} steps of the run; shorten one of them"
        )
    return lambda step: min(1.0, (steps - step) / length)


def constant(config: OptimConfig, steps: int) -> Callable[[int], float]:
    return lambda step: 1.0
