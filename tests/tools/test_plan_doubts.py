"""A plan says which of its figures are doubtful."""

import pytest
import torch

from regpt.runs.plan import doubtful_figures
from regpt.tools.measure import busy
from regpt.tools.plan.speed import StepTime, Target

HERE = Target("CPU", "cpu", None, torch.device("cpu"), 1e9, 1e9, "measured here")


@pytest.mark.parametrize(
    ("share", "load", "said"),
    [
        (1.0, None, []),
        (None, None, []),
        (1.0, "load 9.0 on 2 cores", ["busy (load 9.0 on 2 cores)"]),
        (0.02, None, ["extrapolated from 2.0% of a micro-batch"]),
    ],
)
def test_load_and_small_parts_make_a_time_doubtful(share: float | None, load: str | None, said: list[str]):
    found = list(doubtful_figures(HERE, StepTime({"all": 1.0}, 1.0, "timed here", share), load))
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found))


def test_a_data_sheet_is_not_doubtful_under_load():
    gpu = Target("H100", "gpu", None, None, 1e9, 1e15, "data sheet: x")
    assert list(doubtful_figures(gpu, StepTime({"all": 1.0}, 1.0, "predicted"), "load 9.0 on 2 cores")) == []


def test_a_machine_is_busy_when_more_wants_to_run_than_one_command(monkeypatch):
    monkeypatch.setattr("regpt.tools.measure.available_cores", lambda: 4)
    monkeypatch.setattr("psutil.getloadavg", lambda: (1.0, 9.0, 9.0))
    assert busy() is None
    monkeypatch.setattr("psutil.getloadavg", lambda: (6.0, 0.0, 0.0))
    assert busy() == "load 6.0 on 4 cores"
