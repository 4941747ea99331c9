"""Out of memory: all processes go on with fewer rows and repeat the step, whose result is that of fewer rows."""

import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.data.batch import Batch
from regpt.errors import UserError
from regpt.model.config import ModelConfig
from regpt.model.weights import state_tensors
from regpt.parallel.mesh import Mesh, open_mesh
from regpt.runs.pretrain import pretrain, resume
from regpt.train.backend import make_loss_sum
from regpt.train.config import TrainConfig
from regpt.train.micro_batch import MicroBatch, fewer
from regpt.train.objective import NextToken
from regpt.train.trainer import Trainer

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.98 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried …"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried …"),
    MemoryError(),
]


class Limit:
    """The loss of a model on a device that has room for `rows` rows; the failure comes in a micro-batch of choice."""

    def __init__(self, model, rows: int, *, failing: int = 0, error: Exception = ERRORS[0], backward: bool = False):
        self.loss_sum = make_loss_sum(model, "fp64", tiny.CPU, compile=False)
        self.rows, self.failing, self.error, self.backward = rows, failing, error, backward
        self.calls = 0

    def __call__(self, batch: Batch) -> Tensor:
        self.calls += 1
        if len(batch.idx) <= self.rows or self.calls <= self.failing:
            return self.loss_sum(batch)
        self.calls = 0
        if not self.backward:
            raise self.error
        loss = self.loss_sum(batch)
        loss.register_hook(self.fail)
        return loss

    def fail(self, gradient: Tensor) -> None:
        raise self.error


def trainer_with(rows: int, mesh: Mesh = tiny.ALONE) -> Trainer:
    loader = tiny.Rows(micro_batch_rows=rows, dp_rank=mesh.rank, dp_size=mesh.world_size)
    return tiny.build_trainer(tiny.build_model().to(mesh.device), loader, mesh=mesh)


def three_updates(trainer: Trainer) -> dict[str, Tensor]:
    """Losses, norms and weights."""
    rows = [tiny.update(trainer) for _ in range(3)]
    numbers = {key: torch.tensor([row[key] for row in rows]) for key in ("loss", "grad_norm")}
    return numbers | {name: w.clone() for name, w in state_tensors(trainer.model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:20])
def test_the_step_is_repeated_with_half_the_rows_and_nothing_of_the_failure_remains(error: Exception):
    trainer = trainer_with(4)
    tiny.compute_by(trainer, Limit(trainer.model, rows=2, failing=1, error=error))  # one micro-batch has left gradients
    told: list[int] = []
    trainer.micro_batch.on_fewer = told.append
    assert same(three_updates(trainer), three_updates(trainer_with(2)))
    assert told == [2]


@pytest.mark.parametrize("backward", [False, True])
def test_rows_are_halved_until_they_fit(backward: bool):
    trainer = trainer_with(8)
    tiny.compute_by(trainer, Limit(trainer.model, rows=1, backward=backward))
    told: list[int] = []
    trainer.micro_batch.on_fewer = told.append
    assert same(three_updates(trainer), three_updates(trainer_with(1)))
    assert told == [4, 2, 1]


def test_one_row_that_does_not_fit_is_one_sentence():
    trainer = trainer_with(4)
    tiny.compute_by(trainer, Limit(trainer.model, rows=0))
    before = {name: w.clone() for name, w in state_tensors(trainer.model).items()}
    with pytest.raises(
        UserError,
        match=r"^out of memory with train\.micro_batch_rows = 1, .*; try --train\.activation-checkpointing true, ",
    ):
        tiny.update(trainer)
    assert same(before, state_tensors(trainer.model))


def test_what_the_failure_held_is_given_back_before_the_next_attempt():
    held: list[weakref.ref] = []

    def compute(rows: int) -> int:
        assert all(ref() is None for ref in held)
        tensor = torch.ones(rows)
        tensor.itself = tensor  # type: ignore[attr-defined]  # a cycle, as frames and exceptions make them
        held.append(weakref.ref(tensor))
        if rows > 1:
            raise torch.OutOfMemoryError
        return rows

    assert MicroBatch(4, tiny.ALONE).attempt(compute) == 1
    assert len(held) == 3


