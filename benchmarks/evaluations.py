"""HellaSwag computed in every way that there is: do the log-likelihoods and the judgements agree, item by item?

    python benchmarks/evaluations.py hellaswag_val.jsonl.zst [--model MODEL] [--items 0] [--skip lm-eval …] [--out DIR]

Reference: the lecture's loop, one item at a time, four padded rows, all logits, in float64. Against it: ours in
float64, float32 and bfloat16, with other sizes of batches, by two processes, compiled. Then lm-eval's definition of
HellaSwag (items read from the local file): our adapter against lm-eval's own Hugging Face backend on the exported
model. Prints a line each, writes DIR/evaluations-<name>-<hardware>-<date>.json, and exits with 1 where a difference is
above its bound. Without --model: two layers of width 64 with random weights.

With GPT-2's vocabulary the loop fills fresh memory with logits for most of its time; glibc keeps it with
MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000, which halves that.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from hellaswag import machine, padded

from regpt.checkpoint.open import OpenModel, open_model
from regpt.evals.choices import Choices, read_hellaswag
from regpt.evals.items import read_items
from regpt.evals.score import Scorer, Scores
from regpt.hf.export import export_hf
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.parallel.mesh import Mesh, open_mesh
from regpt.text.open import open_tokenizer
from regpt.train.config import PrecisionName
from regpt.train.precision import autocast, parameter_dtype, set_matmul_precision

BOUNDS = {"fp64": 1e-10, "fp32": 2e-5, "bf16": 0.1}  # nats a token
ALONE = Mesh(0, 1, torch.device("cpu"))
BATCHES = (256, 1024, 8192)
TASK = """
task: hellaswag_here
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""


@dataclass(frozen=True)
class Args:
    file: tyro.conf.Positional[str]
    """The items: the official file or that of CORE's bundle."""
    model: str = ""
    """MODEL; default: a small one with random weights."""
    tokenizer: str = "gpt2"
    """Without --model: gpt2, or the folder of a trained tokenizer."""
    items: int = 0
    """The first N items; 0 for all."""
    skip: tuple[str, ...] = ()
    """Ways to leave out: compile, processes, lm-eval."""
    harness_precision: PrecisionName = "fp32"
    """Number format of both backends of lm-eval."""
    out: str = "benchmarks/results"
    worker: str = ""
    """Used by this script itself: a process that writes its scores to this file."""


class Row(NamedTuple):
    """One way: the largest difference from what it is compared with, in nats a token, and items judged otherwise."""

    way: str
    beside: str
    precision: str
    difference: float
    other_acc: int
    other_acc_norm: int
    acc: float
    acc_norm: float
    seconds: float


def main(args: Args) -> int:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        if args.worker:
            return worker(args)
        opened = open_model(args.model) if args.model else random_model(args.tokenizer)
        folder = export_hf(opened.model, opened.tokenizer, Path(work) / "model")
        task = open_task(args, opened)
        size = f"{sum(p.numel() for p in opened.model.parameters()):,} parameters"
        print(f"{task.n_items:,} items, {size}, {opened.tokenizer.name}, {machine()['name']}", flush=True)
        rows = list(own_ways(args, folder, task, Path(work)))
        if "lm-eval" not in args.skip:
            rows += harness_ways(args, folder, Path(work))
    write(args, opened, task, rows)
    wrong = [row for row in rows if not row.difference <= BOUNDS[row.precision] or wrongly_judged(row)]
    for row in wrong:
        print(f"OUT OF BOUNDS: {row.way}", file=sys.stderr)
    return int(bool(wrong))


def wrongly_judged(row: Row) -> bool:
    """In float64 there are no ties that rounding could decide."""
    return row.precision == "fp64" and bool(row.other_acc or row.other_acc_norm)


def random_model(name: str) -> OpenModel:
    tokenizer = open_tokenizer(name)
    config = ModelConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=tokenizer.n_vocab, max_seq_len=512)
    with torch.device("meta"):
        model = make_model(config)
    return OpenModel(initialize(model.to_empty(device="cpu"), seed=1).eval(), tokenizer, None, "random")


