"""Retrieved passages and examples in a prompt: where they stand, and how many fit."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from regpt.text.chat import Message

Extra = TypeVar("Extra")


class Passage(NamedTuple):
    """A text of the user's documents; `place` is its file with the line or row."""

    text: str
    place: str


def last_question(messages: Sequence[Message]) -> str:
    """What the user said last, by which passages are looked for."""
    return next((str(one["content"]) for one in reversed(messages) if one["role"] == "user"), "")


def with_passages(messages: Sequence[Message], passages: Sequence[Passage]) -> list[dict[str, Any]]:
    """`messages` with the passages, numbered in brackets, before the user's last message."""
    found = [dict(one) for one in messages]
    asked = next((one for one in reversed(found) if one["role"] == "user"), None)
    if asked is not None:
        asked["content"] = "".join(f"[{k}] {one.text}\n\n" for k, one in enumerate(passages, 1)) + asked["content"]
    return found


def with_examples(messages: Sequence[Message], examples: Sequence[Sequence[Message]]) -> list[Message]:
    """`messages` with example turns before them, after a system message."""
    begin = int(bool(messages) and messages[0]["role"] == "system")
    return [*messages[:begin], *(one for example in examples for one in example), *messages[begin:]]


def retrieved_prompt(
    encode: Callable[[Sequence[Message]], list[int]],
    messages: Sequence[Message],
    passages: Sequence[Passage],
    longest: int,
) -> tuple[list[int], list[Passage]]:
    """The tokens of a conversation with passages, and those in it: the best ones, while all of it is at most half of
    what a model of `longest` tokens reads."""
    return as_many_as_fit(lambda some: encode(with_passages(messages, some)), passages, longest // 2)


def cited(passages: Sequence[Passage]) -> str:
    """`from [1] a.md, line 3; [2] …`, the numbers that the passages have in the prompt; empty without any."""
    return "from " * bool(passages) + "; ".join(f"[{k}] {one.place}" for k, one in enumerate(passages, 1))


def as_many_as_fit(
    encode: Callable[[Sequence[Extra]], list[int]], extras: Sequence[Extra], room: int
) -> tuple[list[int], list[Extra]]:
    """The tokens of a prompt of at most `room` tokens, and what is in it: `extras` in their order, each that still fits
    (without any, the prompt may be longer)."""
    ids, kept = encode([]), list[Extra]()
    for one in extras:
        longer = encode([*kept, one])
        if len(longer) <= room:
            ids, kept = longer, [*kept, one]
    return ids, kept
