"""Twelve tasks with exact checkers, and `ifeval`: `make_item(task, …)`, `check_reply(item, reply)`. Without torch.

`difficulty` (1 to 10) is digits, letters, terms or steps; of `ifeval` the number of instructions, 1 to 3.
"""

import itertools
import json
import re
from collections.abc import Callable
from datetime import date, timedelta
from typing import Any, NamedTuple

from regpt.errors import UsageError, nearest
from regpt.evals.chat.instructions import followed, make_instructions
from regpt.evals.chat.items import ChatItem, Draw, DrawnQuestion, Split, different, draw_item

NUMBER = " Answer with the number alone."
NAMES = ("Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon", "Kim", "Lea", "Max", "Nora")
THINGS = ("apples", "books", "coins", "eggs", "keys", "lamps", "marbles", "nails", "pens", "shells", "stamps")
KEYS = ("age", "city", "code", "count", "kind", "level", "name", "open", "price", "ready", "tag")
NOUNS = ("blicks", "daxes", "feps", "glorps", "kivs", "lurps", "mips", "norps", "quibs", "tovs", "wugs", "zaks")


def digits(draw: Draw, n: int) -> int:
    """A number of exactly `n` digits; 0 has one."""
    return draw.between(0 if n == 1 else 10 ** (n - 1), 10**n - 1)


def addition(draw: Draw, difficulty: int) -> DrawnQuestion:
    a, b = digits(draw, difficulty), digits(draw, difficulty)
    return DrawnQuestion((min(a, b), max(a, b)), f"What is {a} + {b}?{NUMBER}", str(a + b))


def subtraction(draw: Draw, difficulty: int) -> DrawnQuestion:
    a, b = digits(draw, difficulty), digits(draw, difficulty)
    return DrawnQuestion((a, b), f"What is {a} - {b}?{NUMBER}", str(a - b))


