"""Needle in a haystack (after Kamradt 2023): a sentence with a random number is hidden at a depth of a long text, and
the number asked for at its end.

    needle, needle:lengths=1024/4096:depths=0/50/100:items=8:text=FILE

Metrics: `exact`, each token of the number is the likeliest, so that greedy decoding writes it; `rank`, the share of
nine other numbers that are less likely, 0.5 for guessing: a small model shows there whether it looks at all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from regpt.errors import UsageError, UserError, nearest
from regpt.evals.items import hash_of
from regpt.evals.packing import Prompt
from regpt.evals.score import Scores
from regpt.evals.task import Result
from regpt.text.tokenizer import Encoder

SEED, N_SENTENCES, DISTRACTORS = 2023, 1500, 9
ANSWER = len(" 12345.")  # most tokens of a number
SHARES = (16, 8, 4, 2, 1)  # of the model's length, where no lengths are given
NAMES = (
    "Lisbon",
    "Vienna",
    "Oslo",
    "Cairo",
    "Lima",
    "Seoul",
    "Prague",
    "Nairobi",
    "Quito",
    "Hanoi",
    "Dublin",
    "Athens",
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
WORDS = (
    ("The", "A", "One", "Another", "Every", "Some"),
    ("old", "quiet", "young", "tall", "busy", "careful", "tired", "famous", "cheerful", "patient", "small", "clever"),
    ("baker", "teacher", "farmer", "sailor", "doctor", "painter", "gardener", "driver", "writer", "student", "guide"),
    ("walked", "waited", "worked", "rested", "sang", "read", "talked", "painted", "travelled", "cooked", "stayed"),
    ("near the river", "in the garden", "at the market", "by the window", "on the hill", "behind the school"),
    ("in the morning", "after lunch", "until evening", "during the storm", "for many hours", "before the holiday"),
)


@dataclass(frozen=True)
class NeedleOptions:
    """Tokens of the prompts (none: shares of the model's length), depths in percent, prompts of each pair, and a text
    for the haystack (none: sentences of our own)."""

    lengths: tuple[int, ...] = ()
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    items: int = 8
    text: str = ""


def needle_options(given: str) -> NeedleOptions:
    """The options after `needle:`, KEY=VALUE with colons between them; `text` comes last, as a path may hold colons.

    Raises:
        UsageError: an unknown name, or a value out of range.
    """
    plain, marker, text = f":{given}".partition(":text=")
    found: dict[str, Any] = {"text": text} if marker else {}
    for part in filter(None, plain.split(":")):
        key, _, value = part.partition("=")
        if key not in ("lengths", "depths", "items"):
            close = nearest(key, ("lengths", "depths", "items", "text"))
            raise UsageError(f"needle has no option {key!r}{close}; choose from lengths=, depths=, items= and text=")
        numbers = value.split("/")
        if not all(number.isascii() and number.isdigit() for number in numbers):
            raise UsageError(f"needle: {key}={value} must be whole numbers with / between them, as depths=0/50/100")
        found[key] = tuple(sorted({int(number) for number in numbers}))
    if "items" in found:
        found["items"] = found["items"][0] if len(found["items"]) == 1 else 0
    options = NeedleOptions(**found)
    if max(options.depths) > 100 or options.items < 1:
        raise UsageError(f"needle: depths are percent, 0 to 100, and items one number from 1 on; given was {given!r}")
    return options


class Needle:
    """A `Task` whose items are every length with every depth, `items` times: prompts of exactly that many tokens."""

    name = "needle"
    baseline: float | None = None

    def __init__(self, options: NeedleOptions, encoder: Encoder, max_seq_len: int):
        """
        Raises:
            UsageError: lengths that the model does not read, or too short for the needle and its question.
            UserError: a text that cannot be read, or without sentences.
        """
        texts = sentences(Path(options.text)) if options.text else own_sentences()
        hay = encoder.encode_continuations([f" {text}" for text in texts])
        self.hay, self.hay_ends = np.concatenate(hay), np.cumsum([len(one) for one in hay])
        self.first = encoder.encode_prompts([""])[0]  # what stands before every text
        self.questions = encoder.encode_continuations([f" The secret number of {name} is" for name in NAMES])
        self.lengths_asked = self.fitting(options.lengths, max_seq_len)
        self.depths = options.depths
        self.cells = [cell for cell in product(self.lengths_asked, self.depths) for _ in range(options.items)]
        self.n_items = len(self.cells)
        draw = np.random.default_rng(SEED)
        self.asked, self.ends = (draw.integers(n, size=self.n_items) for n in (len(NAMES), len(self.hay_ends)))
        numbers = [draw.choice(90_000, 1 + DISTRACTORS, replace=False) + 10_000 for _ in self.cells]
        each = iter(encoder.encode_continuations([f" {n}." for some in numbers for n in some]))
        self.answers = [[next(each) for _ in some] for some in numbers]
        self.lengths = np.array([max(map(len, answers)) for answers in self.answers], dtype=np.int64)
        self.items_sha256 = hash_of([*texts, repr((self.lengths_asked, self.depths, options.items))])

    def fitting(self, lengths: tuple[int, ...], max_seq_len: int) -> tuple[int, ...]:
        """`lengths`, or those of our own that the needle fits into."""
        shortest = len(self.first) + 2 * (max(map(len, self.questions)) + ANSWER)
        chosen = lengths or [n for n in (max_seq_len // share for share in SHARES) if n >= shortest] or [max_seq_len]
        if not shortest <= min(chosen) <= max(chosen) <= max_seq_len:
            raise UsageError(
                f"needle: lengths are {', '.join(map(str, chosen))}; the needle and its question take {shortest} "
                f"tokens, the model reads {max_seq_len:,}; choose lengths between"
            )
        return tuple(chosen)

    def prompts(self, chosen: Sequence[int]) -> list[Prompt]:
        return [self.prompt(i) for i in chosen]

    def prompt(self, i: int) -> Prompt:
        """The right number is the first ending. The needle stands between two sentences, the haystack ends with one."""
        (length, depth), answers, question = self.cells[i], self.answers[i], self.questions[self.asked[i]]
        needle = np.concatenate([question, answers[0]])
        room = length - len(self.first) - len(needle) - len(question) - max(map(len, answers))
        end = int(self.hay_ends[self.ends[i]])
        places = np.arange(end - room, end) % len(self.hay)
        bounds = np.append(0, np.flatnonzero(np.isin(places + 1, self.hay_ends)) + 1)
        at = 0 if depth == 0 else bounds[np.abs(bounds - depth / 100 * room).argmin()]
        hay = self.hay[places]
        context = np.concatenate([self.first, hay[:at], needle, hay[at:], question])
        return Prompt(context, answers, [len(answer) for answer in answers])

    def judge(self, scores: Scores, chosen: Sequence[int]) -> dict[str, np.ndarray]:
        found = scores.log_likelihood.reshape(len(chosen), 1 + DISTRACTORS)
        rank = (found[:, :1] > found[:, 1:]).mean(axis=1)
        return {"exact": scores.greedy.reshape(found.shape)[:, 0].astype(np.float64), "rank": rank}

    def by_cell(self, result: Result, metric: str) -> dict[str, Any]:
        """What a row of metrics holds besides: the mean of `metric` at each depth (rows) and length (columns)."""
        values: dict[tuple[int, int], list[float]] = {}
        for i, value in zip(result.chosen.tolist(), result.outcomes[metric].tolist()):
            values.setdefault(self.cells[i], []).append(value)
        means = {cell: sum(some) / len(some) for cell, some in values.items()}
        table = [[means.get((length, depth)) for length in self.lengths_asked] for depth in self.depths]
        return {"cells": {"lengths": list(self.lengths_asked), "depths": list(self.depths), "values": table}}


def own_sentences() -> list[str]:
    """Sentences of plain words, the same everywhere."""
    draw = np.random.default_rng(SEED)
    drawn = zip(*(draw.integers(len(words), size=N_SENTENCES) for words in WORDS))
    return [" ".join(words[k] for words, k in zip(WORDS, numbers)) + "." for numbers in drawn]


def sentences(path: Path) -> list[str]:
    try:
        found = [one for one in SENTENCE_END.split(path.read_text(encoding="utf-8-sig").strip()) if one]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"needle: {str(path)!r} cannot be read ({error}); name a text file in UTF-8") from None
    if not found:
        raise UserError(f"needle: {str(path)!r} is empty; name a file with sentences")
    return found
