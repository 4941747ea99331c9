"""Models whose weights are stored in bfloat16 are evaluated in it, with two bytes a parameter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.checkpoint.open import open_model
from regpt.evals.specs import parse_tasks
from regpt.hf.export import export_hf
from regpt.model.weights import state_tensors
from regpt.runs.evaluate import EvalRequest, evaluate_model, silent
from regpt.runs.pretrain import pretrain
from regpt.train.backend import make_loss_sum
from regpt.train.precision import inference_dtype

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("narrow") / "run"
    config = tiny.change(tiny.run_config(shards), "train", precision="bf16", weight_dtype="bf16", ema_decay=0.9)
    assert pretrain(config, folder, quiet=True) == 0
    return folder


@pytest.fixture(autouse=True)
def _precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def request(run: Path, **options) -> EvalRequest:
    return EvalRequest(str(run), parse_tasks("val"), **options)


def held(model: torch.nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters()}


def test_evaluation_in_bf16_holds_two_bytes_a_parameter_and_repeats_the_runs_validation(run: Path):
    rows = tiny.rows_of(run, "val")
    tokens = {"val_tokens": 48, "batch_rows": 1}
    found = evaluate_model(request(run, precision="bf16", **tokens), tiny.ALONE, silent)
    assert held(found.opened.model) == {BF16}
    assert found.val is not None
    assert found.val[1].whole.loss == pytest.approx(rows[-1]["loss"], rel=1e-7)
    wide = evaluate_model(request(run, precision="fp32", **tokens), tiny.ALONE, silent)
    assert held(wide.opened.model) == {torch.float32}
    assert wide.val is not None
    assert wide.val[1].whole.loss == pytest.approx(rows[-1]["loss"], rel=5e-3)


def test_what_is_not_stored_in_bfloat16_is_held_in_float32(run: Path):
    assert held(open_model(str(run), narrow=True).model) == {BF16}
    assert held(open_model(str(run)).model) == {torch.float32}
    average = open_model(str(run), ema=True, narrow=True)
    assert (held(average.model), average.dtype) == ({torch.float32}, torch.float32)
    assert held(open_model(str(checkpoint_folder(run, 8)), narrow=True).model) == {BF16}
    assert [inference_dtype(name, BF16) for name in ("bf16", "fp16", "fp32", "fp64")] == [
        BF16, torch.float32, torch.float32, torch.float64,
    ]  # fmt: skip
    assert inference_dtype("bf16", torch.float32) == torch.float32


@pytest.mark.parametrize("family", tiny.FAMILY_CONFIGS)
def test_a_folder_in_bfloat16_opens_with_its_own_bits_and_nearly_the_same_loss(family: str, run: Path, tmp_path: Path):
    tokenizer = open_model(str(run)).tokenizer
    config = replace(tiny.FAMILY_CONFIGS[family], vocab_size=tokenizer.n_vocab, n_expert_shared=0)
    model = tiny.build_model(config=config, dtype=torch.float32)
    folder = export_hf(model, tokenizer, tmp_path / "folder", dtype=BF16)
    narrow, wide = (open_model(str(folder), narrow=one).model for one in (True, False))
    assert (held(narrow), held(wide)) == ({BF16}, {torch.float32})
    for name, value in state_tensors(wide).items():
        assert state_tensors(narrow)[name].float().equal(value), name
    idx = torch.randint(tokenizer.n_vocab, (8, 13), generator=torch.Generator().manual_seed(0))
    batch = tiny.Batch(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    with torch.no_grad():
        losses = [make_loss_sum(one, "bf16", tiny.CPU, False)(batch).item() for one in (narrow, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
