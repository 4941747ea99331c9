"""HellaSwag on this device: ours, compiled and not, beside the lecture's loop of one item at a time.

    python benchmarks/hellaswag.py hellaswag_val.jsonl.zst [--model MODEL] [--precision bf16] [--items 0] [--out DIR]

Prints a table and writes DIR/hellaswag-<hardware>-<date>.json. Without --model the weights are random ones of GPT-2
124M: speed does not depend on them. The loop judges --lecture-items items drawn from all; its time for all is
proportional. The processor's time is given, too: other programs on the machine change it less.
What is compared besides time: on these items the predictions of both, once in --precision and once in
float32, where both should agree but for ties closer than rounding. Reading and encoding count for ours, not for the
loop; compilation counts for neither and stands beside.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from regpt.checkpoint.open import open_model
from regpt.data.order import permutation
from regpt.evals.choices import Choices
from regpt.evals.score import Scorer
from regpt.evals.specs import Spec
from regpt.evals.suite import open_suites
from regpt.evals.task import SUBSET_SEED, evaluate_task
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.parallel.mesh import Mesh, choose_device
from regpt.text.open import open_tokenizer
from regpt.train.config import PrecisionName
from regpt.train.precision import autocast, set_matmul_precision

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Args:
    file: tyro.conf.Positional[str]
    """The items: the official file or that of CORE's bundle."""
    model: str = ""
    """MODEL; default: GPT-2 124M with random weights."""
    precision: PrecisionName = "bf16"
    items: int = 0
    """Items that ours judges; 0 for all."""
    lecture_items: int = 300
    """Items that the lecture's loop judges, the first of the order in which parts of a task are taken."""
    batch_tokens: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N…")] = ()
    """Tokens of a batch to try; default: what regpt eval takes on this device."""
    compile: bool = True
    """Measure ours compiled, too."""
    check: bool = True
    """Compare predictions in float32, too."""
    out: str = "benchmarks/results"


def main(args: Args) -> None:
    device = choose_device()
    set_matmul_precision(args.precision)
    mesh = Mesh(0, 1, device)
    model, tokenizer = open_given(args.model, device)
    suite = open_suites([Spec("hellaswag", args.file)], tokenizer)[0]
    task = suite.tasks[0]
    assert isinstance(task, Choices)
    print(f"{suite.seconds:.2f} s to read and encode {task.n_items:,} items, {machine()['name']}", flush=True)
    in_precision: Autocast = lambda: autocast(args.precision, device)  # noqa: E731
    rows = []
    for compile in (False, True) if args.compile else (False,):
        for batch_tokens in args.batch_tokens or (None,):
            scorer = Scorer(model, mesh, autocast=in_precision, compile=compile, batch_tokens=batch_tokens)
            rows.append(ours(task, scorer, suite.seconds, args.items))
            show(rows[-1])
    lecture_items = permutation(SUBSET_SEED, 0, task.n_items)[: args.lecture_items].tolist()
    cpu = time.process_time()
    judged, seconds = lecture(model, task, lecture_items, in_precision)
    cpu_per_item = (time.process_time() - cpu) / (len(lecture_items) + 1)
    per_item = seconds / len(lecture_items)
    scaled = per_item * (args.items or task.n_items)
    loop = {"name": "the lecture's loop", "items": len(lecture_items), "ms_an_item": per_item * 1e3}
    rows.append(loop | {"cpu_ms_an_item": cpu_per_item * 1e3})
    print(
        f"the lecture's loop: {per_item * 1e3:.2f} ms an item over {len(lecture_items)} items, {scaled:.1f} s for all"
    )
    fastest = min(rows[:-1], key=lambda row: row["seconds"])
    cpu_ratio = cpu_per_item * fastest["items"] / fastest["cpu_s"]
    print(f"ratio to the fastest of ours: {scaled / fastest['seconds']:.1f}; of the processor's time {cpu_ratio:.1f}")
    agreement = {args.precision: disagreements(model, mesh, task, lecture_items, judged, in_precision)}
    if args.check and args.precision != "fp32":
        set_matmul_precision("fp32")
        fp32: Autocast = lambda: autocast("fp32", device)  # noqa: E731
        judged, _ = lecture(model, task, lecture_items, fp32)
        agreement["fp32"] = disagreements(model, mesh, task, lecture_items, judged, fp32)
    for precision, (acc, acc_norm) in agreement.items():
        of = f"of {len(lecture_items)}"
        print(f"judged otherwise than by the loop, {precision}: {acc} by acc, {acc_norm} by acc_norm, {of}")
    write(args, rows, scaled, agreement)


