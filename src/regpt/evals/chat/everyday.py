"""The conversations that ship with regpt, for `regpt chat-from-text`: greetings, questions about the model, what it
does not know, simple facts, short formats (`everyday.jsonl`, written by hand), and items of the chat tasks. CC0 1.0.

A line of the file is a group: ways to ask, replies, and perhaps a table whose columns are `$a`, `$b`, … in both (`$A`:
with a capital). Without torch.
"""

import json
from importlib.resources import files
from typing import Any

from regpt.evals.chat.items import Draw
from regpt.evals.chat.tasks import ChatOptions, make_items

Turn = tuple[str, str]  # what is asked, the reply
COLUMNS = "abcd"
TASKS = ("addition", "subtraction", "counting", "reversing", "sorting", "copying", "syllogisms", "json")
ITEMS = 150  # of each task, at difficulty 1
SUMS = ("{} + {}", "What is {} + {}?", "What is {} plus {}?", "How much is {} + {}?", "Add {} and {}")
SHARE_LONG = 6  # for so many turns a conversation of several
NAMES = "My name is "


def everyday_conversations(seed: int = 0) -> list[list[dict[str, str]]]:
    """Messages of each conversation, in random order; a function of the seed."""
    draw, turns = Draw("everyday", seed), [*written_turns(seed), *generated_turns(seed)]
    found = [[turn] for turn in turns]
    found += [draw.sample(turns, draw.between(2, 7)) for _ in range(len(turns) // SHARE_LONG)]
    for asked, reply in [turn for turn in turns if turn[0].startswith(NAMES)]:
        name = asked.removeprefix(NAMES).removesuffix(".")
        found.append(
            [(asked, reply), *draw.sample(turns, draw.below(5)), ("What is my name?", f"Your name is {name}.")]
        )
    return [as_messages(one) for one in draw.sample(found, len(found))]


def as_messages(turns: list[Turn]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def written_turns(seed: int) -> list[Turn]:
    """Every way to ask of every group, for every row of its table, with one of the replies."""
    draw = Draw("everyday", "written", seed)
    lines = files("regpt.evals.chat").joinpath("everyday.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for group in map(json.loads, lines):
        for row in group.get("table", [[]]):
            found += [(filled(asked, row), filled(draw.choice(group["say"]), row)) for asked in group["ask"]]
    return found


def filled(text: str, row: list[str]) -> str:
    for name, value in zip(COLUMNS, row):
        text = text.replace(f"${name.upper()}", value[:1].upper() + value[1:]).replace(f"${name}", value)
    return text


def generated_turns(seed: int) -> list[Turn]:
    """Items of the tasks' training split, and their sums in everyday words."""
    found: list[Turn] = []
    for task in TASKS:
        found += [(one.question, one.answer) for one in make_items(ChatOptions(task, 1, ITEMS, seed), "train")]
    for item in make_items(ChatOptions("addition", 1, ITEMS, seed), "train"):
        a, b = sorted(item.operands)
        for wording in SUMS:
            found += [(wording.format(x, y), f"{x} + {y} = {item.answer}.") for x, y in {(a, b), (b, a)}]
    return found


def conversation_lines(conversations: list[list[dict[str, Any]]]) -> str:
    """As a file that `regpt finetune --data` reads."""
    return "".join(json.dumps({"messages": one}, ensure_ascii=False) + "\n" for one in conversations)
