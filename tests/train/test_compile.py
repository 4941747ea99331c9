"""The compiled training step gives what the plain one gives, and leaves validation, sampling and chance alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import tiny
from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.evals.perplexity import validate
from regpt.model.transformer import Transformer
from regpt.runs.pretrain import pretrain
from regpt.sample.generate import generate
from regpt.sample.sampling import SamplingOptions
from regpt.train.loss import make_loss_sum

pytestmark = [
    tiny.IMPORTS_COMPILER,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on the CPU"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Graphs of other tests count toward no limit here."""
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def held_out() -> list[Batch]:
    """Validation batches of the training's shape; the last has rows without targets."""
    batches = [batch for step in (7, 8) for batch in tiny.Rows(micro_batch_rows=4).step(step)]
    batches[-1].targets[2:] = IGNORE_INDEX
    return batches


def drawn(model: Transformer) -> list[list[int]]:
    prompt = torch.tensor([[1, 2, 3]]).expand(2, 3)
    generator = torch.Generator().manual_seed(4)
    return generate(model, prompt, 9, options=SamplingOptions(top_k=20), generator=generator).tolist()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5)])
def test_loss_and_gradients_are_those_of_the_plain_step(precision: str, tolerance: float):
    dtype = torch.float64 if precision == "fp64" else torch.float32
    train = tiny.replace(tiny.TRAIN, precision=precision)
    plain, compiled = (
        tiny.build_trainer(tiny.build_model(dtype=dtype), tiny.Rows(micro_batch_rows=4), train=train, compile=compile)
        for compile in (False, True)
    )
    assert tiny.largest_error(tiny.step_gradients(compiled), tiny.step_gradients(plain)) < tolerance
    assert graphs() == 1


def test_training_validation_and_sampling_share_a_process():
    """As the lecture could not; two graphs in all, training's and validation's, and none for sampling."""
    plain, compiled = (
        tiny.build_trainer(tiny.build_model(), tiny.Rows(micro_batch_rows=4), compile=compile)
        for compile in (False, True)
    )
    for step in range(6):
        chance = torch.get_rng_state()
        ours, theirs = (
            (t.update()["loss"], validate(t.loss_sum, held_out(), None, tiny.CPU).loss, drawn(t.model))
            for t in (compiled, plain)
        )
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-9), f"step {step}"
        assert ours[2] == theirs[2]
        assert torch.get_rng_state().equal(chance)
    assert graphs() == 2
    assert not counters["graph_break"]


def test_the_module_stays_a_plain_module():
    model = tiny.build_model()
    make_loss_sum(model, "fp64", tiny.CPU, compile=True)(tiny.Rows().step(0)[0])
    assert type(model) is Transformer
    assert not any("_orig_mod" in name for name, _ in model.named_parameters())
    assert model.forward.__func__ is Transformer.forward


def test_a_compiled_run_has_the_curve_of_a_plain_one(shards, tmp_path: Path):
    curves = []
    for compile in (False, True):
        run = tmp_path / str(compile)
        assert pretrain(tiny.change(tiny.run_config(shards), "train", compile=compile), run) == 0
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        curves.append([row["loss"] for row in rows if row["kind"] in ("train", "val")])
        samples = (run / "samples.jsonl").read_text(encoding="utf-8")
        assert samples.count("\n") == 3
    assert len(curves[0]) == 8 + 4
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert graphs() == 2