def open_given(name: str, device: torch.device) -> tuple[Transformer, Any]:
    if name:
        opened = open_model(name, device)
        return opened.model, opened.tokenizer
    with torch.device("meta"):
        model = make_model(ModelConfig())
    return initialize(model.to_empty(device=device), seed=1).eval(), open_tokenizer("gpt2")


def ours(task: Choices, scorer: Scorer, read_seconds: float, items: int) -> dict[str, Any]:
    """Twice: once to compile and to warm up, then the one that counts."""
    if scorer.mesh.device.type == "cuda":
        evaluate_task(task, scorer, max_items=items)
        torch.cuda.reset_peak_memory_stats()
    before, cpu_before = scorer.cost.tokens, time.process_time()
    found = evaluate_task(task, scorer, max_items=items)
    tokens = scorer.cost.tokens - before
    cuda = scorer.mesh.device.type == "cuda"
    return {
        "name": f"ours, {'compiled' if scorer.compile else 'not compiled'}, {scorer.batch_tokens:,} tokens a batch",
        "items": len(found.chosen),
        "seconds": found.seconds + read_seconds,
        "read_and_encode_s": read_seconds,
        "cpu_s": time.process_time() - cpu_before,
        "compile_s": scorer.cost.compile_seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / found.seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "metrics": {name: one.value for name, one in found.estimates().items()},
    }


def show(row: dict[str, Any]) -> None:
    peak = f", peak {row['peak_gib']:.1f} GiB" if row["peak_gib"] else ""
    print(
        f"{row['name']}: {row['seconds']:.2f} s for {row['items']:,} items with reading and encoding, "
        f"{row['tokens_per_s']:,.0f} tokens/s while computing, compiled in {row['compile_s']:.1f} s{peak}; "
        + ", ".join(f"{name} {value:.4f}" for name, value in row["metrics"].items()),
        flush=True,
    )


@torch.no_grad()
def lecture(model: Transformer, task: Choices, items: list[int], context: Autocast) -> tuple[np.ndarray, float]:
    """(items, 2) whether each was right by sum and by mean, and the seconds: four padded rows, all logits."""
    device = model.device
    right = []
    started = time.perf_counter()
    for n, i in enumerate([items[0], *items]):  # the first one twice: it warms up
        started = time.perf_counter() if n == 1 else started
        tokens, mask = padded(task, i)
        tokens, mask = tokens.to(device), mask.to(device)
        with context():
            logits = model(tokens)  # (4, T, V)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        sums = (losses * mask[:, 1:]).sum(dim=1)
        label = task.questions[i].label
        right.append((sums.argmin().item() == label, (sums / mask[:, 1:].sum(dim=1)).argmin().item() == label))
    return np.array(right[1:]), time.perf_counter() - started


def padded(task: Choices, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(4, T) tokens and (4, T) 1 where they are an ending's."""
    context, endings = task.contexts[i], task.endings[i]
    n = len(context)
    tokens, mask = torch.zeros(2, len(endings), n + max(map(len, endings)), dtype=torch.long)
    for row, ending in enumerate(endings):
        tokens[row, : n + len(ending)] = torch.from_numpy(np.concatenate([context, ending]).astype(np.int64))
        mask[row, n : n + len(ending)] = 1
    return tokens, mask


def disagreements(
    model: Transformer, mesh: Mesh, task: Choices, items: list[int], judged: np.ndarray, context: Autocast
) -> tuple[int, int]:
    """How many items the loop judged otherwise, by acc and by acc_norm."""
    found = task.judge(Scorer(model, mesh, autocast=context)(task.prompts(items)), items)
    return tuple(int((found[name] != judged[:, k]).sum()) for k, name in enumerate(("acc", "acc_norm")))  # type: ignore[return-value]


def write(args: Args, rows: list[dict[str, Any]], scaled: float, agreement: dict[str, Any]) -> None:
    where = machine()
    results = {"machine": where, "date": f"{datetime.now(UTC):%Y-%m-%d}", "precision": args.precision, "rows": rows}
    results |= {"lecture_seconds_for_all": scaled, "other_predictions": agreement}
    path = Path(args.out) / f"hellaswag-{where['name']}-{results['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = (gpu or f"{platform.machine()}-{torch.get_num_threads()}threads").replace(" ", "-").lower()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"name": name, "cores": cores, "load": load, "torch": torch.__version__, "python": platform.python_version()}


if __name__ == "__main__":
    main(tyro.cli(Args))
