"""Differences between the configurations of a checkpoint and of its resume, and their consequences."""

from collections.abc import Mapping
from typing import Any

from regpt.checkpoint.state import DataPosition, RunState
from regpt.config import RunConfig, completed, validate_config
from regpt.data.ramp import stages_of, step_at
from regpt.errors import UsageError
from regpt.train.schedule import make_schedule

Sections = Mapping[str, Mapping[str, Any]]
Changes = dict[str, list[Any]]  # "train.steps": [before, after]; None where the key was not set

# Keys that change the order of sums, and so the rounding.
ROUNDING_KEYS = (
    "train.micro_batch_rows",
    "train.compile",
    "train.compile_blocks",
    "train.kernels",
    "train.activation_checkpointing",
    "train.mlp_tokens",
    "train.pad_vocab",
    "train.deterministic",
)
# Keys that change no update but for rounding. The shards are compared by their manifest, not by their path; every other
# key changes the run, those of the future too, until they are listed here.
FREE_SECTIONS = ("eval", "sample", "checkpoint", "log")
FREE_KEYS = {
    *ROUNDING_KEYS,
    "data.path",
    "data.mixture",
    "data.tokenizer",
    "optim.offload",
    "train.activation_offload",
    "train.device",
    "train.on_non_finite",
    "train.on_spike",
    "train.spike_score",
    "train.max_refused",
    "train.stop_seconds",
    "train.hang_seconds",
}


def changes(before: Sections, after: Sections) -> Changes:
    """Every key whose value differs, `[before, after]`; empty when nothing is known of `before`."""
    known = completed(before)
    keys = [(section, key) for section in after for key in {**before.get(section, {}), **after[section]}]
    pairs = {f"{s}.{key}": [stored(known.get(s, {}).get(key)), stored(after[s].get(key))] for s, key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]} if before else {}


def stored(value: Any) -> Any:
    """`value` as JSON gives it back, which has no tuples."""
    return [stored(one) for one in value] if isinstance(value, (tuple, list)) else value


def refuse_changes(found: Changes, step: int, force: bool) -> None:
    """Raise a UsageError for changes with which the run would not be the same; `force` allows all that can be done.

    More steps than planned are always allowed.
    """
    if steps := found.get("train.steps"):
        if steps[1] < step:
            raise UsageError(
                f"train.steps is {steps[1]}, but {step} updates are made already; give {step} or more, or start from "
                "an earlier checkpoint with --fork-from"
            )
        fewer = isinstance(steps[0], int) and steps[1] < steps[0]
        found = {key: pair for key, pair in found.items() if key != "train.steps" or fewer}
    shape = {key: pair for key, pair in found.items() if key.startswith("model.") and key != "model.dropout"}
    if shape:
        raise UsageError(
            f"the weights of the checkpoint have another shape: {listed(shape)}; leave [model] as it is, or start a "
            "new run"
        )
    serious = {key: pair for key, pair in found.items() if not is_free(key)}
    if serious and not force:
        raise UsageError(
            f"this would be another run: {listed(serious)}; leave these as they are, add --force to go on "
            "all the same, or start a new run from the checkpoint with --fork-from"
        )


def is_free(key: str) -> bool:
    return key in FREE_KEYS or key.partition(".")[0] in FREE_SECTIONS


def listed(found: Changes) -> str:
    """`optim.lr 0.0006 → 0.0003, train.seed 1 → 2`."""
    return ", ".join(f"{key} {shown(before)} → {shown(after)}" for key, (before, after) in found.items())


def describe(found: Changes, state: RunState, config: RunConfig) -> str:
    """A line for the terminal; with the next learning rate, where it is another one than it would have been."""
    step = state.step + 1
    before = validate_config(state.config, "the checkpoint")  # its configuration was valid when it was stored
    old, new = (c.optim.lr * make_schedule(c.optim, c.train.steps)(step) for c in (before, config))
    digits = next((n for n in (2, 5, 16) if f"{new:.{n}e}" != f"{old:.{n}e}"), None)
    rate = f"; the learning rate of step {step:,} is {new:.{digits}e} instead of {old:.{digits}e}" if digits else ""
    return f"changed: {listed(found)}{rate}"


def shown(value: Any) -> str:
    return "unset" if value is None else str(value)


def first_row(data: DataPosition, step: int, config: RunConfig, manifest_sha256: str) -> int:
    """The `first_row` of the loader with which step `step` goes on where `data` says.

    The rows of another length begin after as many tokens, rounded up; another order, seed or corpus is read from its
    beginning.
    """
    T, now = config.data.seq_len, config.data
    order, before = (now.order, now.shuffle_rows, now.seed), (data.order, data.shuffle_rows, data.seed)
    same = (data.manifest_sha256, before) == (manifest_sha256, order)
    next_row = -(-data.next_row * data.seq_len // T) if same else 0
    return next_row - step * (config.train.batch_tokens // T)


def ramp_steps(data: DataPosition, config: RunConfig) -> int:
    """Steps of `train.batch_ramp` with which as many tokens are read as `data` says, rounded up; of other data as many.

    The state of a run with a ramp counts in rows of one token.
    """
    stages = stages_of(config.train.batch_tokens, config.data.seq_len, config.train.batch_ramp)
    return step_at(stages, data.next_row * data.seq_len)
