"""In what runs differ, as far as their folders say."""

from collections.abc import Sequence
from typing import Any

from regpt.report.markup import flatten
from regpt.report.read import Row, Run, section

MISSING = None  # a key that a run does not have; a null in its file means as little
DATA = ("manifest_sha256", "tokenizer", "tokenizer_sha256", "train_tokens", "val_tokens")
# Follow from other keys, differ between any two runs, or are shown elsewhere.
INCIDENTAL = ("argv", "started", "host", "data", "unigram_loss", "parameters", "peak")


def differing(documents: Sequence[Row]) -> list[tuple[str, list[Any]]]:
    """Keys, joined with dots, whose values are not the same in all `documents`, with each one's value."""
    flat = [dict(flatten(document)) for document in documents]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = [(key, [one.get(key, MISSING) for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    return differing([run.config for run in runs])


def code_differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Versions, commit and machine."""
    return differing([{key: value for key, value in run.env.items() if key not in INCIDENTAL} for run in runs])


def data_differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """What was read: hashes and counts, not where it lies on the disk."""
    tables = [section(run.env, "data") for run in runs]
    return differing([{key: table[key] for key in DATA if key in table} for table in tables])
