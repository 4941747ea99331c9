"""What protects a run, on each path of its loss: a batch or a weight that is spoiled, a spike, an average."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from kernels.paths import loss_path
from regpt.checkpoint.load import checkpoint_folder
from regpt.config import RunConfig
from regpt.data.batch import Batch
from regpt.errors import UserError
from regpt.runs import build
from regpt.runs.build import build_loader, open_corpus
from regpt.runs.pretrain import pretrain, resume

SLOW = pytest.param("compiled", marks=[tiny.IMPORTS_COMPILER, pytest.mark.slow])  # each run is traced anew


@pytest.fixture(params=["plain", SLOW, "fused", "graphed", "fp8"])
def computed(request, monkeypatch) -> Callable[[Callable[[torch.nn.Module, Batch], float]], None]:
    """`computed(spoil)`: runs take this path, and their loss is `spoil(model, batch)` times as large."""

    def with_spoil(spoil: Callable[[torch.nn.Module, Batch], float]) -> None:
        def wrap(model, _):
            torch.compiler.reset()
            good = loss_path(request.param, model)
            return lambda batch: spoil(model, batch) * good(batch)

        monkeypatch.setattr(build, "make_backend", tiny.wrapping(wrap))

    return with_spoil


def events(run: Path, name: str) -> list[dict]:
    return [row for row in tiny.rows_of(run, "event") if row["name"] == name]


def test_a_run_whose_weights_were_spoiled_goes_on_from_the_checkpoint_as_if_nothing_had_been(
    computed, config: RunConfig, tmp_path: Path
):
    """Rewound in the run itself, or resumed from the checkpoint that the rewind wrote: bitwise the same."""
    run, again, computed_before = tmp_path / "run", tmp_path / "again", []

    def spoil(model, batch) -> float:
        computed_before.append(torch.is_grad_enabled())
        if sum(computed_before) == 5 * 4 + 3 and computed_before[-1]:  # in a micro-batch of update 6
            with torch.no_grad():
                model.h[0].attn.c_attn.weight[0] = math.nan
        return 1.0

    computed(spoil)
    assert pretrain(tiny.change(config, "train", on_non_finite="rewind", ema_decay=0.5), run) == 0
    (event,) = events(run, "non_finite")
    assert (event["at_step"], event["weights"]) == (6, "h.0.attn.c_attn.weight")
    assert [row["step"] for row in tiny.rows_of(run, "train")] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    shutil.copytree(run, again)
    for later in (6, 8):
        shutil.rmtree(checkpoint_folder(again, later))
    assert resume(again) == 0
    assert tiny.final_files(again) == tiny.final_files(run)
    averaged = [[row["loss_ema"] for row in tiny.rows_of(folder, "val")][-2:] for folder in (run, again)]
    assert averaged[0] == averaged[1]


def test_a_spike_that_is_recorded_changes_no_update(computed, config: RunConfig, tmp_path: Path):
    """Its batch is computed once more, to be examined; the gradients that follow are clipped and those of the step."""
    config = tiny.change(config, "train", steps=36, micro_batch_rows=4)
    config = tiny.change(tiny.change(config, "eval", every_steps=0), "checkpoint", every_steps=0)
    bad = build_loader(config, open_corpus(config), tiny.ALONE).step(34)[0].idx
    computed(lambda model, batch: 9.0 if batch.idx.equal(bad) else 1.0)
    for name, keys in {"recorded": {}, "unseen": {"spike_score": 0.0}, "skipped": {"on_spike": "skip"}}.items():
        assert pretrain(tiny.change(config, "train", **keys), tmp_path / name) == 0
    assert [len(events(tmp_path / name, "spike")) for name in ("recorded", "unseen", "skipped")] == [1, 0, 1]
    assert tiny.final_files(tmp_path / "recorded") == tiny.final_files(tmp_path / "unseen")
    assert tiny.final_files(tmp_path / "skipped") != tiny.final_files(tmp_path / "unseen")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_spoiled_batch_is_not_applied(computed, config: RunConfig, policy: str, tmp_path: Path):
    bad = build_loader(config, open_corpus(config), tiny.ALONE).step(4, 1)[2].idx
    computed(lambda model, batch: math.nan if batch.idx.equal(bad) else 1.0)
    config = tiny.change(config, "train", on_non_finite=policy)
    if policy == "skip":
        assert pretrain(config, tmp_path / "run") == 0
    else:
        with pytest.raises(UserError, match="step 5: the loss is nan"):
            pretrain(config, tmp_path / "run")
    steps = [row["step"] for row in tiny.rows_of(tmp_path / "run", "train")]
    assert steps == [*range(1, 5 if policy == "stop" else 9)]
    (event,) = events(tmp_path / "run", "non_finite")
    assert (event["ranks"], event["repeats"], event["weights"]) == ([0], True, None)
