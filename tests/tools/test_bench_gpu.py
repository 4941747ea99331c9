"""`regpt bench` on one CUDA device: what only exists there."""

import json
from pathlib import Path

import pytest
import torch

from regpt.config import read_config
from regpt.runs.bench import Window

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
RECIPE = """
[model]
n_layer = 2
n_head = 2
n_embd = 128
vocab_size = 300
max_seq_len = 64

[data]
seq_len = 64

[train]
batch_tokens = 1024
micro_batch_rows = 8
device = "cuda"
"""


@pytest.fixture
def gpu_recipe(tmp_path: Path) -> str:
    path = tmp_path / "gpu.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kernels", ["plain", "auto"])
def test_training_is_reported(bench, gpu_recipe: str, kernels: str):
    code, out, err = bench("train", gpu_recipe, "--steps", 3, "--warmup", 2, "--train.kernels", kernels, "--json", "-")
    assert code == 0, err
    report = json.loads(out)
    assert report["peak_memory_of"] == "gpu"
    assert 0 < report["peak_memory_gib"] < 4  # the measured product came later
    assert (report["product"]["n"], report["product"]["precision"]) == (8192, "bf16")
    assert (report["mfu"] is None) == (report["data_sheet"] is None)
    assert report["compile"] == (report["kernels"]["name"] == "plain")
    assert (report["attention"] is None) == (report["kernels"]["name"] == "fused")
    if report["compile"]:
        assert report["attention"] in ("flash", "cudnn", "efficient", "math")


def test_every_rung_is_climbed_or_its_lack_named(ladder, gpu_recipe: str):
    window, config = Window(steps=2, warmup=1), read_config(gpu_recipe)
    report = ladder.bench_ladder(config, window, name="tiny", rows=4, progress=lambda text: None)
    rungs = {rung["name"]: rung for rung in report["rungs"]}
    assert len(rungs) == len(ladder.LADDER)
    for rung in ladder.LADDER:
        skipped = ladder.lacks_tf32(CUDA) if rung.name == "TF32" else "fused" in rungs[rung.name].get("skipped", "")
        assert ("ms" in rungs[rung.name]) is not skipped, rungs[rung.name]
        if not skipped:
            assert rungs[rung.name]["peak_memory_gib"] > 0
    losses = [rung["loss"] for rung in rungs.values() if "loss" in rung and rung["batch_tokens"] == 256]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.02)
