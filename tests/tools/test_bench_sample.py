"""`regpt bench sample`: tokens/s of the very function that writes samples."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
from regpt.__main__ import main
from regpt.tools.bench import samples as samples_module
from regpt.tools.bench.samples import bench_sample

SMALL = ("--batch", 1, 3, "--prompt-tokens", 4, "--new-tokens", 5, "--repeats", 2, "--device", "cpu")


def test_a_trained_model_is_timed(bench, recipe: str, shards: Path, tmp_path: Path):
    flags = ["--train.steps", "1", "--sample.prompt", "ba", "--sample.max-new-tokens", "2"]
    assert main(["train", recipe, "--data", str(shards), "--out", str(tmp_path / "run"), *flags]) == 0
    code, out, err = bench("sample", tmp_path / "run", *SMALL, "--json", tmp_path / "sample.json")
    assert code == 0, err
    report = json.loads((tmp_path / "sample.json").read_text(encoding="utf-8"))
    assert (report["kind"], report["source"]) == ("bench sample", str(tmp_path / "run"))
    assert [row["batch"] for row in report["batches"]] == [1, 3]
    for row in report["batches"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] * 5 / row["seconds"])
        assert f"{row['tokens_per_s']:,.0f}" in out
    assert report["model"]["n_layer"] == 1
    assert (report["prompt_tokens"], report["new_tokens"], report["precision"]) == (4, 5, "fp32")


def test_a_recipe_is_timed_with_random_weights(bench):
    code, out, err = bench("sample", "quickstart", *SMALL, "--precision", "bf16", "--json", "-")
    assert code == 0, err
    report = json.loads(out)
    assert (report["parameters"], report["precision"]) == (809_728 + 50257 * 128, "bf16")


def test_every_text_is_written_to_its_end_and_the_first_time_does_not_count(monkeypatch: pytest.MonkeyPatch):
    calls, now = [], [0.0]

    def generate(model, prompts, new_tokens, *, options, generator):
        calls.append((tuple(prompts.shape), new_tokens, options.top_k))
        now[0] += 100 if len(calls) in (1, 3) else new_tokens  # the first of each kind is slow
        return prompts

    monkeypatch.setattr(samples_module, "generate", generate)
    monkeypatch.setattr(samples_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    (row,) = bench_sample(tiny.build_model(dtype=torch.float32), [6], 4, 8, repeats=1)["batches"]
    assert calls == [((6, 4), 8, 50)] * 2 + [((6, 4), 1, 50)] * 2
    assert (row["seconds"], row["first_token_s"], row["tokens_per_s"]) == (8, 1, 6)


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--prompt-tokens", "0"], 2, ["--prompt-tokens is 0", "at least 1"]),
        (["--new-tokens", "0"], 2, ["--new-tokens is 0", "at least 1"]),
        (["--repeats", "0"], 2, ["--repeats is 0", "at least 1"]),
        (["--batch", "1", "0"], 2, ["--batch is 0", "at least 1"]),
        (["--new-tokens", "125"], 2, ["125", "128", "--new-tokens 64"]),
        (["--json", "no/such/folder/x"], 1, ["no/such/folder/x"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_mistake_is_one_sentence(bench, flags, code: int, parts):
    got, _, err = bench("sample", "quickstart", *SMALL, *flags)
    assert got == code, err
    assert err.startswith("regpt: "), err
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_a_model_that_is_not_there_is_named(bench):
    code, _, err = bench("sample", "/no/such/model")
    assert code == 2
    assert "'/no/such/model'" in err
