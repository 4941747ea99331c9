"""Texts next to a model on which no number depends: chat template, its certificate, and options of generation."""

from collections.abc import Mapping
from pathlib import Path

from regpt.files import is_file
from regpt.text.folder import CERTIFICATE, CHAT, GENERATION, OPTIONS, read_optional, read_text

COMPANIONS = (CHAT, GENERATION, CERTIFICATE)


def read_companions(folder: Path) -> dict[str, str]:
    """Texts by file name. A template inside `tokenizer_config.json` is returned as `chat_template.jinja`; of several
    the one called `default`."""
    found = {name: read_text(folder / name) for name in COMPANIONS if is_file(folder / name)}
    inside = read_optional(folder / OPTIONS).get("chat_template")
    if isinstance(inside, list):
        named = (one for one in inside if isinstance(one, Mapping) and one.get("name") == "default")
        inside = next(named, {}).get("template")
    return found if CHAT in found or not isinstance(inside, str) or not inside else found | {CHAT: inside}
