"""`regpt bench train`: what it reports, that it runs what `regpt train` runs, and every mistake in one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

import tiny
from regpt.__main__ import main
from regpt.cli.bench import figures
from regpt.config import read_config
from regpt.parallel.mesh import open_mesh
from regpt.runs.bench import Window, bench_train, greatest
from regpt.tools.bench.steps import attention_backend, percentiles, time_steps

FAST = ("--steps", 3, "--warmup", 2)


def one_sentence(err: str) -> bool:
    return err.startswith("regpt: ") and err.count("\n") == 1 and "Traceback" not in err


@pytest.fixture
def report(bench, recipe: str, tmp_path: Path) -> dict:
    code, _, err = bench("train", recipe, *FAST, "--json", tmp_path / "report.json")
    assert code == 0, err
    return json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))


def test_the_report_has_what_the_page_says(report: dict, recipe: str):
    assert report["kind"] == "bench train"
    assert report["recipe"] == recipe
    assert report["data"] == "invented tokens"
    assert (report["world_size"], report["accumulation"], report["micro_batch_rows"]) == (1, 2, 4)
    assert report["flops_per_token"] == 6 * (300 * 16 + 12 * 16 * 16) + 12 * 16 * 16
    assert report["parameters"] == 300 * 16 + 16 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16
    assert len(report["steps_ms"]) == report["steps"] == 3
    ms = report["step_ms"]
    assert ms["min"] <= ms["p10"] <= ms["median"] <= ms["p90"] <= ms["max"]
    assert report["tokens_per_s"] == pytest.approx(128e3 / ms["median"])
    assert report["tokens_per_s_per_device"] == report["tokens_per_s"]
    assert report["share_of_product"] == pytest.approx(
        report["tokens_per_s"] * report["flops_per_token"] / report["product"]["tflops"] / 1e12
    )
    assert report["product"]["precision"] == "fp32"
    assert report["first_step_s"] > report["steps_ms"][0] / 1e3
    assert report["versions"]["torch"] == torch.__version__
    assert (report["precision"], report["compile"], report["fused_adamw"]) == ("fp32", False, True)
    assert report["kernels"]["name"] == "plain"
    assert "cpu" in report["kernels"]["reason"]


def test_the_table_has_one_row_a_figure(report: dict):
    assert list(figures(report)) == [
        "tokens/s",
        "a step",
        "MFU, data sheet",
        "of a product",
        "peak memory",
        "first step after",
        "batch",
        "active",
        "versions",
    ]
    listed = {"tflops": 989.4, "precision": "bf16", "source": ""}
    on_gpu = figures(report | {"data_sheet": listed, "mfu": 0.5, "world_size": 2, "peak_memory_of": "gpu"})
    assert "each of 2" in on_gpu["tokens/s"]
    assert on_gpu["MFU, data sheet"] == "50.0% of 989.4 TFLOP/s, dense bf16"
    assert "on the GPU, the largest of all processes" in on_gpu["peak memory"]


def test_it_trains_what_regpt_train_trains(bench, recipe: str, shards: Path, tmp_path: Path):
    flags = ["--data", shards, "--optim.schedule", "constant", "--sample.prompt", "ba"]
    code, out, err = bench("train", recipe, *FAST, *flags, "--json", "-")
    assert code == 0, err
    short = ["--train.steps", "5", "--sample.max-new-tokens", "2"]
    assert main(["train", recipe, *map(str, flags), *short, "--out", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"]
    assert json.loads(out)["loss"] == [losses[0], losses[-1]]


def timed(recipe: str) -> dict | None:
    """What each process of `regpt bench train` does."""
    return bench_train(read_config(recipe), Window(3, 2), recipe="tiny", progress=lambda text: None)


def test_two_processes_report_together_and_each(recipe: str):
    report, other = tiny.in_processes(2, timed, recipe)
    assert other is None
    assert (report["world_size"], report["accumulation"]) == (2, 1)
    assert report["tokens_per_s"] == pytest.approx(2 * report["tokens_per_s_per_device"])
    assert report["tokens_per_s"] == pytest.approx(128e3 / report["step_ms"]["median"])


def test_the_largest_memory_of_all_processes_is_reported():
    assert tiny.in_processes(2, largest_of_ranks) == [2.0, 2.0]
    assert greatest(tiny.ALONE, None) is None


def largest_of_ranks() -> float | None:
    with open_mesh("cpu") as mesh:
        return greatest(mesh, float(mesh.rank + 1))


def test_a_step_lasts_from_the_end_of_the_one_before(monkeypatch: pytest.MonkeyPatch):
    trainer = tiny.build_trainer(tiny.build_model(), tiny.Rows(), train=replace(tiny.TRAIN, steps=5))
    update, now = trainer.train_step, [0.0]
    monkeypatch.setattr("regpt.tools.bench.steps.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow_update():
        result = update()
        now[0] += trainer.step**2  # seconds: 1, 4, 9, 16, 25
        return result

    trainer.train_step = slow_update
    times = time_steps(trainer, warmup=2)
    assert (times.first_s, times.first_end) == (1, 1)
    assert times.steady_ms == (9e3, 16e3, 25e3)
    assert [row["step"] for row in times.rows] == [1, 2, 3, 4, 5]


def test_the_spread_is_that_of_the_percentiles():
    numbers = percentiles([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (numbers["median"], numbers["min"], numbers["max"], numbers["mean"]) == (3, 1, 5, 3)
    assert (numbers["p10"], numbers["p90"]) == pytest.approx((1.4, 4.6))
    assert numbers["spread"] == pytest.approx(3.2 / 3)
    assert percentiles([1.0, 2.0, 4.0])["p90"] == pytest.approx(3.6)
    assert percentiles([7.0])["p10"] == percentiles([7.0])["p90"] == 7


def test_the_attention_backend_is_the_one_that_torch_chooses(monkeypatch: pytest.MonkeyPatch):
    assert attention_backend(tiny.CONFIG, 16, torch.float32, tiny.CPU) == "flash"  # torch has one for CPUs
    asked = []

    def choose(q, k, v, *, attn_mask, dropout_p, is_causal):
        asked.append(
            (tuple(q.shape), q.requires_grad, None if attn_mask is None else attn_mask.sum().item(), is_causal)
        )
        return SDPBackend.CUDNN_ATTENTION.value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    for masked in (False, True):
        assert attention_backend(tiny.CONFIG, 16, torch.float32, tiny.CPU, masked=masked) == "cudnn"
    assert asked == [((1, 3, 16, 8), True, None, True), ((1, 3, 16, 8), True, 16 * 17 / 2, False)]


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--steps", "0"], 2, ["--steps is 0", "at least 1"]),
        (["--warmup", "0"], 2, ["--warmup is 0", "at least 1"]),
        (["--nproc", "0"], 2, ["--nproc is 0", "at least 1"]),
        (["--nproc", "3"], 2, ["3 processes", "192"]),
        (["--nproc", "16"], 2, ["16 processes", "8 rows"]),
        (["--data", "/no/such/folder"], 1, ["/no/such/folder", "does not exist"]),
        (["--json", "no/such/folder/x.json"], 1, ["no/such/folder/x.json", "make it first"]),
        (["--train.stepz", "3"], 2, ["--train.stepz"]),
        (["--data.seq-len", "32"], 2, ["data.seq_len 32 is longer than model.max_seq_len 16"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_mistake_is_one_sentence(bench, recipe: str, flags, code: int, parts):
    got, out, err = bench("train", recipe, *flags)
    assert (got, out) == (code, ""), err
    assert one_sentence(err), err
    for part in parts:
        assert part in err


def test_data_of_any_tokenizer_will_do(bench, recipe: str, shards: Path):
    code, _, err = bench("train", recipe, *FAST, "--data", shards, "--data.tokenizer", "gpt2", "--json", "-")
    assert code == 0, err


def test_data_of_another_vocabulary_is_refused_before_the_model_is_built(bench, recipe: str, shards: Path):
    code, _, err = bench("train", recipe, "--data", shards, "--model.vocab-size", "301")
    assert code == 1
    assert "vocabulary of 300" in err


@pytest.mark.parametrize("args", [[], ["trian", "x"], ["train"], ["train", "gpt2-125m"]], ids=" ".join)
def test_what_is_missing_or_unknown_is_said(bench, args: list[str]):
    code, _, err = bench(*args)
    assert code == 2
    assert one_sentence(err)
    assert "train" in err or "gpt2-124m" in err
