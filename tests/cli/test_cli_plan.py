"""`regpt plan` as a user meets it: the numbers, the JSON, the warnings, and every mistake in one sentence."""

import json
from pathlib import Path

import pytest
import torch

from regpt.runs import plan as plan_module

KEYS = {
    "recipe": str,
    "machine": {"name": str, "kind": str, "count": int, "memory_gib": float, "peak_tflops": float, "how": str},
    "model": {"parameters": int, "active_parameters": int, "parameters_in_memory": int, "flops_per_token": int},
    "run": {
        "steps": int,
        "batch_tokens": int,
        "seq_len": int,
        "micro_batch_rows": int,
        "accumulation": int,
        "precision": str,
        "tokens": int,
        "tokens_per_parameter": float,
        "optimal_tokens_per_parameter": int,
        "flops": int,
        "stages": list,
    },
    "data": None,
    "memory": {
        "path": str,
        "of": str,
        "parts_gib": dict,
        "peak_gib": float,
        "host_gib": float,
        "needed_gib": float,
        "available_gib": float,
        "fits": bool,
        "largest_micro_batch_rows": int,
    },
    "disk": {
        "data_gib": float,
        "data_is": str,
        "checkpoint_gib": float,
        "checkpoints": int,
        "checkpoints_gib": float,
        "free_gib": None,
    },
    "time": {
        "step_ms": float,
        "parts_ms": dict,
        "tokens_per_s": float,
        "mfu": float,
        "validation_hours": float,
        "hours": float,
        "how": str,
    },
    "cost": None,
    "warnings": list,
}


