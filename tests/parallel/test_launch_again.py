"""What the launcher does about a process that dies, by how it died; and a run that goes on by itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_launch import DEVICES, PATIENCE, finished, module_process, regpt, rows  # type: ignore[import-not-found]

import tiny
from regpt.checkpoint.load import checkpoint_folder, checkpoints
from regpt.parallel import launch as module
from regpt.parallel.launch import launch, should_restart, verdict

POSIX = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
KILLED = -signal.SIGTERM


@pytest.mark.parametrize(
    ("codes", "again", "code"),  # without a signal to the launcher
    [
        ({0: 0, 1: 0}, False, 0),
        ({0: 75, 1: 75}, False, 75),
        ({0: 75, 1: 0}, False, 75),  # the launcher ended process 1, which had nothing left to do
        ({0: 75, 1: KILLED}, False, 75),  # nor this one
        ({0: 75, 1: -9}, True, 1),  # the launcher ended process 0, before its first step, as the other one had died
        ({0: KILLED, 1: KILLED}, False, 1),
        ({0: 70, 1: KILLED}, True, 1),
        ({0: 70, 1: 2}, False, 2),
        ({0: 70, 1: 1}, False, 1),
        ({0: 130, 1: 75}, False, 130),
    ],
)
def test_the_exit_code_and_whether_another_try_is_of_use(codes: dict[int, int], again: bool, code: int):
    assert should_restart(codes) is again
    assert verdict(codes) == code


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ({0: 75, 1: 75}, 75),
        ({0: 70, 1: 75}, 75),  # before the first step: process 0 waited for the other one in vain
        ({0: 70, 1: 70}, 70),  # train.stop_seconds were over
        ({0: 1, 1: 70}, 1),  # the disk was full
        ({0: 130, 1: 130}, 130),
    ],
)
def test_the_exit_code_after_a_signal_to_the_launcher(codes: dict[int, int], code: int):
    assert verdict(codes, interrupted=True) == code


def tries(monkeypatch, *ends: dict[int, int], **options) -> tuple[int, list[list[str]]]:
    """The launcher's exit code, and the arguments of each group that it started; they end as `ends` says."""
    started: list[list[str]] = []
    left = iter(ends)

    def run_once(processes: int, args: list[str], *rest: object) -> tuple[dict[int, int], bool]:
        started.append(list(args))
        return next(left), False

    monkeypatch.setattr(module, "run_once", run_once)
    return launch(2, ["first"], again=lambda: ["again"], say=lambda text: None, **options), started


def test_a_death_starts_all_again_and_a_refusal_does_not(monkeypatch):
    dead, refused, well = {0: 70, 1: -9}, {0: 1, 1: 70}, {0: 0, 1: 0}
    assert tries(monkeypatch, dead, well, max_restarts=3) == (0, [["first"], ["again"]])
    assert tries(monkeypatch, refused, max_restarts=3) == (1, [["first"]])
    assert tries(monkeypatch, dead, dead, dead, max_restarts=2) == (1, [["first"], ["again"], ["again"]])
    assert tries(monkeypatch, dead, max_restarts=0) == (1, [["first"]])


def test_progress_begins_the_count_anew(monkeypatch):
    dead, well = {0: -9, 1: 70}, {0: 0, 1: 0}
    reached = iter(range(100))
    code, started = tries(monkeypatch, *[dead] * 5, well, max_restarts=1, progress=lambda: next(reached))
    assert (code, len(started)) == (0, 6)


DEAF = "import signal, time; [signal.signal(kind, signal.SIG_IGN) for kind in (2, 15)]; time.sleep(60)"
LAUNCH_DEAF = f"""
import signal, sys, threading
from regpt.parallel import launch as module, signals
module.COMMAND, module.GRACE_SECONDS, signals.SAME_PRESS_SECONDS = (sys.executable, "-c", {DEAF!r}), 0.2, 0.2
for k in range(int(sys.argv[1])):
    threading.Timer(1 + k, signal.raise_signal, [signal.SIGINT]).start()
sys.exit(module.launch(2, [], stop_seconds=int(sys.argv[2])))
"""


@POSIX
@pytest.mark.parametrize(("often", "stop_seconds", "code"), [(1, 0, 70), (2, 60, 130)])
def test_the_exit_code_says_whether_the_processes_were_late_or_interrupted_twice(often, stop_seconds, code):
    """Processes that end by no signal of ours are killed."""
    command = [sys.executable, "-c", LAUNCH_DEAF, str(often), str(stop_seconds)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=env, timeout=PATIENCE, check=False).returncode == code


@POSIX
def test_a_process_that_does_not_end_when_the_others_have_is_killed(monkeypatch):
    """Suspended after the last step, or hanging in a library's clean-up: nobody waits for it any more."""
    hang = "import os, time; time.sleep(60 if os.environ['RANK'] == '1' else 0)"
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", hang))
    said: list[str] = []
    assert launch(2, [], hang_seconds=0.05, say=said.append) == 0
    assert said == ["process 1 has not ended 0.05 seconds after the others, and is killed"]


@POSIX
def test_the_death_of_a_process_ends_the_others(monkeypatch):
    """They are asked to, and save what they can."""
    dying = "import os, signal, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(60)"
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", dying))
    assert module.run_once(2, [], 300, 600, print) == ({0: -signal.SIGTERM, 1: -signal.SIGKILL}, False)


