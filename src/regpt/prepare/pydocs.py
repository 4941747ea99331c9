"""The named set `pydocs`: reference and docstrings of the running Python as training text, without a download.

The standard library's sources are parsed with `ast` and never imported. One document is a topic of the language
reference or a module: its name, then the docstring of everything in it that has one, under its signature, in the order
of the source. Topics come first, then modules, both sorted by name.
"""

import ast
import itertools
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from regpt.errors import UserError

# Not documentation, not the standard library, or Python 2's grammar.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def pydocs(library: Path | None = None) -> Iterator[str]:
    """The documents; `library` is the folder of the standard library's sources, by default the running Python's.

    Raises:
        UserError: this Python has no sources of its standard library.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    found = False
    for text in itertools.chain(topics(library), modules(library)):
        found = True
        yield text
    if not found:
        raise UserError(
            f"pydocs needs the sources of Python's standard library; {library} holds none, give files instead"
        )


def topics(library: Path) -> Iterator[str]:
    """The language reference, as `help('TOPIC')` shows it."""
    path = library / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "topics":
            for _, text in sorted(ast.literal_eval(node.value).items()):
                yield text.strip() + "\n"


def modules(library: Path) -> Iterator[str]:
    paths = (path for path in library.rglob("*.py") if not SKIPPED & set(path.relative_to(library).parts))
    names = {module_name(path.relative_to(library)): path for path in paths}
    for name, path in sorted(names.items()):
        try:
            with warnings.catch_warnings(action="ignore"):  # escapes that the running Python deprecates
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a template, not a module
            continue
        parts = list(docstrings(tree, ""))
        if parts:
            yield f"{name}\n\n" + "\n\n".join(parts) + "\n"


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def docstrings(node: ast.Module | Definition, prefix: str) -> Iterator[str]:
    """The docstring of `node` and of the definitions directly in it, depth first, in the order of the source."""
    text = ast.get_docstring(node)
    if text:
        heading = "" if isinstance(node, ast.Module) else signature(node, prefix) + "\n\n"
        yield heading + text.strip()
    inner = "" if isinstance(node, ast.Module) else f"{prefix}{node.name}."
    for child in node.body:
        if isinstance(child, Definition):
            yield from docstrings(child, inner)


def signature(node: Definition, prefix: str) -> str:
    """`class textwrap.TextWrapper(Base):`, `def name(arguments):`, as the source has it."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}{node.name}({bases}):" if bases else f"class {prefix}{node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{keyword} {prefix}{node.name}({ast.unparse(node.args)}):"
