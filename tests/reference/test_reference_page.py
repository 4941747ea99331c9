"""The programs on docs/reference.md run and show what the page says."""

import re
from pathlib import Path

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
