"""The names of tasks, as they are typed: `val,hellaswag,core:DIR/arc_easy,piqa,mc:FILE,lm-eval:arc_easy,piqa`."""

from collections.abc import Iterable
from typing import NamedTuple

from regpt.errors import UsageError, nearest
from regpt.evals.chat.tasks import chat_options

KINDS = {
    "val": "the held-out split of the data",
    "hellaswag": "the official file, or hellaswag:FILE",
    "core": "core:DIR, a folder with core.json, or some of its tasks, core:DIR/arc_easy,piqa",
    "mc": "mc:FILE, multiple-choice questions",
    "needle": "needle in a haystack, or needle:lengths=1024/4096:depths=0/50/100:items=8:text=FILE",
    "chat": "chat:TASK, replies to generated questions such as chat:addition:difficulty=2:items=200, or chat:ifeval",
    "conversations": "conversations:FILE, loss on the held-out answers of a file for finetune",
    "lm-eval": "lm-eval:TASK,TASK…, the rest of the list",
}
# The 22 of CORE's metric; a folder may hold fewer, with a notice.
CORE_TASKS = (
    *("hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa", "commonsense_qa"),
    *("piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande", "bigbench_dyck_languages"),
    *("agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators", "bigbench_repeat_copy_logic", "squad"),
    *("coqa", "boolq", "bigbench_language_identification"),
)
NEED = {"core": "DIR", "mc": "FILE", "chat": "TASK", "conversations": "FILE", "lm-eval": "TASK"}


class Spec(NamedTuple):
    """One task: its kind, and the file, folder or names after the colon, or empty."""

    kind: str
    argument: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.argument}" if self.argument else self.kind


def parse_tasks(given: str) -> list[Spec]:
    """The tasks in a list with commas; everything after `lm-eval:` belongs to it.

    Raises:
        UsageError: an unknown name, one that lacks its file, or one given twice.
    """
    ours, marker, theirs = given.partition("lm-eval:")
    names = [name.strip() for name in ours.split(",")]
    if marker:
        names = [*names[:-1], *([names[-1]] if names[-1] else []), f"lm-eval:{theirs.strip()}"]
    return check_specs(names)


def check_specs(names: Iterable[str]) -> list[Spec]:
    """Parse a list of names, as `parse_tasks`; names of CORE's tasks after `core:DIR/…` belong to it."""
    specs: list[Spec] = []
    for name in names:
        kind, colon, argument = name.partition(":")
        if kind not in KINDS and specs and specs[-1].kind == "core" and not colon:
            if name not in CORE_TASKS:
                close = nearest(name, [*KINDS, *CORE_TASKS])
                raise UsageError(f"{name!r} is neither a kind of task nor one of CORE's tasks{close}")
            specs[-1] = Spec("core", f"{specs[-1].argument},{name}")
            continue
        if kind not in KINDS:
            if name.isdecimal() and specs and specs[-1].kind == "needle":
                raise UsageError(f"{name!r} is not a task; needle's numbers have / between them, as depths=0/50/100")
            known = "; ".join(f"{kind} ({what})" for kind, what in KINDS.items())
            raise UsageError(f"task {name!r} is unknown{nearest(kind, KINDS)}; choose from {known}")
        if kind in NEED and not argument:
            raise UsageError(f"task {kind!r} needs to know which; give {kind}:{NEED[kind]}")
        if kind == "val" and colon:
            raise UsageError(f"task {name!r}: val takes nothing after a colon; choose the folder with --data")
        if kind == "chat":
            chat_options(argument)
        specs.append(Spec(kind, argument))
    for i, spec in enumerate(specs):
        if spec in specs[:i]:
            raise UsageError(f"task {str(spec)!r} is given twice; give it once")
        # Files of most kinds have results under one name: the second would replace the first.
        if other := next(
            (one for one in specs[:i] if one.kind == spec.kind not in ("mc", "chat", "conversations")), None
        ):
            raise UsageError(f"tasks {str(other)!r} and {str(spec)!r} have one name in results; give one of them")
    return specs