@POSIX
@pytest.mark.parametrize(
    ("processes", "device"),
    [
        pytest.param(2, "cpu", marks=pytest.mark.slow),
        pytest.param(4, "cpu", marks=pytest.mark.slow),
        pytest.param(2, "cuda", marks=pytest.mark.multi_gpu),
    ],
)
def test_a_killed_process_is_replaced_and_the_run_goes_on_bitwise(shards, processes: int, device: str, tmp_path: Path):
    config = tiny.change(tiny.run_config(shards), "train", deterministic=True, steps=60, device=device)
    for section in ("eval", "sample"):
        config = tiny.change(config, section, every_steps=0)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert finished("train", tmp_path / "config.toml", "--out", straight, "--nproc", processes)[0] == 0
    with regpt("train", tmp_path / "config.toml", "--out", run, "--nproc", processes) as process:
        killed = kill_one(process, run)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert f"process {killed} ended with SIGKILL" in err
    assert f"starting all of them again (1 of 3): regpt train --resume {run}" in err
    assert [row["name"] for row in rows(run, "event")].count("resume") == 1
    ours, theirs = (checkpoint_folder(r, 60) / "model.safetensors" for r in (run, straight))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("device", DEVICES)
def test_torchrun_starts_the_same_command_again_and_it_goes_on(shards, tmp_path: Path, device: str):
    """Its default rendezvous keeps the store, in which the processes that died have left their addresses."""
    config = tiny.change(tiny.run_config(shards), "train", deterministic=True, steps=60, device=device)
    for section in ("eval", "sample"):
        config = tiny.change(config, section, every_steps=0)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    run = tmp_path / "run"
    command = ["--nproc-per-node", 2, "--max-restarts", 2, "-m", "regpt", "train", tmp_path / "config.toml"]
    with module_process("torch.distributed.run", *command, "--out", run) as process:
        kill_one(process, run)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert [row["name"] for row in rows(run, "event")].count("resume") == 1
    assert rows(run, "train")[-1]["step"] == 60


def kill_one(process, run: Path, kind: signal.Signals = signal.SIGKILL) -> int:
    """Send `kind` to the last process of the group when the run has a checkpoint; its rank."""
    limit = time.monotonic() + PATIENCE
    while not checkpoints(run):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
    ranks = workers(process.pid)
    os.kill(ranks[max(ranks)], kind)
    return max(ranks)


def workers(launcher: int) -> dict[int, int]:
    """Process ids of the group that `launcher` started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        rank = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
        if parent == launcher and rank:
            found[rank[0]] = int(folder.name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("device", DEVICES)
def test_a_process_that_hangs_is_named_and_replaced(shards, tmp_path: Path, device: str):
    config = tiny.change(tiny.run_config(shards), "train", hang_seconds=5, steps=200, device=device)
    for section in ("eval", "sample"):
        config = tiny.change(config, section, every_steps=0)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    run = tmp_path / "run"
    with regpt("train", tmp_path / "config.toml", "--out", run, "--nproc", 2) as process:
        kill_one(process, run, signal.SIGSTOP)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "rank 0 has waited" in err
    assert "; missing: rank 1 (" in err
    assert rows(run, "train")[-1]["step"] == 200


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize(("kind", "often", "code"), [(signal.SIGTERM, 1, 70), (signal.SIGINT, 2, 130)])
def test_a_suspended_process_does_not_outlive_a_stop(
    shards, tmp_path: Path, kind: signal.Signals, often: int, code: int
):
    """It handles no signal itself: train.stop_seconds, or the second Ctrl-C, end it all the same."""
    config = tiny.change(tiny.run_config(shards), "train", stop_seconds=5, steps=100_000, device="cpu")
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    run = tmp_path / "run"
    with regpt("train", tmp_path / "config.toml", "--out", run, "--nproc", 2) as process:
        kill_one(process, run, signal.SIGSTOP)
        group = workers(process.pid)
        process.send_signal(kind)
        for _ in range(often - 1):
            time.sleep(1.5)  # more than SAME_PRESS_SECONDS
            process.send_signal(kind)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    assert not any(Path(f"/proc/{pid}").exists() for pid in group.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_processes_whose_launcher_is_killed_save_and_end(shards, tmp_path: Path):
    config = tiny.change(tiny.run_config(shards), "train", hang_seconds=5, steps=100_000, device="cpu")
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    run = tmp_path / "run"
    with regpt("train", tmp_path / "config.toml", "--out", run, "--nproc", 2) as process:
        while not checkpoints(run):
            assert process.poll() is None, process.communicate()
        process.kill()
        out, err = process.communicate(timeout=PATIENCE)  # returns when its processes, which write there, have ended
    assert "the launcher is gone; stopping" in err
    assert checkpoints(run)[-1].name == f"step-{rows(run, 'train')[-1]['step']:08d}"
    assert "and saved; go on with" in out


@POSIX
def test_bad_input_is_not_tried_again(shards, tmp_path: Path):
    """What the processes themselves refuse, a loss that is not finite."""
    config = tiny.change(tiny.run_config(shards), "train", on_non_finite="stop")
    config = tiny.change(config, "optim", lr=1e30, warmup_steps=0, schedule="constant")
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    code, _, err = finished("train", tmp_path / "config.toml", "--out", tmp_path / "run", "--nproc", 2)
    assert code == 1
    assert "so the update was not applied" in err
    assert "starting all of them again" not in err
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["name"] == "non_finite"
