"""Pictures: written whole or not at all, and refused before any work where they cannot be."""

import sys

import pytest

from regpt.errors import UsageError, UserError
from regpt.report.picture import check_picture, save_figure


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_a_picture_is_of_the_kind_that_its_name_says(tmp_path, name, magic):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    save_figure(figure, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_picture_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--out '.*a.pdf' has no known kind of picture; end it in .png or .svg"):
        check_picture(tmp_path / "a.pdf")


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    with pytest.raises(UserError, match=r"cannot write '.*none.a.png' \(No such file or directory\); choose another"):
        save_figure(figure, tmp_path / "none" / "a.png")


def test_a_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'regpt\[report\]'"):
        check_picture(tmp_path / "a.png")
