"""The tokenizer of a folder as one `tokenizer.json`: that file, or `vocab.json` with `merges.txt`, and what joins it.

Hugging Face folders spread a tokenizer over these files; many older models have no `tokenizer.json`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regpt.errors import UserError
from regpt.files import is_file
from regpt.structured import parse_json, read_json, read_small
from regpt.text.rules import BYTE_LEVEL
from regpt.text.tokenizer import ENDOFTEXT

TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
OPTIONS, ADDED, NAMES = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
RESTORE = "restore the file or give another tokenizer"
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")  # what transformers makes of a vocab.json and a merges.txt
PREFIXES = (
    "add_prefix_space",
    "add_bos_token",
    "add_eos_token",
)  # the latter two are in the tokenizer.json if there is one

Json = dict[str, Any]


def find_tokenizer(folder: Path) -> Path | None:
    """The file that describes the tokenizer of `folder`: `tokenizer.json`, else `vocab.json` where there is one."""
    return next((folder / name for name in (TOKENIZER, VOCAB) if is_file(folder / name)), None)


def folder_json(file: Path) -> str:
    """Contents of a `tokenizer.json` for what `find_tokenizer` found, with what the files next to it add.

    Raises:
        UserError: a file that is missing or damaged, or an option that regpt does not implement, by its name.
    """
    folder, is_vocab = file.parent, file.name == VOCAB
    options, added, names = (read_optional(folder / name) for name in (OPTIONS, ADDED, NAMES))
    for option in PREFIXES if is_vocab else PREFIXES[:1]:
        if options.get(option):
            raise UserError(f"{folder / OPTIONS} sets {option}, which regpt does not implement; use another tokenizer")
    content = from_files(folder, options) if is_vocab else read_text(file)
    special = special_names(options, names) | ({ENDOFTEXT} if is_vocab else set())
    return with_added(content, dict(tokens_of(options, added)), special, folder)


def from_files(folder: Path, options: Json) -> str:
    """`tokenizer.json` of a `vocab.json` and a `merges.txt`, as transformers' GPT-2 reads them."""
    kind = options.get("tokenizer_class")
    if kind not in GPT2_CLASSES:
        raise UserError(
            f"{folder / OPTIONS} has tokenizer_class {kind!r}, regpt reads {VOCAB} as GPT2Tokenizer only; "
            f"give the {TOKENIZER} that transformers' save_pretrained writes for it"
        )
    if not is_file(folder / MERGES):
        raise UserError(f"folder {folder} holds {VOCAB} but not the {MERGES} that belongs to it; put it there")
    lines = [line.rstrip("\r") for line in read_text(folder / MERGES).split("\n")]
    merges = [line for line in lines[lines[0].startswith("#version") :] if line]
    model = {"type": "BPE", "vocab": read_optional(folder / VOCAB), "merges": merges}
    return json.dumps({"model": model, "pre_tokenizer": BYTE_LEVEL, "added_tokens": []})


def tokens_of(options: Json, added: Json) -> Iterator[tuple[str, Json]]:
    """Content → added token, in the form of `tokenizer.json`; `special` is missing where the file does not have it."""
    yield from ((content, {"content": content, "id": i}) for content, i in added.items())
    listed = options.get("added_tokens_decoder")
    for i, token in listed.items() if isinstance(listed, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and i.isdecimal():
            yield token["content"], {**token, "id": int(i)}


def special_names(*files: Json) -> set[str]:
    """The texts that `special_tokens_map.json` and `tokenizer_config.json` name as special."""
    named = [value for file in files for key, value in file.items() if key.endswith(("_token", "_special_tokens"))]
    single = [one for value in named for one in (value if isinstance(value, list) else [value])]
    return {str(one.get("content") if isinstance(one, dict) else one) for one in single}


def with_added(text: str, tokens: dict[str, Json], special: set[str], folder: Path) -> str:
    """`text` with the special tokens that only the other files list or name; others would change what text becomes."""
    try:
        content = parse_json(text)
        vocab, listed = content["model"]["vocab"], [*(content["added_tokens"] or [])]
        known = {token["content"] for token in listed}
        named = {name: {"content": name, "id": vocab[name]} for name in special if name in vocab}
    except (ValueError, KeyError, TypeError):
        return text  # what is wrong is found and named where it is read
    new = [token for name, token in {**named, **tokens}.items() if name not in known]
    for token in new:
        if not token.get("special", token["content"] in special):
            raise UserError(
                f"{folder} adds the token {token['content']!r} ({ADDED} or {OPTIONS}), which is not special, so text "
                "could become it; regpt does not implement this, use another tokenizer"
            )
    ordered = sorted(({**token, "special": True} for token in new), key=lambda token: str(token["id"]))
    return json.dumps({**content, "added_tokens": [*listed, *ordered]}) if new else text


def read_optional(path: Path) -> Json:
    """The JSON object in `path`; an empty one where there is no such file."""
    content = read_json(path, RESTORE) if is_file(path) else {}
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} holds no JSON object; {RESTORE}")
    return content


def read_text(path: Path) -> str:
    """The text of a tokenizer's file.

    Raises:
        UserError: it cannot be read, is too large for its kind, a Git LFS pointer, or not UTF-8.
    """
    try:  # bytes: a newline that Python translates would be another vocabulary
        return read_small(path, RESTORE).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a tokenizer: it is not UTF-8 text") from None
