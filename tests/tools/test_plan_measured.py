"""The plan against every step that was measured on H100 and H200: the reports in benchmarks/results."""

import json
from pathlib import Path

import pytest

from regpt.model.config import ModelConfig
from regpt.tools.plan.memory import PlannedStep, gpu_memory
from regpt.tools.plan.speed import gpu_time
from regpt.train.devices import device_by_name

REPORTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("train-*.json"))
# Worst errors, of time and memory; most are within 3 % and 1 %.
ERRORS = {"checkpointing": (0.09, 0.04), "fp16": (0.07, 0.01)}
OTHERS = (0.065, 0.031)


def test_there_are_reports():
    assert len(REPORTS) >= 25


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_a_measured_step_is_predicted(report: Path):
    measured = json.loads(report.read_text(encoding="utf-8"))
    kernels = measured.get("kernels", {"name": "plain" if "plain" in report.stem else "fused"})["name"]
    step = PlannedStep(
        ModelConfig(**measured["model"]),
        measured["seq_len"],
        "fused" if kernels == "fused" else "compiled",
        measured["precision"],
        checkpointing="checkpointing" in report.stem,
        offload="offload" in report.stem,
        document_mask=measured["document_mask"],
    )
    time_error, memory_error = next((errors for name, errors in ERRORS.items() if name in report.stem), OTHERS)
    rows, device = measured["micro_batch_rows"], device_by_name("h200" if "h200" in report.stem else "h100")
    time = gpu_time(step, rows, measured["accumulation"], measured["world_size"], device)
    assert time.seconds * 1e3 == pytest.approx(measured["step_ms"]["median"], rel=time_error)
    assert gpu_memory(step, rows).peak / 2**30 == pytest.approx(measured["peak_memory_gib"], rel=memory_error)
