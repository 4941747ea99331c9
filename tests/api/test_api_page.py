"""docs/api.md: its examples run, its signatures are the functions'."""

import inspect
import random
import re
from pathlib import Path

import pytest

import regpt

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SIGNATURE = re.compile(r"regpt\.(\w+)\((.*)\)\n")
SIGNATURES = [found for block in BLOCKS if (found := SIGNATURE.fullmatch(block)) and f"## regpt.{found[1]}\n" in PAGE]


def write_texts(folder: Path) -> None:
    draw = random.Random(1)
    words = [
        "The",
        "cat",
        "sat",
        "sits",
        "under",
        "mats",
        "and",
        "saw",
        "another",
        "dog",
        "without",
        "barking",
        "Yesterday",
    ]
    folder.mkdir()
    for number in range(20):
        lines = [" ".join(draw.choices(words, k=9)) for _ in range(20)]
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    write_texts(Path("my_texts"))
    examples = [block for block in BLOCKS if not SIGNATURE.fullmatch(block)]
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), names)
    said = capsys.readouterr().out
    assert "did you mean 'gpt2-tiny'" in said
    assert "True 20" in said
    assert len(examples) >= 7


@pytest.mark.parametrize("found", SIGNATURES, ids=lambda found: found[1])
def test_the_signatures_are_those_of_the_functions(found: re.Match[str]):
    signature = inspect.signature(getattr(regpt, found[1]))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert f"({found[2]})" == str(inspect.Signature(bare)).replace("'", '"')


def test_every_public_name_is_on_the_page():
    for name in regpt.__all__:
        assert f"regpt.{name}" in PAGE
    functions = {name for name in regpt.__all__ if name.islower()}
    assert {found[1] for found in SIGNATURES} == functions
