"""`regpt runs`: the state of sound, unfinished and damaged runs."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from regpt.__main__ import main
from regpt.files import is_locked, locked
from regpt.runs import listing
from regpt.runs.listing import describe, list_runs


@pytest.fixture
def run(straight, tmp_path) -> Path:
    """The finished run of eight steps, with a checkpoint every second one."""
    return shutil.copytree(straight, tmp_path / "runs" / "a[red]")


def cut_rows(run: Path, step: int) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")


def test_a_run_with_all_its_updates_is_finished(run: Path):
    found = describe(run)
    assert (found.state, found.step, found.steps) == ("finished", 8, 8)
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert found.loss == [row["loss"] for row in last if row["kind"] == "val"][-1]
    assert found.tokens_per_s


def test_a_run_that_saved_its_last_step_was_stopped(cut: Path):
    cut_rows(cut, 4)
    assert describe(cut).state == "stopped"


def test_a_run_that_lost_steps_failed(cut: Path):
    cut_rows(cut, 5)
    found = describe(cut)
    assert (found.state, found.note) == ("failed", "1 step after its last checkpoint")


def test_a_run_whose_lock_was_left_was_killed(cut: Path):
    cut_rows(cut, 4)
    (cut / ".lock").write_text("1\n", encoding="utf-8")
    assert (describe(cut).state, describe(cut).note) == ("failed", "its process was killed")


def test_a_held_run_is_running_until_it_writes_nothing_for_too_long(cut: Path):
    cut_rows(cut, 4)
    with locked(cut / ".lock", cut):
        assert describe(cut).state == "running"
        os.utime(cut / "metrics.jsonl", (1, 1))
        assert describe(cut).state == "stalled"
        assert is_locked(cut / ".lock")
    assert not is_locked(cut / ".lock")


def test_a_run_of_its_own_patience_is_stalled_after_it(cut: Path):
    config = (cut / "config.toml").read_text(encoding="utf-8")
    with locked(cut / ".lock", cut):
        for patience, state in ((100, "stalled"), (10_000, "running")):
            changed = re.sub(r"(?m)^hang_seconds = .*$", f"hang_seconds = {patience}", config)
            (cut / "config.toml").write_text(changed, encoding="utf-8")
            os.utime(cut / "metrics.jsonl", (time.time() - 1000,) * 2)
            assert describe(cut).state == state


@pytest.mark.parametrize(
    ("policy", "step", "state"), [("stop", 4, "failed"), ("skip", 4, "stopped"), ("stop", 2, "stopped")]
)
def test_a_run_that_ended_at_a_loss_that_is_not_finite_failed(cut: Path, policy: str, step: int, state: str):
    cut_rows(cut, 4)
    with (cut / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "kind": "event", "name": "non_finite", "policy": policy}) + "\n")
    found = describe(cut)
    assert (found.state, found.note) == (state, "a loss or gradient that is not finite" if state == "failed" else "")


def test_losses_of_one_source_are_not_the_runs_and_numbers_may_be_missing(cut: Path):
    (cut / "metrics.jsonl").write_text(
        '{"step": 1, "kind": "train", "loss": 3.5}\n{"step": 1, "kind": "val", "source": "books", "loss": 9.0}\n',
        encoding="utf-8",
    )
    found = describe(cut)
    assert (found.loss, found.tokens_per_s) == (3.5, None)


@pytest.mark.parametrize(("less", "steps"), [(0, [1, 2]), (1, [2]), (30, [2])])
def test_of_a_long_file_the_rows_at_its_end_are_read(tmp_path: Path, monkeypatch, less: int, steps: list[int]):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "kind": "train", "loss": 1.0}\n{"step": 2, "kind": "train", "loss": 1.0}\n')
    monkeypatch.setattr(listing, "TAIL_BYTES", path.stat().st_size - less)
    assert [row["step"] for row in listing.last_rows(path)] == steps


@pytest.mark.parametrize(
    ("file", "content", "state"),
    [
        ("config.toml", b"[train\n", "damaged"),
        ("config.toml", b"train = 5\n", "stopped"),
        ("config.toml", b"[train]\nsteps = nan\nhang_seconds = 'x'\n", "stopped"),
        ("config.toml", None, "damaged"),
        ("metrics.jsonl", b'\xff\x00[[[\n{}\n5\n{"kind": "train", "step": "x"}\n', "finished"),
        ("metrics.jsonl", b"", "finished"),
        ("metrics.jsonl", None, "finished"),
    ],
)
def test_a_damaged_run_is_a_row(run: Path, file: str, content: bytes | None, state: str):
    (run / file).unlink()
    if content is not None:
        (run / file).write_bytes(content)
    (found,) = list_runs(run.parent)
    assert found.state == state
    assert bool(found.note) == (state == "damaged")


def test_the_command_lists_runs_in_folders_of_folders_and_leaves_other_folders_out(run: Path, capsys):
    shutil.copytree(run, run.parent / "group" / "b")
    (run.parent / "data").mkdir()
    (run.parent / "file.txt").write_text("x", encoding="utf-8")
    (run.parent / "circle").symlink_to(run.parent, target_is_directory=True)
    assert main(["runs", str(run.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["run", "state", "step"]
    assert any(line.startswith("a[red] ") and line.split()[1:3] == ["finished", "8/8"] for line in lines)
    assert any(line.startswith(f"group{os.sep}b ") for line in lines)
    assert not any("data" in line or "file" in line for line in lines)
    assert main(["runs", str(run), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["runs"]
    assert (one["run"], one["state"], one["step"]) == (str(run), "finished", 8)


def test_a_folder_without_runs_or_none_at_all_is_said(tmp_path: Path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert "holds no run" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "no")]) == 2
    assert "does not exist" in capsys.readouterr().err
