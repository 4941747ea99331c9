"""Should I tune at all? Loss on held-out answers of one model: after the question alone, examples, retrieved passages,
LoRA and full fine-tuning; with seconds and memory of each.

    python benchmarks/should_i_tune.py --base MODEL --data answers.jsonl --out DIR [--recipe sft-124m] [--seconds 240]

Only public commands are called, in this process. Every row judges the same answers, so a row's gain over the question
alone has the standard error of paired differences. Retrieved passages are of the conversations that are not held out,
which is also what tuning reads. What --seconds leaves no time for is left out. Writes DIR/should-i-tune.json.
"""

import json
import math
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from regpt.__main__ import main as regpt


@dataclass(frozen=True)
class Args:
    base: str
    data: Path
    out: Path
    recipe: str = "sft-124m"
    epochs: float = 2.0
    max_items: int = 400  # of the held-out answers
    precision: str = "bf16"
    lr: float = 6e-4
    """Of full fine-tuning; that of LoRA is three times as large."""
    rank: int = 16
    seeds: tuple[int, ...] = (1, 2)  # of examples and of tuning
    seconds: float = 1e9
    flags: tyro.conf.UseAppendAction[tuple[str, ...]] = field(default_factory=tuple)
    """More flags of regpt finetune, such as --flags=--train.micro-batch-rows=32."""


class Bench:
    """The rows so far, and the time that is left."""

    def __init__(self, given: Args):
        self.given, self.started, self.rows = given, time.monotonic(), list[dict[str, Any]]()
        self.items: dict[str, dict[str, np.ndarray]] = {}

    def left(self) -> float:
        return self.given.seconds - (time.monotonic() - self.started)

    def command(self, *words: object) -> tuple[float, float | None]:
        """Seconds of a regpt command and, on a GPU, its peak memory in GiB; what it prints goes to DIR/log.txt."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        with (self.given.out / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            code = regpt([str(word) for word in words])
        if code:
            raise SystemExit(f"regpt {' '.join(map(str, words))} ended with {code}; see {self.given.out / 'log.txt'}")
        return time.monotonic() - began, torch.cuda.max_memory_allocated() / 2**30 if cuda else None

    def measure(
        self, name: str, model: object, *flags: object, ready: tuple[float, float | None] = (0.0, None)
    ) -> None:
        """Evaluate `model`, add and print a row; `ready`: seconds and memory of what was done before."""
        given, folder = self.given, self.given.out / "items" / f"{len(self.rows):02d}"
        task = ["eval", model, "--tasks", f"conversations:{given.data}", "--max-items", given.max_items, *flags]
        task += [
            "--precision",
            given.precision,
            "--compile",
            "off",
            "--json",
            folder / "result.json",
            "--items",
            folder,
        ]
        folder.mkdir(parents=True)
        seconds, memory = self.command(*task)
        (found,) = json.loads((folder / "result.json").read_text())["tasks"].values()
        (file,) = folder.glob("*.jsonl")
        items = [json.loads(line) for line in file.read_text().splitlines()]
        loss = found["metrics"]["loss"]
        self.items[name] = {one["item"]: np.array([one["loss"], one["tokens"]]) for one in items}
        gain, error = self.gain(name)
        row = {"name": name, "loss": loss["value"], "stderr": loss["stderr"], "gain": gain, "gain_stderr": error}
        row |= {"answers": loss["n"], "tokens": loss["tokens"], "seconds_before": ready[0], "seconds": seconds}
        row["memory_gib"] = max(filter(None, (ready[1], memory)), default=None)
        self.rows.append(row | {key: value for key, value in loss.items() if key.startswith(("examples", "pass"))})
        print(line_of(self.rows[-1]), flush=True)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        report = {"args": {key: str(value) for key, value in vars(given).items()}, "device": device, "rows": self.rows}
        (given.out / "should-i-tune.json").write_text(json.dumps(report, indent=1) + "\n")

    def gain(self, name: str) -> tuple[float, float]:
        """How much lower the loss is than after the question alone, and the standard error of the ratio (Cochran)."""
        own, first = self.items[name], next(iter(self.items.values()))
        pairs = np.array([(first[key][0] - own[key][0], own[key][1]) for key in own])
        total, n = pairs[:, 1].sum(), len(pairs)
        ratio = float((pairs[:, 0] * pairs[:, 1]).sum() / total)
        squares = float((((pairs[:, 0] - ratio) * pairs[:, 1]) ** 2).sum())
        return ratio, math.sqrt(squares * n / max(1, n - 1)) / float(total)

    def tune(self, name: str, seed: int, *flags: object) -> None:
        given, run = self.given, self.given.out / name.replace(", ", "-").replace(" ", "-")
        words = ["finetune", given.recipe, "--init-from", given.base, "--data", given.data, "--out", run]
        words += ["--epochs", given.epochs, "--on-error", "skip", "--train.seed", seed, "--sample.every-steps", 0]
        words += ["--eval.every-steps", 0, *given.flags, *flags]
        ready = self.command(*words)
        self.measure(name, run, ready=ready)
        if seed == given.seeds[0] and "full" in name and self.left() > 0:
            self.measure(f"{name}, 2 passages", run, "--retrieve", given.data, "--passages", 2, ready=ready)


HEAD = ("| | loss on answers | lower by | to make, s | to ask, s | memory, GiB | fitted |", "| --- " * 7 + "|")


def line_of(row: dict[str, Any]) -> str:
    fitted = [
        f"{row[f'{kind}_used'] / row['answers']:.2f} {kind}" for kind in ("examples", "passages") if row.get(kind)
    ]
    loss, gain = f"{row['loss']:.4f} ± {row['stderr']:.4f}", f"{row['gain']:+.4f} ± {row['gain_stderr']:.4f}"
    memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}"
    cells = row["name"], loss, gain, f"{row['seconds_before']:.0f}", f"{row['seconds']:.0f}", memory, ", ".join(fitted)
    return f"| {' | '.join(cells)} |"


def run(given: Args) -> None:
    bench = Bench(given)
    tuned = ("full fine-tuning", ()), (f"LoRA, r = {given.rank}", ("--adapter.r", given.rank))
    print("\n".join(HEAD), flush=True)
    bench.measure("the question alone", given.base)
    for k in (1, 3):
        bench.measure(f"{k} passage{'s' * (k > 1)}", given.base, "--retrieve", given.data, "--passages", k)
    for seed in given.seeds:
        for k in (1, 3, 5):
            if bench.left() > 0:
                bench.measure(f"{k} example{'s' * (k > 1)}, seed {seed}", given.base, "--few-shot", k, "--seed", seed)
        for name, flags in tuned:
            if bench.left() > 0:
                lr = given.lr * (3 if flags else 1)
                bench.tune(f"{name}, seed {seed}", seed, "--optim.lr", lr, *flags)


if __name__ == "__main__":
    run(tyro.cli(Args, description=__doc__))
