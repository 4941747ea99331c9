"""One unit for losses of different tokenizers: bits per byte of text."""

from collections.abc import Sequence
from itertools import pairwise
from math import log

from regpt.errors import UserError
from regpt.report.read import Run, number, section


def same_tokenizer(a: Run, b: Run) -> bool:
    """Whether losses in nats per token of the two runs can stand beside each other.

    By the tokenizer's hash where both runs recorded it, else by its name and the size of the vocabulary.
    """
    ours, theirs = section(a.env, "data"), section(b.env, "data")
    if ours.get("tokenizer_sha256") and theirs.get("tokenizer_sha256"):
        return ours["tokenizer_sha256"] == theirs["tokenizer_sha256"]
    same_size = section(a.config, "model").get("vocab_size") == section(b.config, "model").get("vocab_size")
    return ours.get("tokenizer") == theirs.get("tokenizer") and same_size


def need_bits(runs: Sequence[Run]) -> bool:
    """Whether the runs have different tokenizers, so that only bits per byte can be compared.

    Raises:
        UserError: they do, and one of them has no bits per byte.
    """
    if all(same_tokenizer(a, b) for a, b in pairwise(runs)):
        return False
    for run in runs:
        if bytes_per_token(run) is None:
            other = next(one.name for one in runs if not same_tokenizer(one, run))
            raise UserError(
                f"the runs {run.name!r} and {other!r} have different tokenizers, so their losses can only be compared "
                f"in bits per byte, and {run.name!r} has none; leave it out, or validate it once (eval.every_steps)"
            )
    return True


def bytes_per_token(run: Run) -> float | None:
    """UTF-8 bytes a token of the training text; of the validation text where the run says nothing of the other."""
    data = section(run.env, "data")
    n_bytes, tokens = number(data.get("train_bytes")), number(data.get("train_tokens"))
    if n_bytes and tokens:
        return n_bytes / tokens
    for row in reversed(run.val):
        loss, bpb = number(row.get("loss")), number(row.get("bpb"))
        if loss and bpb:
            return loss / (log(2) * bpb)
    return None


def to_bits(nats_per_token: float | None, bytes_per_token: float) -> float | None:
    return None if nats_per_token is None else nats_per_token / (log(2) * bytes_per_token)
