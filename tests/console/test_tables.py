"""Tables and the panel of a run: whole in files, never a number cut on a terminal."""

import io
import sys

import pytest
from rich.table import Table

from regpt.console.tables import PlainConsole, field, print_table, progress_bar
from regpt.runs.terminal import Terminal

LONG = "core/bigbench_a_task_with_a_rather_long_name_of_animals[en]"
NUMBER = "16,384,000,123 B"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def table() -> Table:
    made = Table("task", "text")
    made.add_column("tokens", justify="right")
    made.add_row(LONG, "several words that may wrap [/py] :smile: \x1b[31m", NUMBER)
    return made


def test_a_file_gets_every_letter_and_digit_in_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    out = io.StringIO()
    print_table(table(), PlainConsole(file=out))
    (line,) = [line for line in out.getvalue().splitlines() if LONG in line]
    assert NUMBER in line
    assert "several words that may wrap [/py] :smile: \\x1b[31m" in line


@pytest.mark.parametrize("width", ["20", "40", "100"])
def test_a_narrow_terminal_cuts_no_name_and_no_number(monkeypatch, width: str):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERM", "xterm")
    out = Screen()
    print_table(table(), PlainConsole(file=out))
    assert LONG in out.getvalue()
    assert NUMBER in out.getvalue()
    assert "\x1b[31m" not in out.getvalue()
    assert "[/py] :smile:" not in out.getvalue()  # text wraps
    assert "…" not in out.getvalue()


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