def open_task(args: Args, opened: OpenModel) -> Choices:
    questions = read_hellaswag(Path(args.file))[: args.items or None]
    task = Choices("hellaswag", questions, opened.tokenizer, opened.tokenizer.eot)
    longest = max(len(c) + max(map(len, e)) for c, e in zip(task.contexts, task.endings))
    assert longest <= opened.model.config.max_seq_len + 1, f"{longest} tokens: the loop here does not truncate"
    return task


# ---- our own ways


def own_ways(args: Args, folder: Path, task: Choices, work: Path):
    started = time.perf_counter()
    exact = loop(open_model(str(folder)).model.double(), task)
    reference = exact, task.judge(exact, range(task.n_items))
    yield shown(compared("one at a time", "", "fp64", exact, reference, task, time.perf_counter() - started))

    def row(way: str, precision: PrecisionName, score: Callable[[], Scores]) -> Row:
        started = time.perf_counter()
        scores = score()
        spent = time.perf_counter() - started
        return shown(compared(way, "one at a time", precision, scores, reference, task, spent))

    yield row("ours", "fp64", lambda: ours(folder, task, "fp64"))
    for tokens in BATCHES:
        yield row(f"ours, {tokens:,} tokens a batch", "fp32", lambda: ours(folder, task, "fp32", batch_tokens=tokens))  # noqa: B023
    yield row("ours", "bf16", lambda: ours(folder, task, "bf16"))
    if "processes" not in args.skip:
        yield row("ours, two processes", "fp32", lambda: in_processes(2, args, folder, work))
    if "compile" not in args.skip:
        yield row("ours, compiled", "fp32", lambda: ours(folder, task, "fp32", compile=True))
        yield row("ours, compiled", "bf16", lambda: ours(folder, task, "bf16", compile=True))


@torch.no_grad()
def loop(model: Transformer, task: Choices) -> Scores:
    """One item at a time, all logits: the lecture's `evaluate` in float64."""
    sums, counts = [], []
    for i in range(task.n_items):
        tokens, mask = padded(task, i)
        losses = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        sums.append((losses.view(4, -1) * mask[:, 1:]).sum(dim=1).numpy())
        counts.append(mask.sum(dim=1).numpy())
        if i % 1000 == 999:
            print(f"  {i + 1:,} items one at a time", flush=True)
    tokens = np.concatenate(counts)
    return Scores(-np.concatenate(sums), tokens, np.zeros(len(tokens), dtype=bool))


def ours(folder: Path, task: Choices, precision: PrecisionName, mesh: Mesh = ALONE, **options: Any) -> Scores:
    set_matmul_precision(precision)
    model = open_model(str(folder)).model.to(parameter_dtype(precision))
    scorer = Scorer(model, mesh, autocast=lambda: autocast(precision, mesh.device), **options)
    return scorer(task.prompts(range(task.n_items)))


