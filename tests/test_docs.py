"""Every `regpt …` line in a code block of a page is accepted by the command line as written."""

import pkgutil
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import regpt.cli
from regpt.__main__ import main
from regpt.cli import parse as parse_module
from regpt.evals.specs import parse_tasks

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if page.name != "log.md"]  # history
TRAINED = ["gpt2-tiny", "--data", "DIR", "--out", "RUN"]  # what `…` stands for after `regpt train`
MODULES = [f"regpt.cli.{found.name}" for found in pkgutil.iter_modules(regpt.cli.__path__)]


def typed(page: Path) -> list[list[str]]:
    """The words of each line that calls regpt; without comments, which a # or three spaces begin."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        command = re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(regpt .*?)(?:   .*)?$", line)
        if command:
            found += [words(part) for part in re.split(r" (?:\||&&|>) ", command[1])[:1]]
    return found


def words(command: str) -> list[str]:
    """Words of a synopsis: everything optional is given, of several the first."""
    plain = re.sub(r"\[(-[^\]]*)\]", r"\1", command)
    given: list[str] = []
    for word in shlex.split(plain, comments=True):
        given += TRAINED if word == "…" and given == ["regpt", "train"] else [word.rstrip("…").split("|")[0]]
    return [word for word in given if word]


class Parsed(Exception):
    """The arguments were accepted."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_accepted(page: Path, monkeypatch: pytest.MonkeyPatch):
    original = parse_module.parse

    def accept(*args: object, **options: object) -> None:
        original(*args, **options)
        raise Parsed

    for module in map(import_module, MODULES):
        if module is not parse_module and hasattr(module, "parse"):
            monkeypatch.setattr(module, "parse", accept)
    default = import_module("regpt.cli.train").default_config
    for line in typed(page):
        resumed = {"--resume", "--fork-from"} & set(line)  # whose run is read before the flags over it are
        monkeypatch.setattr("regpt.cli.train.default_config", (lambda *args: None) if resumed else default)
        with pytest.raises(Parsed):
            main([*line[1:], "--debug"])
        if "--tasks" in line:
            assert parse_tasks(line[line.index("--tasks") + 1])


def test_lines_are_found_as_a_reader_sees_them(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "`regpt no`\n```\n$ regpt a b  # c\nregpt train … --x 1   then\nout\nregpt d [--e f] G…\n```\n",
        encoding="utf-8",
    )
    assert typed(page) == [
        ["regpt", "a", "b"],
        ["regpt", "train", *TRAINED, "--x", "1"],
        ["regpt", "d", "--e", "f", "G"],
    ]
    assert sum(len(typed(page)) for page in PAGES) > 60
