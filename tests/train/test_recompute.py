"""Activation checkpointing: the same results from less memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import tiny
from plain_cache import KVCache
from regpt.data.batch import Batch
from regpt.model.config import ModelConfig
from regpt.model.gpt2 import GPT2
from regpt.model.weights import state_tensors
from regpt.runs.pretrain import pretrain
from regpt.train.backend import make_loss_sum
from regpt.train.recompute import recompute_blocks
from regpt.train.trainer import Trainer

DEEP = ModelConfig(n_layer=6, n_head=3, n_embd=24, vocab_size=97, max_seq_len=16)


def trainers(compile: bool = False) -> tuple[Trainer, Trainer]:
    """Without and with recomputation."""
    models = tiny.build_model(config=DEEP), recompute_blocks(tiny.build_model(config=DEEP))
    plain, again = (tiny.build_trainer(model, tiny.Rows(micro_batch_rows=4), compile=compile) for model in models)
    return plain, again


def test_losses_gradients_and_updates_are_bitwise_the_same():
    plain, again = trainers()
    for _ in range(3):
        ours, theirs = (tiny.step_gradients(trainer) for trainer in (again, plain))
        assert ours.keys() == theirs.keys()
        assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
        assert tiny.update(again)["loss"] == tiny.update(plain)["loss"]
    weights = state_tensors(plain.model)
    assert all(w.equal(weights[name]) for name, w in state_tensors(again.model).items())


def saved_bytes(trainer: Trainer) -> int:
    saved = tiny.SavedTensors(list(trainer.model.parameters()))
    with saved:
        loss = tiny.loss_sum_of(trainer)(trainer.loader.step(0)[0])
    loss.backward()
    return saved.bytes


def test_the_blocks_save_only_their_inputs():
    plain, again = trainers()
    logits = 4 * tiny.SEQ_LEN * 128 * 8  # of the loss, which is no block's
    state = 4 * tiny.SEQ_LEN * DEEP.n_embd * 8
    assert saved_bytes(plain) > 6 * 10 * state  # a block keeps its norms, q, k, v, the MLP's width of four, …
    assert saved_bytes(again) < 4 * logits


def test_each_block_is_computed_twice_and_not_for_validation():
    _, again = trainers()
    calls = []
    for block in again.model.h:
        block.ln_1.register_forward_hook(lambda *_: calls.append(1))
    again.gradients()
    assert len(calls) == 2 * 2 * DEEP.n_layer  # of two micro-batches
    calls.clear()
    with torch.no_grad():
        tiny.loss_sum_of(again)(again.loader.step(0)[0])
    assert len(calls) == DEEP.n_layer


def test_the_module_and_its_cache_work_as_before():
    model, plain = recompute_blocks(tiny.build_model()), tiny.build_model()
    assert type(model) is GPT2
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    idx, _ = tiny.Rows().rows(0)
    with torch.no_grad():
        for m in (model, plain):
            cache = KVCache(tiny.CONFIG, tiny.N_ROWS, tiny.SEQ_LEN, device=tiny.CPU, dtype=torch.float64)
            whole = torch.cat([m(part, cache=cache) for part in idx.split([5, 7], dim=1)], dim=1)
            torch.testing.assert_close(whole, plain(idx), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@tiny.IMPORTS_COMPILER
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_it_is_one_graph_with_the_same_results():
    torch._dynamo.reset()
    counters.clear()
    _, again = trainers(compile=True)
    assert tiny.largest_error(tiny.step_gradients(again), tiny.step_gradients(trainers()[0])) < 1e-12
    tiny.update(again)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_run_with_it_is_bitwise_a_run_without(shards, tmp_path: Path):
    losses = []
    for recompute in (False, True):
        config = tiny.change(tiny.run_config(shards), "train", activation_checkpointing=recompute)
        run = tmp_path / str(recompute)
        assert pretrain(config, run) == 0
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses.append([row["loss"] for row in rows if row["kind"] in ("train", "val")])
    assert losses[0] == losses[1]


@pytest.mark.gpu
def test_on_a_gpu_the_peak_falls():
    device, peaks = torch.device("cuda"), []
    config = ModelConfig(n_layer=12, n_head=4, n_embd=256, vocab_size=97, max_seq_len=256)
    for recompute in (False, True):
        model = tiny.build_model(dtype=torch.float32, config=config).to(device)
        model = recompute_blocks(model) if recompute else model
        batch = Batch(*(torch.zeros(32, 256, dtype=torch.int64, device=device) for _ in range(2)))
        loss_sum = make_loss_sum(model, "bf16", device, compile=False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_sum(batch).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.5 * peaks[0]