def in_processes(n: int, args: Args, folder: Path, work: Path) -> Scores:
    """The scores of `n` processes together, started by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), __file__]
    command += [args.file, "--model", str(folder), "--items", str(args.items), "--worker", str(work / "scores.npz")]
    subprocess.run(command, check=True)
    with np.load(work / "scores.npz") as found:
        return Scores(**found)


def worker(args: Args) -> int:
    task = open_task(args, open_model(args.model))
    with open_mesh("cpu") as mesh:
        scores = ours(Path(args.model), task, "fp32", mesh)
        if mesh.is_main:
            np.savez(args.worker, **scores._asdict())
    return 0


# ---- lm-eval


def harness_ways(args: Args, folder: Path, work: Path) -> list[Row]:
    """lm-eval's definition: its Hugging Face backend, and our adapter against that."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "TQDM_DISABLE": "1"}
    here = str(Path(__file__).parent)  # transformers would take benchmarks/kernels.py for a package of that name
    sys.path[:] = [place for place in sys.path if place != here]
    from lm_eval.models.huggingface import HFLM

    from regpt.evals.harness import HarnessModel

    items = lm_eval_items(args)
    (work / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    (work / "hellaswag_here.yaml").write_text(TASK.format(data=work / "items.jsonl"), encoding="utf-8")
    precision = args.harness_precision
    dtype = {"fp64": "float64", "fp32": "float32"}[precision]
    started = time.perf_counter()
    theirs = through_harness(HFLM(pretrained=str(folder), device="cpu", dtype=dtype, batch_size=8), work)
    name = "lm-eval, its Hugging Face backend"
    rows = [shown(against(name, "", precision, theirs, theirs, time.perf_counter() - started))]
    started = time.perf_counter()
    opened = open_model(str(folder))
    scorer = Scorer(opened.model.to(parameter_dtype(precision)), ALONE)
    found = through_harness(HarnessModel(scorer, opened.tokenizer), work)
    spent = time.perf_counter() - started
    return [*rows, shown(against("lm-eval, our adapter", name, precision, found, theirs, spent))]


def lm_eval_items(args: Args) -> list[dict[str, Any]]:
    """Items as lm-eval makes them: the activity before the context, tags removed, and, where the file has
    the context's second part apart, that capitalised."""
    items = []
    for item in read_items(Path(args.file))[: args.items or None]:
        row = item.row
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if "ctx_b" in row else row["ctx"]
        query, *choices = map(cleaned, [f"{row['activity_label']}: {context}", *row["endings"]])
        items.append({"query": query, "choices": choices, "label": int(row["label"])})
    return items


def cleaned(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def through_harness(model: Any, work: Path) -> dict[str, np.ndarray]:
    """Of each item: (items, 4) log-likelihoods, (items, 4) tokens' greediness, (items,) metrics."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(work))
    found = simple_evaluate(model=model, tasks=["hellaswag_here"], bootstrap_iters=0, task_manager=manager)
    assert found is not None
    samples = sorted(found["samples"]["hellaswag_here"], key=lambda one: one["doc_id"])
    pairs = np.array([one["filtered_resps"] for one in samples], dtype=object)  # (items, 4, 2)
    metrics = {name: np.array([one[name] for one in samples]) for name in ("acc", "acc_norm")}
    lengths = np.array([[len(choice) for choice in one["doc"]["choices"]] for one in samples])
    return {"sums": pairs[..., 0].astype(float), "greedy": pairs[..., 1].astype(bool), "chars": lengths} | metrics


def against(way: str, beside: str, precision: str, found: dict[str, Any], other: dict[str, Any], seconds: float) -> Row:
    """Differences are divided by a quarter of the characters, about the tokens."""
    difference = (np.abs(found["sums"] - other["sums"]) / np.maximum(1, other["chars"] / 4)).max()
    assert (found["greedy"] == other["greedy"]).all()
    other_items = [int((found[name] != other[name]).sum()) for name in ("acc", "acc_norm")]
    return Row(way, beside, precision, float(difference), *other_items, *accuracies(found), seconds)


# ---- results


def compared(
    way: str, beside: str, precision: str, scores: Scores, reference: tuple[Scores, Any], task: Choices, seconds: float
) -> Row:
    exact, judged = reference
    assert scores.tokens.tolist() == exact.tokens.tolist()
    difference = (np.abs(scores.log_likelihood - exact.log_likelihood) / exact.tokens).max()
    found = task.judge(scores, range(task.n_items))
    other = [int((found[name] != judged[name]).sum()) for name in ("acc", "acc_norm")]
    return Row(way, beside, precision, float(difference), *other, *accuracies(found), seconds)


def accuracies(found: dict[str, np.ndarray]) -> tuple[float, float]:
    return float(found["acc"].mean()), float(found["acc_norm"].mean())


def shown(row: Row) -> Row:
    print(
        f"{row.way}, {row.precision}: at most {row.difference:.2g} nats a token from {row.beside or 'itself'}, "
        f"judged otherwise {row.other_acc} (acc) and {row.other_acc_norm} (acc_norm); acc {row.acc:.4f}, "
        f"acc_norm {row.acc_norm:.4f}; {row.seconds:.0f} s",
        flush=True,
    )
    return row


def write(args: Args, opened: OpenModel, task: Choices, rows: list[Row]) -> None:
    where, config = machine(), opened.model.config
    name = f"{'trained' if args.model else 'random'}-{config.vocab_size}"
    results = {"machine": where, "date": f"{datetime.now(UTC):%Y-%m-%d}", "items": task.n_items, "bounds": BOUNDS}
    results |= {"model": {"name": name, "step": opened.step, **asdict(config)}, "rows": [r._asdict() for r in rows]}
    path = Path(args.out) / f"evaluations-{name}-{where['name']}-{results['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
