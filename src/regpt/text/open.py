"""Find a tokenizer by its name or its file."""

from collections.abc import Callable
from pathlib import Path

from regpt.errors import UsageError, UserError, nearest
from regpt.files import is_file, is_folder
from regpt.text.bpe import BPETokenizer, byte_tokenizer
from regpt.text.folder import MERGES, TOKENIZER, VOCAB, file_content, find_tokenizer, folder_content
from regpt.text.gpt2 import RULES_SHA256, GPT2Tokenizer, load_gpt2, ranks_of
from regpt.text.library import LibraryTokenizer
from regpt.text.rules import NotATokenizer, is_like_gpt2, parse_content
from regpt.text.spec import Json, read_spec
from regpt.text.tokenizer import Tokenizer

NAMED = {"gpt2": load_gpt2, "bytes": byte_tokenizer}  # shards keep the second in full, as a trained one
OTHER_KINDS = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.bpe")


def open_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `spec` names: `gpt2`, `bytes`, a `tokenizer.json`, or a folder with one, with `vocab.json`
    and `merges.txt`, or with `tokenizer.model` (`./gpt2` is a folder). Whatever has GPT-2's rules is `gpt2`.

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
        return open_content(lambda: folder_content(file), str(file))
    if not is_file(path):
        known = f"gpt2, bytes, a {TOKENIZER} or the folder of one{nearest(str(spec), NAMED)}"
        raise UsageError(f"there is no tokenizer {str(spec)!r}; give {known}")
    return open_content(lambda: file_content(path), str(path))


def other_kind(folder: Path) -> str:
    """` (it holds vocab.txt, which regpt does not read)` for a tokenizer of another kind."""
    found = next((name for name in OTHER_KINDS if is_file(folder / name)), None)
    return f" (it holds {found}, which regpt does not read)" if found else ""


def from_json(text: str) -> Tokenizer:
    """The tokenizer whose `to_json` returned `text`.

    Raises:
        UserError: not a tokenizer of ours, or one that is not available here.
    """
    return open_content(lambda: parse_content(text), TOKENIZER)


def open_content(read: Callable[[], Json], where: str) -> Tokenizer:
    """The tokenizer that the contents of a `tokenizer.json` describe or name; `where` names the file in errors."""
    try:
        content = read()
        if "model" not in content:
            return named_tokenizer(content, where)
        if not is_like_gpt2(content):
            return LibraryTokenizer(read_spec(content))
        tokenizer = BPETokenizer(content)
    except NotATokenizer as error:
        raise UserError(f"{where} is {error}; {error.remedy}") from None
    return GPT2Tokenizer(ranks_of(tokenizer.rules.vocab)) if tokenizer.sha256 == RULES_SHA256 else tokenizer


def named_tokenizer(content: Json, where: str) -> Tokenizer:
    """The tokenizer that a `tokenizer.json` of a data folder or checkpoint names."""
    name, sha256 = str(content["name"]), content.get("sha256")
    if name not in NAMED:
        raise UserError(f"{where} names the tokenizer {name!r}, this regpt knows {', '.join(NAMED)}")
    tokenizer = NAMED[name]()
    if sha256 != tokenizer.sha256:
        raise UserError(f"{where} names a {name} tokenizer of SHA-256 {sha256}, this regpt has {tokenizer.sha256}")
    return tokenizer
