"""Commands whose console fails, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REGPT = [sys.executable, "-m", "regpt"]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="a device that is always full")


@needs_full
def test_a_run_goes_on_without_its_console(tmp_path: Path, tiny_flags: list[str]):
    """Its disk is full, and it cannot show the characters of its own first line."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [*REGPT, "train", "gpt2-tiny", "--out", str(tmp_path / "run[x]"), *tiny_flags]
    with FULL.open("wb") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=300, check=False)
    assert found.returncode == 0
    assert found.stderr.startswith(b"regpt: standard output could not be written (No space left on device)")
    assert (tmp_path / "run[x]" / "checkpoints" / "step-00000003").is_dir()
    assert (tmp_path / "run[x]" / "metrics.jsonl").read_text(encoding="utf-8").count('"kind": "train"') == 3


@needs_full
def test_a_result_that_cannot_be_printed_is_a_failure():
    with FULL.open("wb") as full:
        found = subprocess.run([*REGPT, "--help"], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert found.returncode == 1
    assert found.stderr.count(b"\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="descriptors as POSIX has them")
def test_a_prompt_from_a_closed_stdin_is_refused():
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *REGPT, "sample", "gpt2", "--prompt", "-"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert "standard input is closed" in found.stderr


def test_results_are_in_their_file_before_they_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from regpt.cli import bench

    report = {"recipe": "[/py]", "parameters": 1, "world_size": 1, "device": "cpu", "adapter": None}

    def broken(report: dict) -> object:
        assert json.loads((tmp_path / "r.json").read_text()) == report
        raise KeyboardInterrupt

    monkeypatch.setattr("regpt.runs.bench.bench_train", lambda *_, **__: report)
    monkeypatch.setattr(bench, "figures", broken)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["train", "gpt2-tiny", "--json", str(tmp_path / "r.json")])


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_waiting_threads_give_their_core_away_unless_the_user_says_otherwise(given: dict[str, str], spins: str):
    look = "import os, sys; sys.argv[1:] = ['--version']; from regpt.__main__ import main; main()"
    look += "; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"  # torch reads it when it is imported
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, env=clean | given, check=True)
    assert found.stdout.splitlines()[-1] == f"False {spins}"
