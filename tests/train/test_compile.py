"""The compiled training step gives what the plain one gives, and leaves validation, sampling and chance alone."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import tiny
from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.data.loader import document_bounds
from regpt.engine.generate import generate
from regpt.engine.processing import SamplingOptions
from regpt.evals.packing import Prompt
from regpt.evals.perplexity import batch_losses, loss_sums, validation_of
from regpt.evals.score import Scorer
from regpt.model.gpt2 import GPT2
from regpt.model.transformer import Transformer
from regpt.runs.pretrain import pretrain
from regpt.train import activation_offload
from regpt.train.activation_offload import OnHost
from regpt.train.backend import make_loss_sum
from regpt.train.config import TrainConfig
from regpt.train.recompute import compile_blocks, mlps_in_pieces, recompute_blocks

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
    return generate(model, prompt, 9, options=SamplingOptions(top_k=20), seed=5).tolist()


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch hides it
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_compiled_once_for_all_give_the_gradients_of_the_plain_step(monkeypatch, recompute: bool, offload: bool):
    """Two graphs of six blocks: of the first, and of all others, whose number is an input. None for samples."""
    monkeypatch.setattr(activation_offload, "LEAST_BYTES", 1024)
    config = tiny.replace(tiny.FAMILY_CONFIGS["llama"], n_layer=6)
    plain, model = tiny.build_model(config=config), compile_blocks(tiny.build_model(config=config))
    if recompute:
        recompute_blocks(model)
    loader = tiny.Rows(micro_batch_rows=4, config=config)
    ours, theirs = tiny.build_trainer(model, loader), tiny.build_trainer(plain, loader)
    if offload:
        tiny.data_parallel(ours).context = lambda: OnHost(list(model.parameters()), tiny.CPU)
    assert tiny.largest_error(tiny.step_gradients(ours), tiny.step_gradients(theirs)) < 1e-12
    assert graphs() == 2
    assert drawn(model) == drawn(plain)
    tiny.update(ours)
    assert graphs() == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch hides it
def test_blocks_whose_mlps_are_in_pieces_share_their_graphs(monkeypatch):
    """As above; more of them than the compiler would compile anew."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = tiny.replace(tiny.FAMILY_CONFIGS["llama"], n_layer=10)
    plain, model = tiny.build_model(config=config), mlps_in_pieces(tiny.build_model(config=config), 40)
    ours, theirs = (tiny.build_trainer(m, tiny.Rows(config=config)) for m in (compile_blocks(model), plain))
    assert tiny.largest_error(tiny.step_gradients(ours), tiny.step_gradients(theirs)) < 1e-12
    assert graphs() == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch hides it
def test_blocks_compiled_once_for_all_have_the_dropout_of_the_plain_step():
    config = tiny.replace(tiny.CONFIG, n_layer=4, dropout=0.2)
    plain, model = tiny.build_model(config=config), compile_blocks(tiny.build_model(config=config))
    ours, theirs = (tiny.step_gradients(tiny.build_trainer(m, tiny.Rows(config=config))) for m in (model, plain))
    assert tiny.largest_error(ours, theirs) < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch hides it
@pytest.mark.parametrize("blocks", [False, True])
def test_gradients_of_bfloat16_weights_are_summed_in_float32(blocks: bool):
    train = TrainConfig(precision="bf16", weight_dtype="bf16")
    found = []
    for compiled in (False, True):
        model = tiny.build_model(dtype=torch.bfloat16)
        if compiled and blocks:
            compile_blocks(model)
        loader = tiny.Rows(micro_batch_rows=1)
        found.append(tiny.build_trainer(model, loader, train=train, compile=compiled and not blocks))
    theirs, ours = (tiny.step_gradients(trainer) for trainer in found)
    assert all(p.grad.dtype == torch.float32 for p in found[1].backend.parameters)
    assert tiny.largest_error(ours, theirs) < 0.1  # where both round is not the same
    assert (graphs(), dict(counters["graph_break"])) == (2 if blocks else 1, {})


def test_training_validation_and_sampling_share_a_process():
    """As the lecture could not; two graphs in all, training's and validation's, and none for sampling."""
    plain, compiled = (
        tiny.build_trainer(tiny.build_model(), tiny.Rows(micro_batch_rows=4), compile=compile)
        for compile in (False, True)
    )
    for step in range(6):
        chance = torch.get_rng_state()
        ours, theirs = (
            (
                tiny.update(t)["loss"],
                validation_of(loss_sums(batch_losses(tiny.loss_sum_of(t), held_out(), None, tiny.CPU))).loss,
                drawn(t.model),
            )
            for t in (compiled, plain)
        )
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-9), f"step {step}"
        assert ours[2] == theirs[2]
        assert torch.get_rng_state().equal(chance)
    assert graphs() == 2
    assert not counters["graph_break"]