@given(st.integers(2, 600))
def test_fewer_rows_divide_the_batch_and_are_at_most_half(rows: int):
    n = fewer(rows)
    assert rows % n == 0
    assert n <= rows / 2
    assert not any(rows % other == 0 for other in range(n + 1, rows // 2 + 1))


def test_out_of_memory_in_the_update_itself_names_the_rows_to_try():
    trainer = trainer_with(4)

    def exhausted(closure: Any = None) -> None:
        raise torch.OutOfMemoryError

    trainer.optimizer.step = exhausted  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^out of memory with .*rows = 4; try --train\.micro-batch-rows 2, which"):
        tiny.update(trainer)


def test_another_error_is_passed_on_as_it_is():
    def broken(batch: Batch) -> Tensor:
        raise RuntimeError("shapes differ")

    trainer = trainer_with(4)
    tiny.compute_by(trainer, broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        tiny.update(trainer)


def test_gradients_keep_their_memory():
    trainer = trainer_with(4)
    places = [p.grad.data_ptr() for p in trainer.backend.parameters if p.grad is not None]
    three_updates(trainer)
    assert places == [p.grad.data_ptr() for p in trainer.backend.parameters if p.grad is not None]
    assert len(places) == len(trainer.backend.parameters)


# ---- processes -------------------------------------------------------------------------------------------------------


def shared_updates(rows: int, limit_of_the_last: int, device: str = "cpu") -> dict[str, Tensor]:
    """Two processes of which only the last runs out of memory, in its second micro-batch."""
    with open_mesh(device) as mesh:
        trainer = trainer_with(rows, mesh)
        if mesh.rank == mesh.world_size - 1:
            tiny.compute_by(trainer, Limit(trainer.model, rows=limit_of_the_last, failing=1))
        found = three_updates(trainer)
        return {name: x.cpu() for name, x in found.items()} | {"rows": torch.tensor(trainer.micro_batch.rows)}


def test_when_one_process_fails_all_repeat_the_step():
    expected = tiny.in_processes(2, shared_updates, 1, 1)
    found = tiny.in_processes(2, shared_updates, 2, 1)
    assert [mine["rows"].item() for mine in found] == [1, 1]
    assert all(same(mine, other) for mine, other in zip(found, expected))


@pytest.mark.multi_gpu
def test_when_one_gpu_fails_all_repeat_the_step():
    """The gradients go through NCCL, the agreement through gloo."""
    expected = tiny.in_processes(2, shared_updates, 1, 1, "cuda")
    found = tiny.in_processes(2, shared_updates, 2, 1, "cuda")
    assert [mine.pop("rows").item() for mine in found] == [1, 1]
    assert [other.pop("rows").item() for other in expected] == [1, 1]
    for mine, other in zip(found, expected):
        assert tiny.largest_error(mine, other) < 1e-12


# ---- a run -----------------------------------------------------------------------------------------------------------


def limit_the_device(monkeypatch: pytest.MonkeyPatch, rows: int, *, training_only: bool) -> None:
    real = NextToken.loss_sum

    def limited(objective: NextToken, batch: Batch):
        if len(batch.idx) > rows and (torch.is_grad_enabled() or not training_only):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(objective, batch)

    monkeypatch.setattr(NextToken, "loss_sum", limited)


def fewer_rows_events(run: Path) -> list[tuple[int, int]]:
    return [(e["step"], e["micro_batch_rows"]) for e in tiny.rows_of(run, "event") if e["name"] == "out_of_memory"]


@pytest.mark.parametrize("training_only", [True, False])
def test_a_run_goes_on_in_training_and_validation_and_says_so(shards, tmp_path, monkeypatch, capsys, training_only):
    config = tiny.run_config(shards)
    assert pretrain(tiny.change(config, "train", micro_batch_rows=2), tmp_path / "two") == 0
    limit_the_device(monkeypatch, 2, training_only=training_only)
    assert pretrain(tiny.change(config, "train", micro_batch_rows=4), tmp_path / "four") == 0
    assert fewer_rows_events(tmp_path / "four") == [(0, 2)]
    assert fewer_rows_events(tmp_path / "two") == []
    assert "after step 0: out of memory, continuing with micro-batches of 2 rows" in capsys.readouterr().out
    assert tiny.final_files(tmp_path / "four") == tiny.final_files(tmp_path / "two")
    losses = [[row["loss"] for row in tiny.rows_of(tmp_path / run, "val")] for run in ("two", "four")]
    assert losses[0][1:] == losses[1][1:]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)


def test_a_resumed_run_goes_on_with_the_fewer_rows(shards, tmp_path, monkeypatch):
    run = tmp_path / "run"
    limit_the_device(monkeypatch, 1, training_only=True)
    assert pretrain(tiny.change(tiny.run_config(shards), "train", micro_batch_rows=4), run) == 0
    expected = tiny.final_files(run)
    for later in (6, 8):
        shutil.rmtree(checkpoint_folder(run, later))
    monkeypatch.undo()
    assert resume(run) == 0
    assert tiny.final_files(run) == expected  # bitwise: another number of rows would round differently
    assert fewer_rows_events(run) == [(0, 2), (0, 1)]


def test_rows_in_a_state_that_no_longer_fit_the_configuration_are_left_alone():
    trainer = trainer_with(4)
    trainer.load_state({"micro_batch_rows": 3})
    assert trainer.micro_batch.rows == 4
    trainer.load_state({})
    assert trainer.micro_batch.rows == 4
    trainer.load_state({"micro_batch_rows": 2})
    assert trainer.micro_batch.rows == 2
    assert trainer.state()["micro_batch_rows"] == 2
    assert math.isfinite(float(str(tiny.update(trainer)["loss"])))


class Many:
    """A step of 16,384 random rows."""

    seq_len, rows = tiny.SEQ_LEN, 16384

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(97, (self.rows, self.seq_len), generator=generator)
        return [Batch(part, part.roll(-1, dims=1)) for part in tokens.split(micro_batch_rows or self.rows)]


@pytest.mark.gpu
def test_a_gpu_that_is_really_full_is_survived():
    """A gibibyte of it, where all rows at once take several."""
    device = torch.device("cuda")
    mesh, config = Mesh(0, 1, device), ModelConfig(n_layer=8, n_head=2, n_embd=64, vocab_size=97, max_seq_len=16)

    def losses(rows: int) -> tuple[int, list[float]]:
        model = tiny.build_model(dtype=torch.float32, config=config).to(device)
        trainer = tiny.build_trainer(model, Many(), mesh=mesh, train=TrainConfig(precision="fp32"))
        trainer.micro_batch.rows = rows
        found = [float(str(tiny.update(trainer)["loss"])) for _ in range(3)]
        return trainer.micro_batch.rows, found

    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        rows, found = losses(Many.rows)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= rows < Many.rows
    assert found == pytest.approx(losses(rows)[1], rel=1e-4)
