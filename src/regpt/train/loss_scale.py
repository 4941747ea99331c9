"""float16's gradient scaler: the loss is multiplied so that small gradients do not underflow.

The rule is that of torch.amp.GradScaler (Micikevicius et al. 2018, section 3.2): halve the scale when a gradient
overflows, double it after 2,000 updates without. Two things differ. An update whose gradients overflow is not lost: the
same step is computed again with the smaller scale. And the gradients are tested where they are whole, after they have
been summed over micro-batches and processes: an infinity anywhere is one everywhere, so all processes decide alike.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

FIRST_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000  # the defaults of torch.amp.GradScaler
LEAST_SCALE = 1.0  # gradients that overflow without being enlarged are not the scale's doing


class LossScale:
    """The present scale, the same in every process.

    Args:
        dynamic: for float16; otherwise the scale is 1 and stays so.
        on_change: called with the new scale and the reason, `overflow` or `growth`.
    """

    def __init__(self, *, dynamic: bool, on_change: Callable[[float, str], None] = lambda scale, reason: None):
        self.dynamic, self.on_change = dynamic, on_change
        self.scale = FIRST_SCALE if dynamic else 1.0
        self.good_updates = 0  # since the last change

    def backs_off(self, loss: float, norm: float) -> bool:
        """Halve the scale where it made the gradients overflow: then the step is to be computed again. Whether it did.

        A loss that is not finite has nothing to do with the scale, which multiplies it afterwards.
        """
        if not self.dynamic or math.isfinite(norm) or not math.isfinite(loss) or self.scale <= LEAST_SCALE:
            return False
        self.change(BACKOFF, "overflow")
        return True

    def note_update(self) -> None:
        """An update was made."""
        self.good_updates += 1
        if self.dynamic and self.good_updates == GROWTH_INTERVAL:
            self.change(GROWTH, "growth")

    def change(self, factor: float, reason: str) -> None:
        self.scale *= factor
        self.good_updates = 0
        self.on_change(self.scale, reason)

    def state(self) -> dict[str, float | int]:
        return {"scale": self.scale, "good_updates": self.good_updates} if self.dynamic else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; a fresh scale where it returned nothing, in another precision.

        Raises:
            ValueError: not a power of two.
        """
        if self.dynamic and state:
            scale = float(state["scale"])
            if not LEAST_SCALE <= scale < math.inf or math.frexp(scale)[0] != 0.5:
                raise ValueError(f"the loss scale {scale} is no power of two")
            self.scale, self.good_updates = scale, int(state["good_updates"])
