"""`regpt verify-resume`: a killed run against the run in one piece, on this machine."""

import random
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from regpt.cli.train import parse_over_recipe
from regpt.config import RunConfig
from regpt.console.lines import print_json, print_line
from regpt.errors import UsageError
from regpt.files import exists, resolved
from regpt.ranges import LARGE, MANY, PROCESSES, Range


@dataclass(frozen=True)
class VerifyResumeArgs:
    """Train straight; then killed by SIGKILL at random moments; then on another number of processes; and compare."""

    recipe: tyro.conf.Positional[str] = ""
    """A recipe by name, or a .toml file."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of token shards; repeated as DIR=WEIGHT, a mixture of several."""
    steps: Annotated[int, Range(2, MANY)] = 24
    """Updates of each run; the learning rates stay those of the whole run."""
    nproc: Annotated[int, Range(1, PROCESSES)] = 1
    """Processes of the straight and of the killed run."""
    other_nproc: Annotated[int, Range(1, PROCESSES)] = 2
    """Processes that go on with the third run."""
    kills: Annotated[int, Range(1, 1 << 20)] = 3
    """How often the second run is killed."""
    tolerance: Annotated[float, Range(0, LARGE)] = 0.01
    """Relative difference of losses and weights that is accepted where bitwise equality is not to be had: on another
    number of processes, or without train.deterministic."""
    seed: int = 0
    """Of the moments of the kills."""
    out: str = ""
    """Keep the runs in this new folder; default: a temporary one."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the certificate as one JSON object."""
    config: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def main(args: list[str]) -> int:
    given: VerifyResumeArgs = parse_over_recipe(VerifyResumeArgs, args, "regpt verify-resume")
    if given.out and exists(given.out):
        raise UsageError(f"--out {given.out!r} exists; choose a folder that does not")
    if given.out:
        return verified(given, resolved(given.out))
    with tempfile.TemporaryDirectory(prefix="regpt-verify-") as folder:
        return verified(given, Path(folder))


def verified(given: VerifyResumeArgs, folder: Path) -> int:
    from regpt.runs.pretrain import check
    from regpt.runs.verify_resume import RunCommands, verify_resume

    config = first_steps(given.config, given.steps)
    check(config, None, processes=given.nproc)
    check(config, None, processes=given.other_nproc)
    say = (lambda text: None) if given.json else print_line
    found = verify_resume(
        config,
        RunCommands(folder, random.Random(given.seed), say),
        processes=given.nproc,
        other_processes=given.other_nproc,
        kills=given.kills,
        tolerance=given.tolerance,
    )
    if given.json:
        print_json(found)
    else:
        made = found["made_with"]
        mode = "deterministic" if found["deterministic"] else "fast"
        print_line(f"{'passed' if found['passed'] else 'FAILED'}: {mode} mode, {made['device']}, torch {made['torch']}")
    return 0 if found["passed"] else 1


def first_steps(config: RunConfig, steps: int) -> RunConfig:
    """`config` for its first `steps`, with the learning rates of the whole run."""
    optim = config.optim
    if optim.schedule == "cosine":
        optim = replace(optim, decay_steps=optim.decay_steps or max(config.train.steps, optim.warmup_steps + 1))
    elif optim.schedule == "wsd":
        optim = replace(optim, schedule="constant")
    return replace(config, train=replace(config.train, steps=steps), optim=optim)
