"""CORE (Li et al. 2024, "DataComp-LM", appendix G): 22 tasks with few-shot prompts, the mean of centred accuracies.

Prompts are those of the paper's evaluator (llm-foundry): examples are separated by a line break, texts are stripped,
the answer begins with a space, nothing stands before the first example but what the tokenizer puts before every text.
Examples are drawn for each item from the other items of its task.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from regpt.data.order import splitmix64
from regpt.errors import UsageError, UserError, nearest
from regpt.evals.choices import largest
from regpt.evals.items import Item, hash_of, read_items
from regpt.evals.packing import Prompt
from regpt.evals.score import Scores
from regpt.evals.specs import CORE_TASKS as TASKS
from regpt.evals.task import Result, Tolerate, refuse
from regpt.files import is_file, is_plain_path
from regpt.structured import read_json
from regpt.text.tokenizer import Encoder

FILE = "core.json"
SEPARATOR = "\n"
SHOT_SEED = 1234
Kind = Literal["multiple_choice", "schema", "language_modeling"]


class Example(NamedTuple):
    """One item: the texts before the answer and the answers, of which one list has a single entry (for language
    modelling both have), and the number of the right one in the other."""

    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class CoreSettings:
    """An entry of core.json."""

    name: str
    kind: Kind
    shots: int
    delimiter: str
    baseline: float


class CoreTask:
    """A `Task`: items of one kind after examples that are answered.

    Metrics: `acc`, and `centered`, which is 0 for guessing and 1 for everything right. Of several answers (or contexts)
    that with the largest mean log-likelihood of a token of the answer is chosen; a continuation is right when each of
    its tokens is the likeliest.
    """

    def __init__(self, settings: CoreSettings, examples: Sequence[Example], encoder: Encoder, eot: int):
        self.settings, self.examples, self.n_items = settings, examples, len(examples)
        self.name = f"core/{settings.name}"
        self.baseline: float | None = settings.baseline
        described = (settings.kind, str(settings.shots), settings.delimiter)
        self.items_sha256 = hash_of([described, *((*one.contexts, *one.answers) for one in examples)])
        delimiter = settings.delimiter

        def encode(
            texts: Callable[[Example], list[str]], by: Callable[[list[str]], list[np.ndarray]] = encoder.encode_batch
        ) -> list[list[np.ndarray]]:
            given = [texts(one) for one in examples]  # of all examples at once: the encoder works in parallel
            tokens = iter(by([text for one in given for text in one]))
            return [[next(tokens) for _ in one] for one in given]

        self.asked = encode(lambda one: [f"{context}{delimiter}".rstrip() for context in one.contexts])
        self.answers = encode(lambda one: [f" {answer}" for answer in one.answers], encoder.encode_continuations)
        shots = encode(lambda one: [shot(one, delimiter)] if settings.shots else [])
        self.shots = [tokens[0] if tokens else None for tokens in shots]
        self.separator = encoder.encode_continuations([SEPARATOR])[0]
        self.first = encoder.encode_prompts([""])[0]  # what stands before every text
        self.empty = np.array([eot], dtype=np.uint32)
        self.lengths = np.array([max(map(len, answers)) for answers in self.answers], dtype=np.int64)

    def prompts(self, chosen: Sequence[int]) -> list[Prompt]:
        return [self.prompt(i) for i in chosen]

    def prompt(self, i: int) -> Prompt:
        shown = [self.first]
        for k in shots_for(i, self.n_items, self.settings.shots):
            shown += [self.shots[k], self.separator]
        contexts = [np.concatenate([*shown, asked]) for asked in self.asked[i]]
        contexts = [context if len(context) else self.empty for context in contexts]
        answers = self.answers[i]
        if len(contexts) == 1:
            return Prompt(contexts[0], answers, [len(answer) for answer in answers])
        n = common(contexts)  # the rest of each context stands before the same answer
        return Prompt(
            contexts[0][:n],
            [np.concatenate([context[n:], answers[0]]) for context in contexts],
            [len(answers[0])] * len(contexts),
        )

    def judge(self, scores: Scores, chosen: Sequence[int]) -> dict[str, np.ndarray]:
        if self.settings.kind == "language_modeling":
            right = scores.greedy.astype(np.float64)
        else:
            counts = [max(len(self.examples[i].contexts), len(self.examples[i].answers)) for i in chosen]
            predicted = largest(scores.log_likelihood / np.maximum(1, scores.tokens), counts)
            right = (predicted == [self.examples[i].gold for i in chosen]).astype(np.float64)
        baseline = self.settings.baseline
        return {"acc": right, "centered": (right - baseline) / (1 - baseline)}


def shot(one: Example, delimiter: str) -> str:
    """The example as it stands before others: with its right answer."""
    context = one.contexts[one.gold if len(one.contexts) > 1 else 0]
    return f"{context}{delimiter}{one.answers[one.gold if len(one.answers) > 1 else 0]}"


def shots_for(item: int, n_items: int, shots: int) -> list[int]:
    """Numbers of the examples shown before `item`: the first `shots` different ones, other than itself, among the
    outputs modulo n_items of SplitMix64, seeded with output `item` of SplitMix64 seeded with `SHOT_SEED`."""
    chosen: list[int] = []
    wanted = min(shots, n_items - 1)
    seed = int(splitmix64(SHOT_SEED, item, 1)[0]) if wanted else 0
    first = 0
    while len(chosen) < wanted:
        for k in (splitmix64(seed, first, 2 * wanted) % np.uint64(n_items)).tolist():
            if k != item and k not in chosen and len(chosen) < wanted:
                chosen.append(k)
        first += 2 * wanted
    return chosen


def common(rows: Sequence[np.ndarray]) -> int:
    """Tokens that all `rows` begin with."""
    n = min(map(len, rows))
    same = np.all([row[:n] == rows[0][:n] for row in rows], axis=0)
    return n if same.all() else int(same.argmin())


# ---- files -----------------------------------------------------------------------------------------------------------


def open_core(
    folder: Path, encoder: Encoder, eot: int, chosen: Sequence[str] = (), tolerate: Tolerate = refuse
) -> tuple[list[CoreTask], list[str]]:
    """The tasks in `folder`, which holds `core.json` and the files that it names; and those of the 22 that are missing.

    Args:
        chosen: names of the tasks that are wanted; nothing is missing then. Empty for all.
        tolerate: receives the error in the file of one task; the others are read.

    Raises:
        UsageError: a name in `chosen` that the folder does not have.
        UserError: no core.json, a malformed entry, or no task at all.
    """
    described = {settings.name: (settings, file) for settings, file in map(settings_of, read_entries(folder))}
    held = {name: one for name, one in described.items() if one[1] is not None and is_file(folder / one[1])}
    for name in chosen:
        if name not in held:
            known = ", ".join(held) or "other folders"
            raise UsageError(f"{str(folder)!r} holds no CORE task {name!r}{nearest(name, held)}; choose from {known}")
    tasks = []
    for settings, file in (held[name] for name in held if not chosen or name in chosen):
        try:
            examples = [READERS[settings.kind](item) for item in read_items(folder / str(file))]
            tasks.append(CoreTask(settings, examples, encoder, eot))
        except UserError as error:
            tolerate(f"core/{settings.name}", error)
    if not held:
        raise UserError(f"{folder / FILE} names no file that exists; put the tasks' files next to it")
    present = {task.settings.name for task in tasks}
    return tasks, [] if chosen else [name for name in TASKS if name not in present]


def locate(argument: str) -> tuple[Path, list[str]]:
    """The folder and the chosen tasks of `DIR`, or of `DIR/arc_easy,piqa`."""
    first, *more = argument.split(",")
    folder = Path(first)
    if is_file(folder / FILE) or not is_file(folder.parent / FILE):
        if more:
            raise UsageError(f"task {more[0]!r} follows all of CORE; choose some tasks with core:{folder / more[0]}")
        return folder, []
    chosen = [folder.name, *more]
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"core:{argument} names a task twice; name it once")
    return folder.parent, chosen


def read_entries(folder: Path) -> list[Item]:
    path = folder / FILE
    if not is_file(path):
        raise UserError(f"CORE's folder {str(folder)!r} holds no {FILE}; give the folder that does")
    entries = read_json(path, "restore the file")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: not a list of tasks")
    return [Item(f"{path}, task {number}", entry) for number, entry in enumerate(entries, start=1)]


def settings_of(entry: Item) -> tuple[CoreSettings, str | None]:
    name, kind, shots = entry.text("task"), entry.get("type", str), entry.get("num_fewshot", int)
    if kind not in READERS:
        raise UserError(f"{entry.where}: 'type' is {kind!r}, must be one of {', '.join(READERS)}")
    baseline, file = entry.row.get("random_baseline"), entry.row.get("file")
    if not isinstance(baseline, int | float) or isinstance(baseline, bool) or not 0 <= baseline < 1:
        raise UserError(f"{entry.where}: 'random_baseline' is {baseline!r}, must be a number from 0 to below 1")
    if shots < 0 or not (file is None or (isinstance(file, str) and is_plain_path(file))):
        raise UserError(
            f"{entry.where}: 'num_fewshot' must be 0 or more, and 'file' null or the name of a file in the folder"
        )
    delimiter = entry.get("continuation_delimiter", str)
    if name not in TASKS:
        raise UserError(f"{entry.where}: {name!r} is not one of CORE's tasks, which are {', '.join(TASKS)}")
    return CoreSettings(name, kind, shots, delimiter, float(baseline)), file  # type: ignore[arg-type]


def multiple_choice(item: Item) -> Example:
    """Of HellaSwag's own format too, whose label of the activity is a part of CORE's question."""
    if "endings" in item.row:
        endings = item.texts("endings", at_least=2)
        label = item.row.get("activity_label")
        query = f"{label}: {item.text('ctx')}" if label else item.text("ctx")
        return Example((query.strip(),), stripped(endings), item.label("label", len(endings)))
    choices = item.texts("choices", at_least=2)
    return Example((item.text("query").strip(),), stripped(choices), item.label("gold", len(choices)))


def schema(item: Item) -> Example:
    options = item.texts("context_options", at_least=2)
    return Example(stripped(options), (item.text("continuation").strip(),), item.label("gold", len(options)))


def language_modeling(item: Item) -> Example:
    return Example((item.get("context", str).strip(),), (item.text("continuation").strip(),), 0)


READERS: dict[str, Callable[[Item], Example]] = {
    "multiple_choice": multiple_choice,
    "schema": schema,
    "language_modeling": language_modeling,
}


def stripped(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(text.strip() for text in texts)


# ---- the metric ------------------------------------------------------------------------------------------------------


def summarize(results: Sequence[Result], missing: Sequence[str]) -> list[dict[str, Any]]:
    """One row: the mean of the centred accuracies. Only that of all 22 tasks is called `centered`. Tasks of which no
    item was scored are missing."""
    found = {one.task: one.estimates()["centered"] for one in results if len(one.chosen)}
    values = [one.value for one in found.values() if one.value is not None]
    missing = [*missing, *(one.task.removeprefix("core/") for one in results if not len(one.chosen))]
    n, errors = len(found), [one.stderr for one in found.values()]
    row: dict[str, Any] = {
        "task": "core",
        "metric": "centered" if n == len(TASKS) else f"centered_{n}_of_{len(TASKS)}",
        "value": float(np.mean(values)) if values else None,
        "stderr": None if None in errors or not n else sqrt(sum(error**2 for error in errors if error is not None)) / n,
        "n": n,
    }
    left_out = sum(one.left_out for one in results)
    return [row | ({"missing": missing} if missing else {}) | ({"left_out": left_out} if left_out else {})]