def multiplication(draw: Draw, difficulty: int) -> DrawnQuestion:
    a, b = digits(draw, difficulty), digits(draw, (difficulty + 1) // 2)
    return DrawnQuestion((min(a, b), max(a, b)), f"What is {a} * {b}?{NUMBER}", str(a * b))


def chains(draw: Draw, difficulty: int) -> DrawnQuestion:
    """Sums of several terms."""
    terms = [draw.between(1, 99)]
    terms += [draw.between(1, 99) * draw.choice((1, -1)) for _ in range(difficulty + 1)]
    text = str(terms[0]) + "".join(f" {'+' if one > 0 else '-'} {abs(one)}" for one in terms[1:])
    return DrawnQuestion(tuple(terms), f"What is {text}?{NUMBER}", str(sum(terms)))


def counting(draw: Draw, difficulty: int) -> DrawnQuestion:
    letters = "".join(draw.sample("abcdefghijklmnopqrstuvwxyz", 4))
    word, letter = draw.word(3 + 2 * difficulty, letters), draw.choice(letters)
    question = f'How many times does the letter "{letter}" occur in "{word}"?{NUMBER}'
    return DrawnQuestion((word, letter), question, str(word.count(letter)))


def reversing(draw: Draw, difficulty: int) -> DrawnQuestion:
    word = draw.word(2 + 2 * difficulty)
    return DrawnQuestion(
        (word,), f'Write the letters of "{word}" in reverse order. Answer with them alone.', word[::-1]
    )


def sorting(draw: Draw, difficulty: int) -> DrawnQuestion:
    numbers = [draw.between(1, 99) for _ in range(2 + difficulty)]
    ordered = sorted(numbers, reverse=(down := draw.below(2) == 1))
    order = "largest to smallest" if down else "smallest to largest"
    listed, answer = ", ".join(map(str, numbers)), ", ".join(map(str, ordered))
    question = f"Sort these numbers from {order}: {listed}. Answer with the numbers, with commas between them."
    return DrawnQuestion((*sorted(numbers), down), question, answer)


def copying(draw: Draw, difficulty: int) -> DrawnQuestion:
    text = " ".join(draw.word(draw.between(2, 6)) for _ in range(1 + difficulty))
    return DrawnQuestion((text,), f"Repeat this text exactly, and nothing else: {text}", text)


def dates(draw: Draw, difficulty: int) -> DrawnQuestion:
    start = date(1950, 1, 1) + timedelta(days=draw.below(36_500))
    days = draw.between(1, min(10 * 2**difficulty, 5_000)) * draw.choice((1, -1))
    where = f"{abs(days)} days {'after' if days > 0 else 'before'} {start.isoformat()}"
    answer = (start + timedelta(days=days)).isoformat()
    return DrawnQuestion((start.isoformat(), days), f"Which date is {where}? Answer in the form YYYY-MM-DD.", answer)


def problems(draw: Draw, difficulty: int) -> DrawnQuestion:
    """Word problems in the shape of GSM8K: a line a step, then `#### n`."""
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    n = first = draw.between(2, 10 * difficulty + 10)
    said, lines, steps = [f"{name} has {n} {things}."], list[str](), list[Any]()
    for _ in range(difficulty):
        kinds = ["gets", "loses"] + (["doubles"] if n < 500 else []) + (["halves"] if n % 2 == 0 and n else [])
        kind = draw.choice(kinds if n else ["gets"])
        b = draw.between(1, n if kind == "loses" else 20) if kind in ("gets", "loses") else 2
        sentence, sign, after = {
            "gets": (f"{name} gets {b} more.", "+", n + b),
            "loses": (f"{name} gives {b} away.", "-", n - b),
            "doubles": ("Their number doubles.", "*", n * 2),
            "halves": ("Half of them are sold.", "/", n // 2),
        }[kind]
        said.append(sentence)
        lines.append(f"{n} {sign} {b} = {after}")
        steps.append((sign, b))
        n = after
    asked = f"How many {things} does {name} have now? End with a line of #### and the number."
    return DrawnQuestion((name, things, first, *steps), " ".join([*said, asked]), "\n".join([*lines, f"#### {n}"]))


def syllogisms(draw: Draw, difficulty: int) -> DrawnQuestion:
    """Whether a chain of inclusions follows: one that is read forwards, backwards, or has a gap."""
    nouns = draw.sample(NOUNS, min(difficulty + 2, len(NOUNS)))
    pairs = list(itertools.pairwise(nouns))
    valid = draw.below(2) == 1
    asked = (nouns[0], nouns[-1])
    if not valid and draw.below(2):
        asked = asked[::-1]
    elif not valid:
        gap = draw.below(len(pairs))
        pairs[gap] = (pairs[gap][1], pairs[gap][0])
    given = draw.sample(pairs, len(pairs))
    premises = " ".join(f"All {a} are {b}." for a, b in given)
    question = f"{premises} Does it follow that all {asked[0]} are {asked[1]}? Answer yes or no."
    return DrawnQuestion((*sorted(given), asked), question, "yes" if valid else "no")


def objects(draw: Draw, difficulty: int) -> DrawnQuestion:
    """JSON objects of named values."""
    keys = draw.sample(KEYS, difficulty)
    values: list[Any] = [draw.choice((draw.between(0, 999), draw.choice(NAMES), True, False, None)) for _ in keys]
    listed = "; ".join(f"{key} is {described(value)}" for key, value in zip(keys, values))
    found = dict(zip(keys, values))
    question = f"Write one JSON object with these keys and values: {listed}. Answer with the JSON alone."
    return DrawnQuestion(tuple(sorted(found.items())), question, json.dumps(found))


def described(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value}"
    return json.dumps(value) if isinstance(value, bool) or value is None else f"the number {value}"


def same_number(item: ChatItem, reply: str) -> bool:
    """The number alone; commas between thousands and a full stop are allowed."""
    text = reply.strip().removesuffix(".")
    if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+", text):
        text = text.replace(",", "")
    return text == item.answer


def same_text(item: ChatItem, reply: str) -> bool:
    return reply.strip() == item.answer


def same_list(item: ChatItem, reply: str) -> bool:
    text = reply.strip().removesuffix(".")
    return [one.strip() for one in text.split(",")] == item.answer.split(", ")


def same_end(item: ChatItem, reply: str) -> bool:
    """The last line is `####` and the number, whatever the steps."""
    last = reply.strip().rpartition("\n")[2]
    return last.startswith("####") and last[4:].strip().replace(",", "") == item.answer.rpartition("#### ")[2]


def same_word(item: ChatItem, reply: str) -> bool:
    return reply.strip().removesuffix(".").lower() == item.answer


def same_object(item: ChatItem, reply: str) -> bool:
    """The same JSON value, each key once; `true` is not 1, and 1.0 is not 1."""
    try:
        found = json.loads(reply, object_pairs_hook=lambda pairs: sorted(pairs, key=lambda pair: pair[0]))
        return repr(found) == repr(sorted(json.loads(item.answer).items()))
    except (ValueError, RecursionError):
        return False


def all_followed(item: ChatItem, reply: str) -> bool:
    return all(followed(item.rules, item.question, reply))


class ChatKind(NamedTuple):
    """A task: its generator and checker, tokens that a reply may have, the share that a guess gets right, and the
    largest difficulty."""

    make: Callable[[Draw, int], DrawnQuestion]
    check: Callable[[ChatItem, str], bool]
    tokens: int = 64
    baseline: float | None = None
    hardest: int = 10


IFEVAL = "ifeval"
CHAT_TASKS = {
    "addition": ChatKind(addition, same_number),
    "subtraction": ChatKind(subtraction, same_number),
    "multiplication": ChatKind(multiplication, same_number),
    "chains": ChatKind(chains, same_number),
    "counting": ChatKind(counting, same_number),
    "reversing": ChatKind(reversing, same_text),
    "sorting": ChatKind(sorting, same_list),
    "copying": ChatKind(copying, same_text, 128),
    "dates": ChatKind(dates, same_text),
    "problems": ChatKind(problems, same_end, 256),
    "syllogisms": ChatKind(syllogisms, same_word, 16, 0.5),
    "json": ChatKind(objects, same_object, 256),
    IFEVAL: ChatKind(make_instructions, all_followed, 512, None, 3),
}


class ChatOptions(NamedTuple):
    """`chat:TASK:difficulty=2:items=200:seed=0:tokens=64`; `tokens` 0 takes the task's own limit."""

    task: str
    difficulty: int = 2
    items: int = 200
    seed: int = 0
    tokens: int = 0

    @property
    def name(self) -> str:
        """As in results."""
        more = {
            key: value for key, value in self._asdict().items() if value != self._field_defaults.get(key, self.task)
        }
        return ":".join([f"chat/{self.task}", *(f"{key}={value}" for key, value in more.items())])


def chat_options(argument: str) -> ChatOptions:
    """What stands after `chat:`.

    Raises:
        UsageError: an unknown task or option, or a value that is not allowed.
    """
    task, *given = argument.split(":")
    if task not in CHAT_TASKS:
        close = nearest(task, CHAT_TASKS)
        raise UsageError(f"chat has no task {task!r}{close}; choose from {', '.join(CHAT_TASKS)}")
    most = {"difficulty": CHAT_TASKS[task].hardest, "items": 1_000_000, "seed": 2**31, "tokens": 1_000_000}
    found: dict[str, int] = {}
    for one in given:
        key, _, value = one.partition("=")
        if key not in most:
            raise UsageError(f"chat:{task} has no option {one!r}{nearest(key, most)}; it has {', '.join(most)}")
        least = 0 if key == "seed" else 1
        if not re.fullmatch(r"[0-9]{1,10}", value) or not least <= int(value) <= most[key]:
            raise UsageError(f"{key} of chat:{task} is {value!r}, must be a whole number from {least} to {most[key]:,}")
        if key in found:
            raise UsageError(f"{key} of chat:{task} is given twice; give it once")
        found[key] = int(value)
    return ChatOptions(task, **found)


def make_item(task: str, seed: int, index: int, difficulty: int = 2, split: Split = "train") -> ChatItem:
    """The item number `index` of a task; a pure function of the arguments."""
    return draw_item(CHAT_TASKS[task].make, task, seed, index, difficulty, split)


def make_items(options: ChatOptions, split: Split) -> list[ChatItem]:
    """Up to `options.items` items with operands of their own; the first of them are those of a smaller number."""
    task, difficulty, n, seed, _ = options
    return different((make_item(task, seed, i, difficulty, split) for i in itertools.count()), n)


def check_reply(item: ChatItem, reply: str) -> bool:
    """Whether a reply is right."""
    return CHAT_TASKS[item.task].check(item, reply)
