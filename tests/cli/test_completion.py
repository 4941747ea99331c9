"""Completion, asked of the shells themselves."""

import shutil
import subprocess
from pathlib import Path

import pytest

from regpt.__main__ import main
from regpt.cli.commands import ARGUMENTS, COMMANDS

TYPED = {
    "regpt ver": ["verify-receipt", "verify-resume"],
    "regpt data ": ["import", "info", "prepare", "verify"],
    "regpt data prepare --ded": ["--dedup"],
    "regpt train gpt2-t": ["gpt2-tiny"],
    "regpt train --train.prec": ["--train.precision"],
    "regpt train --train.precision b": ["bf16"],
    "regpt train --train.compile f": ["false"],
    "regpt runs --json --h": ["--help"],
    "regpt --v": ["--version"],
    "regpt completion z": ["zsh"],
}
BASH = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _regpt; printf "%s\\n" "${COMPREPLY[@]}"'


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", shell]) == 0
    path = folder / "script"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    return path


def test_every_command_has_its_arguments():
    assert {command.split()[0] for command in ARGUMENTS} == COMMANDS.keys()


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes(tmp_path: Path, capsys):
    path = script("bash", tmp_path, capsys)
    for typed, wanted in TYPED.items():
        words = [*typed.split(), *([""] if typed.endswith(" ") else [])]
        found = subprocess.run(
            ["bash", "-c", f'source "{path}"; {BASH}', "bash", *words], capture_output=True, text=True, check=True
        )
        assert sorted(found.stdout.split()) == wanted, typed


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish")
def test_fish_completes(tmp_path: Path, capsys):
    path = script("fish", tmp_path, capsys)
    for typed, wanted in TYPED.items():
        ask = f"source '{path}'; complete -C '{typed}' | string split -f1 \\t"
        found = subprocess.run(["fish", "--no-config", "-c", ask], capture_output=True, text=True, check=False)
        assert sorted(found.stdout.split()) == wanted, typed


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_zsh_takes_the_script(tmp_path: Path, capsys):
    path = script("zsh", tmp_path, capsys)
    found = subprocess.run(
        ["zsh", "-fc", f"source '{path}'; echo $_comps[regpt]"], capture_output=True, text=True, check=True
    )
    assert "_regpt" in found.stdout
