"""Lines and JSON, on terminals and elsewhere."""

import io
import json
import sys

import pytest

from regpt.console.lines import print_json, print_line, print_note, status

HOSTILE = {"name": "a\x1b[31m\x9b\u202e\x7f\udcff 日本 [red]"}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_shown_control_characters(monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    print_line("> q\x1b]0;x\x07 [bold]")
    assert terminal.getvalue() == "> q\\x1b]0;x\\x07 [bold]\n"


def test_a_pipe_gets_text_as_it_is(capsys):
    print_line("> q\x1b]0;x\x07 [bold]")
    assert capsys.readouterr().out == "> q\x1b]0;x\x07 [bold]\n"


@pytest.mark.parametrize("content", [HOSTILE, {"name": "\x9b31m"}, {"name": "日本\u202e"}, {"name": "\x7f"}])
def test_json_on_a_terminal_is_the_same_value_in_plain_characters(monkeypatch, content: dict[str, str]):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    print_json(content)
    assert json.loads(terminal.getvalue()) == content
    assert terminal.getvalue().isascii()
    assert terminal.getvalue()[:-1].isprintable()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_is_the_same_value_in_every_encoding(monkeypatch, encoding: str):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    print_json(HOSTILE | {"more": "🙂 é"})
    assert json.loads(raw.getvalue().decode(encoding)) == HOSTILE | {"more": "🙂 é"}


def test_json_keeps_the_letters_that_a_console_can_show(monkeypatch, capsys):
    print_json({"name": "日本"})
    assert "日本" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    print_json({"name": "日本"})
    assert "日本" in terminal.getvalue()


def test_a_stream_of_another_program_gets_what_its_encoding_holds(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252", newline="\n"))
    print_line("é 日")
    assert raw.getvalue() == b"\xe9 \\u65e5\n"


@pytest.mark.parametrize("quiet", [True, False])
def test_what_is_being_done_is_shown_on_a_terminal_unless_quiet(monkeypatch, quiet: bool):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with status(quiet) as say:
        say("read\x07ing")
    assert bool(terminal.getvalue()) == (not quiet)
    assert "\x07" not in terminal.getvalue()


def test_a_note_is_one_visible_sentence(capsys):
    print_note(f"model {'n' * 10**6 + chr(27)!r} cannot be read")
    said = capsys.readouterr().err
    assert said.startswith("regpt: model 'nnn")
    assert said.endswith("' cannot be read\n")
    assert len(said) < 300


def test_a_closed_or_missing_console_ends_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        print_line("x")
        print_note("x")
        print_json("x")
