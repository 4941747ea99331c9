"""Hooks of mkdocs (mkdocs.yml): pages that are not in docs/, and links as GitHub reads them.

A link out of docs/ leads to a page that shows the file; what does not exist stays a dead link, and ends the build.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
AT_THE_TOP = {"README.md": "index.md"}  # and other .md files of the root under their own names
LEARN = "src/regpt/learn/"  # pages with pictures, which are in the package
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)((?:#[^)\s]*)?\))")
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs.setdefault("toc", {})["slugify"] = github_slug
    return config


def github_slug(title: str, separator: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", separator)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, the notebook, and every file that a page links to."""
    pages = {file.src_uri: f"docs/{file.src_uri}" for file in files.documentation_pages()}
    pages |= {AT_THE_TOP.get(path.name, path.name): path.name for path in ROOT.glob("*.md")}
    pages |= {uri_of(LEARN + path.name): LEARN + path.name for path in (ROOT / LEARN).glob("*.md")}
    for uri, place in pages.items():
        if not place.startswith("docs/"):
            files.append(page(config, uri, translated((ROOT / place).read_text("utf-8"), place, uri)))
    for notebook in (ROOT / "docs").glob("*.ipynb"):
        files.append(page(config, f"{notebook.stem}.md", notebook_page(json.loads(notebook.read_text("utf-8")))))
    for place in sorted({target for source in pages.values() for target in linked(source)} - set(pages.values())):
        if place.startswith(LEARN) and (ROOT / place).suffix == ".svg" and (ROOT / place).is_file():
            files.append(File.generated(config, uri_of(place), abs_src_path=str(ROOT / place)))
        elif not place.startswith("docs/") and (text := shown(place)) is not None:
            files.append(page(config, uri_of(place), text, InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, *, page: Any, **others: Any) -> str:
    if page.file.generated_by:
        return markdown  # translated when it was made
    return translated(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def page(config: MkDocsConfig, uri: str, text: str, level: InclusionLevel = InclusionLevel.UNDEFINED) -> File:
    return File.generated(config, uri, content=text, inclusion=level)


def linked(place: str) -> set[str]:
    """Places in the repository that the page at `place` links to."""
    found = LINK.findall((ROOT / place).read_text("utf-8"))
    return {normpath(f"{Path(place).parent.as_posix()}/{target}") for _, target, _ in found}


def translated(markdown: str, place: str, uri: str) -> str:
    """`markdown` of the file `place` as the page `uri`: links to places become links to pages."""

    def replaced(found: re.Match[str]) -> str:
        target = normpath(f"{Path(place).parent.as_posix()}/{found[2]}")
        return found[1] + relpath(uri_of(target), Path(uri).parent.as_posix()) + found[3]

    return outside_code(markdown, lambda text: LINK.sub(replaced, text))


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def uri_of(place: str) -> str:
    """Page of the site that shows the file or folder `place` of the repository."""
    if place.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", place.removeprefix("docs/"))
    if place.startswith(LEARN) and place.endswith((".md", ".svg")):
        return f"learn/{place.removeprefix(LEARN)}"
    if "/" not in place and place.endswith(".md"):
        return AT_THE_TOP.get(place, place)
    return f"source/{place.removesuffix('.md')}.md"


def shown(place: str) -> str | None:
    """A file or folder as a page; None where there is no such thing."""
    path = ROOT / place
    if path.suffix == ".md" and path.is_file():
        return translated(path.read_text("utf-8"), place, uri_of(place))
    if path.is_file():
        return f"# {place}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text('utf-8')}\n````\n"
    if path.is_dir():
        return f"# {place}\n\n" + "".join(f"- `{each.name}`\n" for each in sorted(path.glob("*.py")))
    return None


def notebook_page(notebook: dict[str, Any]) -> str:
    """Cells and their outputs as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
