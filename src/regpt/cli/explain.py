"""`regpt explain`: pages that explain what trains a GPT."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt.cli.parse import parse
from regpt.console.drawing import print_markdown
from regpt.console.lines import print_line, print_rows
from regpt.errors import UsageError
from regpt.files import write_errors, write_json
from regpt.learn.pages import FOLDER, lesson_names, notebook_of, read_lesson


@dataclass(frozen=True)
class ExplainArgs:
    """Explain a topic: text, a picture, a program to run, an exercise with its answer. Without one, list all."""

    topic: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TOPIC")] = ""
    """Such as softmax."""
    notebook: Annotated[Path | None, tyro.conf.arg(metavar="FILE.ipynb")] = None
    """Write the page as a notebook, in place of printing it."""


def main(args: list[str]) -> int:
    given = parse(ExplainArgs, args, prog="regpt explain")
    if not given.topic:
        if given.notebook:
            raise UsageError("--notebook needs a topic; regpt explain lists them")
        print_rows(("topic", ""), [(name, read_lesson(name).title) for name in lesson_names()], left=(0, 1))
        return 0
    lesson = read_lesson(given.topic)
    if given.notebook:
        with write_errors(given.notebook, "give another file to --notebook"):
            write_json(given.notebook, notebook_of(lesson))
        print_line(f"wrote {given.notebook}")
        return 0
    print_markdown(lesson.text)
    print_line(f"the picture: {FOLDER / lesson.name}.svg")
    return 0
