"""A batch of conversations in the report of a run: what is trained on, in colour."""

from pathlib import Path

from regpt.data.info import tokenizer_of
from regpt.data.manifest import read_manifest
from regpt.data.masked import MaskedRow, masked_rows
from regpt.data.packed import ConversationRows
from regpt.data.rows import CONVERSATIONS, open_rows
from regpt.errors import UserError
from regpt.report.markup import section_html, text
from regpt.report.read import RunData, section

ROWS, CHARACTERS = 4, 4000  # shown of the batch, and of a conversation
CLASSES = ("context", "answer", "format")


def masks_section(run: RunData) -> str:
    """The first batch of a run over conversations; nothing for another run, or where the data are gone."""
    data, train = section(run.config, "data"), section(run.config, "train")
    if data.get("order") not in CONVERSATIONS:
        return ""
    try:
        rows, found, trained, tokens, count = first_batch(Path(str(data["path"])), run, data, train)
    except (UserError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return ""
    said = (
        f"{rows.sentence()}. Of the first batch, {count:,} rows: {trained:,} of {tokens:,} tokens "
        f"({trained / tokens:.0%}). Another batch: regpt finetune --look 4 --step 100 RUN"
    )
    marks = '<mark class="answer">an answer</mark> · <mark class="format">what ends it</mark>'
    key = f'<p class="note">read only · {marks}</p>'
    return section_html("What is trained on", f"<p>{text(said)}</p>{key}{''.join(map(row_html, found))}")


def first_batch(
    folder: Path, run: RunData, data: dict, train: dict
) -> tuple[ConversationRows, list[MaskedRow], int, int, int]:
    """The rows, the first of them as texts, and numbers of the batch: trained tokens, tokens, rows."""
    folder = folder if folder.is_dir() else run.folder / "data"
    manifest = read_manifest(folder)
    T = int(data["seq_len"])
    count = int(train["batch_tokens"]) // T
    rows = open_rows(folder, manifest, "train", data["order"], int(data["seed"]), T, batch_rows=count)
    assert isinstance(rows, ConversationRows)
    batch = masked_rows(rows, 0, count, tokenizer_of(folder, manifest))
    return rows, batch[:ROWS], sum(row.trained for row in batch), sum(row.tokens for row in batch), count


def row_html(row: MaskedRow) -> str:
    head = f"row {row.number}: {row.trained:,} of {row.tokens:,} tokens, {row.padding:,} of padding"
    said = "".join(f"<p>{conversation_html(one)}</p>" for one in row.conversations)
    return f'<div class="card mask"><h3>{text(head)}</h3>{said}</div>'


def conversation_html(texts: list[tuple[str, int]]) -> str:
    found, left = [], CHARACTERS
    for said, part in texts:
        shown = text(said[:left]) + ("…" if len(said) > left else "")
        found.append(f'<mark class="{CLASSES[part]}">{shown}</mark>' if part else shown)
        left -= len(said)
        if left <= 0:
            break
    return "".join(found)
