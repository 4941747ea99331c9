"""Readers next to a run that saves and prunes: what vanishes or is replaced while it is read is not called damaged."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from regpt import tensors
from regpt.__main__ import main
from regpt.checkpoint import manifest, open
from regpt.checkpoint.damage import find_damages, list_checkpoints
from regpt.checkpoint.load import (
    checkpoint_folder,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    of_newest,
    verify_checkpoint,
)
from regpt.checkpoint.open import open_model
from regpt.checkpoint.save import is_intact
from regpt.errors import UserError
from regpt.files import discard
from regpt.runs.replay import config_of


@pytest.fixture
def run(tmp_path: Path, save) -> Path:
    """A run with the checkpoint of step 5."""
    save(tmp_path / "run", 5)
    return tmp_path / "run"


@pytest.fixture
def meanwhile(monkeypatch) -> Callable[..., None]:
    """`meanwhile(module, name, happen)`: when that function is first called, `happen()` comes before it."""

    def install(module: object, name: str, happen: Callable[[], object]) -> None:
        real, left = getattr(module, name), [happen]

        def call(*args, **kwargs):
            if left:
                left.pop()()
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    return install


@pytest.fixture
def pruned(run: Path, save) -> Callable[[], None]:
    """What a live run does: the next checkpoint is saved, the last one pruned."""

    def prune() -> None:
        save(run, 10)
        discard(checkpoint_folder(run, 5))

    return prune


def fail(message: str) -> None:
    pytest.fail(message)


@pytest.mark.parametrize("name", ["file_sha256", "read_small", "stat_or_none"])
def test_a_checkpoint_that_is_pruned_while_it_is_verified_is_no_damaged_one(run, pruned, meanwhile, name):
    meanwhile(manifest, name, pruned)
    assert newest_checkpoint(run, warn=fail) == checkpoint_folder(run, 10)


def test_one_that_is_pruned_while_it_is_used_is_not_the_last_word(run, pruned):
    used = []

    def use(folder: Path) -> int:
        used.append(folder.name)
        if len(used) == 1:
            pruned()
        return load_checkpoint(folder).step

    assert of_newest(run, use, warn=fail) == 10
    assert used == ["step-00000005", "step-00000010"]


def test_an_error_of_the_use_itself_is_raised(run):
    with pytest.raises(UserError, match="mine"):
        of_newest(run, lambda folder: (_ for _ in ()).throw(UserError("mine")))


def test_one_that_is_replaced_by_another_of_its_name_is_read_again(run, save, tmp_path, meanwhile):
    """As a rewind does: tensors of the new one differ from the manifest of the old one."""
    other = save(tmp_path / "other", 5, max_file_bytes=4000)
    folder = checkpoint_folder(run, 5)

    def replace() -> None:
        discard(folder)
        shutil.copytree(other, folder)

    meanwhile(manifest, "file_sha256", replace)
    assert newest_checkpoint(run, warn=fail) == folder
    assert len(load_checkpoint(folder).manifest.tensor_files("model")) > 1


@pytest.mark.parametrize(
    ("module", "name"), [(open, "load_checkpoint"), (open, "load_weights"), (tensors, "safe_open")]
)
def test_a_model_is_opened_from_the_next_checkpoint_when_its_own_is_pruned(
    run, pruned, meanwhile, capsys, module, name
):
    meanwhile(module, name, pruned)
    assert open_model(str(run)).step in (5, 10)  # what was mapped before it was deleted can still be read
    assert not capsys.readouterr().err


def test_a_checkpoint_given_by_its_name_is_said_to_be_deleted(run, pruned, meanwhile):
    meanwhile(manifest, "file_sha256", pruned)
    with pytest.raises(UserError, match=r"step-00000005' was deleted while it was read; use another checkpoint"):
        open_model(str(checkpoint_folder(run, 5)))


def test_a_list_leaves_out_what_vanishes(run, save, meanwhile):
    save(run, 10)
    leftover = run / "checkpoints" / ".step-00000015.tmp-0123abcd"
    leftover.mkdir()
    (leftover / "model.json").write_text("{}")
    meanwhile(manifest, "stat_or_none", lambda: discard(checkpoint_folder(run, 5)))
    assert {one.name: one.problem for one in list_checkpoints(run) if one.step} == {"step-00000010": ""}


@pytest.mark.parametrize("name", ["file_sha256", "read_small"])
def test_verify_judges_what_is_there_and_looks_again_when_nothing_is_left(run, pruned, meanwhile, capsys, name):
    meanwhile(manifest, name, pruned)
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out == "step-00000010  intact\n"


def test_a_checkpoint_that_has_gone_before_it_is_read_is_left_out(run):
    assert find_damages([checkpoint_folder(run, 5), checkpoint_folder(run, 7)]) == {checkpoint_folder(run, 5): []}


def test_what_was_mapped_can_be_read_after_it_was_deleted(run):
    weights = load_checkpoint(checkpoint_folder(run, 5)).weights()
    shutil.rmtree(run)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_run_without_a_checkpoint_is_not_to_be_started_again(tmp_path):
    with pytest.raises(UserError, match="it has no complete checkpoint yet; wait until it has saved one"):
        newest_checkpoint(tmp_path)


# ---- what is damaged -------------------------------------------------------------------------------------------------


def test_a_checkpoint_under_another_steps_name_is_damaged_and_skipped(run, save, capsys):
    save(run, 10)
    checkpoint_folder(run, 10).rename(checkpoint_folder(run, 99999999))
    warned: list[str] = []
    assert newest_checkpoint(run, warn=warned.append) == checkpoint_folder(run, 5)
    assert (
        "state.json' is of step 10, but the folder is called 'step-99999999'; rename that to step-00000010" in warned[0]
    )
    assert not is_intact(checkpoint_folder(run, 99999999))
    assert [one.problem != "" for one in list_checkpoints(run)] == [False, True]
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert main(["sample", str(checkpoint_folder(run, 99999999)), "--prompt", "a"]) == 1
    checkpoint_folder(run, 99999999).rename(run / "best")  # a name that says no step
    verify_checkpoint(run / "best")


def test_a_file_that_the_disk_does_not_give_is_damaged(run, save, monkeypatch):
    save(run, 10)
    real = manifest.file_sha256

    def broken(path: Path) -> str:
        if path.parent == checkpoint_folder(run, 10):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(manifest, "file_sha256", broken)
    warned: list[str] = []
    assert newest_checkpoint(run, warn=warned.append) == checkpoint_folder(run, 5)
    assert "model.json' cannot be read (Input/output error); restore it" in warned[0]


def test_a_file_that_torch_cannot_map_is_one_sentence(run, monkeypatch):
    def vanished(*args: object, **options: object) -> None:
        raise RuntimeError("unable to open file <model.safetensors> in read-only mode: No such file or directory (2)")

    monkeypatch.setattr(tensors, "safe_open", vanished)
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors' as safetensors"):
        verify_checkpoint(checkpoint_folder(run, 5))


def test_a_file_is_opened_once_however_many_tensors_it_holds(run, monkeypatch):
    opened: list[str] = []
    real = tensors.safe_open

    def counted(path, **options):
        opened.append(path.name)
        return real(path, **options)

    monkeypatch.setattr(tensors, "safe_open", counted)
    stored = load_checkpoint(checkpoint_folder(run, 5), verified=True).weights()
    assert len(stored) > 20
    assert all(tensor.isfinite().all() for tensor in stored.values())
    assert opened == ["model.safetensors"]


def test_a_damaged_state_is_not_asked_for_the_configuration(straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "straight")
    for folder in checkpoints(run):
        (folder / "state.json").write_text("{")
    assert config_of(run, 3).train.steps == 8
