"""Losses, norms, weights and checkpoint bytes of small runs, as recorded: a change of structure changes none of them.

Recorded on one machine in `goldens/runs.json`: bitwise where torch and the processor's kernels are those, elsewhere
within rounding. `python tests/test_goldens.py` records them anew, which only a change of the numbers may need.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from regpt.checkpoint.load import checkpoint_folder, checkpoints
from regpt.config import RunConfig
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import open_mesh
from regpt.runs.pretrain import pretrain, resume

RECORDED = Path(__file__).parent / "goldens" / "runs.json"
CPU_INFO = Path("/proc/cpuinfo")
MODELS = (
    [line for line in CPU_INFO.read_text().splitlines() if line.startswith("model name")] if CPU_INFO.exists() else []
)
MACHINE = f"torch {torch.__version__.partition('+')[0]} on {' '.join(MODELS[:1]) or 'an unknown processor'}"
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 3e-2, "fp16": 3e-2}  # relative, of losses and norms
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "fp64": {"train": {"precision": "fp64"}},
    "fp32": {},
    "bf16": {"train": {"precision": "bf16"}},
    "fp16": {"train": {"precision": "fp16"}},
    "average": {"train": {"ema_decay": 0.5}},
    "rewound": {"train": {"on_non_finite": "rewind"}},
    "resumed": {"train": {"deterministic": True}},
    "dropout": {"model": {"dropout": 0.1}},
    "documents": {"data": {"document_mask": True, "order": "bos"}},
    "recomputed": {"train": {"activation_checkpointing": True, "micro_batch_rows": 2}},
    "wsd": {"optim": {"schedule": "wsd", "min_lr_ratio": 0.0}},
}
UPDATES = ["fused", "graphed", "two processes"]


def golden_run(case: str, config: RunConfig, folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The run `case` in `folder`: rows of metrics, and SHA-256 of the files of its last checkpoint."""
    for section, values in CHANGES[case].items():
        config = tiny.change(config, section, **values)
    run = folder / "run"
    if case == "rewound":
        spoil_once(patch, at=5 * 4 + 3)
    assert pretrain(config, run, quiet=True) == 0
    if case == "resumed":
        for later in (6, 8):
            shutil.rmtree(checkpoint_folder(run, later))
        assert resume(run, quiet=True) == 0
    rows = {kind: tiny.rows_of(run, kind) for kind in ("train", "val")}
    files = ("model.safetensors", "optimizer.safetensors", "average.safetensors", "model.json", "tokenizer.json")
    last = checkpoints(run)[-1]
    return {
        "steps": [row["step"] for row in rows["train"]],
        "losses": [row["loss"] for row in rows["train"]],
        "norms": [row["grad_norm"] for row in rows["train"]],
        "rates": [row["lr"] for row in rows["train"]],
        "validation": [row["loss"] for row in rows["val"]],
        "sha256": {name: sha256((last / name).read_bytes()) for name in files if (last / name).exists()},
    }


def spoil_once(patch: pytest.MonkeyPatch, at: int) -> None:
    """The `at`-th forward that is differentiated finds a weight that is not a number."""
    calls, hidden = [], Transformer.hidden

    def spoiled(model: Transformer, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        if calls[-1] and sum(calls) == at:
            with torch.no_grad():
                next(model.parameters())[0] = math.nan
        return hidden(model, *args, **kwargs)

    patch.setattr(Transformer, "hidden", spoiled)


def updates(case: str) -> dict[str, Any]:
    """Four updates of a model in float64 on this path of its loss, or by two processes."""
    if case == "two processes":
        return tiny.in_processes(2, of_rank)[0]
    return four_updates(tiny.ALONE, case)


def of_rank() -> dict[str, Any]:
    with open_mesh("cpu") as mesh:
        return four_updates(mesh, "plain")


def four_updates(mesh: tiny.Mesh, path: str) -> dict[str, Any]:
    from kernels.paths import loss_path

    torch.set_num_threads(1)
    model = tiny.build_model()
    loader = tiny.Rows(micro_batch_rows=2, dp_rank=mesh.rank, dp_size=mesh.world_size)
    trainer = tiny.build_trainer(model, loader, mesh=mesh, loss_sum=loss_path(path, model))
    rows = [tiny.update(trainer) for _ in range(4)]
    if mesh.world_size > 1:
        mesh.wait()
    weights = b"".join(p.detach().numpy().tobytes() for _, p in sorted(model.named_parameters()))
    return {
        "losses": [row["loss"] for row in rows],
        "norms": [row["grad_norm"] for row in rows],
        "sha256": {"weights": sha256(weights)},
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def recorded(case: str) -> tuple[dict[str, Any], bool]:
    """What `case` gave when it was recorded, and whether that was on a machine like this one."""
    found = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found["cases"][case], found["machine"] == MACHINE


def compare(case: str, given: dict[str, Any], precision: str) -> None:
    expected, same_machine = recorded(case)
    if same_machine:
        assert given == expected
    assert given.keys() == expected.keys()
    for name, values in given.items():
        if name != "sha256":
            assert values == pytest.approx(expected[name], rel=TOLERANCE[precision])


@pytest.mark.parametrize("case", CHANGES)
def test_runs_give_the_recorded_numbers_and_files(case: str, config: RunConfig, tmp_path: Path, monkeypatch):
    precision = CHANGES[case].get("train", {}).get("precision", "fp32")
    compare(case, golden_run(case, config, tmp_path, monkeypatch), precision)


@pytest.mark.parametrize("case", UPDATES)
def test_updates_of_every_path_give_the_recorded_numbers(case: str):
    compare(case, updates(case), "fp64")


def record(folder: Path) -> None:
    torch.set_num_threads(1)
    config = tiny.run_config(tiny.write_shards(folder / "data"))
    cases: dict[str, Any] = {case: updates(case) for case in UPDATES}
    for case in CHANGES:
        with pytest.MonkeyPatch.context() as patch:
            cases[case] = golden_run(case, config, folder / case, patch)
    RECORDED.write_text(json.dumps({"machine": MACHINE, "cases": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        record(Path(temporary))
