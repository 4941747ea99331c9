"""Saving a step again: at every moment a whole checkpoint of it can be found, and a damaged one is never deleted."""

import shutil
from pathlib import Path

import pytest
import torch

from regpt.checkpoint.load import checkpoint_folder, load_checkpoint, newest_checkpoint
from regpt.checkpoint.save import save_checkpoint


class Crash(BaseException):
    pass


@pytest.fixture
def crash_before(monkeypatch):
    """`crash_before(n)`: the n-th rename or deletion from now on, counted from 0, and all later ones do not happen."""

    def arrange(n: int) -> list[str]:
        calls: list[str] = []
        rename, delete = Path.replace, shutil.rmtree

        def counted(kind, real):
            def call(path, *args, **options):
                if kind == "delete" or path.is_dir():  # not the files inside, which have no readers yet
                    calls.append(kind)
                    if len(calls) > n:
                        raise Crash
                return real(path, *args, **options)

            return call

        monkeypatch.setattr(Path, "replace", counted("rename", rename))
        monkeypatch.setattr(shutil, "rmtree", counted("delete", delete))
        return calls

    return arrange


def bias(folder: Path) -> float:
    return load_checkpoint(folder).weights()["ln_f.bias"][0].item()


@pytest.mark.parametrize("n", range(5))
def test_a_crash_at_any_moment_of_a_replacement_leaves_the_old_or_the_new(
    tmp_path, contents, save, model, crash_before, monkeypatch, n
):
    save(tmp_path, 1)
    with torch.no_grad():
        model.ln_f.bias.fill_(3)
    calls = crash_before(n)
    with pytest.raises(Crash):
        save(tmp_path, 1)
    assert len(calls) > n
    monkeypatch.undo()
    new = n > 0  # the first rename makes the new one visible
    assert bias(newest_checkpoint(tmp_path)) == (3.0 if new else 0.0)
    save(tmp_path, 2)  # puts everything in order
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert bias(checkpoint_folder(tmp_path, 1)) == (3.0 if new else 0.0)


def test_the_renames_of_a_replacement_are_the_ones_tested_above(tmp_path, save, crash_before):
    save(tmp_path, 1)
    calls = crash_before(99)
    save(tmp_path, 1)
    assert calls == ["rename", "rename", "delete", "rename", "delete"]  # the last deletes what is no longer there


def test_a_damaged_checkpoint_is_set_aside_when_its_step_is_saved_again(tmp_path, save):
    damaged = {}
    for number in (1, 2):
        folder = save(tmp_path, 1)
        path = folder / "model.safetensors"
        damaged[number] = path.read_bytes()[:-number]
        path.write_bytes(damaged[number])
    folder = save(tmp_path, 1)
    load_checkpoint(folder)
    for number, content in damaged.items():
        aside = folder.with_name(f"step-00000001.damaged-{number}")
        assert (aside / "model.safetensors").read_bytes() == content
    assert newest_checkpoint(tmp_path) == folder


def test_a_successor_that_was_damaged_while_it_waited_is_set_aside(tmp_path, save):
    folder = save(tmp_path, 1)
    waiting = folder.with_name("step-00000001.new")
    shutil.copytree(folder, waiting)
    (waiting / "state.json").write_text("{}")
    warnings = []
    assert newest_checkpoint(tmp_path, warn=warnings.append) == folder
    assert "step-00000001.new" in warnings[0]
    save(tmp_path, 2)
    names = sorted(path.name for path in folder.parent.iterdir())
    assert names == ["step-00000001", "step-00000001.new.damaged-1", "step-00000002"]


def test_a_save_elsewhere_needs_no_run_around_it(tmp_path, contents):
    assert load_checkpoint(save_checkpoint(tmp_path / "deep" / "copy", contents(1))).step == 1
