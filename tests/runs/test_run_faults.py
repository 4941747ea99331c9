"""What a file system, a clock and another process do to a run: one sentence, nothing lost, nothing else changed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from regpt.checkpoint.load import checkpoints, load_checkpoint
from regpt.errors import UserError
from regpt.runs.folder import LOCK, is_run, owned
from regpt.runs.pretrain import pretrain, resume
from regpt.runs.terminal import Terminal


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK}


# ---- another process -------------------------------------------------------------------------------------------------


def test_a_second_process_on_the_same_run_is_refused_and_changes_nothing(cut):
    before = contents(cut)
    sentence = rf"is being written by process {os.getpid()}; wait until it has finished"
    with owned(cut), pytest.raises(UserError, match=sentence):
        resume(cut)
    assert contents(cut) == before
    assert resume(cut) == 0
    assert not (cut / LOCK).exists()


def test_two_processes_cannot_start_the_same_run(config, tmp_path):
    with owned(tmp_path / "run"), pytest.raises(UserError, match="is being written by process"):
        pretrain(config, tmp_path / "run")
    assert pretrain(config, tmp_path / "run") == 0


HOLDER = """
import sys, time
from pathlib import Path
from regpt.runs.folder import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_ends_with_a_process_that_is_killed(cut, straight):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(cut)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is being written by process {holder.pid}"):
            resume(cut)
        holder.kill()
    assert resume(cut) == 0
    assert tiny.final_files(cut) == tiny.final_files(straight)


# ---- the file system -------------------------------------------------------------------------------------------------

unix = pytest.mark.skipif(os.name != "posix", reason="file-size limits are POSIX's")


@unix
@pytest.mark.parametrize("limit", [0, 3_000, 40_000])
def test_a_disk_that_takes_no_more_bytes_is_one_sentence_and_nothing_is_lost(cut, straight, limit):
    """The limit is the system's own, for every file: 0 takes no row, 40,000 bytes no optimizer state."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = (cut / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + limit if limit < 40_000 else limit, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*(File too large|free some space)"):
            resume(cut)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [load_checkpoint(folder).step for folder in checkpoints(cut)] == [2, 4]
    assert not list((cut / "checkpoints").glob(".*"))
    assert resume(cut) == 0
    assert tiny.final_files(cut) == tiny.final_files(straight)


def forbid_writing(monkeypatch, folder: Path) -> None:
    """`folder` is read-only (the tests may be root's, whom permissions do not stop)."""
    real_open, real_mkdir = Path.open, Path.mkdir

    def open_(self, mode="r", *args, **options):
        if self.is_relative_to(folder) and set(mode) & set("wa+"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real_open(self, mode, *args, **options)

    def mkdir(self, *args, **options):
        if self.is_relative_to(folder) and not self.exists():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real_mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(Path, "mkdir", mkdir)


def test_a_disk_that_is_full_from_the_beginning_leaves_no_half_of_a_run(config, straight, tmp_path, monkeypatch):
    """Half of a config.toml may be valid: the other half would be defaults."""
    sync, synced = os.fsync, []

    def full(file: int) -> None:
        synced.append(file)
        if len(synced) > 2:  # env.json and its folder are on the disk
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .* \(No space left on device\)"):
        pretrain(config, tmp_path / "run")
    monkeypatch.undo()
    assert not is_run(tmp_path / "run")
    assert pretrain(config, tmp_path / "run") == 0
    assert tiny.final_files(tmp_path / "run") == tiny.final_files(straight)


def test_a_read_only_folder_is_one_sentence(cut, config, tmp_path, monkeypatch):
    before = contents(cut)
    forbid_writing(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*Read-only file system.*make it writable"):
        resume(cut)
    with pytest.raises(UserError, match=r"cannot write .*Read-only file system"):
        pretrain(config, tmp_path / "new")
    assert contents(cut) == before


def test_a_shard_that_has_vanished_is_named(cut, shards, tmp_path):
    data = shutil.copytree(shards, tmp_path / "data")
    text = (cut / "config.toml").read_text(encoding="utf-8").replace(str(shards), str(data))
    (cut / "config.toml").write_text(text, encoding="utf-8")
    before = contents(cut)
    (data / "train-00000.bin").unlink()
    with pytest.raises(UserError, match=r"train-00000\.bin is missing; prepare the folder again or restore the file"):
        resume(cut)
    assert contents(cut) == before
    shutil.copy(shards / "train-00000.bin", data)
    assert resume(cut) == 0


@unix
def test_shards_deleted_under_a_run_stay_readable_to_it(config, straight, shards, tmp_path, monkeypatch):
    """They are mapped from the start; Windows does not let them be deleted."""
    data, run = shutil.copytree(shards, tmp_path / "data"), tmp_path / "run"
    show = Terminal.row

    def vanish(self: Terminal, row: dict) -> None:
        show(self, row)
        if row["kind"] == "train" and row["step"] == 3:
            shutil.rmtree(data)

    monkeypatch.setattr(Terminal, "row", vanish)
    assert pretrain(tiny.change(config, "data", path=str(data)), run) == 0
    assert not data.exists()
    assert tiny.final_files(run) == tiny.final_files(straight)


# ---- the clock -------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_only_what_the_time_is_called(config, straight, tmp_path, monkeypatch):
    jumps = [0, 3.0e9, -1.0e9]
    now = time.time

    def jumping() -> float:
        jumps.append(jumps.pop(0))
        return now() + jumps[0]

    monkeypatch.setattr(time, "time", jumping)
    assert pretrain(config, tmp_path / "run") == 0
    monkeypatch.undo()
    assert tiny.final_files(tmp_path / "run") == tiny.final_files(straight)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["time"] for row in rows) - min(row["time"] for row in rows) > 3e9  # it did jump
    durations = [row[key] for row in rows for key in ("dt_ms", "stall_ms", "write_ms") if key in row]
    assert all(0 < duration < 6e5 for duration in durations)
