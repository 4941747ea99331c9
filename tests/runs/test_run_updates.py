"""A run measures its updates and says what it reads."""

import json

from regpt.report.read import read_run
from regpt.report.series import bytes_per_token
from regpt.runs.pretrain import pretrain
from tiny import change, run_config, write_shards


def test_update_ratios_are_written_when_they_are_due(tmp_path):
    config = change(run_config(write_shards(tmp_path / "data")), "log", update_ratios_every_steps=3)
    assert pretrain(config, tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    updates = [row for row in rows if row["kind"] == "updates"]
    assert [row["step"] for row in updates] == [3, 6]
    assert set(updates[0]["ratios"]) == {"wte", "wpe", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert all(1e-5 < ratio < 1 for row in updates for ratio in [row["ratio"], *row["ratios"].values()])


def test_a_run_says_how_long_its_text_is_and_where_it_came_from(tmp_path):
    data = write_shards(tmp_path / "data")
    assert pretrain(run_config(data), tmp_path / "run") == 0
    run = read_run(tmp_path / "run")
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    facts = run.env["data"]
    assert facts["tokenizer_sha256"] == manifest["tokenizer_sha256"]
    assert facts["sources"] == [str(data.with_suffix(".jsonl"))]
    assert bytes_per_token(run) == manifest["text_bytes"]["train"] / facts["train_tokens"]
