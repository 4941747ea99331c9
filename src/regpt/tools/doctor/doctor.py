"""All trials, those that may crash or hang in processes of their own."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from regpt.tools.doctor.child import MARK
from regpt.tools.doctor.host import host_trials
from regpt.tools.doctor.trial import Trial
from regpt.tools.measure import busy

ALONE = ("training", "rates")  # what counts, and what is measured while nothing else runs
TOGETHER = ("devices", "compile", "flex", "processes")
TRAINING = "training step"
CHILD = ("-m", "regpt.tools.doctor.child")
# Longest time of a group; a fifth of it is usual. The first compilation builds C++ or starts Triton. A machine that is
# merely busy must not be found unable to train.
SECONDS = {"training": 120.0, "compile": 40.0, "flex": 40.0}
OTHER_SECONDS = 20.0


@dataclass(frozen=True)
class Findings:
    """What was found; `can_train` when an update worked on some device."""

    trials: tuple[Trial, ...]

    @property
    def can_train(self) -> bool:
        return any(trial.name == TRAINING and trial.status == "ok" for trial in self.trials)


def examine(
    folder: Path, done: Callable[[str], None] = lambda group: None, trial_seconds: float | None = None
) -> Findings:
    """Try everything; `folder` is where the disk is measured, `done` hears what has been looked at, `trial_seconds` is
    the longest time of each group, instead of `SECONDS`."""
    load = busy()  # before our own trials
    found = list(host_trials(folder))
    if load:
        found.append(Trial("host", "load", "no", f"{load}: other work makes the rates below too low"))
    done("the host")

    def tried(group: str) -> list[Trial]:
        return run_group(group, trial_seconds or SECONDS.get(group, OTHER_SECONDS), load)

    for group in ALONE:
        found += tried(group)
        done(group)
    with ThreadPoolExecutor(len(TOGETHER)) as pool:
        for group, trials in zip(TOGETHER, pool.map(tried, TOGETHER)):
            found += trials
            done(group)
    return Findings(tuple(found))


def run_group(group: str, seconds: float = OTHER_SECONDS, load: str | None = None) -> list[Trial]:
    """The trials of one group, with one more that says so when its process ended early, or not within `seconds`."""
    command = [sys.executable, *CHILD, group]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as late:
        out = late.stdout or b""
        reason = f", perhaps because this machine is busy ({load})" if load else ""
        said = f"did not end within {seconds:.0f} s{reason}; longer: regpt doctor --trial-seconds {4 * seconds:.0f}"
        return [*parsed(out), Trial(group, "trial", "no", said)]
    except OSError as error:
        return [Trial(group, "trial", "no", f"could not be started ({error.strerror})")]
    found = list(parsed(ended.stdout))
    if ended.returncode:
        last = (ended.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
        found.append(Trial(group, "trial", "no", f"the process ended with code {ended.returncode} {last}".rstrip()))
    return found


def parsed(out: bytes) -> Iterator[Trial]:
    for line in out.decode(errors="replace").splitlines():
        if line.startswith(MARK):
            yield Trial(**json.loads(line.removeprefix(MARK)))


def by_group(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """Trials under their headings, in the order in which these first occur."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.group, []).append(trial)
    return found
