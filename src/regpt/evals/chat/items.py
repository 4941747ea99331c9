"""CHAT ITEMS: a question, a reply that is right, and whether another is.

An item is a pure function of task, seed, index, difficulty and split. A hash of the operands decides the split, so no
question of the test is ever made for training, whatever the seed. Without torch.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

Split = Literal["train", "test"]
Kind = TypeVar("Kind")
TEST_SHARE = 10  # one of so many operands is of the test
MOST_DRAWS = 10_000  # until operands of the wanted split are found
MOST_REPEATED = 1_000  # items in turn whose operands were there before, until no others are expected


class Draw:
    """Random draws that are the same for every version of Python, which promises that of `random()` alone."""

    def __init__(self, *seed: object):
        self.random = random.Random(":".join(map(str, seed))).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        """A whole number, `high` included."""
        return low + self.below(high - low + 1)

    def choice(self, of: Sequence[Kind]) -> Kind:
        return of[self.below(len(of))]

    def sample(self, of: Sequence[Kind], n: int) -> list[Kind]:
        """`n` different ones, in random order."""
        left = list(of)
        return [left.pop(self.below(len(left))) for _ in range(n)]

    def word(self, n: int, letters: str = "abcdefghijklmnopqrstuvwxyz") -> str:
        return "".join(self.choice(letters) for _ in range(n))


class DrawnQuestion(NamedTuple):
    """What a generator draws.

    Attributes:
        operands: what the question is about, in one order where the order does not matter; decides the split.
        question, answer: what is asked, and a right reply.
        rules: of `instructions`: names and their arguments.
    """

    operands: tuple[Any, ...]
    question: str
    answer: str
    rules: tuple[tuple[str, dict[str, Any]], ...] = ()


@dataclass(frozen=True)
class ChatItem:
    """One question; `answer` is a right reply, not the only one. See `DrawnQuestion`."""

    task: str
    question: str
    answer: str
    operands: tuple[Any, ...]
    seed: int
    index: int
    difficulty: int
    rules: tuple[tuple[str, dict[str, Any]], ...] = field(default=(), compare=False)

    def line(self) -> str:
        """The item as a line of a file that `regpt finetune --data` reads."""
        row = {"prompt": self.question, "completion": self.answer, "task": self.task, "difficulty": self.difficulty}
        return json.dumps(row | {"seed": self.seed, "index": self.index}, ensure_ascii=False) + "\n"


def split_of(task: str, operands: tuple[Any, ...]) -> Split:
    """The split that all questions about these operands belong to."""
    digest = hashlib.sha256(json.dumps([task, *operands]).encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"


def draw_item(
    make: Callable[[Draw, int], DrawnQuestion], task: str, seed: int, index: int, difficulty: int, split: Split
) -> ChatItem:
    """The item number `index`: the first draw whose operands are of `split`."""
    for attempt in range(MOST_DRAWS):
        found = make(Draw(task, seed, index, difficulty, split, attempt), difficulty)
        if split_of(task, found.operands) == split:
            return ChatItem(task, found.question, found.answer, found.operands, seed, index, difficulty, found.rules)
    raise AssertionError(f"{task} has no operands of split {split} at difficulty {difficulty}")


def different(items: Iterator[ChatItem], n: int) -> list[ChatItem]:
    """The first `n` items with operands of their own; fewer where hardly any are left, as of one-digit sums."""
    found: dict[tuple[Any, ...], ChatItem] = {}
    repeated = 0
    for item in items:
        repeated = repeated + 1 if item.operands in found else 0
        found.setdefault(item.operands, item)
        if len(found) == n or repeated == MOST_REPEATED:
            break
    return list(found.values())
