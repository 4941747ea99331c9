"""Files of conversations → messages with roles. The format is recognised by the columns of each file's first row."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from regpt.compression import Unreadable
from regpt.errors import UserError
from regpt.prepare.documents import Row, names_in
from regpt.prepare.readers import read_table_rows
from regpt.prepare.settings import TextOptions
from regpt.prepare.split import fraction
from regpt.text.chat import APART

Messages = list[dict[str, Any]]  # role and content, perhaps weight

ROLES = ("system", "user", "assistant", "tool")
NAMES = {  # of roles in ShareGPT and its relatives
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function": "tool",
    "observation": "tool",
    "developer": "system",
} | {role: role for role in ROLES}
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")  # of hh-rlhf (Bai et al. 2022)


class Conversation(NamedTuple):
    """What one row holds.

    Attributes:
        messages: of a preference, the chosen ones.
        rejected: of a preference; None for others.
        where: gives the row's place, for messages; of a plain .jsonl it counts the lines before.
    """

    messages: Messages
    rejected: Messages | None
    where: Callable[[], str]


class Wrong(Exception):
    """Why a row is not a conversation; without its place."""


def column_text(row: dict[str, Any], name: str, *, needed: bool = True) -> str:
    """The text in column `name`; empty, where it may be missing."""
    value = row.get(name)
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        there = "missing" if value is None else f"not text but {type(value).__name__}"
        raise Wrong(f"{name} is {there}")
    return value


def from_instruction(row: dict[str, Any]) -> Messages:
    """Alpaca: `instruction`, `input` (perhaps empty), `output`, perhaps `system`."""
    asked, given = column_text(row, "instruction"), column_text(row, "input", needed=False)
    user = f"{asked}\n\n{given}" if given.strip() else asked
    return with_system(row, [*message("user", user), *message("assistant", column_text(row, "output"))])


def from_prompt(row: dict[str, Any]) -> Messages:
    """`prompt` and `completion`, each a text or messages."""
    return with_system(row, side(row, "prompt", "user") + side(row, "completion", "assistant"))


def from_messages(row: dict[str, Any]) -> Messages:
    return with_system(row, as_messages(row["messages"], "messages"))


def from_sharegpt(row: dict[str, Any]) -> Messages:
    return with_system(row, as_messages(row["conversations"], "conversations"))


def from_preference(row: dict[str, Any]) -> tuple[Messages, Messages]:
    """`chosen` and `rejected`, texts or messages, with a shared `prompt` or each with its own."""
    prompt = side(row, "prompt", "user") if row.get("prompt") is not None else []
    found = []
    for name in ("chosen", "rejected"):
        answer = side(row, name, "assistant")
        if not prompt and len(answer) < 2:
            raise Wrong(f"{name} is one text, so a prompt is needed, and there is none")
        shared = bool(prompt) and answer[: len(prompt)] == prompt
        found.append(with_system(row, answer if shared else prompt + answer))
    if found[0] == found[1]:
        raise Wrong("chosen and rejected are equal")
    return found[0], found[1]


def message(role: str, content: str) -> Messages:
    return [{"role": role, "content": content}]


def side(row: dict[str, Any], name: str, role: str) -> Messages:
    """A column that holds a text of `role`, a transcript of Anthropic's, or messages."""
    value = row.get(name)
    if isinstance(value, list):
        return as_messages(value, name)
    text = column_text(row, name)
    turns = TRANSCRIPT.split(f"\n\n{text.lstrip()}")
    if len(turns) < 3 or turns[0].strip():
        return message(role, text)
    found = [{"role": NAMES[who.lower()], "content": said.strip()} for who, said in zip(turns[1::2], turns[2::2])]
    return found[:-1] if found[-1] == {"role": "assistant", "content": ""} else found


def with_system(row: dict[str, Any], messages: Messages) -> Messages:
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or (messages and messages[0]["role"] == "system"):
        return messages
    return message("system", system) + messages


def as_messages(value: Any, name: str) -> Messages:
    """Messages of OpenAI's form (`role`, `content`) or ShareGPT's (`from`, `value`)."""
    if not isinstance(value, list) or not value:
        raise Wrong(f"{name} is {'empty' if value == [] else 'not a list'}, must be a list of messages")
    return [as_message(one, f"{name}[{i}]") for i, one in enumerate(value)]


def as_message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Wrong(f"{where} is not an object with role and content")
    given = value.get("role", value.get("from"))
    role = NAMES.get(str(given).lower())
    if role is None:
        raise Wrong(f"{where} has the role {given!r}, must be one of {', '.join(ROLES)}")
    content = value.get("content", value.get("value"))
    if isinstance(content, list):  # OpenAI's parts
        content = "".join(column_text(part if isinstance(part, dict) else {}, "text") for part in content)
    if not isinstance(content, str):
        raise Wrong(f"{where} has no text as its content")
    if value.get("tool_calls"):
        raise Wrong(f"{where} has tool_calls, which are not read; write them into its content")
    return {"role": role, "content": content} | ({"weight": 0} if value.get("weight") == 0 else {})


