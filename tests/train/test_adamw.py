"""The optimizer is torch's, bitwise, and a run that compiles nothing does without torch's compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from regpt.train.adamw import AdamW

# What torch._dynamo takes seconds to import, and sympy with it.
COMPILER = ("torch._dynamo", "torch._inductor", "sympy")


@pytest.mark.parametrize("fused", [True, False])
def test_updates_are_bitwise_torchs(fused: bool):
    weights = [[torch.linspace(-1, 1, 12).view(3, 4).requires_grad_(), torch.ones(4, requires_grad=True)] for _ in "ab"]
    options = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "fused": fused}
    ours, theirs = (
        make([{"params": [w], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}], **options)
        for make, (w, b) in zip((AdamW, torch.optim.AdamW), weights)
    )
    seen = []
    ours.register_step_pre_hook(lambda *_: seen.append("before"))
    ours.register_step_post_hook(lambda *_: seen.append("after"))
    for k in range(5):
        for (w, b), optimizer in zip(weights, (ours, theirs)):
            ((w * (k + 1)).sin().sum() + (b**2).sum() * k).backward()
            optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=k == 2)
    assert all(mine.equal(other) for mine, other in zip(*weights))
    assert seen == ["before", "after"] * 5
    for (w, _), (v, _) in [weights]:
        assert ours.state[w].keys() == theirs.state[v].keys()
        assert all(value.equal(theirs.state[v][name]) for name, value in ours.state[w].items())


def test_a_run_that_compiles_nothing_does_not_import_the_compiler(shards, tmp_path: Path):
    (tmp_path / "config.toml").write_text(tiny.run_config(shards).to_toml(), encoding="utf-8")
    program = (
        "import sys; from regpt.__main__ import main; "
        f"assert main(['train', {str(tmp_path / 'config.toml')!r}, '--out', {str(tmp_path / 'run')!r}]) == 0; "
        f"print([name for name in {COMPILER} if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
