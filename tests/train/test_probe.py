"""`micro_batch_rows = "auto"`: what is tried and chosen, and that trying leaves no trace."""

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.config import read_config
from regpt.data.batch import Batch
from regpt.errors import UserError
from regpt.parallel.mesh import Mesh, open_mesh
from regpt.runs.pretrain import pretrain, resume
from regpt.train import memory, probe
from regpt.train.config import TrainConfig
from regpt.train.memory import Capacity, available_memory
from regpt.train.probe import Prober, choose_rows, fastest, largest, row_choices
from regpt.train.trainer import Trainer

AUTO = TrainConfig(precision="fp64", micro_batch_rows="auto")


@pytest.mark.parametrize(
    ("batch_rows", "choices"),
    [
        (512, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]),
        (48, [1, 2, 4, 8, 16, 24, 48]),
        (15, [1, 3, 5, 15]),
        (7, [1, 7]),
        (1, [1]),
    ],
)
def test_rows_divide_the_batch_and_are_powers_of_two_where_there_are_any(batch_rows, choices):
    assert row_choices(batch_rows) == choices


# ---- how few are tried -----------------------------------------------------------------------------------------------


@given(
    st.integers(1, 1024),
    st.integers(0, 100),
    st.integers(0, 300),
    st.integers(1, 50),
    st.integers(1, 5000),
)
def test_the_largest_that_fits_is_found_in_few_attempts(batch_rows, held, fixed, row, limit):
    """A peak is what is held, something for any number of rows, and so much a row; twice the limit does not exist."""
    choices = row_choices(batch_rows)
    tried: list[int] = []

    def measure(rows: int) -> probe.Probe:
        tried.append(rows)
        found = held + fixed + row * rows
        return probe.Probe(rows, found if found <= 2 * limit else None, 1.0)

    chosen = largest(choices, measure, Capacity(held, limit))
    fitting = [n for n in choices if held + fixed + row * n <= limit]
    assert len(tried) == len(set(tried))
    if not fitting:
        assert chosen == 0
    elif fixed == 0:
        assert chosen == fitting[-1]
        assert len(tried) <= 2 + (row > 2 * limit)
    else:
        assert chosen in fitting
        after = [n for n in choices if n > chosen]  # one more row counts what is fixed a second time at most
        assert chosen == fitting[-1] or held + (fixed + row * chosen) * after[0] / chosen > limit


def timed(seconds: dict[int, float], size: int = 10):
    """A stand-in for a `Prober`, with the rows it was asked for."""
    asked: list[int] = []

    def measure(rows: int) -> probe.Probe:
        asked.append(rows)
        return probe.Probe(rows, rows * size, seconds[rows])

    return measure, asked


def test_on_a_cpu_rows_are_doubled_while_a_row_gets_faster():
    measure, asked = timed({1: 1.0, 2: 1.6, 4: 2.8, 8: 5.6})
    assert fastest([1, 2, 4, 8, 16], measure, Capacity(0, 10**6)) == 4
    assert asked == [1, 1, 2, 4, 8]


def test_on_a_cpu_nothing_is_tried_that_memory_might_not_hold():
    measure, asked = timed({1: 1.0, 2: 1.0, 4: 1.0})
    assert fastest([1, 2, 4, 8], measure, Capacity(0, 79)) == 4
    assert asked == [1, 1, 2, 4]


def test_on_a_cpu_choosing_ends_when_it_takes_too_long():
    measure, asked = timed({1: 15.0, 2: 16.0})
    assert fastest([1, 2, 4], measure, Capacity(0, 10**6)) == 1
    assert asked == [1, 1]


# ---- trying ----------------------------------------------------------------------------------------------------------


def trainer_to_choose_for(*, updates: int = 0, mesh: Mesh = tiny.ALONE) -> Trainer:
    loader = tiny.Rows(micro_batch_rows=1, dp_rank=mesh.rank, dp_size=mesh.world_size)
    trainer = tiny.build_trainer(tiny.build_model(), loader, mesh=mesh, train=AUTO)
    for _ in range(updates):
        tiny.update(trainer)
    return trainer


def everything(trainer: Trainer) -> list[Tensor]:
    """Weights, moments, counters, gradients, random state."""
    moments = [x for p in trainer.backend.parameters for x in trainer.optimizer.state[p].values()]
    gradients = [p.grad for p in trainer.backend.parameters if p.grad is not None]
    return [x.clone() for x in (*trainer.model.parameters(), *moments, *gradients, torch.get_rng_state())]


def test_trying_leaves_no_trace():
    trainer, untouched = trainer_to_choose_for(updates=2), trainer_to_choose_for(updates=2)
    for t in (trainer, untouched):
        t.backend.forward_backward([], torch.ones(()))  # sets the gradients to zero, as each step does
    before = everything(trainer)
    choice = choose_rows(trainer)
    trainer.backend.forward_backward([], torch.ones(()))
    assert choice.chosen in row_choices(tiny.N_ROWS)
    assert [found.rows for found in choice.probes][:2] == [1, 1]
    assert all(a.equal(b) for a, b in zip(before, everything(trainer)))
    trainer.micro_batch.rows = untouched.micro_batch.rows = choice.chosen
    for _ in range(2):
        numbers = [[tiny.update(t)[key] for key in ("loss", "grad_norm")] for t in (trainer, untouched)]
        assert numbers[0] == numbers[1]
    assert all(a.equal(b) for a, b in zip(everything(trainer), everything(untouched)))


