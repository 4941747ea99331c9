"""Rows of a batch of conversations as they are trained on: which tokens are context, which are targets."""

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from regpt.config import RunConfig
from regpt.console.drawing import print_parts
from regpt.console.lines import print_line
from regpt.data.packed import ConversationRows
from regpt.errors import UsageError
from regpt.runs.build import open_shards
from regpt.runs.finetune import training_rows
from regpt.text.tokenizer import Tokenizer, with_bytes

KINDS = ("context", "answer", "format")


@dataclass(frozen=True)
class MaskedRow:
    """One row.

    Attributes:
        number: in the run.
        conversations: each as texts with their parts (0 context, 1 answer, 2 format), from left to right.
        trained, tokens, padding: numbers of tokens.
    """

    number: int
    conversations: list[list[tuple[str, int]]]
    trained: int
    tokens: int
    padding: int


def masked_rows(rows: ConversationRows, first: int, count: int, tokenizer: Tokenizer) -> list[MaskedRow]:
    """Rows [first, first + count)."""
    documents, row, _ = rows.layout(first, count)
    found = []
    for k in range(count):
        own = documents[row == k]
        pieces = [(rows.starts[d], rows.starts[d + 1]) for d in own]
        tokens = [rows.corpus.read(np.array([begin]), np.array([end])) for begin, end in pieces]
        parts = [rows.parts[begin:end] for begin, end in pieces]
        said = [texts_of(ids.tolist(), part.tolist(), tokenizer) for ids, part in zip(tokens, parts)]
        n, trained = sum(map(len, tokens)), sum(int(np.count_nonzero(part)) for part in parts)
        found.append(MaskedRow(first + k, said, trained, n, rows.seq_len - n if rows.order != "grouped" else 0))
    return found


def texts_of(ids: list[int], parts: list[int], tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Neighbouring tokens of one part as one text."""
    found = []
    for part, run in groupby(zip(ids, parts), key=lambda pair: pair[1]):
        found.append((with_bytes(b"".join(tokenizer.token_bytes(token) for token, _ in run)), part))
    return found


def look(config: RunConfig, count: int, step: int = 1) -> None:
    """Print `count` rows of the batch of update `step`, and what share of it is trained on.

    Raises:
        UsageError: a step that the run does not have.
    """
    if step > config.train.steps:
        raise UsageError(f"--step is {step}, must be from 1 to the {config.train.steps} of the run")
    rows, tokenizer = training_rows(config), open_tokenizer_of(config)
    batch_rows = config.train.batch_tokens // config.data.seq_len
    whole = masked_rows(rows, (step - 1) * batch_rows, batch_rows, tokenizer)
    for row in whole[:count]:
        print_line(
            f"row {row.number:,}: {len(row.conversations)} conversations, {row.trained:,} of {row.tokens:,} tokens are "
            f"trained on, {row.padding:,} of padding"
        )
        for conversation in row.conversations:
            print_parts(conversation)
    trained, tokens = sum(row.trained for row in whole), sum(row.tokens for row in whole)
    print_line(
        f"step {step:,}, {len(whole):,} rows: {trained:,} of {tokens:,} tokens are trained on ({trained / tokens:.0%})"
    )
    print_line(f"all of the run: {rows.sentence()}")


def open_tokenizer_of(config: RunConfig) -> Tokenizer:
    return open_shards(config).tokenizer
