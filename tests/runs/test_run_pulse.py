"""What the others read of a process that a slow disk keeps: that it works, and at what."""

from pathlib import Path

import tiny
from regpt.checkpoint.load import checkpoint_folder
from regpt.checkpoint.saver import Saver
from regpt.config import RunConfig
from regpt.parallel.mesh import Mesh
from regpt.parallel.pulse import Pulse
from regpt.runs import actions, begin
from regpt.runs.folder import JsonLines
from regpt.runs.pretrain import pretrain, resume
from regpt.train.trainer import Trainer


def test_whatever_a_disk_can_make_slow_says_what_it_is(config: RunConfig, tmp_path: Path, monkeypatch):
    pulses: list[Pulse] = []
    seen: dict[str, set[str]] = {}

    def listen(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*args, **kwargs):
            seen.setdefault(name, set()).add(pulses[-1].work)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    init = Pulse.__init__
    monkeypatch.setattr(Pulse, "__init__", lambda pulse: (init(pulse), pulses.append(pulse))[0])
    for owner, name in (
        (actions, "keep_items"),
        (actions, "write_samples"),
        (JsonLines, "write"),
        (Saver, "wait"),
        (begin, "newest_checkpoint"),
        (begin, "restore_weights"),
        (begin, "open_corpus"),
    ):
        listen(owner, name)
    step = Trainer.gradients

    def gradients(trainer: Trainer):
        listen(trainer.loader, "step")
        return step(trainer)

    monkeypatch.setattr(Trainer, "gradients", gradients)
    config = tiny.change(config, "train", steps=4)
    assert pretrain(config, tmp_path / "run") == 0
    assert pulses[-1].work == "finishing what it writes"
    assert resume(tmp_path / "run", tiny.change(config, "train", steps=6), force=True) == 0
    assert "reading its data" in seen.pop("step")
    seen["write"].discard("")  # rows of the run's beginning and end, of a few bytes
    assert seen == {
        "open_corpus": {"opening its data"},
        "newest_checkpoint": {"checking its checkpoints"},
        "restore_weights": {"loading a checkpoint"},
        "wait": {"writing a checkpoint", "finishing what it writes"},
        "keep_items": {"evaluating"},
        "write_samples": {"sampling"},
        "write": {"writing its metrics", "evaluating", "sampling", "finishing what it writes"},
    }


def test_processes_of_a_finished_run_part_after_its_last_checkpoint_is_written(
    config: RunConfig, tmp_path: Path, monkeypatch
):
    """A launcher kills the process that writes some time after the others have ended."""
    written: list[bool] = []
    real = Mesh.wait

    def wait(mesh: Mesh) -> None:
        written.append((checkpoint_folder(tmp_path / "run", config.train.steps) / "manifest.json").exists())
        real(mesh)

    monkeypatch.setattr(Mesh, "wait", wait)
    assert pretrain(config, tmp_path / "run", quiet=True) == 0
    assert written[-1]
