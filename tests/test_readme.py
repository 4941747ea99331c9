"""What the README tells a newcomer to type works as typed; the quickstart is shortened."""

import re
import shlex
from pathlib import Path

import pytest

from regpt.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def typed(program: str) -> list[list[str]]:
    """Words of every line of the README's shell blocks that calls `program`, comments left out."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words[:1] == [program]]


def test_the_two_commands_are_targets_of_the_makefile():
    targets = [words[1] for words in typed("make")]
    assert targets == ["quickstart", "test"]
    for target in targets:
        assert re.search(rf"^{target}: install\n", MAKEFILE, flags=re.MULTILINE)
    assert "$(BIN)/regpt quickstart\n" in MAKEFILE


def test_the_table_names_every_command():
    table = README[README.index("| command |") :].split("\n\n")[0]
    assert set(re.findall(r"`regpt ([\w-]+)", table)) == COMMANDS.keys()


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda page: page.name)
def test_no_page_keeps_the_marks_of_a_merge(page: Path):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(("<<<<<<< ", ">>>>>>> ")) or line == "======="] == []


def test_the_quickstart_trains_and_what_it_suggests_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "quickstart"
    assert main(["quickstart", "--steps", "6", "--out", str(run)]) == 0
    said = capsys.readouterr().out
    assert "word frequencies" in said
    assert "before training:" in said
    assert (run / "report.html").stat().st_size > 50_000
    suggested = [shlex.split(line) for line in said.splitlines() if line.startswith(("  regpt sample", "  regpt eval"))]
    assert len(suggested) == 2
    for words in suggested:
        assert main(words[1:]) == 0, capsys.readouterr().err


def test_the_quickstart_refuses_a_folder_that_holds_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.toml").write_text("", encoding="utf-8")
    assert main(["quickstart", "--out", str(tmp_path)]) == 1
    assert "--resume" in capsys.readouterr().err
