"""The heat maps of a needle in a haystack."""

import json
import re
from pathlib import Path

import pytest
from run_files import train_row

from regpt.report.page import write_report

TRAIN = [train_row(step) for step in range(1, 41)]
CELLS = {"lengths": [256, 1024], "depths": [0, 50, 100], "values": [[0.0, None], [0.5, 0.125], [1.0, 1]]}


def eval_row(metric: str, cells, step: int = 40) -> dict:
    return {
        "kind": "eval",
        "step": step,
        "task": "needle",
        "metric": metric,
        "value": 0.5,
        "stderr": 0.1,
        "cells": cells,
    }


def tables(page: Path) -> list[list[list[str]]]:
    """Cells of each map, the header first, as they are read."""
    found = re.findall(r'<table class="heat">(.*?)</table>', page.read_text(encoding="utf-8"), flags=re.S)
    rows = [re.findall(r"<tr>(.*?)</tr>", one) for one in found]
    return [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in one] for one in rows]


EXPECTED = [
    ["depth", "256", "1,024"],
    ["0 %", "0.00", "–"],
    ["50 %", "0.50", "0.12"],
    ["100 %", "1.00", "1.00"],
]


def test_the_last_evaluation_of_training_is_drawn(make_run):
    other = CELLS | {"values": [[0.25] * 2] * 3}
    rows = [*TRAIN, eval_row("exact", other, 20), eval_row("exact", CELLS), eval_row("rank", other)]
    page = write_report(make_run(rows))
    exact, rank = tables(page)
    assert exact == EXPECTED
    assert rank[1] == ["0 %", "0.25", "0.25"]
    text = page.read_text(encoding="utf-8")
    assert "Needle in a haystack after step 40" in text
    assert 'style="--v:0.125"' in text


def test_a_file_of_regpt_eval_takes_its_place(make_run):
    run = make_run([*TRAIN, eval_row("exact", CELLS | {"values": [[0.25] * 2] * 3})])
    (run / "evals").mkdir()
    report = {"step": 30, "tasks": {"needle": {"metrics": {"exact": {"value": 0.4, "cells": CELLS}}}}}
    (run / "evals" / "needle.json").write_text(json.dumps(report), encoding="utf-8")
    page = write_report(run)
    assert tables(page) == [EXPECTED]
    assert "Needle in a haystack after step 30" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "cells", [None, [], {"lengths": [1]}, CELLS | {"values": [[1.0]]}, CELLS | {"values": [3, 4, 5]}], ids=str
)
def test_malformed_cells_are_left_out(make_run, cells):
    run = make_run([*TRAIN, eval_row("exact", cells)])
    (run / "evals").mkdir()
    page = write_report(run)
    assert tables(page) == []
    assert "Needle in a haystack" not in page.read_text(encoding="utf-8")
    (run / "evals" / "needle.json").write_text("{", encoding="utf-8")
    assert tables(write_report(run)) == []


def test_values_of_any_kind_stay_inside_their_cells(make_run):
    odd = CELLS | {"lengths": ["<b>", 2], "values": [["<i>", 7.0], [None, -1], [True, float("1e999")]]}
    page = write_report(make_run([*TRAIN, eval_row("<u>", odd)]))
    (table,) = tables(page)
    assert table[0][1] == "&lt;b&gt;"
    assert [row[1:] for row in table[1:]] == [["–", "1.00"], ["–", "0.00"], ["–", "–"]]
