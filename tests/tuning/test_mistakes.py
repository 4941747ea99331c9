"""What users get wrong with `regpt finetune`: one sentence that says how to go on, and nothing is left behind."""

import json
import re

import pytest

from conversation_files import TUNING, save_byte_model
from regpt.__main__ import main
from regpt.prepare.conversations import question_fraction


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"instruction": f"say {i}", "output": f"it is {i}"} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("model") / "bytes")


def refused(capsys, model, rows, *flags):
    given = ["--init-from", str(model), "--data", str(rows), *TUNING, "--train.steps", "1", *map(str, flags)]
    assert main(["finetune", "sft-tiny", *given]) != 0
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "traceback in" not in said
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 1/0 }}", "cannot render these messages: division by zero; give another with --template"),
        ("{% for m in messages %}{{ raise_exception('no') }}{% endfor %}", "cannot render these messages: no; give"),
        ("{% for m in", r"is not valid: .* \(line 1\)"),
        ("{{ messages[0].content }}", "writes no special token after an answer"),
    ],
)
def test_a_template_that_cannot_be_used_says_why_before_any_row_is_read(
    template, why, small_model, rows, tmp_path, capsys
):
    file = tmp_path / "template.jinja"
    file.write_text(template, encoding="utf-8")
    said = refused(capsys, small_model, rows, "--template", file, "--on-error", "skip", "--out", tmp_path / "run")
    assert re.search(why, said), said
    assert "row" not in said


def test_a_place_that_cannot_be_written_is_named(small_model, rows, capsys):
    out = rows / "x"  # within a file
    assert f"--out {out} cannot be written" in refused(capsys, small_model, rows, "--out", out)


def test_a_fraction_that_holds_something_out_is_named_and_works(small_model, rows, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(rows.read_text(encoding="utf-8").splitlines()[:3]), encoding="utf-8")
    said = refused(capsys, small_model, few, "--val-fraction", 0.0001, "--out", tmp_path / "run")
    assert "none of 3 conversations fell into the split val at --val-fraction 0.0001; give --val-fraction 0." in said
    fraction = float(said.partition("give --val-fraction ")[2].partition(" ")[0])
    asked = [f"say {i}" for i in range(3)]
    assert min(question_fraction([{"role": "user", "content": one}]) for one in asked) < fraction


def test_the_shape_is_that_of_the_model_to_begin_with(small_model, rows, tmp_path, capsys):
    said = refused(capsys, small_model, rows, "--model.n-layer", 5, "--out", tmp_path / "run")
    assert "--model.n-layer would be of another model than --init-from" in said
