"""`regpt train`: start a run from a recipe or a file, resume one, or fork one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from regpt.cli.flags import flags_of, is_value, normalized
from regpt.cli.parse import parse
from regpt.config import RunConfig, read_config, recipe_names
from regpt.console.lines import print_note
from regpt.data.config import DataConfig
from regpt.errors import UsageError, UserError, word
from regpt.files import is_folder
from regpt.ranges import MANY, PROCESSES, Range
from regpt.remote import is_address

if TYPE_CHECKING:
    from regpt.runs.remote import RemoteRun


@dataclass(frozen=True)
class Train:
    """Train a model. Every value of the configuration is a flag: --train.steps 100, --model.n-layer 6, …"""

    recipe: tyro.conf.Positional[str] = ""
    """A recipe by name, or a .toml file."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of token shards, from `regpt data prepare`; repeat it as DIR=WEIGHT to mix several."""
    out: str = ""
    """New folder for the run; a run at s3://… is written to a local staging folder and copied (docs/remote.md)."""
    resume: str = ""
    """Resume the run in this folder (or at s3://…) from its newest valid checkpoint; flags change its settings."""
    fork_from: str = ""
    """Start the new run --out from this checkpoint: its weights, optimizer and settings, changed by the flags given."""
    force: bool = False
    """With --resume: accept settings that change the run, such as optim.lr."""
    init_from: str = ""
    """Start from the weights of this model: a run, a checkpoint, a Hugging Face folder or hub name such as gpt2."""
    nproc: Annotated[int | None, tyro.conf.arg(metavar="INT"), Range(1, PROCESSES)] = None
    """Start this many processes on this machine (torchrun): one per GPU, or several on the CPU."""
    profile: Annotated[int, Range(0, MANY)] = 0
    """Profile this many steps, from the fourth on: RUN/profile gets a Chrome trace and the ten largest costs."""
    max_restarts: Annotated[int, Range(0, MANY)] = 3
    """With --nproc: restarts of all processes after one has died, in a row without a new checkpoint."""
    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def main(args: list[str]) -> int:
    recipe = named_recipe(Train, args, prog="regpt train")
    default = default_config(args, recipe)
    over = Train(recipe=recipe, config=default) if default else None
    given = parse(Train, args, prog="regpt train", default=over, stores=["out"])
    refuse_contradictions(given)
    if given.data:
        data = chosen_data(given.config.data, given.data, given.nproc)
        given = replace(given, config=replace(given.config, data=data))
    work = prepared(given, args)
    with restart_on_error():
        code = work()
    return code or ended(given)


def ended(given: Train) -> int:
    """Print what a run over preferences or with rewards ends with, once, whatever the number of processes; 0."""
    from regpt.parallel.mesh import under_launcher

    tuned = given.config.preference.method or given.config.grpo.tasks
    if tuned and not under_launcher() and not is_address(given.resume or given.out):
        from regpt.runs.finetune import say_how_it_ended

        say_how_it_ended(Path(given.resume or given.out))
    return 0


def default_config(args: list[str], recipe: str) -> RunConfig | None:
    """Read the values that flags override: of the run to resume, the checkpoint to fork from, or the recipe."""
    ways = {"RECIPE": recipe} | {flag: flag_value(args, flag) for flag in ("--resume", "--fork-from")}
    chosen = [name for name, value in ways.items() if value]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} exclude each other; give one of them")
    if run := ways["--resume"]:
        from regpt.runs.folder import read_run_config
        from regpt.runs.remote import stored_config

        staging = flag_value(args, "--checkpoint.staging")
        return stored_config(run, staging) if is_address(run) else read_run_config(Path(run))
    if source := ways["--fork-from"]:
        from regpt.runs.begin import checkpoint_at, fork_config

        return fork_config(checkpoint_at(source))
    return read_config(recipe) if recipe else None


def refuse_contradictions(given: Train) -> None:
    """Raise a UsageError for missing or contradictory arguments."""
    if not (given.recipe or given.resume or given.fork_from):
        raise UsageError(
            f"no recipe was given; regpt train RECIPE --data DIR --out RUN, with one of {', '.join(recipe_names())}"
        )
    if given.resume and (given.out or given.init_from):
        other = "--out" if given.out else "--init-from"
        raise UsageError(f"--resume continues a run in its folder and {other} starts a new one; leave out one of them")
    if given.fork_from and given.init_from:
        raise UsageError("--fork-from and --init-from exclude each other; give one of them")
    if given.force and not given.resume:
        raise UsageError("--force needs --resume; leave it out")
    if not given.resume and not given.out:
        raise UsageError("no folder for the run was given; add --out RUN, a folder that does not exist yet")


def flag_value(args: list[str], flag: str) -> str:
    """Find the value of the last `flag` in `args`, before they are parsed; "" without it."""
    found = ""
    for arg, following in zip(args, [*args[1:], ""]):
        name, equals, value = arg.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else following
    return found


def named_recipe(command: type, args: list[str], prog: str) -> str:
    """Find the recipe: the first argument that is neither a flag nor a flag's value. It sets the flags' defaults."""
    known = flags_of(command)
    rest = normalized(known, args, prog)
    while rest:
        name, equals, _ = (arg := rest.pop(0)).partition("=")
        if not arg.startswith("-"):
            return arg
        flag = known.get(name)
        several = flag is not None and flag.many and not flag.append
        takes = 0 if flag is None or flag.switch else len(rest) if several else int(not equals)
        while takes and rest and is_value(rest[0], known):
            rest.pop(0)
            takes -= 1
    return ""


