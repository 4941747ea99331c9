"""Saving while training goes on: what is written is what was there, in order, and what goes wrong is told."""

import errno
import os
import threading

import pytest
import torch

import regpt.checkpoint.saver
from regpt.checkpoint.config import CheckpointConfig
from regpt.checkpoint.load import checkpoint_folder, checkpoints, load_checkpoint
from regpt.checkpoint.saver import Saver
from regpt.errors import UserError
from regpt.model.weights import state_tensors

CPU = torch.device("cpu")


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """No checkpoint is written before it is set."""
    event, real = threading.Event(), regpt.checkpoint.saver.save_checkpoint

    def wait_and_save(*args):
        assert event.wait(60)
        return real(*args)

    monkeypatch.setattr(regpt.checkpoint.saver, "save_checkpoint", wait_and_save)
    return event


def fill(model, optimizer, value: float) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *optimizer.values()):
            tensor.fill_(value)


def test_what_is_written_is_what_was_there_when_save_was_called(tmp_path, contents, model, optimizer, gate):
    parts = contents(1).tensors()
    expected = {f"{part}/{name}": tensor.clone() for part in parts for name, tensor in parts[part].items()}
    with Saver(tmp_path, CheckpointConfig()) as saver:
        saver.save(contents(1), CPU)
        assert saver.take_done() == []
        fill(model, optimizer, 5.0)  # training goes on
        gate.set()
    checkpoint = load_checkpoint(checkpoint_folder(tmp_path, 1))
    stored = {"weights": checkpoint.weights(), "optimizer": checkpoint.optimizer()}
    for name, tensor in expected.items():
        stem, _, inner = name.partition("/")
        assert stored[stem][inner].equal(tensor)
    (saved,) = saver.take_done()
    assert (saved.step, saved.bytes) == (1, sum(t.nbytes for t in expected.values()))
    assert saved.stall_ms > 0
    assert saved.write_ms > 0


def test_a_save_waits_for_the_one_before_it(tmp_path, contents, model, optimizer, gate):
    with Saver(tmp_path, CheckpointConfig(keep_last=0)) as saver:
        saver.save(contents(1), CPU)
        fill(model, optimizer, 5.0)
        threading.Timer(0, gate.set).start()
        saver.save(contents(2), CPU)
        assert checkpoints(tmp_path)[0] == checkpoint_folder(tmp_path, 1)  # whole before the second was begun
    assert [saved.step for saved in saver.take_done()] == [1, 2]
    assert load_checkpoint(checkpoint_folder(tmp_path, 1)).weights()["ln_f.weight"].eq(1).all()
    assert load_checkpoint(checkpoint_folder(tmp_path, 2)).weights()["ln_f.weight"].eq(5).all()


def test_without_background_nothing_is_left_to_wait_for(tmp_path, contents):
    saver = Saver(tmp_path, CheckpointConfig(background=False))
    saver.save(contents(1), CPU)
    assert len(saver.take_done()) == 1
    assert load_checkpoint(checkpoint_folder(tmp_path, 1)).step == 1


@pytest.fixture
def full_disk(monkeypatch) -> list[bool]:
    """Nothing can be written while its only element is true."""
    full, real = [True], regpt.tensors.write_tensors

    def write(path, tensors):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, tensors)

    monkeypatch.setattr(regpt.tensors, "write_tensors", write)
    return full


def test_a_failure_is_told_once_and_the_next_save_is_made(tmp_path, contents, full_disk):
    with Saver(tmp_path, CheckpointConfig()) as saver:
        saver.save(contents(1), CPU)
        saver.thread.join()
        assert saver.failed
        with pytest.raises(UserError, match=r"cannot write .*step-00000001.*No space left.*untouched"):
            saver.wait()
        full_disk[0] = False
        saver.save(contents(2), CPU)
        saver.wait()
        assert saver.failed  # a run should end all the same: see `stop_requested`
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000002"]


def test_a_failure_that_nobody_asked_for_ends_the_context(tmp_path, contents, full_disk):
    with pytest.raises(UserError, match="No space left"), Saver(tmp_path, CheckpointConfig()) as saver:
        saver.save(contents(1), CPU)


def test_an_error_of_training_is_not_hidden_and_what_was_begun_is_finished(tmp_path, contents, gate):
    def train():
        with Saver(tmp_path, CheckpointConfig()) as saver:
            saver.save(contents(1), CPU)
            threading.Timer(0, gate.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert load_checkpoint(checkpoint_folder(tmp_path, 1)).step == 1


def test_an_interrupt_waits_for_nothing(tmp_path, contents, gate):
    saver = Saver(tmp_path, CheckpointConfig())

    def train():
        with saver:
            saver.save(contents(1), CPU)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert saver.thread.is_alive()
    assert saver.thread.daemon  # the process does not wait for it either
    assert checkpoints(tmp_path) == []
    gate.set()
    saver.thread.join()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, contents, model, optimizer, value):
    saver = Saver(tmp_path, CheckpointConfig())
    optimizer["exp_avg/h.0.ln_1.bias"][3] = value
    saver.save(contents(1), CPU)
    with pytest.raises(UserError, match=r"'optimizer/exp_avg/h\.0\.ln_1\.bias' holds numbers that are not finite"):
        saver.wait()
    assert checkpoints(tmp_path) == []


def test_older_checkpoints_go_only_when_the_new_one_is_whole(tmp_path, contents, full_disk):
    full_disk[0] = False
    with Saver(tmp_path, CheckpointConfig(keep_last=1)) as saver:
        saver.save(contents(1), CPU)
        saver.wait()
        full_disk[0] = True
        saver.save(contents(2), CPU)
        with pytest.raises(UserError):
            saver.wait()
        assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000001"]
        full_disk[0] = False
        saver.save(contents(3), CPU)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000003"]


def test_a_damaged_checkpoint_of_the_right_size_is_not_counted_among_those_kept(tmp_path, contents, save):
    save(tmp_path, 1)
    later = save(tmp_path, 9) / "model.safetensors"  # a resume skipped it
    content = bytearray(later.read_bytes())
    content[-1] ^= 1
    later.write_bytes(content)
    with Saver(tmp_path, CheckpointConfig(keep_last=1)) as saver:
        saver.save(contents(2), CPU)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000002", "step-00000009"]


def test_frozen_weights_are_saved_too(tmp_path, contents, model):
    model.wte.weight.requires_grad_(False)
    with Saver(tmp_path, CheckpointConfig()) as saver:
        saver.save(contents(1), CPU)
    weights = load_checkpoint(checkpoint_folder(tmp_path, 1)).weights()
    assert weights.keys() == state_tensors(model).keys()
    assert weights["wte.weight"].equal(state_tensors(model)["wte.weight"])
