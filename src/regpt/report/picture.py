"""Pictures (.png or .svg): what can be wrong with their names, and atomic writing."""

from pathlib import Path
from typing import TYPE_CHECKING

from regpt.errors import UsageError, import_extra
from regpt.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
OTHER_OUT = "choose another place for --out"


def check_picture(path: Path) -> None:
    """Raise what `save_figure` would for the name of the file, and for a missing package, before any work."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out {str(path)!r} has no known kind of picture; end it in {' or '.join(SUFFIXES)}")
    import_extra("matplotlib", "a picture needs matplotlib", "report")


def save_figure(figure: "Figure", path: Path) -> None:
    """Replace the picture `path` (.png or .svg) atomically.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path, OTHER_OUT) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)
