"""On a GPU, compiled: a killed run is bitwise the straight one, also when it has to compile again."""

import json
from pathlib import Path

import pytest

import tiny
from regpt.__main__ import main
from regpt.config import RunConfig

pytestmark = [pytest.mark.gpu, tiny.IMPORTS_COMPILER]


def certificate(config: RunConfig, folder: Path, capsys, *more: str) -> dict:
    """Of a run on one GPU, killed twice."""
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    args = [str(folder / "config.toml"), "--kills", "2", "--other-nproc", "1", "--json", *more]
    assert main(["verify-resume", *args]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("fresh", [False, True], ids=["cached", "compiled-again"])
def test_a_killed_run_is_bitwise_the_straight_one(shards, tmp_path: Path, capsys, monkeypatch, fresh: bool):
    if fresh:  # every process that verify-resume starts compiles anew
        monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    config = tiny.run_config(shards)
    train = {"deterministic": True, "device": "cuda", "precision": "bf16", "compile": True, "micro_batch_rows": 2}
    config = tiny.change(config, "train", **train)
    found = certificate(config, tmp_path, capsys, "--steps", "16")
    assert found["passed"]
    assert all(c["bitwise"] for c in found["comparisons"].values())
    assert found["made_with"]["device"].startswith("NVIDIA")