@dataclass(frozen=True)
class ConversationFormat:
    """A kind of rows: the columns that it is recognised by, and how one is read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[dict[str, Any]], Any]


FORMATS = (  # the first whose columns are all there
    ConversationFormat("preference pairs", ("chosen", "rejected"), from_preference),
    ConversationFormat("messages", ("messages",), from_messages),
    ConversationFormat("ShareGPT conversations", ("conversations",), from_sharegpt),
    ConversationFormat("instruction, input, output", ("instruction", "output"), from_instruction),
    ConversationFormat("prompt and completion", ("prompt", "completion"), from_prompt),
)


def recognise(row: dict[str, Any], where: str) -> ConversationFormat:
    """
    Raises:
        UserError: the columns are those of no format.
    """
    for one in FORMATS:
        if all(column in row for column in one.columns):
            return one
    known = "; ".join(" and ".join(one.columns) for one in FORMATS)
    there = ", ".join(list(names_in(row))[:20]) or "none"
    raise UserError(f"{where}: no conversation is in the columns {there}; known are the columns {known}")


def check_messages(messages: Messages) -> None:
    """Raise `Wrong` for roles out of order, or nothing to learn."""
    before = ""
    for i, one in enumerate(messages):
        role = one["role"]
        if role == "system" and i:
            raise Wrong(f"message {i} has the role system, which can only be the first")
        if role == "assistant" and before in ("", "system", "assistant"):
            raise Wrong(f"message {i} is an answer after {before or 'nothing'}, must follow a user or a tool")
        if role == "user" and before == "user":
            raise Wrong(f"messages {i - 1} and {i} are both of the user; join them")
        if role == "tool" and before not in ("assistant", "tool"):
            raise Wrong(f"message {i} is of a tool after {before or 'nothing'}, must follow an answer or a tool")
        if APART in one["content"]:
            raise Wrong(f"message {i} has U+E000, a character of private use that is not read")
        try:
            one["content"].encode()
        except UnicodeEncodeError:
            raise Wrong(f"message {i} has a lone surrogate, which is no character; repair it") from None
        before = role
    if not any(one["role"] == "assistant" and one["content"].strip() and one.get("weight") != 0 for one in messages):
        raise Wrong("there is nothing to learn: no answer has any text")


def without_ending(messages: Messages) -> Messages:
    """The messages up to the last answer: what follows it is never trained on."""
    last = max((i for i, one in enumerate(messages) if one["role"] == "assistant"), default=-1)
    return messages[: last + 1]


def question_fraction(messages: Messages) -> float:
    """A number in [0, 1) that depends on what the user says first alone: a question is held out below some number."""
    asked = next((one["content"] for one in messages if one["role"] == "user"), "")
    return fraction(sha256(asked.encode()).digest())


class ConversationReader:
    """Reads files, and counts what it skips.

    Attributes:
        formats: recognised, by file.
        read: conversations.
        kinds: rows that were skipped, by kind; `reasons` has the first sentences about them.
    """

    def __init__(self, paths: Sequence[Path], *, skip: bool = False):
        self.paths, self.skip = paths, skip
        self.formats: dict[str, str] = {}
        self.read = 0
        self.kinds: dict[str, int] = {}
        self.reasons: list[str] = []

    def __iter__(self) -> Iterator[Conversation]:
        """
        Raises:
            UserError: a file that cannot be read, columns of no known format, or a bad row unless these are skipped.
        """
        for path in self.paths:
            known: ConversationFormat | None = None
            options = TextOptions(on_error="skip" if self.skip else "stop")
            try:
                for row in read_table_rows(path, options):
                    known = self.format_of(row, known, path)
                    found = self.conversation(row, known)
                    if found is not None:
                        self.read += 1
                        yield found
            except Unreadable as error:
                self.refuse(str(error))
            if known is None:
                raise UserError(f"{path} holds no row; give a file of conversations")

    def format_of(self, row: Row, known: ConversationFormat | None, path: Path) -> ConversationFormat | None:
        if known is None and isinstance(row.value, dict):
            known = recognise(row.value, row.where())
            self.formats[str(path)] = known.name
        return known

    def conversation(self, row: Row, known: ConversationFormat | None) -> Conversation | None:
        """The row's conversation; None for one that is skipped."""
        try:
            if isinstance(row.value, Unreadable):
                raise Wrong(str(row.value).removeprefix(row.where() + ": "))
            if not isinstance(row.value, dict) or known is None:
                raise Wrong("not an object with columns")
            missing = [column for column in known.columns if column not in row.value]
            if missing:
                raise Wrong(f"no column {missing[0]!r}, as the rows before have ({known.name})")
            found = known.read(row.value)
            sides = [without_ending(one) for one in (found if isinstance(found, tuple) else (found,))]
            for one in sides:
                check_messages(one)
        except Wrong as error:
            self.refuse(f"{row.where()}: {error}")
            return None
        return Conversation(sides[0], sides[1] if len(sides) > 1 else None, row.where)

    @property
    def skipped(self) -> int:
        return sum(self.kinds.values())

    def refuse(self, sentence: str, kind: str = "bad_row") -> None:
        """Count a bad row, or raise a UserError for it."""
        if not self.skip:
            raise UserError(f"{sentence}; correct the row, or leave such rows out with --on-error skip")
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if len(self.reasons) < 3:
            self.reasons.append(sentence)
