"""The page at `/`: three files of this package, and nothing else."""

from importlib.resources import files

SCRIPTS = ("tokens.js", "page.js")
STYLES = ("tokens.css", "page.css")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def page_asset(name: str) -> str:
    return files("regpt.serve").joinpath(name).read_text(encoding="utf-8").strip() + "\n"


def script(names: tuple[str, ...] = SCRIPTS) -> str:
    return '(() => {\n"use strict";\n' + "".join(map(page_asset, names)) + "})();\n"


def page_files() -> dict[str, tuple[str, str]]:
    """Path → media type, content."""
    return {
        "/": ("text/html", page_asset("page.html")),
        "/page.css": ("text/css", "".join(map(page_asset, STYLES))),
        "/page.js": ("text/javascript", script()),
    }
