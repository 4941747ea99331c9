"""Loss, tokens/s, peak memory and bytes a parameter of the types of weights and moments, over 200 steps.

    python benchmarks/low_memory.py --data DIR [--recipe gpt2-124m] [--section.key value …]

What is not known here goes to every `regpt train`; the plain path, each run in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

BF16 = ["--train.weight-dtype", "bf16"]
CASES = {  # name: flags, bytes a parameter on the device
    "fp32": ([], 16),
    "fp32, moments on the host": (["--optim.offload", "True"], 8),
    "fp32, bf16 moments": (["--optim.state-dtype", "bf16"], 12),
    "bf16, fp32 moments": (BF16, 14),
    "bf16, bf16 moments": ([*BF16, "--optim.state-dtype", "bf16"], 10),
    "bf16, int8 moments": ([*BF16, "--optim.state-dtype", "int8"], 8.03),
    "bf16 and its gradients, int8": ([*BF16, "--train.grad-dtype", "bf16", "--optim.state-dtype", "int8"], 6.03),
    "fp32, another seed": (["--train.seed", "1"], 16),
}
QUIET = ["eval.every-steps", "sample.every-steps", "checkpoint.every-steps", "log.update-ratios-every-steps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="gpt2-124m")
    parser.add_argument("--steps", type=int, default=200)
    given, flags = parser.parse_known_args()
    common = ["--data", given.data, "--train.kernels", "plain", "--train.steps", str(given.steps), *flags]
    common += [word for key in QUIET for word in (f"--{key}", "0")]
    for name, (own, n_bytes) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            command = [sys.executable, "-m", "regpt", "train", given.recipe, *common, *own, "--out", str(run)]
            subprocess.run(command, check=True, capture_output=True)
            text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [row for row in map(json.loads, text.splitlines()) if row["kind"] == "train"]
        loss = mean(row["loss"] for row in rows[-20:])
        speed, peak = median(row["tokens_per_s"] for row in rows[len(rows) // 2 :]), rows[-1]["peak_memory_gib"]
        print(f"{name:30} {n_bytes:5} B  loss {loss:.4f}  {speed:10,.0f} tokens/s  {peak:.3f} GiB", flush=True)


if __name__ == "__main__":
    main()