@pytest.fixture
def plan(regpt):
    def run(*args: object) -> dict:
        code, out, err = regpt("plan", *args, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return run


def check_keys(given: dict, expected: dict) -> None:
    assert given.keys() == expected.keys()
    for key, kind in expected.items():
        if isinstance(kind, dict):
            check_keys(given[key], kind)
        elif kind is None:
            assert given[key] is None
        else:
            assert isinstance(given[key], kind), key


def test_the_json_has_these_keys(plan):
    check_keys(plan("gpt2-124m", "--gpu", "h100"), KEYS)


def test_gpt2_124m_on_an_h100(plan):
    found = plan("gpt2-124m", "--gpu", "h100", "--train.kernels", "plain", "--price", "2")
    assert found["model"]["parameters"] == 124_439_808
    assert found["run"]["tokens"] == 19_073 * 524_288
    assert found["run"]["accumulation"] == 8
    assert found["memory"]["path"] == "compiled"
    assert found["memory"]["peak_gib"] == pytest.approx(28.95, rel=0.01)
    assert sum(found["memory"]["parts_gib"].values()) == pytest.approx(found["memory"]["peak_gib"])
    assert found["memory"]["largest_micro_batch_rows"] == 128
    assert found["time"]["step_ms"] == pytest.approx(1084.7, rel=0.01)
    assert sum(found["time"]["parts_ms"].values()) == pytest.approx(found["time"]["step_ms"])
    assert found["time"]["mfu"] == pytest.approx(0.418, abs=0.005)
    assert found["time"]["hours"] == pytest.approx(19_073 * 1.0847 / 3600, rel=0.05)
    assert found["cost"]["total"] == pytest.approx(2 * found["time"]["hours"])
    assert found["disk"]["checkpoint_gib"] == pytest.approx(12 * 124_439_808 / 2**30)
    assert found["disk"]["checkpoints"] == 3  # the newest two, and the one that is being written
    assert found["warnings"] == []


def test_hopper_takes_the_fused_path_and_others_the_plain_one(plan):
    assert plan("gpt2-124m", "--gpu", "h200")["memory"]["path"] == "fused"
    assert plan("gpt2-124m", "--gpu", "a100")["memory"]["path"] == "compiled"
    assert plan("gpt2-124m", "--gpu", "a100", "--train.kernels", "fused")["memory"]["path"] == "fused"
    assert plan("gpt2-124m", "--gpu", "h100", "--train.precision", "tf32")["memory"]["path"] == "compiled"
    assert plan("gpt2-124m", "--gpu", "h100", "--train.deterministic", "True")["memory"]["path"] == "compiled"
    eager = plan("gpt2-124m", "--gpu", "a100", "--train.compile", "False")
    assert eager["memory"]["path"] == "eager"
    assert eager["memory"]["peak_gib"] > 1.5 * plan("gpt2-124m", "--gpu", "a100")["memory"]["peak_gib"]


def test_fp8_is_planned_on_both_paths_where_it_can_be_computed(plan):
    fp8 = plan("gpt2-124m", "--gpu", "h100", "--train.precision", "fp8", "--train.kernels", "plain")
    assert fp8["memory"]["path"] == "compiled"
    assert fp8["machine"]["peak_tflops"] == 1978.9  # what its MFU is a share of
    assert fp8["warnings"] == []
    fused = plan("gpt2-124m", "--gpu", "h100", "--train.precision", "fp8")
    assert fused["memory"]["path"] == "fused"
    assert fused["time"]["tokens_per_s"] > 1.3 * fp8["time"]["tokens_per_s"]
    refused = plan("gpt2-124m", "--gpu", "a100", "--train.precision", "fp8")["warnings"]
    assert any("regpt train will refuse this: A100 80GB SXM has no units for fp8" in line for line in refused)


def test_eight_gpus_cost_as_much_and_take_an_eighth(plan):
    one = plan("gpt2-124m", "--gpu", "h100", "--price", "3")
    eight = plan("gpt2-124m", "--gpu", "h100", "--gpus", "8", "--price", "3")
    assert eight["run"]["accumulation"] == 1
    assert eight["time"]["hours"] == pytest.approx(one["time"]["hours"] / 8, rel=0.15)
    assert eight["cost"]["total"] == pytest.approx(one["cost"]["total"], rel=0.15)


def test_moments_in_host_memory(plan):
    here = plan("gpt2-1558m", "--gpu", "rtx3090", "--train.micro-batch-rows", "1")
    away = plan("gpt2-1558m", "--gpu", "rtx3090", "--train.micro-batch-rows", "1", "--optim.offload", "True")
    saved = here["memory"]["peak_gib"] - away["memory"]["peak_gib"]
    assert saved == pytest.approx(8 * here["model"]["parameters_in_memory"] / 2**30 - 0.1875)
    assert away["memory"]["host_gib"] == here["memory"]["parts_gib"]["optimizer"]
    assert away["time"]["parts_ms"]["moments from and to the host"] > 100
    assert away["memory"]["fits"]
    assert not here["memory"]["fits"]


def test_checkpointing_takes_time_and_saves_memory(plan):
    given = ("gpt2-350m", "--gpu", "a100", "--train.micro-batch-rows", "32")
    plain = plan(*given)
    again = plan(*given, "--train.activation-checkpointing", "True")
    assert 1.2 < again["time"]["step_ms"] / plain["time"]["step_ms"] < 1.34
    assert again["memory"]["peak_gib"] < 0.5 * plain["memory"]["peak_gib"]
    fused = plan("gpt2-350m", "--gpu", "h100", "--train.activation-checkpointing", "True")
    assert fused["memory"]["path"] == "compiled"


def test_auto_takes_the_largest_that_fits(plan):
    found = plan("gpt2-124m", "--gpu", "rtx3090", "--train.micro-batch-rows", "auto")
    assert found["run"]["micro_batch_rows"] == found["memory"]["largest_micro_batch_rows"] == 32
    assert found["memory"]["fits"]


def test_a_stated_mfu_is_reckoned_with(plan):
    found = plan("gpt2-124m", "--gpu", "b200", "--mfu", "0.5")
    assert found["time"]["mfu"] == pytest.approx(0.5)
    assert found["time"]["step_ms"] == pytest.approx(524_288 * found["model"]["flops_per_token"] / 2250e12 / 0.5 * 1e3)


def test_the_data_is_counted(plan, corpus: Path, tiny_flags: list[str]):
    found = plan("gpt2-tiny", *tiny_flags, "--gpu", "h100", "--train.steps", "1000")
    assert found["data"]["train_tokens"] > 0
    assert found["model"]["parameters"] == 300 * 16 + 16 * 16 + 12 * 16**2 + 13 * 16 + 2 * 16  # the data's vocabulary
    assert found["data"]["epochs"] == pytest.approx(64_000 / found["data"]["train_tokens"])
    stored = sum(path.stat().st_size for path in corpus.glob("*.bin")) + sum(
        path.stat().st_size for path in corpus.glob("*.idx")
    )
    assert found["disk"]["data_gib"] * 2**30 == pytest.approx(stored)
    assert any("times; beyond 4 times" in warning for warning in found["warnings"])


def test_this_machine_s_cpu_is_measured(plan, tiny_flags: list[str]):
    found = plan("gpt2-tiny", *tiny_flags, "--gpu", "cpu")
    assert found["machine"]["kind"] == "cpu"
    assert "measured here" in found["machine"]["how"]
    assert "timed here" in found["time"]["how"]
    assert found["memory"]["of"] == "the process"
    assert found["memory"]["fits"]
    assert found["time"]["step_ms"] > 0
    assert found["disk"]["free_gib"] > 0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--train.batch-tokens", "500000"], ["regpt train will refuse", "train.batch_tokens 500000", "458752"]),
        (["--gpus", "3"], ["regpt train will refuse", "3 processes"]),
        (["--optim.decay-steps", "100"], ["regpt train will refuse", "warmup takes 715"]),
        (["--optim.warmup-steps", "20000"], ["warmup of 20,000 steps is as long as the run (19,073)"]),
        (["--gpu", "rtx3090"], ["64 rows at once will not fit", "23.7 GiB", "train.micro_batch_rows to 32"]),
        (
            ["--gpu", "rtx3090", "--model.n-layer", "100", "--model.n-embd", "3072", "--train.micro-batch-rows", "1"],
            ["1 rows at once will not fit", "a smaller model or a larger device"],
        ),
        (["--gpu", "t4", "--train.micro-batch-rows", "8"], ["T4 has no units for bf16", "it has fp16"]),
        (["--gpu", "p100", "--train.micro-batch-rows", "8"], ["capability 7.0, P100 PCIe has 6.0"]),
        (["--train.steps", "100"], ["tokens a parameter", "20 are optimal"]),
        (
            [
                "--model.n-layer",
                "1",
                "--model.n-embd",
                "96",
                "--train.batch-tokens",
                "1024",
                "--train.compile",
                "False",
                "--train.micro-batch-rows",
                "1",
                "--train.precision",
                "fp32",
                "--model.vocab-size",
                "256",
            ],
            ["wait for the host to launch"],
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else str(value),
)
def test_what_deserves_a_second_thought_is_a_warning(plan, flags: list[str], parts: list[str]):
    gpu = [] if "--gpu" in flags else ["--gpu", "h100"]
    warnings = plan("gpt2-124m", *gpu, *flags)["warnings"]
    assert any(all(part in warning for part in parts) for warning in warnings), warnings


def test_a_vocabulary_that_the_data_will_decide_is_said_where_it_is_assumed(plan, corpus: Path):
    said = "the vocabulary is the data's: GPT-2's 50,257 tokens are assumed here; add --data DIR, or"
    for recipe, flags, assumed in (
        ("llama-124m", [], True),
        ("llama-124m", ["--model.vocab-size", "128256"], False),
        ("llama-124m", ["--data", str(corpus)], False),
        ("gpt2-124m", [], False),
    ):
        warnings = plan(recipe, "--gpu", "h100", *flags)["warnings"]
        assert any(warning.startswith(said) for warning in warnings) is assumed, (recipe, flags)


def test_a_disk_that_is_too_small_is_a_warning(plan, tiny_flags, monkeypatch):
    monkeypatch.setattr(plan_module, "free_disk_bytes", lambda folder: 1000)
    warnings = plan("gpt2-tiny", *tiny_flags, "--gpu", "cpu", "--mfu", "0.5")["warnings"]
    assert any("GiB are free here; keep fewer" in warning for warning in warnings)


def test_it_prints_a_table(regpt):
    code, out, _ = regpt(
        "plan", "gpt2-124m", "--gpu", "h100", "--train.kernels", "plain", "--gpus", "2", "--price", "2"
    )
    assert code == 0
    said = " ".join(out.split())
    assert said.startswith("gpt2-124m on 2 × H100 SXM model 124,439,808 parameters")
    for part in ("10.0B tokens", "29.02 GiB of tensors at the peak (compiled)", "GPU hours at 2.00", "MFU 41."):
        assert part in said


def test_switches_may_come_first(regpt):
    assert regpt("plan", "--json", "gpt2-124m", "--gpu", "h100")[0] == 0


@pytest.mark.parametrize(
    ("args", "code", "parts"),
    [
        ([], 2, ["no recipe was given", "gpt2-124m"]),
        (["gpt2-125m"], 2, ["gpt2-125m", "did you mean 'gpt3-125m'"]),
        (["gpt2-124m", "--gpu", "h101"], 2, ["a GPU called 'h101'", "did you mean 'h100'", "RTX 4090"]),
        (["gpt2-124m", "--gpus", "0"], 2, ["--gpus is 0", "at least 1"]),
        (["gpt2-124m", "--gpus", "many"], 2, ["--gpus", "many"]),
        (["gpt2-124m", "--gpu", "h100", "--price", "-1"], 2, ["--price is -1", "0 or more"]),
        (["gpt2-124m", "--gpu", "h100", "--price", "nan"], 2, ["--price is nan"]),
        (["gpt2-124m", "--gpu", "h100", "--mfu", "40"], 2, ["--mfu is 40", "at most 1"]),
        (["gpt2-124m", "--gpu", "h100", "--mfu", "0"], 2, ["--mfu is 0,", "above 0"]),
        (["gpt2-124m", "--gpu", "cpu", "--gpus", "2"], 2, ["--gpus is 2", "add --gpu NAME"]),
        (["gpt2-124m", "--gpu", "h100", "--train.steps", "0"], 2, ["train.steps is 0"]),
        (["gpt2-124m", "--gpu", "h100", "--train.step", "9"], 2, ["--train.step"]),
        (["gpt2-124m", "--gpu", "h100", "--train.precision", "fp64"], 2, ["fp64", "fp32"]),
        (["gpt2-124m", "--gpu", "h100", "--train.kernels", "fused", "--train.precision", "fp32"], 2, ["fused", "fp32"]),
        (["gpt2-124m", "--gpu", "h100", "--train.kernels", "fused", "--train.precision", "fp16"], 2, ["fused", "fp16"]),
        (["gpt2-124m", "--gpu", "h100", "--train.kernels", "fused", "--model.n-embd", "780"], 2, ["multiples of 8"]),
        (
            ["gpt2-124m", "--gpu", "h100", "--train.kernels", "fused", "--train.deterministic", "True"],
            2,
            ["order of its"],
        ),
        (["gpt2-124m", "--gpu", "h100", "--data", "/no/such/folder"], 1, ["/no/such/folder", "does not exist"]),
        (["gpt2-124m", "--gpu", "h100", "--data.seq-len", "2048"], 2, ["data.seq_len 2048", "max_seq_len 1024"]),
        (["gpt2-124m", "--train.device", "cuda"], 2, ["'cuda' is not available"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_mistake_is_one_sentence(regpt, args: list[str], code: int, parts: list[str]):
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    got, out, err = regpt("plan", *args)
    assert got == code, err
    assert err.startswith("regpt: ")
    assert err.count("\n") == 1
    assert not out
    for part in parts:
        assert part in err
