"""Guard of updates: a loss or gradient that is not finite and a spike of the loss are not applied."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from regpt.train.config import TrainConfig

WINDOW, LEAST = 128, 32  # losses that a spike is judged by, and how many of them there must be
# 0.6745 is the 0.75 quantile of the normal distribution: it makes a median absolute deviation a standard deviation
# (Iglewicz & Hoaglin 1993, "How to Detect and Handle Outliers", chapter 3: the modified z-score).
QUANTILE = 0.6745
# Losses that hardly vary make no spike of a last digit: a deviation is at least this share of the median, and of a loss
# of 0.01 where the median is smaller: a batch that is known by heart has the loss 0.
LEAST_DEVIATION, LEAST_MEDIAN = 1e-3, 0.01

Policy = Literal["stop", "skip", "rewind", "record", "repeat"]


@dataclass(frozen=True)
class Verdict:
    """The fault of a step and the policy for it. `overflow`: of float16, under the loss scale before.

    Attributes:
        score: the modified z-score of a spike.
        again: the update before was a spike too.
    """

    name: Literal["non_finite", "spike", "overflow"]
    policy: Policy
    score: float | None = None
    again: bool = False


class Guard:
    """Judges every step before its update, by numbers that all processes share: they decide alike."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.refused_in_row = 0
        self.furthest = 0  # updates made when one was refused last
        self.spiked = -1  # the same, of spikes that were only recorded

    def judge(self, updates: int, loss: float, norm: float) -> Verdict | None:
        """Verdict on the step after `updates` updates; None when it is to be applied. Counts refusals."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            enough = self.count(updates) > self.config.max_refused
            return Verdict("non_finite", "stop" if enough else self.config.on_non_finite)
        if not self.config.spike_score or (score := self.score(loss)) <= self.config.spike_score:
            return None
        skip = self.config.on_spike == "skip" and self.count(updates) <= self.config.max_refused
        again, self.spiked = self.spiked == updates - 1, updates
        return Verdict("spike", "skip" if skip else "record", score, again)  # too many in a row: the level has changed

    def score(self, loss: float) -> float:
        """Modified z-score of `loss` among the last losses; 0 while there are few."""
        if len(self.losses) < LEAST:
            return 0.0
        middle = median(self.losses)
        deviation = median(abs(x - middle) for x in self.losses)
        return QUANTILE * (loss - middle) / max(deviation, LEAST_DEVIATION * max(abs(middle), LEAST_MEDIAN))

    def count(self, updates: int) -> int:
        """Refusals in a row, this one included: with no update beyond the furthest of them."""
        self.refused_in_row += 1
        self.furthest = max(self.furthest, updates)
        return self.refused_in_row

    def note_update(self, updates: int, loss: float) -> None:
        """An update was applied, the `updates`-th."""
        self.losses.append(loss)
        if updates > self.furthest:
            self.refused_in_row = 0

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "refused_in_row": self.refused_in_row, "furthest": self.furthest}

    def load_state(self, state: Mapping[str, Any], *, rewound: bool = False) -> None:
        """Restore what `state` returned; `rewound`: in the same run, which has refused more since.

        Raises:
            ValueError: a loss that is not finite, which no update has.
        """
        if not all(math.isfinite(loss) for loss in state.get("losses", ())):
            raise ValueError("losses that are not finite")
        self.losses = deque(map(float, state.get("losses", ())), maxlen=WINDOW)
        if not rewound:
            self.refused_in_row, self.furthest = int(state.get("refused_in_row", 0)), int(state.get("furthest", 0))
