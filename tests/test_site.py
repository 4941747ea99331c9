"""The pages as a site: every link of README.md and docs/ leads somewhere, every page is in the menu."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs")
pytestmark = pytest.mark.filterwarnings("ignore")


def build(root: Path, site: Path) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(root / "mkdocs.yml"), site_dir=str(site)))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A small repository with the settings of this one: two pages, a README and a source file."""
    for folder in (".ci", "docs", "src"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / ".ci" / "site.py", tmp_path / ".ci")
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = "nav:\n  - index.md\n  - one.md\n  - two.md\n"
    (tmp_path / "mkdocs.yml").write_text(settings[: settings.index("nav:\n  -")] + pages, encoding="utf-8")
    (tmp_path / "README.md").write_text("# R\n\n[one](docs/one.md#a-b--c_d) [code](src/x.py)\n", encoding="utf-8")
    (tmp_path / "docs" / "one.md").write_text("# One\n\n## A (b) / `c_d`\n\n[r](../README.md)\n", encoding="utf-8")
    (tmp_path / "docs" / "two.md").write_text("# Two\n\n[code](../src/x.py)\n", encoding="utf-8")
    (tmp_path / "src" / "x.py").write_text("x = 1\n", encoding="utf-8")
    return tmp_path


def test_the_site_builds_without_a_warning_and_with_all_its_pages(tmp_path: Path):
    build(ROOT, tmp_path / "site")
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "site" / f"{page.stem}.html").is_file()
    index = (tmp_path / "site" / "index.html").read_text("utf-8")
    assert 'href="training.html"' in index
    assert 'href="source/src/regpt/train/trainer.py.html"' in index
    assert not re.findall(r'(?:src|<link[^>]*href)="https?://', index)  # nothing is loaded from elsewhere


def test_links_lead_out_of_docs_and_back(copy: Path):
    build(copy, copy / "site")
    assert 'href="source/src/x.py.html"' in (copy / "site" / "index.html").read_text("utf-8")
    assert 'href="index.html"' in (copy / "site" / "one.html").read_text("utf-8")
    assert "x" in (copy / "site" / "source" / "src" / "x.py.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("README.md", "[gone](docs/gone.md)"),
        ("README.md", "[gone](src/gone.py)"),
        ("docs/one.md", "[gone](../src/gone.py)"),
        ("docs/one.md", "[gone](two.md#gone)"),
        ("docs/one.md", "[gone](#gone)"),
        ("docs/orphan.md", "# In no menu"),
    ],
)
def test_a_dead_link_and_a_page_in_no_menu_end_the_build(copy: Path, file: str, text: str):
    from mkdocs.exceptions import Abort

    with (copy / file).open("a", encoding="utf-8") as page:
        page.write(f"\n{text}\n")
    with pytest.raises(Abort):
        build(copy, copy / "site")
