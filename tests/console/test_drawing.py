"""Progress bars and the panel of a run: never a number cut on a terminal."""

import io
import re
import sys

import pytest

from regpt.console.drawing import PlainConsole, field, print_parts, progress_bar
from regpt.runs.terminal import Terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_progress_bar_shows_braces_and_brackets_of_names():
    from rich.progress import Task

    name = "mc:{0}[red]x[/py].jsonl"
    task = Task(0, name, total=1, completed=0, _get_time=lambda: 0.0)  # type: ignore[arg-type]
    assert field("description").render(task).plain == name


@pytest.mark.parametrize("terminal", [False, True])
def test_a_progress_bar_is_drawn_on_a_terminals_stderr_only(monkeypatch, capsys, terminal: bool):
    monkeypatch.setenv("TERM", "xterm")
    out = Screen() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with progress_bar(field("description")) as bar:
        bar.add_task("encode [red]")
    assert ("encode [red]" in out.getvalue()) == bool(out.getvalue()) == terminal
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("width", ["24", "50", "80"])
def test_the_panel_of_a_run_cuts_no_number(monkeypatch, width: str):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERM", "xterm")
    out = Screen()
    figures = {"loss": 10.9012, "lr": 6e-4, "grad_norm": 1.25, "dt_ms": 100.0, "tokens_per_s": 523456.0}
    with Terminal("runs/[red]x", 19_073, PlainConsole(file=out)) as terminal:
        terminal.row({"kind": "train", "step": 12_345} | figures)
    for number in ("12,345", "19,073", "10.9012", "6.00e-04", "523,456"):
        assert number in out.getvalue()
    assert "runs/[red]x" in out.getvalue()


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert Terminal("run", 10, PlainConsole(file=Screen())).live is None


def test_what_is_trained_on_is_coloured_on_a_terminal_and_in_brackets_in_a_file(monkeypatch):
    texts = [("[red]Q[/]\n", 0), ("A\x1b", 1), ("<end>", 2)]
    plain, screen = io.StringIO(), Screen()
    print_parts(texts, PlainConsole(file=plain))
    assert plain.getvalue() == "[red]Q[/]\n[[A\\x1b]]{{<end>}}\n"
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_parts(texts, PlainConsole(file=screen))
    found = re.findall(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", screen.getvalue(), flags=re.DOTALL)
    assert [text for _, text in found if text.strip()] == ["[red]Q[/]", "A\\x1b", "<end>"]
    assert len({code for code, text in found if text.strip()}) == 3
