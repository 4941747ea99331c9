"""What our own messages tell the reader to type is accepted by our own command line."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import regpt
from regpt.cli.commands import ARGUMENTS, COMMANDS, arguments
from regpt.cli.flags import Flag, flags_of, normalized
from regpt.errors import UsageError, UserError
from regpt.runs.folder import refuse_used_folder

SOURCE = Path(regpt.__file__).parent
GAP = "\ue000"  # what an f-string fills in
OTHER_PROGRAMS = {  # flags of torchrun, pip, git, Python and llama.cpp, which messages name too
    *("--max-restarts", "--lora", "--standalone", "--nproc-per-node", "--upgrade", "--rdzv-backend", "--show-toplevel"),
    *(
        "--dirty",
        "--short",
        "--porcelain",
        "--query-gpu",
        "--format",
        "--no-config",
        "--debug",
        "--help",
        "--version",
        "--no",
    ),
    *("--head", "--numstat", "--relative", "--error-unmatch", "--force-reinstall"),
}
KNOWN = {command: flags_of(arguments(command)) for command in ARGUMENTS}
ANY: dict[str, list[Flag]] = {}
for flags in KNOWN.values():
    for spelled, flag in flags.items():
        ANY.setdefault(spelled, []).append(flag)


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a module that may be shown, docstrings left out; what is filled in is a `GAP`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    hidden |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


ALL = [
    (f"{path.relative_to(SOURCE)}:{line}", text)
    for path in sorted(SOURCE.rglob("*.py"))
    for line, text in literals(path)
    if "regpt " in text or "--" in text
]


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands that a message quotes: which, and the words after it, as far as its phrase goes."""
    for found in re.finditer(r"(?<![\w/.'-])regpt ([a-z][a-z-]*)((?: [^\s;,()`]+)*)", text):
        words = re.split(r" (?:&&|\||>|and|or) ", found[2] + " ")[0].split()
        both = f"{found[1]} {words[0]}" if words else ""
        if both in ARGUMENTS:
            yield both, words[1:]
        elif found[1] in ARGUMENTS or found[1] in COMMANDS:
            yield found[1], words


def sample(word: str) -> str:
    """A value for a placeholder, such as N or DIR=WEIGHT."""
    return "1" if GAP in word or word.isupper() or word.endswith("…") else word.strip("'\".:")


@pytest.mark.parametrize(
    ("where", "text"), [one for one in ALL if list(commands(one[1]))], ids=lambda value: value[:40]
)
def test_every_command_that_a_message_quotes_takes_the_flags_with_it(where: str, text: str):
    for command, words in commands(text):
        if command in KNOWN:
            quoted = [
                re.split(r"[=|…\]]", word.strip("'\".:[]"))[0] for word in words if word.startswith(("--", "[--"))
            ]
            for flag in quoted:
                assert flag in KNOWN[command] or flag in ("--help", "--debug"), (
                    f"{where}: regpt {command} has no {flag}"
                )


def advised(text: str) -> Iterator[tuple[str, str]]:
    """Flags that a message names, each with the word after it."""
    for found in re.finditer(r"(?<![\w-])(--[a-z][a-z0-9.-]*[a-z0-9])(?:[ =]([^\s;,()`]+))?", text):
        yield found[1], found[2] or ""


@pytest.mark.parametrize(("where", "text"), [one for one in ALL if list(advised(one[1]))], ids=lambda value: value[:40])
def test_every_flag_that_a_message_names_exists_and_takes_the_value_with_it(where: str, text: str):
    for name, value in advised(text):
        if name in OTHER_PROGRAMS:
            continue
        assert name in ANY, f"{where}: no command has {name}"
        flag = ANY[name][0]
        if value.lower() in ("true", "false") or re.fullmatch(r"-?\d[\d.e-]*", value):
            try:
                normalized({name: flag}, [name, sample(value)], "regpt")
            except UsageError as error:
                pytest.fail(f"{where}: {error}")
        elif flag.choices and not flag.boolean and not flag.kinds and value.islower() and value.isalpha():
            assert value in flag.choices or value in WORDS, f"{where}: {name} {value}"


WORDS = {
    "is",
    "names",
    "was",
    "and",
    "or",
    "holds",
    "has",
    "needs",
    "shows",
    "says",
    "gives",
    "to",
    "with",
    "goes",
    "not",
}


@pytest.mark.parametrize(
    ("where", "text"),
    [one for one in ALL if re.search(r"\b(train|optim|data|model|eval|sample|checkpoint|log)\.[a-z]", one[1])],
    ids=lambda value: value[:40],
)
def test_every_key_that_a_message_names_exists(where: str, text: str):
    keys = {name.removeprefix("--").replace("-", "_") for name in KNOWN["train"] if "." in name}
    for section, key in re.findall(r"(?<![\w./-])(train|optim|eval|sample|log)\.([a-z_]+)(?![\w./(])", text):
        assert f"{section}.{key}" in keys or key in ("jsonl", "bin", "txt", "toml"), f"{where}: {section}.{key}"


COMMAND = re.compile(rf"regpt (?:{'|'.join(sorted(KNOWN, key=len, reverse=True))}) [^;:,()]*")
PLAIN = {"word", "self.url", "self.store.url", "store.url", "4 * seconds"}  # quoted already; addresses, numbers


def filled_in(path: Path) -> Iterator[tuple[int, str]]:
    """The expressions that stand inside commands of a module's f-strings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else part for part in node.values]
            said = "".join(part if isinstance(part, str) else GAP for part in parts)
            inside = [range(*found.span()) for found in COMMAND.finditer(said)]
            at = 0
            for part in parts:
                if not isinstance(part, str) and any(at in span for span in inside):
                    value = part.value
                    yield node.lineno, ast.unparse(value.func if isinstance(value, ast.Call) else value)
                at += len(part) if isinstance(part, str) else 1


def test_folders_inside_commands_are_quoted_for_the_shell():
    unquoted = [
        f"{path.relative_to(SOURCE)}:{line}: {{{value}}}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line, value in filled_in(path)
        if value not in PLAIN
    ]
    assert unquoted == []


def test_a_command_of_a_message_is_the_same_words_in_a_shell(tmp_path):
    run = tmp_path / "my [first] run"
    run.mkdir()
    (run / "config.toml").touch()
    with pytest.raises(UserError) as found:
        refuse_used_folder(run)
    command = str(found.value).partition("go on with: ")[2].partition(", or choose")[0]
    assert shlex.split(command) == ["regpt", "train", "--resume", str(run)]
