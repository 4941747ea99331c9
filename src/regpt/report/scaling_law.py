"""A scaling law, L(N, D) = E + A/N^alpha + B/D^beta, and its JSON file, which `regpt scaling --json` writes."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from regpt.errors import UserError
from regpt.structured import read_json

ORDER = ("E", "A", "B", "alpha", "beta")  # of the rows and columns of the covariance


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, section 3.3), nats a token; N parameters, D tokens.

    Attributes:
        covariance: of (E, A, B, alpha, beta), where the fit gave it.
        unit: of the loss.
        parameters: what N counts: all parameters, or those without token and position embeddings.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    covariance: tuple[tuple[float, ...], ...] | None = None
    unit: str = "nats per token"
    parameters: Literal["total", "non-embedding"] = "total"

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens with the lowest loss among those with 6·N·D = `flops` (equation 4)."""
        if self.alpha + self.beta == 0 or min(self.A, self.B, self.alpha, self.beta) <= 0:
            raise UserError(
                "the fitted law has no optimum: one of its terms vanished; add runs of other sizes or lengths"
            )
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, flops / 6 / parameters

    def standard_error(self, parameters: float, tokens: float) -> float | None:
        """Of the loss, to first order in the coefficients; None without a covariance."""
        if self.covariance is None:
            return None
        size, data = parameters**-self.alpha, tokens**-self.beta
        slope = [1.0, size, data, -self.A * size * math.log(parameters), -self.B * data * math.log(tokens)]
        variance = float(np.array(slope) @ np.array(self.covariance) @ np.array(slope))
        return math.sqrt(max(0.0, variance))


def read_law(path: Path) -> ScalingLaw:
    """The law in a JSON file: `{"form": "chinchilla", "E": …, "A": …, "B": …, "alpha": …, "beta": …}` and, optional,
    `"covariance"`, 5 × 5 in that order, `"unit"`, `"parameters"`. Other keys are not looked at.

    Raises:
        UserError: no such file, no JSON, another form, a coefficient that is missing or no number.
    """
    advice = f"write it with: regpt scaling RUN… --json {path}"
    values = read_json(path, advice)
    if not isinstance(values, dict) or values.get("form") != "chinchilla":
        form = values.get("form") if isinstance(values, dict) else None
        raise UserError(f"{path} holds a law of the form {form!r}, 'chinchilla' is known; {advice}")
    known = {key: values[key] for key in (*ORDER, "covariance", "unit", "parameters") if key in values}
    try:
        law = TypeAdapter(ScalingLaw).validate_python(known)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where} is wrong ({first['msg'].lower()}); {advice}") from None
    return checked(law, path, advice)


def checked(law: ScalingLaw, path: Path, advice: str) -> ScalingLaw:
    numbers: list[Any] = [getattr(law, key) for key in ORDER]
    square = law.covariance is None or [len(row) for row in law.covariance] == [len(ORDER)] * len(ORDER)
    if not all(map(math.isfinite, numbers)) or not square:
        what = "a coefficient is not finite" if square else "the covariance is not 5 × 5"
        raise UserError(f"{path}: {what}; {advice}")
    return law
