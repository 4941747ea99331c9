"""TWENTY INSTRUCTIONS whose following a program can check, as IFEval has them (Zhou et al. 2023, arXiv 2311.07911).

Prompts and checkers are our own. Each instruction also says how a text is changed to follow it, so that every prompt
has a reply that follows all of its instructions: a combination without one is drawn again.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from regpt.evals.chat.items import Draw, DrawnQuestion

Arguments = dict[str, Any]
Rules = Sequence[tuple[str, Arguments]]
TOPICS = ("a river", "a garden", "the moon", "an old town", "a train", "winter", "the sea", "a library", "music")
WORDS = ("window", "paper", "stone", "light", "table", "silver", "market", "bridge", "forest", "letter", "cloud")
AVOIDED = ("very", "thing", "because", "good", "people", "nice", "really", "often", "never", "always")
STARTS = ("Here is my answer:", "In short:", "Let me tell you:", "First of all:")
ENDS = ("Is there anything else?", "That is all.", "Thank you for asking.", "I hope that this helps.")
SCRIPTS = {
    "Greek": "Αυτή είναι μια σύντομη απάντηση.",
    "Cyrillic": "Это короткий ответ на вопрос.",
    "Hebrew": "זוהי תשובה קצרה.",
    "Devanagari": "यह एक छोटा उत्तर है।",
    "Hangul": "이것은 짧은 대답입니다.",
}
SENTENCES = (
    "{topic} has much to offer.",
    "Many stories begin with it.",
    "It changes with the hours of the day.",
    "Children like to draw it.",
    "One can spend a whole day with it.",
    "It needs care and time.",
    "Some write songs about it.",
    "It looks different from afar.",
)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def sentences_of(text: str) -> int:
    """Sentences, by the marks that end them."""
    return len(re.findall(r"[^.!?]*\w[^.!?]*(?:[.!?]+|$)", text))


def paragraphs_of(text: str) -> int:
    return len([one for one in re.split(r"\n\s*\n", text) if one.strip()])


def occurrences(text: str, word: str) -> int:
    return len(re.findall(rf"\b{re.escape(word)}\b", text, flags=re.IGNORECASE))


def bullets_of(text: str) -> int:
    return len(re.findall(r"^\s*[*-] +\S", text, flags=re.MULTILINE))


def is_json(text: str) -> bool:
    """One JSON object or list, also within a fence of Markdown."""
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def in_script(text: str, script: str) -> bool:
    letters = [one for one in text if one.isalpha()]
    return bool(letters) and all(unicodedata.name(one, "").startswith(script.upper()) for one in letters)


def with_words(text: str, n: int) -> str:
    """At least `n` words: the text's own sentences, again."""
    return " ".join([text] * -(-n // len(words_of(text))))


def insert(text: str, words: str) -> str:
    """`words` at the end of the first sentence."""
    head, stop, rest = text.partition(".")
    return f"{head} {words}{stop}{rest}"


def capitalized(text: str, n: int) -> str:
    for word in [one for one in words_of(text) if len(one) > 1][:n]:
        text = text.replace(word, word.upper(), 1)
    return text


class Instruction(NamedTuple):
    """One kind of instruction; at most one of a family is in a prompt.

    Attributes:
        family: those of one change the same thing.
        draw: its arguments.
        said: how it is asked for.
        check: (reply, arguments, question) → whether it is followed.
        follow: (text, arguments, question) → the text, changed to follow it.
    """

    family: str
    draw: Callable[[Draw], Arguments]
    said: str
    check: Callable[[str, Arguments, str], bool]
    follow: Callable[[str, Arguments, str], str]


def amount(low: int, high: int) -> Callable[[Draw], Arguments]:
    return lambda draw: {"n": draw.between(low, high)}


def one_of(values: Sequence[str]) -> Callable[[Draw], Arguments]:
    return lambda draw: {"x": draw.choice(values)}


def word_and_amount(draw: Draw) -> Arguments:
    return {"x": draw.choice(WORDS), "n": draw.between(2, 4)}


def nothing(draw: Draw) -> Arguments:
    return {}


# Texts are changed in this order: shape first, then words, letters, and what surrounds all of it.
INSTRUCTIONS: dict[str, Instruction] = {
    "sentences": Instruction(
        "length", amount(2, 6), "Write exactly {n} sentences.",
        lambda r, a, q: sentences_of(r) == a["n"],
        lambda r, a, q: " ".join(re.findall(r"[^.]+\.", r)[: a["n"]]).replace("  ", " "),
    ),
    "paragraphs": Instruction(
        "length", amount(2, 4), "Write exactly {n} paragraphs with an empty line between them.",
        lambda r, a, q: paragraphs_of(r) == a["n"],
        lambda r, a, q: "\n\n".join(one.strip() for one in re.findall(r"[^.]+\.", r)[: a["n"]]),
    ),
    "bullets": Instruction(
        "length", amount(2, 5), "Write exactly {n} bullet points, lines that begin with * and a space.",
        lambda r, a, q: bullets_of(r) == a["n"],
        lambda r, a, q: "\n".join(f"* {one.strip()}" for one in re.findall(r"[^.]+\.", r)[: a["n"]]),
    ),
    "min_words": Instruction(
        "length", amount(20, 60), "Use at least {n} words.",
        lambda r, a, q: len(words_of(r)) >= a["n"],
        lambda r, a, q: with_words(r, a["n"]),
    ),
    "max_words": Instruction(
        "length", amount(15, 40), "Use at most {n} words.",
        lambda r, a, q: len(words_of(r)) <= a["n"],
        lambda r, a, q: r.partition(".")[0] + ".",
    ),
    "include": Instruction(
        "word", one_of(WORDS), 'Use the word "{x}".',
        lambda r, a, q: occurrences(r, a["x"]) > 0,
        lambda r, a, q: insert(r, f"like a {a['x']}"),
    ),
    "count": Instruction(
        "word", word_and_amount, 'Use the word "{x}" exactly {n} times.',
        lambda r, a, q: occurrences(r, a["x"]) == a["n"],
        lambda r, a, q: insert(r, "like a " + " and a ".join([a["x"]] * a["n"])),
    ),
    "exclude": Instruction(
        "word", one_of(AVOIDED), 'Do not use the word "{x}".',
        lambda r, a, q: occurrences(r, a["x"]) == 0,
        lambda r, a, q: r,
    ),
    "no_commas": Instruction(
        "marks", nothing, "Do not use commas.",
        lambda r, a, q: "," not in r,
        lambda r, a, q: r.replace(",", ""),
    ),
    "start": Instruction(
        "start", one_of(STARTS), 'Begin with the words "{x}"',
        lambda r, a, q: r.strip().startswith(a["x"]),
        lambda r, a, q: f"{a['x']} {r}",
    ),
    "title": Instruction(
        "start", nothing, "Give a title in double angle brackets, such as <<title>>.",
        lambda r, a, q: re.search(r"<<[^\n<>]*\w[^\n<>]*>>", r) is not None,
        lambda r, a, q: f"<<My answer>>\n{r}",
    ),
    "end": Instruction(
        "end", one_of(ENDS), 'End with the words "{x}" and nothing after them.',
        lambda r, a, q: r.strip().endswith(a["x"]),
        lambda r, a, q: f"{r} {a['x']}",
    ),
    "postscript": Instruction(
        "end", nothing, "Add a postscript at the end, a line that begins with P.S.",
        lambda r, a, q: re.search(r"^\s*P\.S\..*\w.*\Z", r, flags=re.MULTILINE) is not None,
        lambda r, a, q: f"{r}\nP.S. There is more to say",
    ),
    "capitals": Instruction(
        "case", amount(2, 5), "Write at least {n} words in capital letters.",
        lambda r, a, q: len([one for one in words_of(r) if len(one) > 1 and one.isupper()]) >= a["n"],
        lambda r, a, q: capitalized(r, a["n"]),
    ),
    "lowercase": Instruction(
        "case", nothing, "Write in lower case only, without capital letters.",
        lambda r, a, q: r.islower(),
        lambda r, a, q: r.lower(),
    ),
    "uppercase": Instruction(
        "case", nothing, "Write in capital letters only.",
        lambda r, a, q: r.isupper(),
        lambda r, a, q: r.upper(),
    ),
    "quotation": Instruction(
        "whole", nothing, "Put the whole answer in double quotation marks.",
        lambda r, a, q: re.fullmatch(r'\s*".*\w.*"\s*', r, flags=re.DOTALL) is not None,
        lambda r, a, q: f'"{r}"',
    ),
    "json": Instruction(
        "whole", nothing, "Answer with one JSON object and nothing else.",
        lambda r, a, q: is_json(r),
        lambda r, a, q: json.dumps({"answer": r}),
    ),
    "repeat": Instruction(
        "whole", nothing, "First repeat this whole request word for word, then answer it.",
        lambda r, a, q: r.strip().startswith(q) and len(r.strip()) > len(q),
        lambda r, a, q: f"{q}\n{r}",
    ),
    "script": Instruction(
        "whole", one_of(tuple(SCRIPTS)), "Use the letters of the {x} script only.",
        lambda r, a, q: in_script(r, a["x"]),
        lambda r, a, q: SCRIPTS[a["x"]],
    ),
}  # fmt: skip


def make_instructions(draw: Draw, difficulty: int) -> DrawnQuestion:
    """A request with `difficulty` instructions of different families, and a reply that follows them."""
    while True:
        topic = draw.choice(TOPICS)
        names: list[str] = []
        while len(names) < difficulty:
            name = draw.choice(tuple(INSTRUCTIONS))
            if INSTRUCTIONS[name].family not in [INSTRUCTIONS[one].family for one in names]:
                names.append(name)
        rules = tuple((name, INSTRUCTIONS[name].draw(draw)) for name in names)
        asked = " ".join(INSTRUCTIONS[name].said.format(**arguments) for name, arguments in rules)
        question = f"Write a short text about {topic}. {asked}"
        reply = reference(draw, topic, rules, question)
        if all(followed(rules, question, reply)):
            given = sorted((name, *arguments.values()) for name, arguments in rules)
            return DrawnQuestion((topic, *given), question, reply, rules)


def reference(draw: Draw, topic: str, rules: Rules, question: str) -> str:
    """A text about `topic`, changed to follow each rule in the order of the table."""
    opening, *others = SENTENCES
    text = " ".join([opening.format(topic=topic[0].upper() + topic[1:]), *draw.sample(others, len(others))])
    given = dict(rules)
    for name, instruction in INSTRUCTIONS.items():
        if name in given:
            text = instruction.follow(text, given[name], question)
    return text


def followed(rules: Rules, question: str, reply: str) -> list[bool]:
    """Whether a reply follows each rule, strictly: as it stands."""
    return [bool(reply.strip()) and INSTRUCTIONS[name].check(reply, given, question) for name, given in rules]


def followed_loosely(rules: Rules, question: str, reply: str) -> list[bool]:
    """The same of the reply or one of seven others: without its first line, its last, both, each also without
    asterisks (IFEval's loose score: introductions and emphasis do not count)."""
    lines = reply.split("\n")
    texts = ["\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    variants = [reply, *texts, *(text.replace("*", "") for text in texts)]
    found = [followed(rules, question, one) for one in variants]
    return [any(column) for column in zip(*found)]
