"""`benchmarks/ladder.py`: each rung computes what it says, the factors are right, and what a device lacks is said."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor

import tiny
from regpt.config import read_config
from regpt.model.ops import PLAIN, attention
from regpt.runs.bench import Window
from regpt.tools.bench.steps import StepTimes
from regpt.train.optim import make_optimizer


@pytest.fixture
def run_ladder(ladder, recipe: str):
    """The report of `rungs` on the tiny recipe, four rows a step."""

    def run(rungs=ladder.LADDER) -> dict:
        window, config = Window(steps=3, warmup=1), read_config(recipe)
        return ladder.bench_ladder(config, window, name="tiny", rows=4, progress=lambda text: None, rungs=rungs)

    return run


# ---- the lecture's first forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("T", [1, 3, 7])
def test_explicit_attention_is_the_plain_one(ladder, T: int, masked: bool):
    generator = torch.Generator().manual_seed(T)
    q = torch.randn(2, 3, T, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    mask = None
    if masked:
        mask = (torch.rand(2, 1, T, 7, generator=generator) < 0.5) | torch.eye(T, 7, dtype=torch.bool)
    ours, plain = ladder.explicit_attention(q, k, v, mask), attention(q, k, v, mask)
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-13)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), weights), torch.autograd.grad(plain, (q, k, v), weights)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_model_with_explicit_attention_has_the_same_loss_and_gradients(ladder):
    def gradients(ops) -> dict[str, Tensor]:
        model = tiny.build_model()
        for module in model.modules():
            if hasattr(module, "ops"):
                module.ops = ops
        loss = tiny.loss_sum(model, *tiny.Rows().rows(0))
        loss.backward()
        return {"loss": loss} | {name: p.grad for name, p in model.named_parameters()}

    assert tiny.largest_error(gradients(ladder.EXPLICIT), gradients(PLAIN)) < 1e-13


def test_the_unfused_optimizer_makes_the_same_updates(ladder):
    models = [tiny.build_model() for _ in range(2)]
    optimizers = [make_optimizer(model, tiny.OPTIM, tiny.CPU) for model in models]
    optimizers[1] = ladder.unfused(optimizers[1])
    assert [optimizer.param_groups[0]["fused"] for optimizer in optimizers] == [True, None]
    for step in range(3):
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            tiny.loss_sum(model, *tiny.Rows().rows(step)).backward()
            optimizer.step()
    one, other = ({name: p.detach() for name, p in model.named_parameters()} for model in models)
    assert tiny.largest_error(one, other) < 1e-8  # Adam makes much of gradients that are only rounding
    decays = [[group["weight_decay"] for group in optimizer.param_groups] for optimizer in optimizers]
    assert decays == [[0.0, 0.1]] * 2


# ---- which rungs there are -------------------------------------------------------------------------------------------


def test_a_skipped_rung_says_why_and_changes_nothing_later(ladder, run_ladder):
    rungs = [
        ladder.LADDER[0],
        ladder.LadderRung("no Ampere", {"train.precision": "tf32"}),
        ladder.LadderRung("no such GPU", {"train.kernels": "fused"}),
        ladder.LadderRung("repeated", {"train.compile": False}),
        ladder.LadderRung("padded", {"train.pad_vocab": True}),
    ]
    found = run_ladder(rungs)["rungs"]
    assert "Ampere" in found[1]["skipped"]
    assert "needs an NVIDIA GPU" in found[2]["skipped"]
    assert found[3]["skipped"] == "no change here"
    assert found[4]["setup"] == found[0]["setup"] | {"train.pad_vocab": True}
    assert found[4]["factor"] == found[4]["total"] == pytest.approx(found[0]["ms"] / found[4]["ms"])


def test_the_ladder_is_the_lectures(ladder):
    names = ["float32", "TF32", "bfloat16", "torch.compile", "flash attention", "padded vocabulary", "fused AdamW"]
    lectures = list(zip(names, (1000, 333, 300, 130, 96, 93, 90)))
    assert [(rung.name, rung.lecture_ms) for rung in ladder.LADDER[:7]] == lectures
    assert all(rung.lecture_ms is None for rung in ladder.LADDER[7:])
    lecture = read_config("gpt2-124m").with_vocab_size().model
    assert ladder.is_lectures(lecture, 16384, 1024)
    assert not ladder.is_lectures(lecture, 8192, 1024)
    assert not ladder.is_lectures(read_config("gpt2-350m").model, 16384, 1024)


# ---- climbing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(ladder, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What each rung's trainer is, in place of timing it; every rung is twice as fast as the one before."""
    trainers = []

    def look(trainer, warmup) -> StepTimes:
        compiled = hasattr(trainer.backend.loss_sum, "__wrapped__")
        trainers.append(
            {
                "attention": trainer.model.ops.attention.__name__,
                "fused": bool(trainer.optimizer.param_groups[0]["fused"]),
                "vocabulary": trainer.model.wte.num_embeddings,
                "precision": trainer.config.precision,
                "compiled": compiled,
                "kernels": trainer.config.kernels,
                "batch_tokens": trainer.config.batch_tokens,
            }
        )
        ms = 64.0 / 2 ** len(trainers) * trainer.config.batch_tokens / 64
        return StepTimes(1.0, (ms, ms, ms), 1.0, ({"loss": 5.0},))

    monkeypatch.setattr(ladder, "time_steps", look)
    monkeypatch.setattr(ladder, "lacks_tf32", lambda device: False)
    return trainers


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_each_rung_trains_what_it_says(ladder, run_ladder, seen: list[dict]):
    auto = {"train.kernels": "auto"}
    on_cpu = [replace(rung, changes=auto) if "kernels" in rung.name else rung for rung in ladder.LADDER]
    report = run_ladder(on_cpu)
    plain = {
        "attention": "explicit_attention",
        "fused": False,
        "vocabulary": 300,
        "precision": "fp32",
        "compiled": False,
        "kernels": "plain",
        "batch_tokens": 64,
    }
    changes = [
        {},
        {"precision": "tf32"},
        {"precision": "bf16"},
        {"compiled": True},
        {"attention": "attention"},
        {"vocabulary": 384},
        {"fused": True},
        {"kernels": "auto"},
        {"batch_tokens": 128},
    ]
    expected = []
    for change in changes:
        plain = plain | change
        expected.append(plain)
    assert seen == expected
    assert [rung["ms"] for rung in report["rungs"]] == [32, 16, 8, 4, 2, 1, 0.5, 0.25, 0.125]  # of the same 64 tokens
    assert [rung["factor"] for rung in report["rungs"]] == [1] + [2] * 8
    assert report["rungs"][-1]["total"] == 256
    assert report["rungs"][-1]["tokens_per_s"] == 64 / 0.125e-3
    assert report["rungs"][-1]["batch_tokens"] == 128


