"""`regpt tokenizer inspect`: what a tokenizer is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from regpt.cli.parse import parse
from regpt.console.drawing import print_cells
from regpt.console.lines import print_json, print_line, print_rows
from regpt.console.text import elided
from regpt.errors import UserError
from regpt.ranges import MANY, Range

if TYPE_CHECKING:
    from regpt.text.anatomy import Anatomy, SpecialToken, TextCost
    from regpt.text.tokenizer import Tokenizer

SEPARATOR = "│"  # between the tokens of a text in a file or pipe
LONGEST_CELL = 60  # characters of a token in a table
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class TokenizerInspectArgs:
    """Show a tokenizer's vocabulary, its special tokens, how a text splits, bytes per token by language, the longest
    tokens, and the tokens that no text becomes."""

    tokenizer: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|FOLDER")]
    """gpt2, bytes, a folder with a tokenizer, or a file of one (tokenizer.json, tokenizer.model)."""
    text: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")] = None
    """Show how this text splits."""
    file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Measure bytes per token on this text file instead of on sentences in many languages."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"]), Range(1, MANY)] = 10
    """Tokens shown in a table of many."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead."""


def main(args: list[str]) -> int:
    given = parse(TokenizerInspectArgs, args, prog="regpt tokenizer inspect")
    from regpt.text.anatomy import describe_special, examine_tokens, measure_text
    from regpt.text.open import open_tokenizer
    from regpt.text.sentences import SENTENCES

    tokenizer = open_tokenizer(given.tokenizer)
    samples = {given.file.name: read_sample(given.file)} if given.file else SENTENCES
    costs = [measure_text(tokenizer, name, text) for name, text in samples.items()]
    ids = None if given.text is None else tokenizer.encode(given.text)
    special, anatomy = describe_special(tokenizer, given.tokenizer), examine_tokens(tokenizer, given.n)
    if given.json:
        print_json(as_json(tokenizer, special, anatomy, costs, ids))
        return 0
    print_vocabulary(tokenizer, anatomy)
    print_special(special, given.n)
    if ids is not None:
        print_split(tokenizer, ids)
    print_costs(costs)
    print_tokens(tokenizer, "longest tokens", list(anatomy.longest))
    never = list(anatomy.unreachable)
    title = f"{len(never):,} tokens whose own text encodes to other tokens"
    print_tokens(tokenizer, title if len(never) <= given.n else f"{title}, the first {given.n}", never[: given.n])
    return 0


def read_sample(path: Path) -> str:
    from regpt.structured import read_small

    try:
        return read_small(path, "give a text file", MAX_FILE_BYTES).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give a text file") from None


def as_json(
    tokenizer: Tokenizer, special: list[SpecialToken], anatomy: Anatomy, costs: list[TextCost], ids: list[int] | None
) -> dict[str, Any]:
    from regpt.text.anatomy import shown_tokens

    def listed(chosen: list[int]) -> list[dict[str, Any]]:
        return [{"id": i, "text": text} for i, text in zip(chosen, shown_tokens(tokenizer, chosen))]

    return {
        "name": tokenizer.name,
        "sha256": tokenizer.sha256,
        "ids": tokenizer.n_vocab,
        **{key: getattr(anatomy, key) for key in ("learned", "special", "found", "partial")},
        "starts_documents": tokenizer.eot,
        "ends_text": list(tokenizer.stop_ids),
        "special_tokens": [asdict(token) for token in special],
        "split": None if ids is None else listed(ids),
        "texts": [asdict(cost) | {"bytes_per_token": round(cost.bytes_per_token, 4)} for cost in costs],
        "longest": listed(list(anatomy.longest)),
        "unreachable": listed(list(anatomy.unreachable)),
    }


def print_vocabulary(tokenizer: Tokenizer, anatomy: Anatomy) -> None:
    holes = tokenizer.n_vocab - anatomy.learned - anatomy.special - anatomy.found
    rows = [
        ("ids", tokenizer.n_vocab),
        ("base vocabulary", anatomy.learned),
        ("  of these parts of a character", anatomy.partial),
        ("added, special", anatomy.special),
        ("added, found in text", anatomy.found),
        ("ids without a token", holes),
    ]
    print_line(f"{tokenizer.name}, SHA-256 {tokenizer.sha256}\n")
    print_rows(["vocabulary", "tokens"], [[name, f"{count:,}"] for name, count in rows if count or name == "ids"])


def print_special(special: list[SpecialToken], n: int) -> None:
    used = [token for token in special if token.roles]
    rest = [token for token in special if not token.roles]
    rows = [[token.text, str(token.id), ", ".join(token.roles)] for token in [*used, *rest[:n]]]
    print_line()
    print_rows(["special token", "id", "used as"], rows, left=(0, 2))
    if len(rest) > n:
        print_line(f"and {len(rest) - n:,} more")


def print_split(tokenizer: Tokenizer, ids: list[int]) -> None:
    from regpt.text.anatomy import shown_tokens

    print_line(f"\nthe text is {len(ids):,} tokens")
    print_cells(shown_tokens(tokenizer, ids), list(map(str, ids)), SEPARATOR)


def print_costs(costs: list[TextCost]) -> None:
    base = costs[0].tokens
    rows = [
        [
            *(cost.name, f"{cost.text_bytes:,}", f"{cost.tokens:,}", f"{cost.bytes_per_token:.3f}"),
            *(f"{cost.characters / max(1, cost.tokens):.3f}", f"{cost.tokens / max(1, base):.2f}"),
        ]
        for cost in costs
    ]
    print_line()
    print_rows(["text", "bytes", "tokens", "bytes/token", "characters/token", f"tokens/{costs[0].name}"], rows)


def print_tokens(tokenizer: Tokenizer, title: str, ids: list[int]) -> None:
    from regpt.text.anatomy import shown_tokens

    print_line(f"\n{title}")
    if ids:
        sizes = [f"{len(tokenizer.token_bytes(i)):,}" for i in ids]
        texts = [elided(repr(text)[1:-1], LONGEST_CELL) for text in shown_tokens(tokenizer, ids)]
        print_rows(["token", "id", "bytes"], [[f"'{text}'", str(i), size] for text, i, size in zip(texts, ids, sizes)])
