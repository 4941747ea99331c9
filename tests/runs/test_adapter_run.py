"""Runs that train adapters on a frozen base: stored once, resumed bitwise, forked, replayed, opened as one model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from regpt.__main__ import main
from regpt.checkpoint.load import checkpoint_folder
from regpt.checkpoint.open import open_model
from regpt.config import RunConfig
from regpt.errors import UsageError, UserError
from regpt.model.adapter_config import AdapterConfig
from regpt.model.weights import state_tensors
from regpt.runs.pretrain import fork, pretrain, resume
from regpt.runs.replay import replay
from regpt.train.config import TrainConfig

LORA = AdapterConfig(r=3, alpha=6.0, dropout=0.1)
KINDS = {"lora": LORA, "dora on nf4": replace(LORA, dora=True, base="nf4")}


@pytest.fixture(scope="module")
def base(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("base") / "run"
    assert pretrain(tiny.change(tiny.run_config(shards), "train", steps=4), run) == 0
    return run


def config_of(shards: Path, adapter: AdapterConfig = LORA, **train: object) -> RunConfig:
    config = replace(tiny.run_config(shards), adapter=adapter)
    return tiny.change(config, "train", deterministic=True, ema_decay=0.9, **train)


@pytest.fixture(scope="module")
def runs(shards, base, tmp_path_factory) -> dict[str, Path]:
    """A run of each kind without a stop; read only."""
    folder = tmp_path_factory.mktemp("adapted")
    for name, adapter in KINDS.items():
        assert pretrain(config_of(shards, adapter), folder / name, init_from=str(base)) == 0
    return {name: folder / name for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_hold_adapters_alone_and_the_base_is_stored_once(runs, base, kind):
    run, before = runs[kind], load_file(checkpoint_folder(base, 4) / "model.safetensors")
    stored = load_file(checkpoint_folder(run, 8) / "model.safetensors")
    assert stored
    assert all("lora_" in name for name in stored)
    moments = load_file(checkpoint_folder(run, 8) / "optimizer.safetensors")
    assert {name.partition("/")[2] for name in moments} == set(stored)
    kept = load_file(run / "base" / "base.safetensors")
    assert torch.equal(kept["wte.weight"], before["wte.weight"])
    assert ("h.0.attn.c_attn.weight" in kept) == (KINDS[kind].base == "none")
    assert "lora_A" not in "".join(kept)
    facts = json.loads((run / "env.json").read_text())["adapter"]
    assert (0.08 < facts["quantization_error"] < 0.1) == (KINDS[kind].base == "nf4")
    assert facts["adapted"] == ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    assert facts["trained"] == sum(tensor.numel() for tensor in stored.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_with_adapters_resumes_bitwise(runs, kind, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[kind], run)
    for later in (6, 8):
        shutil.rmtree(checkpoint_folder(run, later))
    assert resume(run) == 0
    assert tiny.final_files(run) == tiny.final_files(runs[kind])
    assert tiny.rows_of(run, "val")[-1]["loss"] == tiny.rows_of(runs[kind], "val")[-1]["loss"]


def test_validation_begins_at_the_bases_loss_and_training_lowers_it(runs, base):
    before = tiny.rows_of(base, "val")[-1]["loss"]
    losses = [row["loss"] for row in tiny.rows_of(runs["lora"], "val")]
    assert losses[0] == before
    assert losses[-1] < before - 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_open_model_is_the_one_that_was_validated(runs, kind, shards, capsys):
    assert (
        main(["eval", str(runs[kind]), "--tasks", "val", "--data", str(shards), "--val-tokens", "48", "--json", "-"])
        == 0
    )
    found, last = json.loads(capsys.readouterr().out), tiny.rows_of(runs[kind], "val")[-1]
    opened = open_model(str(runs[kind]))
    assert opened.adapter is not None
    assert opened.adapter.config == KINDS[kind]
    assert not any("lora" in name for name in state_tensors(opened.model))
    assert found["tasks"]["val"]["loss"] == pytest.approx(last["loss"], abs=2e-6)


def test_inspect_names_what_is_adapted(runs, capsys):
    assert main(["inspect", str(runs["lora"]), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["adapted"] == ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    assert (facts["trained"], facts["rank"]) == (3 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16), 3)
    assert main(["inspect", str(runs["lora"])]) == 0
    assert "parameters in adapters of rank 3" in capsys.readouterr().out


def test_a_fork_has_the_base_too_and_a_replay_repeats_a_step(runs, shards, tmp_path):
    source = checkpoint_folder(runs["lora"], 4)
    assert fork(config_of(shards), source, tmp_path / "fork") == 0
    assert tiny.final_files(tmp_path / "fork") == tiny.final_files(runs["lora"])
    ours, theirs = ((run / "base" / "base.safetensors").read_bytes() for run in (tmp_path / "fork", runs["lora"]))
    assert ours == theirs
    found = replay(runs["lora"], 6)
    assert found["loss"] == found["recorded"]["loss"]
    assert found["grad_norm"] == found["recorded"]["grad_norm"]


def test_adapters_in_a_run_of_another_base_are_refused_by_name(runs, shards, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["lora"], run)
    record = json.loads((run / "base" / "base.json").read_text())
    (run / "base" / "base.json").write_text(json.dumps(record | {"sha256": "0" * 64}))
    for use in (lambda: open_model(str(run)), lambda: resume(run)):
        with pytest.raises(UserError, match=r"are for the base [0-9a-f]{12} .*base' is 000000000000"):
            use()
    shutil.rmtree(run / "base")
    with pytest.raises(UserError, match="holds adapters alone, and their base"):
        open_model(str(run))


def test_a_damaged_base_is_named(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["lora"], run)
    file = run / "base" / "base.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"base\.safetensors' has been changed or damaged"):
        open_model(str(run))


def test_what_cannot_be_adapted_ends_before_a_folder_is_made(shards, base, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="no model to adapt; add --init-from MODEL"):
        pretrain(config_of(shards), out)
    with pytest.raises(UsageError, match="'nothing', which matches no linear layer"):
        pretrain(config_of(shards, replace(LORA, targets=("nothing",))), out, init_from=str(base))
    with pytest.raises(UserError, match=r"the run trains adapters and checkpoint .* does not"):
        fork(config_of(shards), checkpoint_folder(base, 4), out)
    with pytest.raises(UsageError, match="precision is fp8, in which no adapters are trained"):
        RunConfig(adapter=LORA, train=TrainConfig(precision="fp8"))
    assert not out.exists()


def test_a_full_run_begins_from_adapters_merged(runs, shards, tmp_path):
    config = tiny.change(tiny.run_config(shards), "train", steps=1)
    assert pretrain(config, tmp_path / "run", init_from=str(runs["lora"])) == 0
    assert tiny.rows_of(tmp_path / "run", "val")[0]["loss"] == pytest.approx(
        tiny.rows_of(runs["lora"], "val")[-1]["loss"], abs=1e-5
    )
