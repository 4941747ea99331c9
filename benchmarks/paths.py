"""How far the ways to compute a step part over a run: training losses of the fused path, and of plain ones, compared.

    python benchmarks/paths.py --data DIR --out DIR [--recipe gpt2-124m] [--steps 200] [--only fused plain …]
        [--more-seeds N] [-- FLAGS]

Each arm is `regpt train RECIPE` with other flags: the same weights, the same batches. Several GPUs take one arm each at
a time. `plain` is the reference: compiled, with the recipe's rows. `other-rows` sums in another order but rounds every
activation alike; `uncompiled` rounds at other places; `tf32` shows where less rounding leads, `fp8` where more. With
--more-seeds `plain`, `fused` and `fp8` are compared from N other initial weights, too: a difference that rounding makes
has another sign and size for each, one that is a wrong term has not. Prints, for each arm, the mean absolute and mean
signed difference of the last quarter's losses and the largest of the first twenty, and the validation losses; writes
DIR/paths-DEVICE-DATE.json after every arm. Flags after -- go to every arm. About two minutes an arm on one H100 with
`-- --train.batch-tokens 131072`.
"""

import argparse
import datetime
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

ARMS = {
    "plain": ["--train.kernels", "plain"],
    "fused": ["--train.kernels", "fused"],
    "other-rows": ["--train.kernels", "plain", "--train.micro-batch-rows", "32"],
    "uncompiled": ["--train.kernels", "plain", "--train.compile", "False"],
    "tf32": ["--train.kernels", "plain", "--train.precision", "tf32"],
    "fp8": ["--train.kernels", "plain", "--train.precision", "fp8"],
}
REFERENCE = "plain"
Rows = list[dict[str, Any]]
Arm = tuple[str, int | None]  # name and seed; None is the recipe's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="gpt2-124m")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--more-seeds", type=int, default=0)
    parser.add_argument("flags", nargs="*")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{os.cpu_count()}-cores"
    every = max(1, given.steps // 2)
    common = ["--data", given.data, "--train.steps", str(given.steps), "--optim.warmup-steps", str(given.steps // 10)]
    common += ["--eval.every-steps", str(every), "--log.every-steps", "1", "--checkpoint.keep-last", "1", *given.flags]
    arms: list[Arm] = [(name, None) for name in given.only]
    seeded = [name for name in (REFERENCE, "fused", "fp8") if name in given.only]
    arms += [(name, seed) for seed in range(1, 1 + given.more_seeds) for name in seeded]
    path = given.out / f"paths-{re.sub(r'[^a-z0-9]+', '-', device.lower())}-{datetime.date.today()}.json"
    about = {"device": device, "torch": torch.__version__, "recipe": given.recipe, "flags": common[2:]}

    def write(rows: dict[Arm, Rows]) -> dict[str, dict[str, Any]]:
        found = {label(arm): compare(rows[arm], rows.get((REFERENCE, arm[1]))) for arm in arms if arm in rows}
        path.write_text(json.dumps(about | {"arms": found}, indent=1) + "\n", encoding="utf-8")
        return found

    with tempfile.TemporaryDirectory() as folder:
        found = write(run_all(given.recipe, arms, common, Path(folder), given.out, write))
    for name, arm in found.items():
        print(f"{name:12}", *(f"{key} {value}" for key, value in arm.items() if key != "losses"), sep="  ")
    print(f"written: {path}")


def label(arm: Arm) -> str:
    name, seed = arm
    return name if seed is None else f"{name}-seed-{seed}"


def run_all(
    recipe: str, arms: list[Arm], common: list[str], folder: Path, out: Path, done: Callable[[dict[Arm, Rows]], object]
) -> dict[Arm, Rows]:
    """Rows of metrics of every arm that ended well, as many arms at a time as there are GPUs; `done` after each."""
    devices = queue.SimpleQueue[str]()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    for name in visible.split(",") if visible else map(str, range(max(1, torch.cuda.device_count()))):
        devices.put(name)
    rows: dict[Arm, Rows] = {}
    alone = threading.Lock()

    def run(arm: Arm, device: str) -> None:
        name, seed = arm
        command = [sys.executable, "-m", "regpt", "train", recipe, "--out", str(folder / label(arm)), *common]
        command += ARMS[name] + ([] if seed is None else ["--train.seed", str(seed)])
        with (out / f"{label(arm)}.txt").open("w", encoding="utf-8") as log:
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": device}
            code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
        devices.put(device)
        print(f"{label(arm)}: exit code {code}, {out / f'{label(arm)}.txt'}", flush=True)
        if code == 0:
            lines = (folder / label(arm) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            with alone:
                rows[arm] = [json.loads(line) for line in lines]
                done(rows)

    threads = []
    for arm in arms:  # in this order
        threads.append(threading.Thread(target=run, args=(arm, devices.get())))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return rows


def compare(rows: Rows, reference: Rows | None) -> dict[str, Any]:
    own, other = losses(rows), losses(reference or [])
    differences = [own[step] - other[step] for step in sorted(own.keys() & other.keys())]
    result: dict[str, Any] = {"validation": [round(row["loss"], 4) for row in rows if row["kind"] == "val"]}
    if differences:
        last = differences[-max(1, len(differences) // 4) :]
        result["last_quarter_mean_absolute"] = round(fmean(map(abs, last)), 5)
        result["last_quarter_mean_signed"] = round(fmean(last), 5)
        result["first_20_largest"] = round(max(map(abs, differences[:20])), 6)
    return result | {"losses": [round(own[step], 5) for step in sorted(own)]}


def losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


if __name__ == "__main__":
    main()
