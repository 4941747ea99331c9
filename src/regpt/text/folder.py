"""The tokenizer of a folder as one `tokenizer.json`: that file or another form of it, and the files next to it.

Hugging Face folders spread a tokenizer over these files; many older models have `vocab.json` and `merges.txt` instead,
Meta's and Mistral's own folders `tokenizer.model`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regpt.errors import UserError
from regpt.files import is_file
from regpt.structured import read_json, read_small
from regpt.text.rules import BYTE_LEVEL, ENDS_TEXT, RESTORE, STARTS_DOCUMENTS, members, parse_content
from regpt.text.spec import before_every_text, template_token
from regpt.text.tokenizer import ENDOFTEXT

TOKENIZER, VOCAB, MERGES, MODEL = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"
OPTIONS, ADDED, NAMES = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
GENERATION, CONFIG, CHAT = "generation_config.json", "config.json", "chat_template.jinja"
CERTIFICATE = "chat_certificate.json"  # of the template (`text.certificate`)
STEPS = ("normalizer", "pre_tokenizer")
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")  # what transformers makes of a vocab.json and a merges.txt
Json = dict[str, Any]


def find_tokenizer(folder: Path) -> Path | None:
    """The file that describes the tokenizer of `folder`: `tokenizer.json`, else `vocab.json` or `tokenizer.model`."""
    return next((folder / name for name in (TOKENIZER, VOCAB, MODEL) if is_file(folder / name)), None)


def folder_content(file: Path) -> Json:
    """Contents of a `tokenizer.json` for what `find_tokenizer` found, with what the files next to it add.

    Raises:
        UserError: a file that is missing or damaged, or an option that regpt does not implement, by its name.
    """
    folder = file.parent
    options, added, names = (read_optional(folder / name) for name in (OPTIONS, ADDED, NAMES))
    content = from_files(folder, options) if file.name == VOCAB else file_content(file)
    if not has_tokens(content):
        return content  # what is wrong is found and named where it is read
    spaced = any(step.get("type") in ("Prepend", "Metaspace") for name in STEPS for step in members(content, name))
    for option in ("add_prefix_space", "add_eos_token"):
        if options.get(option) and not (option == "add_prefix_space" and spaced):
            raise UserError(f"{folder / OPTIONS} sets {option}, which regpt does not implement; use another tokenizer")
    special = special_names(options, names) | ({ENDOFTEXT} if file.name == VOCAB else set())
    with_added(content, dict(tokens_of(options, added)), special)
    with_roles(content, {**names, **options}, [read_optional(folder / name) for name in (GENERATION, CONFIG)])
    return content


def file_content(file: Path) -> Json:
    """The object in a `tokenizer.json`, or one with the tokens of a `tokenizer.model`."""
    if file.name != MODEL:
        return parse_content(read_text(file))
    from regpt.text.llama3 import is_tiktoken, llama3_content
    from regpt.text.sentencepiece import sentencepiece_content

    data = read_small(file, RESTORE)
    return llama3_content(data, llama3_names(file.parent)) if is_tiktoken(data) else sentencepiece_content(data)


def has_tokens(content: Json) -> bool:
    """Whether the tables of tokens have their form."""
    vocab, added = content.get("model", {}).get("vocab"), content.get("added_tokens") or []
    named = isinstance(added, list) and all(isinstance(token, dict) and "content" in token for token in added)
    return isinstance(vocab, dict) and named


def llama3_names(folder: Path) -> dict[int, str]:
    """The names of Llama 3's special tokens: those of 3.1 and later, unless `params.json` describes 3.0."""
    from regpt.text.llama3 import NAMED_3_0, NAMED_3_1, RANKS, SPECIAL

    params = read_optional(folder / "params.json")
    before = bool(params) and not params.get("use_scaled_rope")
    listed = {token["id"] - RANKS: name for name, token in tokens_of(read_optional(folder / OPTIONS), {})}
    return {i: name for i, name in listed.items() if 0 <= i < SPECIAL} or (NAMED_3_0 if before else NAMED_3_1)


def from_files(folder: Path, options: Json) -> Json:
    """Contents of a `tokenizer.json` for a `vocab.json` and a `merges.txt`, as transformers' GPT-2 reads them."""
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
    return {"model": model, "pre_tokenizer": BYTE_LEVEL, "added_tokens": []}


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
    return {str(name_of(one)) for value in named for one in as_list(value)}


def with_added(content: Json, tokens: dict[str, Json], special: set[str]) -> None:
    """Add the tokens that only the other files list, or name as special, to the added tokens of `content`."""
    vocab, listed = content["model"]["vocab"], [*(content.get("added_tokens") or [])]
    known = {token["content"] for token in listed}
    named = {name: {"content": name, "id": vocab[name]} for name in special if name in vocab}
    new = [token for name, token in {**named, **tokens}.items() if name not in known]
    marked = [{**token, "special": token.get("special", token["content"] in special)} for token in new]
    content["added_tokens"] = [*listed, *sorted(marked, key=lambda token: str(token["id"]))]


def with_roles(content: Json, options: Json, configs: list[Json]) -> None:
    """Flag the added tokens that start a document and end a text, and put the former before every text, where only the
    other files say so."""
    added, names = content["added_tokens"], {token["content"] for token in content["added_tokens"]}
    bos, eos = (name_of(options.get(f"{role}_token")) for role in ("bos", "eos"))
    ids = [i for config in configs for i in as_list(config.get("eos_token_id"))]
    if template_token(content) is None and (options.get("add_bos_token") or ENDOFTEXT not in names):
        start = next((name for name in (bos, eos) if name in names), None)
        for token in added:
            token.update({STARTS_DOCUMENTS: True} if token["content"] == start else {})
            if options.get("add_bos_token") and bos == token["content"] == start != ENDOFTEXT:
                content["post_processor"] = before_every_text(token["content"], token["id"])
    for token in added:
        token.update({ENDS_TEXT: True} if token["content"] == eos or token["id"] in ids else {})


def name_of(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


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
