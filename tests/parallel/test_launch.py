"""`regpt train --nproc 2`, as a user types it: the curve of one process, its errors, its end on Ctrl-C."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny
from regpt.checkpoint.load import checkpoints
from regpt.errors import UsageError
from regpt.parallel.launch import launch
from regpt.runs.pretrain import pretrain

PATIENCE = 120.0  # seconds; a test that waits this long has failed
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.multi_gpu)]


@contextlib.contextmanager
def module_process(module: str, *args: object) -> Iterator[subprocess.Popen]:
    """`python -m module` as a process of its own session, which does not outlive the test, nor do its children."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    command = [sys.executable, "-m", module, *map(str, args)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None and os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def regpt(*args: object) -> contextlib.AbstractContextManager[subprocess.Popen]:
    return module_process("regpt", *args)


def finished(*args: object) -> tuple[int, str, str]:
    with regpt(*args) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE)
        return process.returncode, stdout, stderr


def rows(run: Path, kind: str) -> list[dict]:
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [row for row in map(json.loads, text.splitlines()) if row["kind"] == kind]


def curve(run: Path) -> list[float]:
    return [row["loss"] for kind in ("train", "val") for row in rows(run, kind)]


def test_fewer_than_one_process_is_refused():
    with pytest.raises(UsageError, match=r"--nproc is 0, must be at least 1"):
        launch(0, [])


@pytest.mark.parametrize("device", ["cpu", DEVICES[1]])
def test_two_processes_have_the_loss_curve_of_one(shards, tmp_path: Path, device: str):
    config = tiny.change(tiny.run_config(shards), "train", device=device)
    assert pretrain(config, tmp_path / "one") == 0
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    code, out, err = finished("train", tmp_path / "config.toml", "--out", tmp_path / "two", "--nproc", 2)
    assert code == 0, err
    assert "8,368 parameters on 2 × " in out
    assert out.count("validation loss") == 4  # one process prints
    assert len(curve(tmp_path / "two")) == 8 + 4
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)
    env = json.loads((tmp_path / "two" / "env.json").read_text(encoding="utf-8"))
    assert env["world_size"] == 2
    assert [f.name for f in checkpoints(tmp_path / "two")] == [f"step-{s:08d}" for s in (2, 4, 6, 8)]


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("device", DEVICES)
def test_a_signal_to_the_launcher_saves_and_two_processes_go_on(
    shards, tmp_path: Path, kind: signal.Signals, device: str
):
    config = tiny.change(tiny.run_config(shards), "train", device=device)
    for section in ("eval", "sample", "checkpoint"):
        config = tiny.change(config, section, every_steps=0)
    config = tiny.change(config, "train", steps=3000)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    run = tmp_path / "run"
    with regpt("train", tmp_path / "config.toml", "--out", run, "--nproc", 2) as process:
        limit = time.monotonic() + PATIENCE
        while not rows(run, "train"):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < limit
            time.sleep(0.1)
        process.send_signal(kind)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, err
    assert "and saved; go on with: regpt train --resume" in out
    (saved,) = checkpoints(run)
    step = int(saved.name.removeprefix("step-"))
    assert rows(run, "train")[-1]["step"] == step < 3000
    text = (run / "config.toml").read_text(encoding="utf-8").replace("steps = 3000", f"steps = {step + 2}")
    (run / "config.toml").write_text(text, encoding="utf-8")
    code, _, err = finished("train", "--resume", run, "--force", "--nproc", 2)
    assert code == 0, err
    assert [row["step"] for row in rows(run, "train")] == list(range(1, step + 3))


def test_bad_input_is_one_sentence_before_a_process_is_started(shards, tmp_path: Path):
    (tmp_path / "config.toml").write_text(tiny.run_config(shards).to_toml(), encoding="utf-8")
    code, _, err = finished("train", tmp_path / "config.toml", "--out", tmp_path / "run", "--nproc", 3)
    assert code == 2
    assert err.startswith("regpt: train.batch_tokens 64 is not a multiple of 48 = data.seq_len 16 × ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no other store")
def test_processes_find_each_other_in_a_store_without_libuv(tmp_path: Path):
    """As on Windows, whose wheels of torch have none."""
    sum_of_ranks = (
        "import torch, torch.distributed as dist; from regpt.parallel import mesh; mesh.USE_LIBUV = False\n"
        "with mesh.open_mesh('cpu') as m: x = torch.tensor(m.rank + 1.0); dist.all_reduce(x); print(x.item())"
    )
    start = (
        "from regpt.parallel import launch; import sys; launch.USE_LIBUV = False\n"
        "launch.COMMAND = (sys.executable, '-c'); sys.exit(launch.launch(2, [sys.argv[1]]))"
    )
    found = subprocess.run([sys.executable, "-c", start, sum_of_ranks], capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stdout) == (0, "3.0\n3.0\n"), found.stderr
