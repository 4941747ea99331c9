"""The fault campaign of benchmarks/faults.py, shortened: nothing lost, no wrong resume, no unnoticed damage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[1] / "benchmarks" / "faults.py"


@pytest.mark.skipif(os.name != "posix", reason="forks, and kills what it has forked")
def test_a_shortened_campaign_finds_nothing(tmp_path: Path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    kinds = "kills,flips,truncations,full_disk,sigterms,nan"
    command = [sys.executable, str(CAMPAIGN), "--scale", "0.03", "--only", kinds, "--no-write"]
    done = subprocess.run([*command, "--folder", str(tmp_path / "runs")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:3] for line in done.stdout.splitlines()[2:]]
    assert [(kind.strip(), int(count)) for kind, count in rows] == [
        ("kills", 3),
        ("flips", 2),
        ("truncations", 1),
        ("full_disk", 1),
        ("sigterms", 1),
        ("nan", 1),
    ]
