"""Multiple choice: which of several endings of a context the model finds likeliest."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from regpt.errors import UserError
from regpt.evals.items import Item, hash_of, read_items
from regpt.evals.packing import Prompt
from regpt.evals.score import Scores
from regpt.text.tokenizer import Encoder

KEYS = (("ctx", "endings", "label"), ("query", "choices", "gold"))  # HellaSwag's names, and those of CORE's files


class Question(NamedTuple):
    """`label` is the number of the right ending. Endings are appended to the context as they are."""

    context: str
    endings: tuple[str, ...]
    label: int


class Choices:
    """A `Task` of questions.

    Metrics: `acc`, the ending with the largest log-likelihood is the right one; `acc_norm`, the one with the largest
    mean log-likelihood of a token is (which is the smallest mean loss). Of equals the first counts.
    """

    def __init__(self, name: str, questions: Sequence[Question], encoder: Encoder, eot: int):
        """Encodes everything: context and endings apart, as the lecture does; an empty context is `eot`.

        Raises:
            UserError: an ending without a token.
        """
        self.name, self.questions, self.n_items = name, questions, len(questions)
        self.items_sha256 = hash_of((question.context, *question.endings) for question in questions)
        self.baseline = float(np.mean([1 / len(question.endings) for question in questions])) if questions else None
        texts = [question.context for question in questions]
        texts += [ending for question in questions for ending in question.endings]
        tokens = encoder.encode_batch(texts)
        empty = np.array([eot], dtype=np.uint32)
        self.contexts = [context if len(context) else empty for context in tokens[: self.n_items]]
        each = iter(tokens[self.n_items :])
        self.endings = [[next(each) for _ in question.endings] for question in questions]
        self.lengths = np.array([max(map(len, endings)) for endings in self.endings], dtype=np.int64)
        for number, endings in enumerate(self.endings):
            if not all(map(len, endings)):
                raise UserError(f"{name}: an ending of item {number} has no token; give it a text")

    def prompts(self, chosen: Sequence[int]) -> list[Prompt]:
        """Every token of an ending is scored."""
        return [Prompt(self.contexts[i], self.endings[i], [len(x) for x in self.endings[i]]) for i in chosen]

    def judge(self, scores: Scores, chosen: Sequence[int]) -> dict[str, np.ndarray]:
        counts = [len(self.questions[i].endings) for i in chosen]
        labels = np.array([self.questions[i].label for i in chosen])
        mean = scores.log_likelihood / np.maximum(1, scores.tokens)
        by = {"acc": scores.log_likelihood, "acc_norm": mean}
        return {metric: (largest(values, counts) == labels).astype(np.float64) for metric, values in by.items()}


def largest(values: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """(groups,) the place of the largest of each group of `counts` neighbouring values, the first of equals."""
    ends = np.cumsum(counts)
    return np.array([values[end - n : end].argmax() for end, n in zip(ends, counts)], dtype=np.int64)


def open_choices(path: Path, name: str, encoder: Encoder, eot: int) -> Choices:
    """The questions of a user's file: a line has `ctx`, `endings`, `label`, or `query`, `choices`, `gold`.

    A space is put before an ending that does not begin with white space.

    Raises:
        UserError: a file that cannot be read, or a malformed line.
    """
    return Choices(name, list(questions_of(read_items(path))), encoder, eot)


def questions_of(items: Iterable[Item]) -> Iterable[Question]:
    for item in items:
        keys = next((keys for keys in KEYS if keys[1] in item.row), None)
        if keys is None:
            raise UserError(
                f"{item.where}: the item has neither 'endings' nor 'choices'; a question has ctx, endings and label, "
                "or query, choices and gold"
            )
        context, endings, label = keys
        texts = item.texts(endings, at_least=2)
        spaced = tuple(text if text[0].isspace() else f" {text}" for text in texts)
        yield Question(item.get(context, str), spaced, item.label(label, len(texts)))
