"""What a run in a bucket survives: killed again and again on machines that lose their disks, gone on with on others.

    nice python benchmarks/faults_remote.py [--kills 30] [--folder DIR]

A tiny run in deterministic mode is made once on a local disk, then in a bucket of moto's server: each process gets
a staging folder, a machine, at random; SIGKILL comes at a random moment, every second time while a checkpoint is being
copied; every third machine is then wiped. After each kill the newest complete checkpoint of the bucket is
downloaded and verified. In the end the loss curve and the last checkpoint must be those of the straight run. Prints a
table and writes benchmarks/results/faults-remote-<hardware>-<date>.json. POSIX only.
"""

import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import moto
import torch
import tyro
from fault_campaign import tiny_config, write_data

import regpt
from regpt.checkpoint.fetch import restore, stored_checkpoints
from regpt.errors import UserError
from regpt.remote.lease import Lease
from regpt.remote.store import Store
from regpt.runs.folder import source_commit
from regpt.runs.verify_resume import compare_runs

STEPS, EVERY, MACHINES = 4000, 5, 3


@dataclass(frozen=True)
class Args:
    kills: int = 30
    """How often a process is killed."""
    folder: str = ""
    """Where everything lies; default: a temporary folder."""
    seed: int = 0
    """Of all random moments and places."""
    write: bool = True
    """Write the results as JSON."""


class Campaign:
    """The server, the machines, what was seen."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        config = tiny_config(write_data(folder / "data"))
        config = replace(config, train=replace(config.train, steps=STEPS))
        kept = replace(config.checkpoint, every_steps=EVERY, keep_last=2, lease_seconds=2)
        self.file = folder / "run.toml"
        self.file.write_text(replace(config, checkpoint=kept).to_toml(), encoding="utf-8")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        command = [sys.executable, "-c", f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"]
        self.server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.1)
        self.store = Store("s3://bucket/runs/a")
        self.store.fs.mkdir("bucket")

    def start(self, machine: Path) -> subprocess.Popen[str]:
        begun = self.store.read("config.toml") is not None
        what = ["--resume", self.store.url] if begun else [str(self.file), "--out", self.store.url]
        if not begun:
            shutil.rmtree(machine, ignore_errors=True)
        command = [sys.executable, "-m", "regpt", "train", *what, "--checkpoint.staging", str(machine)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def wait_until_owned(self, process: subprocess.Popen[str], before: int) -> None:
        while process.poll() is None and claims(self.store) <= before:
            time.sleep(0.02)

    def is_copying(self) -> bool:
        """Whether a checkpoint is there without its manifest."""
        files = self.store.files("checkpoints")
        folders = {name.rpartition("/")[0] for name in files}
        return any(f"{folder}/manifest.json" not in files for folder in folders)

    def newest(self) -> int:
        names = [name for name, is_complete in stored_checkpoints(self.store).items() if is_complete]
        return int(names[0][5:13]) if names else -1

    def is_valid(self) -> bool:
        """Whether another machine would go on from the newest complete checkpoint."""
        skipped: list[str] = []
        with tempfile.TemporaryDirectory(dir=self.folder) as empty:
            try:
                restore(self.store, Path(empty), skipped.append)
            except UserError:
                return False
        return not skipped


def claims(store: Store) -> int:
    """Number of the newest claim on the run; 0 before there is one."""
    newest = Lease(store).newest()
    return newest.number if newest else 0


def run(c: Campaign, kills: int) -> dict[str, object]:
    """Kill so many processes, then let the last one finish."""
    seen: dict[str, int] = dict.fromkeys(("kills", "while copying", "machines changed", "machines wiped"), 0)
    seen |= dict.fromkeys(("lost", "invalid", "failed"), 0)
    before, reached, claimed = c.folder / "machine-0", -1, 0
    while seen["kills"] < kills:
        machine = c.folder / f"machine-{c.draw.randrange(MACHINES)}"
        seen["machines changed"] += machine != before
        process, before = c.start(machine), machine
        c.wait_until_owned(process, claimed)
        aimed = seen["kills"] % 2 == 0
        until = time.monotonic() + (30 if aimed else 4 * c.draw.random())
        while process.poll() is None and time.monotonic() < until and not (aimed and c.is_copying()):
            time.sleep(0.01)
        if process.poll() is not None:
            if process.returncode == 0:
                break
            seen["failed"] += 1
            print(process.communicate()[1], file=sys.stderr)
            continue
        process.kill()
        process.communicate()
        claimed = claims(c.store)
        seen["kills"] += 1
        seen["while copying"] += c.is_copying()
        seen["lost"] += c.newest() < reached
        reached = c.newest()
        seen["invalid"] += c.store.read("config.toml") is not None and not c.is_valid()
        if c.draw.randrange(3) == 0:
            shutil.rmtree(machine, ignore_errors=True)
            seen["machines wiped"] += 1
        print(f"{seen['kills']} of {kills} kills, step {reached} is there", file=sys.stderr, flush=True)
    process = c.start(c.folder / "last")
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return {**seen, "wrong": int(not is_straight(c))}


def is_straight(c: Campaign) -> bool:
    """Whether the run in the bucket has the curve and the tensors of the one on a local disk."""
    straight, there = c.folder / "straight", c.folder / "last-copy"
    command = [sys.executable, "-m", "regpt", "train", str(c.file), "--out", str(straight)]
    subprocess.run(command, check=True, capture_output=True)
    there.mkdir()
    restore(c.store, there)
    return compare_runs(straight, there).bitwise


def main(args: Args) -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        c = Campaign(Path(args.folder or temporary), args.seed)
        try:
            found = run(c, args.kills)
        finally:
            c.server.kill()
    print("\n".join(f"| {key} | {value} |" for key, value in found.items()))
    result = {
        "seen": found,
        "steps": STEPS,
        "every_steps": EVERY,
        "machines": MACHINES,
        "seconds": round(time.monotonic() - began),
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "moto": moto.__version__,
        "regpt": regpt.__version__,
        "commit": source_commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    if args.write:
        name = f"faults-remote-{platform.machine()}-{os.cpu_count()}cores-{result['date']}.json"
        path = Path(__file__).parent / "results" / name
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(tyro.cli(Args))
