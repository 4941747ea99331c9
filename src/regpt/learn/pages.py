"""The pages of `regpt explain`, as files next to this one: text, a program with what it prints, an exercise with its
answer.

A page is Markdown of a fixed order: `# title`, paragraphs with one picture, `## Try it` with a block of Python and a
block of what it prints, `## Exercise` whose answer is a block of Python that ends without an error, `## In the source`,
`## Papers`.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from regpt.errors import UsageError

FOLDER = Path(__file__).parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Lesson:
    """A page.

    Attributes:
        program, output: what can be run, and what it prints.
        answer: a program that checks the exercise's answer.
    """

    name: str
    text: str

    @property
    def title(self) -> str:
        return self.text.splitlines()[0].removeprefix("# ")

    @property
    def program(self) -> str:
        return self._blocks("Try it")[0]

    @property
    def output(self) -> str:
        return self._blocks("Try it")[1]

    @property
    def answer(self) -> str:
        return self._blocks("Exercise")[0]

    def section(self, title: str) -> str:
        """The text under a heading; empty where there is none."""
        found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", self.text, flags=re.DOTALL | re.MULTILINE)
        return found[1] if found else ""

    def _blocks(self, title: str) -> list[str]:
        return [block for _, block in BLOCK.findall(self.section(title))]


def lesson_names() -> list[str]:
    """Names of all pages."""
    return sorted(path.stem for path in FOLDER.glob("*.md"))


def read_lesson(name: str) -> Lesson:
    """The page `name`.

    Raises:
        UsageError: there is none; it names those that are near.
    """
    known = lesson_names()
    if name not in known:
        near = get_close_matches(name, known, 3) or known
        raise UsageError(f"there is no page {name!r}; topics are {', '.join(near)} (all: regpt explain)")
    return Lesson(name, (FOLDER / f"{name}.md").read_text(encoding="utf-8"))


def notebook_of(lesson: Lesson) -> dict[str, Any]:
    """The page as a Jupyter notebook (nbformat 4.5): its programs are cells, what they print is left for the reader to
    see."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, text: str) -> None:
        if text.strip():
            code = {"execution_count": None, "outputs": []} if kind == "code" else {}
            source = text.strip("\n").splitlines(keepends=True)
            cells.append(
                {"cell_type": kind, "id": f"{lesson.name}-{len(cells)}", "metadata": {}, "source": source} | code
            )

    at = 0
    for found in BLOCK.finditer(lesson.text):
        add("markdown", lesson.text[at : found.start()])
        if found[1] == "python":
            add("code", found[2])
        at = found.end()
    add("markdown", lesson.text[at:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