class Room:
    """The loss on a device with room for so many rows, that counts bytes; in place of `memory`'s."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, rows: int):
        self.plain, self.rows, self.tried = tiny.loss_sum_of(trainer), rows, []
        self.peak = 0
        monkeypatch.setattr(probe, "start_counting", lambda device: None)
        monkeypatch.setattr(probe, "peak_bytes", lambda device: self.peak)

    def __call__(self, batch: Batch) -> Tensor:
        self.tried.append(len(batch.idx))
        if len(batch.idx) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.peak = 100 + 10 * len(batch.idx)
        return self.plain(batch)


@pytest.mark.parametrize(("rows", "limit", "chosen"), [(4, 10**6, 4), (8, 10**6, 8), (8, 130, 2), (0, 10**6, 0)])
def test_on_a_gpu_peaks_are_measured_and_failures_caught(monkeypatch, rows, limit, chosen):
    trainer = trainer_to_choose_for()
    room = Room(trainer, monkeypatch, rows)
    tiny.compute_by(trainer, room)
    prober = Prober(trainer)
    prober.device = torch.device("meta")  # not the CPU's way; nothing is put there
    assert largest(row_choices(8), prober, Capacity(100, limit)) == chosen
    assert {found.rows for found in prober.done if found.bytes is None} == {n for n in room.tried if n > rows}


def test_a_mistake_that_is_no_lack_of_memory_is_passed_on(monkeypatch):
    def broken(*arguments: Any) -> Tensor:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("regpt.train.objective.NextToken.loss_sum", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        Prober(trainer_to_choose_for())(1)


def test_one_row_that_does_not_fit_is_one_sentence(monkeypatch):
    def exhausted(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("regpt.train.objective.NextToken.loss_sum", exhausted)
    with pytest.raises(UserError, match=r"^out of memory with one row at a time, tried for .*'auto'; try --train"):
        choose_rows(trainer_to_choose_for())


def test_the_memory_of_this_machine_is_known():
    free = available_memory()
    assert 2**26 < free < 2**46


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000\n", encoding="utf-8")
    (tmp_path / "memory.current").write_text("400\n", encoding="utf-8")
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path if "cgroup" in path else Path(path))
    assert available_memory() == 600
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert available_memory() != 600


def test_processes_share_the_memory_of_a_cpu():
    alone, four = (memory.capacity(tiny.CPU, n) for n in (1, 4))
    assert four.limit - four.held == pytest.approx((alone.limit - alone.held) / 4, rel=0.2)


# ---- processes and runs ----------------------------------------------------------------------------------------------


def chosen_together() -> int:
    """Two processes; the last has room for two rows only."""
    with open_mesh("cpu") as mesh:
        trainer = trainer_to_choose_for(mesh=mesh)
        probe.FASTER = 1e9  # whatever the clock says
        if mesh.rank == mesh.world_size - 1:
            probe.capacity = lambda device, processes: Capacity(0, 1)  # the second is expected not to fit
        return choose_rows(trainer).chosen


def test_processes_agree_on_the_smallest():
    assert tiny.in_processes(2, chosen_together) == [1, 1]


def test_a_run_keeps_the_number_and_goes_on_with_it(shards, tmp_path, monkeypatch):
    config = tiny.change(tiny.run_config(shards), "train", micro_batch_rows="auto")
    run, given = tmp_path / "auto", tmp_path / "given"
    asked = SimpleNamespace(times=0)
    real = probe.choose_rows

    def counted(trainer: Trainer) -> probe.Choice:
        asked.times += 1
        return real(trainer)

    monkeypatch.setattr("regpt.runs.build.choose_rows", counted)
    assert pretrain(config, run) == 0
    rows = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["train"]["micro_batch_rows"]
    assert rows in (1, 2, 4)
    facts = json.loads((run / "env.json").read_text(encoding="utf-8"))["micro_batch_rows"]
    assert (facts["chosen"], facts["why"]) == (rows, "the fastest a row")
    assert {"rows", "bytes", "seconds"} == facts["probes"][0].keys()
    assert pretrain(tiny.change(config, "train", micro_batch_rows=rows), given) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = ((checkpoint_folder(folder, 8) / name).read_bytes() for folder in (run, given))
        assert ours == theirs
    assert asked.times == 1
    assert "micro_batch_rows" not in json.loads((given / "env.json").read_text(encoding="utf-8"))
    assert resume(run) == 0
    assert asked.times == 1
    assert read_config(str(run / "config.toml")).train.micro_batch_rows == rows


@pytest.mark.gpu
def test_on_a_real_gpu_the_choice_fits_and_leaves_memory_free(shards, tmp_path):
    config = tiny.change(tiny.run_config(shards), "train", micro_batch_rows="auto", device="cuda", precision="bf16")
    assert pretrain(config, tmp_path / "run") == 0
    facts = json.loads((tmp_path / "run" / "env.json").read_text(encoding="utf-8"))["micro_batch_rows"]
    assert facts["why"] == "the largest that leaves memory free"
    assert facts["chosen"] == 4  # a batch of four rows of a tiny model fits anywhere
    total = torch.cuda.get_device_properties(0).total_memory
    assert all(0 < found["bytes"] < total for found in facts["probes"])
