"""Look into a tokenizer: what its ids are, how a text splits, which tokens no text becomes."""

from dataclasses import dataclass
from pathlib import Path

from regpt.files import is_file, is_folder
from regpt.text.bpe import BPETokenizer
from regpt.text.folder import CHAT, NAMES, OPTIONS, name_of, read_optional, read_text
from regpt.text.library import LibraryTokenizer
from regpt.text.tokenizer import ENDOFTEXT, Tokenizer, with_bytes

ROLES = ("bos", "eos", "pad", "unk")
BATCH = 4096  # tokens encoded at a time


@dataclass(frozen=True)
class SpecialToken:
    """A token that no text becomes; `roles` are where it is used: `starts documents`, `eos`, `chat template`, …."""

    id: int
    text: str
    roles: tuple[str, ...]


@dataclass(frozen=True)
class TextCost:
    """Size of one text in bytes, characters and tokens."""

    name: str
    text_bytes: int
    characters: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(1, self.tokens)


@dataclass(frozen=True)
class Anatomy:
    """Kinds of the ids below `n_vocab`.

    Attributes:
        learned: tokens of the BPE itself.
        special: added tokens that no text becomes.
        found: added tokens that are found in text.
        partial: learned tokens that are only a part of a character.
        unreachable: ids of the other learned or found tokens whose own text encodes to something else.
        longest: ids of the longest of them, in bytes.
    """

    learned: int
    special: int
    found: int
    partial: int
    unreachable: tuple[int, ...]
    longest: tuple[int, ...]


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Name → id of the special tokens."""
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.spec.special
    return tokenizer.rules.special if isinstance(tokenizer, BPETokenizer) else {ENDOFTEXT: tokenizer.eot}


def describe_special(tokenizer: Tokenizer, where: str | Path) -> list[SpecialToken]:
    """The special tokens by id; `where` is what opened the tokenizer, whose folder may name further roles."""
    folder = Path(where) if is_folder(Path(where)) else None
    named, template = (roles_in(folder), chat_template(folder)) if folder else ({}, "")
    found = []
    for text, i in sorted(special_ids(tokenizer).items(), key=lambda pair: pair[1]):
        roles = ["starts documents"] if i == tokenizer.eot else []
        roles += ["ends text"] if i in tokenizer.stop_ids else []
        roles += named.get(text, [])
        roles += ["chat template"] if text in template else []
        found.append(SpecialToken(i, text, tuple(roles)))
    return found


def roles_in(folder: Path) -> dict[str, list[str]]:
    """Token → roles that `tokenizer_config.json` and `special_tokens_map.json` give it."""
    options = {**read_optional(folder / NAMES), **read_optional(folder / OPTIONS)}
    roles: dict[str, list[str]] = {}
    for role in ROLES:
        if name := name_of(options.get(f"{role}_token")):
            roles.setdefault(str(name), []).append(role)
    return roles


def chat_template(folder: Path) -> str:
    """All templates of the folder, one after another; "" where there is none."""
    if is_file(folder / CHAT):
        return read_text(folder / CHAT)
    template = read_optional(folder / OPTIONS).get("chat_template") or ""
    parts = template if isinstance(template, list) else [template]
    return "\n".join(str(part.get("template", "")) if isinstance(part, dict) else str(part) for part in parts)


def measure_text(tokenizer: Tokenizer, name: str, text: str) -> TextCost:
    return TextCost(name, len(text.encode("utf-8", "replace")), len(text), len(tokenizer.encode(text)))


def shown_tokens(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    r"""Each token's text with `\n`, `\t` and parts of characters as escapes."""
    texts = [with_bytes(tokenizer.token_bytes(i)) for i in ids]
    return [text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") for text in texts]


def examine_tokens(tokenizer: Tokenizer, longest: int = 10) -> Anatomy:
    """What every id stands for; encodes the text of each token, some seconds for 128,000."""
    special = special_ids(tokenizer)
    taken = set(special.values())
    added = tokenizer.spec.added if isinstance(tokenizer, LibraryTokenizer) else []
    plain = [token for token in added if not token["special"]]
    own = [(i, data) for i in range(tokenizer.n_vocab) if i not in taken and (data := tokenizer.token_bytes(i))]
    whole = [(i, text) for i, data in own if (text := as_text(data)) is not None]
    unreachable = []
    for start in range(0, len(whole), BATCH):
        part = whole[start : start + BATCH]
        encoded = tokenizer.encode_continuations([text for _, text in part])
        unreachable += [i for (i, _), ids in zip(part, encoded) if ids.tolist() != [i]]
    by_length = sorted(own, key=lambda one: (-len(one[1]), one[0]))
    return Anatomy(
        learned=len(own) - len(plain),
        special=len(special),
        found=len(plain),
        partial=len(own) - len(whole),
        unreachable=tuple(unreachable),
        longest=tuple(i for i, _ in by_length[:longest]),
    )


def as_text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
