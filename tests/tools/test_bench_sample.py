"""`benchmarks/sampling.py`: tokens/s of the very function that writes samples."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
from regpt.__main__ import main

SMALL = {"batch": (1, 3), "prompt_tokens": 4, "new_tokens": 5, "repeats": 2, "device": "cpu"}


def test_a_trained_model_is_timed(sampling, recipe: str, shards: Path, tmp_path: Path, capsys):
    flags = ["--train.steps", "1", "--sample.prompt", "ba", "--sample.max-new-tokens", "2"]
    assert main(["train", recipe, "--data", str(shards), "--out", str(tmp_path / "run"), *flags]) == 0
    sampling.main(sampling.Args(str(tmp_path / "run"), json=tmp_path / "sample.json", **SMALL))
    out, report = capsys.readouterr().out, json.loads((tmp_path / "sample.json").read_text(encoding="utf-8"))
    assert report["source"] == str(tmp_path / "run")
    assert [row["batch"] for row in report["batches"]] == [1, 3]
    for row in report["batches"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] * 5 / row["seconds"])
        assert f"{row['tokens_per_s']:,.0f}" in out
    assert report["model"]["n_layer"] == 1
    assert (report["prompt_tokens"], report["new_tokens"], report["precision"]) == (4, 5, "fp32")


def test_a_recipe_is_timed_with_random_weights(sampling):
    assert sampling.open_or_make("quickstart", tiny.CPU).config.n_embd == 128


def test_every_text_is_written_to_its_end_and_the_first_two_times_do_not_count(sampling, monkeypatch):
    calls, now = [], [0.0]

    def write(engine, prompts, new_tokens):
        calls.append(((len(prompts), len(prompts[0])), new_tokens, engine.rows.n))
        now[0] += 100 if len(calls) in (1, 2, 4, 5) else new_tokens  # the first two of each kind are slow

    monkeypatch.setattr(sampling, "write_texts", write)
    monkeypatch.setattr(sampling, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    (row,) = sampling.bench_sample(tiny.build_model(dtype=torch.float32), [6], 4, 8, repeats=1)["batches"]
    assert calls == [((6, 4), 8, 6)] * 3 + [((6, 4), 1, 6)] * 3
    assert (row["seconds"], row["first_token_s"], row["tokens_per_s"]) == (8, 1, 6)


def test_more_tokens_than_the_model_reads_are_refused(sampling):
    with pytest.raises(SystemExit, match="are together more than the 16 tokens that the model reads"):
        sampling.bench_sample(tiny.build_model(), [1], 10, 10, repeats=1)
