"""Find a tokenizer by its name or its file."""

from pathlib import Path

from regpt.errors import UsageError, UserError, nearest
from regpt.files import is_file, is_folder
from regpt.structured import parse_json
from regpt.text.bpe import BPETokenizer, byte_tokenizer
from regpt.text.folder import MERGES, TOKENIZER, VOCAB, find_tokenizer, folder_json, read_text
from regpt.text.gpt2 import RULES_SHA256, GPT2Tokenizer, load_gpt2, ranks_of
from regpt.text.tokenizer import Tokenizer

NAMED = {"gpt2": load_gpt2, "bytes": byte_tokenizer}  # shards keep the second in full, as a trained one
OTHER_KINDS = ("vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.bpe")


def open_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `spec` names: `gpt2`, `bytes`, a `tokenizer.json`, or a folder with one or with `vocab.json`
    and `merges.txt` (`./gpt2` is a folder). Whatever has GPT-2's rules is `gpt2`.

    Raises:
        UsageError: no such name or file.
        UserError: a file that is not a tokenizer of ours.
    """
    if isinstance(spec, str) and spec in NAMED:
        return NAMED[spec]()
    path = Path(spec)
    if is_folder(path):
        file = find_tokenizer(path)
        if file is None:
            raise UserError(
                f"folder {path} holds no {TOKENIZER}, nor {VOCAB} with {MERGES}{other_kind(path)}; give gpt2, bytes, a "
                f"{TOKENIZER} or the folder of one{nearest(str(spec), NAMED)}"
            )
        return from_json(folder_json(file), str(file))
    if not is_file(path):
        known = f"gpt2, bytes, a {TOKENIZER} or the folder of one{nearest(str(spec), NAMED)}"
        raise UsageError(f"there is no tokenizer {str(spec)!r}; give {known}")
    return from_json(read_text(path), str(path))


def other_kind(folder: Path) -> str:
    """` (it holds vocab.txt, which regpt does not read)` for a tokenizer of another kind."""
    found = next((name for name in OTHER_KINDS if is_file(folder / name)), None)
    return f" (it holds {found}, which regpt does not read)" if found else ""


def from_json(text: str, where: str = "tokenizer.json") -> Tokenizer:
    """The tokenizer whose `to_json` returned `text`; `where` names it in errors.

    Raises:
        UserError: not a tokenizer of ours, or one that is not available here.
    """
    name, sha256 = reference(text)
    if name is None:
        try:
            tokenizer = BPETokenizer(text)
        except UserError as error:
            raise UserError(f"{where} is {error}; give a file written by: regpt tokenizer train") from None
        return GPT2Tokenizer(ranks_of(tokenizer.rules.vocab)) if tokenizer.sha256 == RULES_SHA256 else tokenizer
    if name not in NAMED:
        raise UserError(f"{where} names the tokenizer {name!r}, this regpt knows {', '.join(NAMED)}")
    tokenizer = NAMED[name]()
    if sha256 != tokenizer.sha256:
        raise UserError(f"{where} names a {name} tokenizer of SHA-256 {sha256}, this regpt has {tokenizer.sha256}")
    return tokenizer


def reference(text: str) -> tuple[str | None, str | None]:
    """Name and SHA-256 that a `tokenizer.json` of a named tokenizer holds; (None, None) for any other text."""
    try:
        content = parse_json(text)
    except ValueError:
        return None, None
    if not isinstance(content, dict) or "model" in content or "name" not in content:
        return None, None
    return str(content["name"]), str(content.get("sha256"))
