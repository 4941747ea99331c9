"""`regpt plan` beside what `regpt bench train` then measures: memory and time, in per cent.

    python benchmarks/plan.py --out DIR [--steps 12] [--warmup 4] [--only TEXT]

On a CUDA device: GPT-2 124M with 64 and 16 rows, 350M, 1558M and rows of 2048, on the plain compiled, the fused and the
eager path; about a minute a case. Elsewhere: the two small recipes on the CPU, about half a minute each when idle. Each
case is a fresh process, as a user's would be; DIR/plan-DEVICE-DATE.json is written after each of them.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PLAIN, FUSED = ["--train.kernels", "plain"], ["--train.kernels", "fused"]
EAGER = [*PLAIN, "--train.compile", "False"]
ROWS_16 = ["--train.micro-batch-rows", "16"]
SHORT = ["--train.batch-tokens", "131072"]  # 16 micro-batches of the largest model; a quarter of a minute a step
ON_GPU = {
    "124m 64 rows compiled": ["gpt2-124m", *PLAIN],
    "124m 16 rows compiled": ["gpt2-124m", *PLAIN, *ROWS_16],
    "124m 64 rows fused": ["gpt2-124m", *FUSED],
    "124m 16 rows fused": ["gpt2-124m", *FUSED, *ROWS_16],
    "350m 32 rows compiled": ["gpt2-350m", *PLAIN],
    "350m 32 rows fused": ["gpt2-350m", *FUSED],
    "1558m 8 rows compiled": ["gpt2-1558m", *PLAIN, *SHORT],
    "1558m 8 rows fused": ["gpt2-1558m", *FUSED, *SHORT],
    "125m 32 rows of 2048 compiled": ["gpt3-125m", *PLAIN],
    "125m 32 rows of 2048 fused": ["gpt3-125m", *FUSED],
    "124m 16 rows eager": ["gpt2-124m", *EAGER, *ROWS_16, *SHORT],
    "124m 64 rows recomputed": ["gpt2-124m", *PLAIN, "--train.activation-checkpointing", "True"],
}
# bench saves nothing: without the copy that a checkpoint in the background takes.
ON_CPU = {
    name: [name, "--checkpoint.background", "False", "--train.device", "cpu"] for name in ("quickstart", "gpt2-tiny")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else f"cpu-{os.cpu_count()}-cores"
    path = given.out / f"plan-{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{datetime.date.today()}.json"
    given.out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    print(f"{name}; torch {torch.__version__}; percentages: planned above (+) or below (-) what was measured")
    for case, args in (ON_GPU if on_gpu else ON_CPU).items():
        if given.only in case:
            found.append({"case": case, "args": args, **compare(args, given.steps, given.warmup)})
            show(found[-1])
            document = {"device": name, "torch": torch.__version__, "cases": found}
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def compare(args: list[str], steps: int, warmup: int) -> dict[str, Any]:
    """The plan, the measurement after it, and the load of the machine around both."""
    before = load()
    planned = json.loads(regpt("plan", *args, "--json"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "bench.json"
        try:
            regpt("bench", "train", *args, "--steps", str(steps), "--warmup", str(warmup), "--json", str(report))
        except subprocess.CalledProcessError as error:
            return {"plan": planned, "failed": (error.stderr or "").strip()[-500:]}
        measured = json.loads(report.read_text(encoding="utf-8"))
    ms, gib = measured["step_ms"]["median"], measured["peak_memory_gib"]
    return {
        "planned": {"ms": planned["time"]["step_ms"], "gib": planned["memory"]["peak_gib"]},
        "measured": {"ms": ms, "gib": gib},
        "error": {"ms": planned["time"]["step_ms"] / ms - 1, "gib": gib and planned["memory"]["peak_gib"] / gib - 1},
        "load": [before, load()],
        "plan": planned,
        "bench": measured,
    }


def regpt(*args: str) -> str:
    command = [sys.executable, "-m", "regpt", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout


def load() -> float | None:
    """Processes that wanted to run in the last minute, on average."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def show(found: dict[str, Any]) -> None:
    if "failed" in found:
        print(f"{found['case']:32} failed: {found['failed']}", flush=True)
        return
    planned, measured, error = found["planned"], found["measured"], found["error"]
    memory = "no memory" if measured["gib"] is None else f"{planned['gib']:6.2f} / {measured['gib']:6.2f} GiB"
    memory += "" if error["gib"] is None else f" {error['gib']:+6.1%}"
    time = f"{planned['ms']:8.1f} / {measured['ms']:8.1f} ms {error['ms']:+6.1%}"
    print(f"{found['case']:32} {memory}   {time}   load {found['load']}", flush=True)


if __name__ == "__main__":
    main()
