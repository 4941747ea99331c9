"""All trials, those that may crash or hang in processes of their own."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regpt.tools.measure import busy

ALONE = ("training", "rates")  # trials that count, and measurements, while nothing else runs
TOGETHER = ("steps", "compile", "collectives")
TRAINING = "training step"
CHILD = ("-m", "regpt.tools.doctor.child")
MARK = "regpt-trial "  # before each line of a child: libraries print too
# Longest time of a group; a fifth of it is usual. The first compilation builds C++ or starts Triton. A machine that is
# merely busy must not be found unable to train.
SECONDS = {"training": 120.0, "compile": 60.0}
OTHER_SECONDS = 20.0
LONGEST = 160  # characters of an error that are shown
Status = Literal["ok", "no", "note"]
Attempt = Callable[[], str | tuple[str, float, str]]


@dataclass(frozen=True)
class Trial:
    """A result.

    Attributes:
        group: heading that it is shown under.
        name: what was tried.
        status: ok: works; no: does not, `detail` has the reason; note: nothing that could work or not.
        detail: one line.
        value, unit: a measured rate, where there is one.
    """

    group: str
    name: str
    status: Status
    detail: str
    value: float | None = None
    unit: str | None = None


def attempt(group: str, name: str, function: Attempt) -> Trial:
    """`function()` as a trial: it returns a line, or a line, a value and its unit; whatever it raises is a no."""
    try:
        found = function()
    except Exception as error:  # the doctor's task: any failure of a trial is its result
        return Trial(group, name, "no", first_line(error))
    line, value, unit = (found, None, None) if isinstance(found, str) else found
    return Trial(group, name, "ok", line, value, unit)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message, shortened."""
    message = (str(error).strip().splitlines() or [""])[0]
    line = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


@dataclass(frozen=True)
class Findings:
    """What was found; `can_train` when an update worked on some device."""

    trials: tuple[Trial, ...]

    @property
    def can_train(self) -> bool:
        return any(trial.name == TRAINING and trial.status == "ok" for trial in self.trials)


def examine_machine(
    folder: Path, done: Callable[[str], None] = lambda group: None, trial_seconds: float | None = None
) -> Findings:
    """Try everything; `folder` is where the disk is measured, `done` hears what has been looked at, `trial_seconds` is
    the longest time of each group, instead of `SECONDS`."""
    from regpt.tools.doctor.host import host_trials

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
