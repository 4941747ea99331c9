"""`regpt finetune`: train a model on conversations; look at what it is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from regpt.cli import train
from regpt.cli.data_prepare import download_folder
from regpt.cli.parse import local_folder, parse
from regpt.cli.train import flag_value, named_recipe
from regpt.config import RunConfig, read_config, recipe_names
from regpt.errors import UsageError
from regpt.ranges import LARGE, MANY, PROCESSES, Range


@dataclass(frozen=True)
class Finetune:
    """Train a model on conversations: an ordinary run, which regpt train --resume, replay, report and chat take. Every
    value of the configuration is a flag, as in regpt train."""

    recipe: tyro.conf.Positional[str] = ""
    """A recipe by name, such as sft-124m, or a .toml file; with --look and nothing else, a run."""
    init_from: str = ""
    """The model to begin with: a run, a checkpoint, a Hugging Face folder or hub name such as gpt2."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Conversations: a file (.jsonl, .json, .csv, .parquet, perhaps compressed), an address (https://, s3://, hf://),
    or a data set of the hub, OWNER/NAME or OWNER/NAME:SPLIT (default train); repeat it for several."""
    tasks: str = ""
    """Instead, with recipes such as grpo-124m: learn from rewards of the model's own replies to the questions of these
    chat tasks, such as chat:addition:difficulty=2:items=2000."""
    out: str = ""
    """New folder for the run; its data are written to RUN/data."""
    epochs: Annotated[float, Range(0, LARGE, above=True)] = 3.0
    """How often every conversation is read; --train.steps replaces it."""
    val_fraction: Annotated[float, Range(0, 1, below=True)] = 0.05
    """Share of the conversations that is held out for validation, by the hash of what the user asks first."""
    on_error: Literal["stop", "skip"] = "stop"
    """A bad row, or a conversation longer than data.seq_len: stop with its number and reason, or leave it out."""
    template: str = ""
    """Chat template: plain, chatml, or a Jinja file; default: the model's own, else plain."""
    add_tokens: tyro.conf.FlagCreatePairsOff[bool] = False
    """Add ChatML's two special tokens to the vocabulary, and use its template."""
    look: Annotated[int, Range(0, MANY)] = 0
    """Print so many rows of the first batch, what is trained on in colour (in a file in brackets), and end."""
    nproc: Annotated[int | None, tyro.conf.arg(metavar="INT"), Range(1, PROCESSES)] = None
    """Train in this many processes on this machine: one per GPU, or several on the CPU."""
    step: Annotated[int, Range(1, MANY)] = 1
    """With --look: the batch of this update."""
    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def main(args: list[str]) -> int:
    recipe = named_recipe(Finetune, args, prog="regpt finetune")
    if recipe and flag_value(args, "--look") and not flag_value(args, "--init-from"):
        return look_at_run(parse(Finetune, args, prog="regpt finetune"))
    default = Finetune(recipe=recipe, config=read_config(recipe)) if recipe else None
    given = parse(Finetune, args, prog="regpt finetune", default=default, stores=["out"])
    given = with_tasks(given)
    refuse_missing(given)
    refuse_shape(args)
    from regpt.remote.download import RemoteOptions
    from regpt.runs.finetune import FinetuneRequest, finetune, look, prepare_run, write_settings

    asked = FinetuneRequest(
        given.init_from,
        given.data,
        local_folder(given.out, "regpt finetune", written=True),
        None if flag_value(args, "--train.steps") else given.epochs,
        given.val_fraction,
        given.on_error,
        given.template,
        given.add_tokens,
        RemoteOptions(download_folder()),
    )
    if given.look:
        look(prepare_run(asked, given.config), given.look, given.step)
        return 0
    if given.nproc:
        settings = str(write_settings(asked, given.config))
        where = ["--init-from", given.init_from, "--out", given.out, "--nproc", str(given.nproc)]
        return train.main([settings, *where])
    return finetune(asked, given.config, argv=["regpt", "finetune", *args])


def with_tasks(given: Finetune) -> Finetune:
    """`given`, its tasks in the configuration; held-out questions of the same ones are graded unless eval.tasks names
    others."""
    tasks = given.tasks or given.config.grpo.tasks
    if not tasks:
        return given
    config = given.config
    graded = config.eval.tasks or tasks
    grpo, evals = replace(config.grpo, tasks=tasks), replace(config.eval, tasks=graded)
    return replace(given, tasks=tasks, config=replace(config, grpo=grpo, eval=evals))


def look_at_run(given: Finetune) -> int:
    from regpt.runs.finetune import look
    from regpt.runs.replay import config_of

    run = Path(given.recipe)
    config = config_of(run, given.step)
    look(replace(config, train=replace(config.train, device="cpu")), given.look, given.step)
    return 0


def refuse_shape(args: list[str]) -> None:
    """Raise a UsageError for a flag of the model's shape, which --init-from decides."""
    shape = [arg.partition("=")[0] for arg in args if arg.startswith("--model.")]
    if others := [flag for flag in shape if flag != "--model.dropout"]:
        raise UsageError(f"{others[0]} would be of another model than --init-from; leave it out")


def refuse_missing(given: Finetune) -> None:
    """Raise a UsageError for what is needed and not there."""
    if not given.recipe:
        raise UsageError(
            "no recipe was given; regpt finetune RECIPE --init-from MODEL --data FILE --out RUN, with one of "
            f"{', '.join(name for name in recipe_names() if name.startswith(('sft', 'dpo', 'reward', 'grpo')))}"
        )
    for flag, value, what in (
        ("--init-from", given.init_from, "the model to begin with, such as gpt2 or a run"),
        ("--data", given.data or given.tasks, "a file of conversations"),
        ("--out", given.out, "a folder for the run that does not exist yet"),
    ):
        if not value:
            raise UsageError(f"{flag} is missing; give {what}")