def test_a_rung_that_needs_too_much_memory_computes_fewer_rows_at_once(ladder, run_ladder, monkeypatch):
    def hungry(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if len(q) > 2:
            raise MemoryError
        return ladder.explicit_attention(q, k, v, mask)

    monkeypatch.setattr(ladder, "EXPLICIT", replace(PLAIN, attention=hungry))
    peaks_forgotten: list[torch.device] = []
    monkeypatch.setattr("regpt.tools.bench.steps.reset_peak", peaks_forgotten.append)
    report = run_ladder([ladder.LADDER[0], ladder.LadderRung("flash", {"attention": "torch"})])
    assert peaks_forgotten == [tiny.CPU]  # that of the attempt that failed
    assert [(rung["rows"], rung["rows_wanted"]) for rung in report["rungs"]] == [(2, 4), (4, 4)]
    assert "out of memory with 4 rows at once, so 2" in printed(ladder, report)


def test_rows_that_the_device_chooses_are_no_lack_of_memory(ladder, run_ladder):
    changes = {"first": {"train.precision": "fp32"}, "auto": {"train.micro_batch_rows": "auto"}}
    (first, auto) = run_ladder([ladder.LadderRung(name, change) for name, change in changes.items()])["rungs"]
    assert (first["rows"], first["rows_wanted"]) == (4, 4)
    assert auto["rows"] == auto["rows_wanted"]


def test_a_rung_that_fails_is_named_and_the_next_one_is_timed(ladder, run_ladder, monkeypatch: pytest.MonkeyPatch):
    def fail(optimizer):
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(ladder, "unfused", fail)
    rungs = [ladder.LadderRung("bad", ladder.START | {"adamw": "default"}), ladder.LadderRung("good", ladder.START)]
    bad, good = run_ladder(rungs)["rungs"]
    assert bad["skipped"] == "not on this device: no kernel"
    assert good["ms"] > 0


# ---- the command -----------------------------------------------------------------------------------------------------


def printed(ladder, report: dict) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(ladder.ladder_table(report))
    return out.getvalue()


def test_the_script_prints_a_table_and_writes_json_and_picture(ladder, recipe, tmp_path, monkeypatch, capsys):
    def no_compiler(function, **options):
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    files = {"json": tmp_path / "ladder.json", "picture": tmp_path / "ladder.png"}
    ladder.main(ladder.Args(model=recipe, steps=2, warmup=1, device="cpu", **files))
    said = capsys.readouterr().out
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "ladder.json").read_text(encoding="utf-8"))
    assert (report["kind"], report["rows"], report["tokens"], report["lectures"]) == ("ladder", 4, 64, False)
    rungs = {rung["name"]: rung for rung in report["rungs"]}
    assert list(rungs) == [rung.name for rung in ladder.LADDER]
    for name in ("float32", "bfloat16", "flash attention", "padded vocabulary", "fused AdamW", "the recipe's batch"):
        assert rungs[name]["ms"] > 0, rungs[name]
        assert rungs[name]["tokens_per_s"] == pytest.approx(64e3 / rungs[name]["ms"])
        assert rungs[name]["p10"] <= rungs[name]["ms"] <= rungs[name]["p90"]
    assert rungs["float32"]["setup"] == {
        "train.precision": "fp32",
        "train.compile": False,
        "train.kernels": "plain",
        "train.pad_vocab": False,
        "attention": "explicit",
        "adamw": "default",
    }
    assert rungs["TF32"]["skipped"].startswith("TensorFloat-32")
    assert rungs["torch.compile"]["skipped"] == "not on this device: there is no compiler"
    assert "there is no compiler" in said
    assert "lecture" not in said


