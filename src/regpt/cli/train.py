"""`regpt train`: start a run from a recipe or a file, or go on with one."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from regpt.cli.parse import parse
from regpt.config import RunConfig, read_config, recipe_names
from regpt.data.config import DataConfig
from regpt.errors import UsageError


@dataclass(frozen=True)
class Train:
    """Train a model. Every value of the configuration is a flag: --train.steps 100, --model.n-layer 6, …"""

    recipe: tyro.conf.Positional[str] = ""
    """A recipe by name, or a .toml file."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of token shards, from `regpt data prepare`; repeated as DIR=WEIGHT, a mixture of several."""
    out: str = ""
    """New folder for the run."""
    resume: str = ""
    """Go on with the run in this folder from its newest valid checkpoint."""
    init_from: str = ""
    """Start from the weights of this model: a run, a checkpoint, a Hugging Face folder or hub name such as gpt2."""
    nproc: int = 0
    """Start this many processes on this machine (torchrun): one a GPU, or several on the CPU."""
    profile: int = 0
    """Record so many steps from the fourth on: RUN/profile gets a Chrome trace and the ten largest costs."""
    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def main(args: list[str]) -> int:
    recipe = named_recipe(args)
    over = Train(recipe=recipe, config=read_config(recipe)) if recipe else None
    given = parse(Train, args, prog="regpt train", default=over)
    if given.nproc < 0:
        raise UsageError(f"--nproc is {given.nproc}, must be at least 1, or 0 for this process alone")
    if given.profile < 0:
        raise UsageError(f"--profile is {given.profile}, must be at least 1 step, or 0 for none")
    if given.resume:
        return resume(given, args)
    if not given.recipe:
        raise UsageError(
            f"no recipe was given; regpt train RECIPE --data DIR --out RUN, with one of {', '.join(recipe_names())}"
        )
    if not given.out:
        raise UsageError("no folder for the run was given; add --out RUN, a folder that does not exist yet")
    config = given.config
    if given.data:
        config = replace(config, data=chosen_data(config.data, given.data))
    return start(given, config, args)


def named_recipe(args: list[str]) -> str:
    """The first argument that is neither a flag nor the value of one: flags are read over this recipe's values."""
    rest = iter(args)
    for arg in rest:
        if not arg.startswith("-"):
            return arg
        if "=" not in arg and arg not in ("-h", "--help"):
            next(rest, None)  # every flag takes one value
    return ""


def chosen_data(data: DataConfig, given: tuple[str, ...]) -> DataConfig:
    """`data` with what --data names: one folder, or several with their weights."""
    if all("=" not in part or Path(part).is_dir() for part in given):
        return replace(data, path=given[-1], mixture={})  # the last one counts, as with every flag
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


def start(given: Train, config: RunConfig, args: list[str]) -> int:
    from regpt.parallel.launch import launch
    from regpt.parallel.mesh import launcher_rank, launcher_world_size, under_launcher
    from regpt.runs.pretrain import check, pretrain

    run = Path(given.out)
    if launcher_rank() == 0:  # one process refuses bad input; torchrun ends the others
        check(config, run, processes=given.nproc or launcher_world_size())
    if given.nproc and not under_launcher():
        return launch(given.nproc, ["train", *args])
    argv = ["regpt", "train", *args]
    return pretrain(config, run, init_from=given.init_from or None, argv=argv, profile_steps=given.profile)


def resume(given: Train, args: list[str]) -> int:
    from regpt.parallel.launch import launch
    from regpt.parallel.mesh import launcher_world_size, under_launcher
    from regpt.runs.folder import read_run_config
    from regpt.runs.pretrain import check
    from regpt.runs.pretrain import resume as go_on

    if replace(given, resume="", nproc=0, profile=0) != Train():
        raise UsageError(
            "--resume RUN takes everything from the run's config.toml; leave out all other arguments but --nproc and "
            "--profile, or start a new run from it with: regpt train RUN/config.toml --out RUN2 --init-from RUN"
        )
    check(read_run_config(Path(given.resume)), None, processes=given.nproc or launcher_world_size())
    if given.nproc and not under_launcher():
        return launch(given.nproc, ["train", *args])
    return go_on(Path(given.resume), profile_steps=given.profile)