class Documents(tiny.Rows):
    """Rows masked by document, with another number of documents in each micro-batch."""

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        masked = []
        for batch in super().step(step, micro_batch_rows):
            share = (0.02, 0.2, 0.5, 0.9)[(step + len(masked)) % 4]
            starts = torch.rand(batch.idx.shape, generator=torch.Generator().manual_seed(step)) < share
            positions, cu_seqlens = (torch.from_numpy(x) for x in document_bounds(starts.numpy()))
            masked.append(batch._replace(positions=positions, cu_seqlens=cu_seqlens))
        return masked


def test_documents_of_any_number_share_a_graph():
    plain, compiled = (
        tiny.build_trainer(tiny.build_model(), Documents(micro_batch_rows=4), compile=compile)
        for compile in (False, True)
    )
    sizes = set()
    for step in range(6):
        batches = Documents(micro_batch_rows=4).step(step)
        sizes |= {len(batch.cu_seqlens) for batch in batches if batch.cu_seqlens is not None}
        assert tiny.update(compiled)["loss"] == pytest.approx(tiny.update(plain)["loss"], rel=1e-9), f"step {step}"
        losses = [
            validation_of(loss_sums(batch_losses(tiny.loss_sum_of(t), batches, None, tiny.CPU))).loss
            for t in (compiled, plain)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert len(sizes) >= 3  # each would have been compiled
    assert graphs() == 2


def test_training_validation_sampling_and_hellaswag_in_one_process_compile_nothing_twice():
    """HellaSwag's rows have many lengths and four endings; its own compiled functions see few shapes."""
    trainer = tiny.build_trainer(tiny.build_model(), tiny.Rows(micro_batch_rows=4), compile=True)
    draw = torch.Generator().manual_seed(3)

    def tokens(n: int) -> np.ndarray:
        return torch.randint(97, (n,), generator=draw).numpy()

    def items(n: int) -> list[Prompt]:
        lengths = torch.randint(1, 5, (n, 5), generator=draw).tolist()
        return [Prompt(tokens(first), [tokens(k) for k in rest], rest) for first, *rest in lengths]

    scorers = [Scorer(trainer.model, tiny.ALONE, compile=compile, batch_tokens=64) for compile in (False, True)]
    found = []
    for _ in range(4):
        tiny.update(trainer)
        validation_of(loss_sums(batch_losses(tiny.loss_sum_of(trainer), held_out(), None, tiny.CPU)))
        drawn(trainer.model)
        prompts = items(12)
        ours, theirs = (scorer(prompts).log_likelihood for scorer in scorers)
        assert theirs == pytest.approx(ours, rel=1e-9)
        found.append(graphs())
    assert found[0] == 4  # the step, validation, hidden states and logits of HellaSwag
    assert found[-1] == found[1]  # a second length of rows may have come up
    assert found[-1] <= 5
    assert not counters["graph_break"]


def test_after_an_out_of_memory_the_smaller_shape_is_compiled_and_the_larger_forgotten():
    """Down to one row: with every shape kept, training and validation would pass torch's limit of eight graphs."""
    trainer = tiny.build_trainer(tiny.build_model(), tiny.Rows(), compile=True)
    whole, limit = tiny.loss_sum_of(trainer), [8]
    compiled = tiny.data_parallel(trainer).loss_sum

    @functools.wraps(whole)
    def limited(batch: Batch) -> torch.Tensor:
        if len(batch.idx) > limit[0]:
            raise torch.OutOfMemoryError
        return whole(batch)

    tiny.compute_by(trainer, limited)
    for rows in (8, 4, 2, 1):
        limit[0] = rows
        tiny.update(trainer)
        with torch.no_grad():
            limited(tiny.Rows(micro_batch_rows=rows).step(0)[0])
    assert graphs() == 2 * 4
    assert trainer.micro_batch.rows == 1
    cached = torch._dynamo.eval_frame._debug_get_cache_entry_list(compiled.__wrapped__.__code__)  # type: ignore[attr-defined]
    assert len(cached) == 2  # with and without gradients, of one row


def test_the_module_stays_a_plain_module():
    model = tiny.build_model()
    make_loss_sum(model, "fp64", tiny.CPU, compile=True)(tiny.Rows().step(0)[0])
    assert type(model) is GPT2
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