def test_the_same_losses_on_every_rung(ladder, run_ladder):
    rungs = [
        ladder.LADDER[0],
        ladder.LadderRung("flash", {"attention": "torch"}),
        ladder.LadderRung("padded", {"train.pad_vocab": True}),
        ladder.LadderRung("fused", {"adamw": "fused"}),
    ]
    losses = [rung["loss"] for rung in run_ladder(rungs)["rungs"]]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_the_lecture_is_compared_with_the_same_work_only(ladder):
    rungs = [{"name": rung.name, "lecture_ms": rung.lecture_ms} for rung in ladder.LADDER]
    measured = {"p10": 1.0, "p90": 2.0, "rows": 8, "rows_wanted": 16, "batch_tokens": 16384, "peak_memory_gib": 7.25}
    measured |= {"tokens_per_s": 5e4, "factor": 1.0, "total": 1.0}
    rungs = [rung | measured | {"ms": 300.0 - i} for i, rung in enumerate(rungs)]
    rungs[1] = {"name": "TF32", "lecture_ms": 333, "skipped": "not on this device: too old"}
    report = {"model_name": "gpt2-124m", "device": "a GPU", "tokens": 16384, "steps": 10, "rungs": rungs}
    alone, compared = report | {"lectures": False}, report | {"lectures": True}
    assert "1,000" in printed(ladder, compared)
    assert "Karpathy 2024" in printed(ladder, compared)
    assert "1,000" not in printed(ladder, alone)
    assert "7.2" in printed(ladder, alone)


def test_figures_have_three_digits(ladder):
    found = [ladder.figure_of(value) for value in (0.1234, 9.876, 12.34, 1234.5, None)]
    assert found == ["0.12", "9.88", "12.3", "1,234", ""]
