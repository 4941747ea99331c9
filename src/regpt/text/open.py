"""Find a tokenizer by its name or its file."""

import json
from pathlib import Path

from regpt.errors import UserError, nearest
from regpt.files import is_file, is_folder
from regpt.text.bpe import BPETokenizer
from regpt.text.gpt2 import load_gpt2
from regpt.text.tokenizer import Tokenizer

NAMED = {"gpt2": load_gpt2}


def open_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `spec` names: `gpt2`, a `tokenizer.json`, or a folder that holds one (`./gpt2` is a folder).

    Raises:
        UserError: no such name or file, or a file that is not a tokenizer of ours.
    """
    if isinstance(spec, str) and spec in NAMED:
        return NAMED[spec]()
    path = Path(spec)
    file = path / "tokenizer.json" if is_folder(path) else path
    if not is_file(file):
        missing = (
            f"folder {path} holds no tokenizer.json" if is_folder(path) else f"there is no tokenizer {str(spec)!r}"
        )
        raise UserError(f"{missing}; give gpt2, a tokenizer.json or the folder of one{nearest(str(spec), NAMED)}")
    try:
        text = file.read_bytes().decode()  # bytes: a newline that Python translates would change the hash
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a tokenizer: it is not UTF-8 text") from None
    return from_json(text, str(file))


def from_json(text: str, where: str = "tokenizer.json") -> Tokenizer:
    """The tokenizer whose `to_json` returned `text`; `where` names it in errors.

    Raises:
        UserError: not a tokenizer of ours, or one that is not available here.
    """
    name, sha256 = reference(text)
    if name is None:
        try:
            return BPETokenizer(text)
        except UserError as error:
            raise UserError(f"{where} is {error}; give a file written by: regpt tokenizer train") from None
    if name not in NAMED:
        raise UserError(f"{where} names the tokenizer {name!r}, this regpt knows {', '.join(NAMED)}")
    tokenizer = NAMED[name]()
    if sha256 != tokenizer.sha256:
        raise UserError(f"{where} names a {name} tokenizer of SHA-256 {sha256}, this regpt has {tokenizer.sha256}")
    return tokenizer


def reference(text: str) -> tuple[str | None, str | None]:
    """Name and SHA-256 that a `tokenizer.json` of a named tokenizer holds; (None, None) for any other text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: a pit of brackets
        return None, None
    if not isinstance(content, dict) or "model" in content or "name" not in content:
        return None, None
    return str(content["name"]), str(content.get("sha256"))
