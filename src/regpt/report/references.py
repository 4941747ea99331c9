"""Figures of other models that a run may be compared with, each with its source and the data it holds for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from regpt.report.read import Run

LECTURE = "measured in the lecture “Let's reproduce GPT-2 (124M)” (build-nanogpt) and its notebook"
GPT3 = "Brown et al. 2020, appendix H, zero-shot"
FINEWEB_EDU = re.compile(r"fineweb[-_]?edu|edu[-_]?fineweb", re.IGNORECASE)


@dataclass(frozen=True)
class Reference:
    """A horizontal line in a chart: what it is, where it lies, who says so ("" where the run itself does)."""

    label: str
    value: float
    source: str = ""


GPT2_ON_FINEWEB_EDU = Reference("GPT-2 124M", 3.2924, f"validation loss on FineWeb-Edu, {LECTURE}")
TASKS = {
    ("hellaswag", "acc_norm"): (
        Reference("chance", 0.25, "four endings an item"),
        Reference("GPT-2 124M", 0.2955, LECTURE),
        Reference("GPT-3 124M", 0.337, GPT3),
        Reference("GPT-2 1558M", 0.489, LECTURE),
    ),
}
CHANCE_IN_CORE = Reference("chance", 0.0, "the definition of centred accuracy")


def loss_references(runs: Sequence[Run]) -> list[Reference]:
    """GPT-2's validation loss, where it was measured on the same text in the same tokens."""
    return [GPT2_ON_FINEWEB_EDU] if all(map(is_fineweb_edu_in_gpt2_tokens, runs)) else []


def is_fineweb_edu_in_gpt2_tokens(run: Run) -> bool:
    """Whether all that the run read is FineWeb-Edu, encoded by GPT-2's tokenizer, as far as env.json says."""
    data = run.env.get("data")
    if not isinstance(data, dict) or data.get("tokenizer") != "gpt2":
        return False
    sources = data.get("sources")
    return isinstance(sources, list) and bool(sources) and all(FINEWEB_EDU.search(str(one)) for one in sources)


def task_references(task: str, metric: str) -> list[Reference]:
    if task == "core" and metric.startswith("centered"):  # of a part of the tasks, too: that has a name of its own
        return [CHANCE_IN_CORE]
    return list(TASKS.get((task, metric), ()))
