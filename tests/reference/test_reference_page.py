"""The programs on docs/reference.md run and show what the page says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.reference.mutations import MUTATIONS

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def programs():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_training_on_the_page_learns_the_line_by_heart(capsys):
    exec(programs()[0], {})
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert 5.4 < losses[0] < 5.7
    assert losses[-1] < 0.1


def test_the_comparison_on_the_page_holds():
    exec(programs()[1], {})


def test_the_page_counts_the_formulas_that_are_broken():
    """That all are caught, `python tests/reference/mutations.py` shows; it takes minutes."""
    table = re.findall(r"\| `(\w+)\.py` \| (\d+) \| (\d+) \|", PAGE.read_text(encoding="utf-8"))
    assert {name: int(broken) for name, broken, _ in table} == {name: len(MUTATIONS[name]) for name in MUTATIONS}
    assert all(broken == caught for _, broken, caught in table)


@pytest.mark.slow
def test_every_broken_formula_is_caught():
    script = Path(__file__).parent / "mutations.py"
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