def parse_over_recipe(command: type[Any], args: list[str], prog: str) -> Any:
    """Parse `args` into `command`, with the recipe's values as defaults of `config` and the folders of --data."""
    recipe = named_recipe(command, args, prog)
    over = command(recipe=recipe, config=read_config(recipe)) if recipe else None
    given = parse(command, args, prog=prog, default=over)
    if not given.recipe:
        raise UsageError(f"no recipe was given; {prog} RECIPE, with one of {', '.join(recipe_names())}")
    if not given.data:
        return given
    data = chosen_data(given.config.data, given.data, getattr(given, "nproc", None))
    return replace(given, config=replace(given.config, data=data))


def chosen_data(data: DataConfig, given: tuple[str, ...], nproc: int | None = None) -> DataConfig:
    """`data` with what --data names: one folder, or several with their weights; `nproc` processes are started."""
    if all("=" not in part or is_folder(part) for part in given):
        *replaced, last = given  # the last one counts, as with every flag
        if replaced and os.environ.get("RANK") in ((None,) if nproc else (None, "0")):  # one process of all prints it
            weighed = " ".join(f"--data {word(f'{part}=1')}" for part in given)
            print_note(
                f"--data {last} alone is read, it replaces {', '.join(replaced)}; a mixture has weights: {weighed}"
            )
        return replace(data, path=last, mixture={})
    mixture: dict[str, float] = {}
    for part in given:
        path, _, weight = part.rpartition("=")
        try:
            mixture[path] = float(weight)
        except ValueError:
            raise UsageError(f"--data {part!r} has no weight; write each of several folders as DIR=WEIGHT") from None
    if len(mixture) < len(given):
        raise UsageError(f"--data names a folder twice ({' '.join(given)}); add up its weights")
    return replace(data, path="", mixture=mixture)


def prepared(given: Train, args: list[str]) -> Callable[[], int]:
    """Check the arguments; return a function that starts, forks or resumes the run."""
    from regpt.parallel.mesh import launcher_rank, launcher_restarts, launcher_world_size, under_launcher
    from regpt.runs.begin import checkpoint_at
    from regpt.runs.folder import is_run
    from regpt.runs.pretrain import check, fork, pretrain, resume

    name = given.resume or given.out
    run, remote = place(name, given.config)
    again = not given.resume and launcher_restarts() and is_run(run)
    if launcher_rank() == 0 and not again:  # rank 0 reports bad input; torchrun ends the others
        if remote and not given.resume:
            remote.refuse_used()
        new = None if remote or given.resume else run
        check(given.config, new, processes=given.nproc or launcher_world_size(), beside=own_data(given.config, run))
    if given.nproc and not under_launcher():
        return partial(launched, given, given.nproc, run, name, args)
    if again:
        return partial(resume, run, remote=remote)
    options: dict[str, Any] = {"profile_steps": given.profile, "remote": remote}
    if given.resume:
        return partial(resume, run, given.config, force=given.force, **options)
    options["argv"] = ["regpt", "train", *args]
    beside = own_data(given.config, run)
    if given.fork_from:
        source = given.fork_from if is_address(given.fork_from) else checkpoint_at(given.fork_from)
        return partial(fork, given.config, source, run, **options)
    return partial(pretrain, given.config, run, init_from=given.init_from or None, beside=beside, **options)


def own_data(config: RunConfig, run: Path) -> tuple[str, ...]:
    """Name the data that are in the folder of the new run already, as regpt finetune has them."""
    path = Path(config.data.path)
    return (path.name,) if config.data.path and path.absolute().parent == run.absolute() else ()


def place(name: str, config: RunConfig) -> tuple[Path, RemoteRun | None]:
    """Return the local folder of the run `name` and, if `name` is an address, its `RemoteRun`."""
    if not is_address(name):
        return Path(name), None
    from regpt.runs.remote import RemoteRun

    remote = RemoteRun(name, config.checkpoint)
    return remote.folder, remote


def launched(given: Train, processes: int, run: Path, name: str, args: list[str]) -> int:
    """Run the command in `processes` processes; restart them from the last checkpoint when one dies.

    `name` is the folder or address of `run`, as typed.
    """
    from regpt.checkpoint.load import checkpoints
    from regpt.parallel.launch import launch
    from regpt.runs.folder import is_run

    def again() -> list[str]:
        return ["train", *args] if given.resume or not is_run(run) else ["train", "--resume", name]

    return launch(
        processes,
        ["train", *args],
        again=again,
        progress=lambda: [folder.name for folder in checkpoints(run)],
        max_restarts=given.max_restarts,
        stop_seconds=given.config.train.stop_seconds,
        hang_seconds=given.config.train.hang_seconds,
        say=print_note,
    )


@contextmanager
def restart_on_error() -> Iterator[None]:
    """Give an unexpected error in a launched process the exit code on which the launcher restarts all processes."""
    from regpt.parallel.launch import UNEXPECTED
    from regpt.parallel.mesh import under_launcher

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if under_launcher():
            error.exit_code = UNEXPECTED  # type: ignore[attr-defined]
        raise
