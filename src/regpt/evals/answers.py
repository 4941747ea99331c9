"""Loss on the answers of held-out conversations: what a model gives them after the question alone, after examples, or
after passages that were retrieved for it.

An item is one answer: the tokens that fine-tuning trains on, its end included, after the prompt for it. So without
examples and passages the loss is the validation loss of a fine-tuning run on the same conversations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from regpt.evals.items import hash_of
from regpt.evals.packing import Prompt
from regpt.evals.score import Scorer, Scores
from regpt.evals.suite import Row, ShowProgress, Suite
from regpt.evals.task import Estimate, Result
from regpt.text.chat import CONTEXT, ChatTemplate, Message
from regpt.text.retrieved import Passage, as_many_as_fit, last_question, with_examples, with_passages

Messages = Sequence[Message]
Retrieve = Callable[[str, str], tuple[list[Passage], int]]  # question, answer → passages, and how many it passed over


class HeldOutAnswer(NamedTuple):
    """One answer: the messages before it, its text, and its tokens with those that the template writes around it."""

    before: list[Message]
    text: str
    ids: np.ndarray


@dataclass
class Extras:
    """Examples and passages of the prompts.

    Attributes:
        examples: of an item, in the order in which they are taken while they fit.
        retrieve: passages for a question; None retrieves nothing.
        counts: of examples and passages that were there and that fit, and of those passed over as they hold the answer.
    """

    examples: Callable[[int], Sequence[Messages]] = lambda item: []
    retrieve: Retrieve | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, **found: int) -> None:
        for name, number in found.items():
            self.counts[name] = self.counts.get(name, 0) + number


class AnswerTask:
    """Held-out answers as a `Task`.

    Args:
        conversations: messages.
        longest: tokens that a conversation has at most; longer ones are left out (`left_out` of them), and examples and
            passages that do not fit.
    """

    baseline: float | None = None

    def __init__(
        self, name: str, conversations: Sequence[Messages], template: ChatTemplate, longest: int, extras: Extras
    ):
        self.name, self.template, self.longest, self.extras = name, template, longest, extras
        self.answers, self.left_out = list[HeldOutAnswer](), 0
        for messages in conversations:
            ids, parts, owners = template.encode_training(messages)
            if len(ids) > longest:
                self.left_out += 1
                continue
            for i in np.unique(owners[parts != CONTEXT]).tolist():
                own = ids[(parts != CONTEXT) & (owners == i)].astype(np.int64)
                self.answers.append(HeldOutAnswer(list(messages[:i]), str(messages[i]["content"]), own))
        self.n_items = len(self.answers)
        self.items_sha256 = hash_of([*(str(m["content"]) for m in one.before), one.text] for one in self.answers)
        self.lengths = np.array([len(one.ids) for one in self.answers], dtype=np.int64)

    def prompts(self, chosen: Sequence[int]) -> list[Prompt]:
        return [Prompt(self.context(item), [self.answers[item].ids], [len(self.answers[item].ids)]) for item in chosen]

    def context(self, item: int) -> np.ndarray:
        """The prompt for an answer: passages first, then examples, each while it fits."""
        before, text, ids = self.answers[item]
        room, encode, asked = self.longest - len(ids), self.template.encode, before
        found, passed = self.extras.retrieve(last_question(before), text) if self.extras.retrieve else ([], 0)
        if found:
            _, kept = as_many_as_fit(lambda some: encode(with_passages(before, some)), found, room)
            asked = with_passages(before, kept)
            self.extras.count(passages=len(found), passages_used=len(kept), passed_over=passed)
        examples = self.extras.examples(item)
        prompt, fitting = as_many_as_fit(lambda some: encode(with_examples(asked, some)), examples, room)
        self.extras.count(examples=len(examples), examples_used=len(fitting))
        return np.array(prompt, dtype=np.int64)

    def judge(self, scores: Scores, chosen: Sequence[int]) -> dict[str, np.ndarray]:
        tokens = self.lengths[list(chosen)].astype(np.float64)
        return {"loss": -scores.log_likelihood / tokens, "tokens": tokens}


class AnswerSuite(Suite):
    """The answers of one file; `notes` are sentences about how it was read."""

    def __init__(self, task: AnswerTask, notes: Sequence[str]):
        super().__init__(task.name, (task,), more=self.more_of)
        self.task, self.notes = task, notes

    def evaluate(self, scorer: Scorer, show: ShowProgress, max_items: int) -> list[Result]:
        self.task.extras.counts.clear()
        (found,) = super().evaluate(scorer, show, max_items)
        loss, tokens = found.outcomes["loss"], found.outcomes["tokens"]
        nats, texts = loss * tokens, [self.task.answers[i].text.encode() for i in found.chosen]
        size = np.array([len(text) for text in texts], dtype=np.float64)
        metrics = {"loss": ratio(nats, tokens), "bpb": ratio(nats / math.log(2), size)}
        return [replace(found, metrics=metrics, left_out=self.task.left_out)]

    def more_of(self, result: Result, metric: str) -> Row:
        return {"tokens": int(result.outcomes["tokens"].sum())} | self.task.extras.counts

    def notices(self, results: Sequence[Result], max_seq_len: int) -> list[str]:
        counts, n = self.task.extras.counts, sum(len(one.chosen) for one in results)
        said = list(self.notes)
        if self.task.left_out:
            said.append(f"{self.task.left_out:,} conversations longer than {self.task.longest:,} tokens were left out")
        for kind in ("examples", "passages"):
            if there := counts.get(kind):
                used = counts[f"{kind}_used"]
                said.append(f"{kind}: {used / n:.2f} of {there / n:.2f} a question fit, the others were left out")
        if passed := counts.get("passed_over"):
            said.append(f"{passed:,} better passages were passed over: held-out conversations, or the answer itself")
        return said


def ratio(values: np.ndarray, sizes: np.ndarray) -> Estimate:
    """Total of `values` over that of `sizes`, both (n,), with its standard error, items as the sampled units (Cochran
    1977, section 2.11)."""
    n, total = len(values), float(sizes.sum())
    if not n or not total:
        return Estimate(None, None, n)
    found = float(values.sum()) / total
    squares = float(((values - found * sizes) ** 2).sum())
    return Estimate(found, math.sqrt(squares * n / (n - 1)) / total if n > 1 else None, n)
