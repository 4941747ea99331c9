"""A fitted law from a file: its value, its uncertainty, and every way the file can be wrong."""

import json

import numpy as np
import pytest

from regpt.errors import UserError
from regpt.report.scaling_law import ScalingLaw, read_law

# Hoffmann et al. 2022, section 3.3, equation 10.
PUBLISHED = {"form": "chinchilla", "E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def write(tmp_path, values) -> str:
    path = tmp_path / "law.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def test_the_published_law(tmp_path):
    """Chinchilla, 70 billion parameters and 1.4 trillion tokens: about 1.94 nats by their own fit."""
    law = read_law(write(tmp_path, PUBLISHED))
    assert law.loss(70e9, 1.4e12) == pytest.approx(1.937, abs=0.002)
    assert law.standard_error(70e9, 1.4e12) is None


def test_the_error_is_that_of_drawn_coefficients(tmp_path):
    spread = np.diag([0.01, 8.0, 8.0, 0.002, 0.002]) ** 2
    law = read_law(write(tmp_path, PUBLISHED | {"covariance": spread.tolist()}))
    draws = np.random.default_rng(0).multivariate_normal([1.69, 406.4, 410.7, 0.34, 0.28], spread, 20_000)
    losses = [ScalingLaw(*coefficients).loss(124e6, 1e10) for coefficients in draws]
    assert law.standard_error(124e6, 1e10) == pytest.approx(np.std(losses), rel=0.03)


def test_other_keys_are_not_looked_at(tmp_path):
    assert read_law(write(tmp_path, PUBLISHED | {"runs": ["a", "b"]})).E == 1.69


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "is not JSON"),
        ([1], "of the form None"),
        (PUBLISHED | {"form": "kaplan"}, "of the form 'kaplan', 'chinchilla' is known"),
        ({key: value for key, value in PUBLISHED.items() if key != "beta"}, "beta is wrong"),
        (PUBLISHED | {"A": "many"}, "A is wrong"),
        (PUBLISHED | {"parameters": "some"}, "parameters is wrong"),
        (PUBLISHED | {"A": float("nan")}, "a coefficient is not finite"),
        (PUBLISHED | {"covariance": [[1.0]]}, "the covariance is not 5 × 5"),
    ],
    ids=str,
)
def test_a_wrong_file_is_one_sentence(tmp_path, values, message):
    with pytest.raises(UserError, match=message) as error:
        read_law(write(tmp_path, values))
    assert "regpt scaling" in str(error.value)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        read_law(tmp_path / "none.json")
