"""All trials, those that may crash or hang in processes of their own."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regpt.errors import first_line
from regpt.tools.measure import busy

TRAINING = "training step"
CHILD = ("-m", "regpt.tools.doctor.device")
MARK = "regpt-trial "  # before each line of a child: libraries print too
# Groups of trials and their longest times; a fifth is usual. The first compilation builds C++ or starts Triton. A
# machine that is merely busy must not be found unable to train.
SECONDS = {"training": 120.0, "steps": 30.0, "compile": 60.0}
LONGEST = 160  # characters of an error that are shown
Status = Literal["ok", "no", "note"]
Attempt = Callable[[], str]


@dataclass(frozen=True)
class Trial:
    """A result.

    Attributes:
        group: heading that it is shown under.
        name: of the trial.
        status: ok: works; no: does not, `detail` has the reason; note: a fact that cannot fail.
        detail: one line.
    """

    group: str
    name: str
    status: Status
    detail: str


def attempt(group: str, name: str, function: Attempt) -> Trial:
    """`function()`, a line, as a trial; whatever it raises is a no."""
    try:
        return Trial(group, name, "ok", function())
    except Exception as error:  # the doctor's task: any failure of a trial is its result
        line = f"{type(error).__name__}: {first_line(error)}"
        return Trial(group, name, "no", line if len(line) <= LONGEST else line[: LONGEST - 1] + "…")


def can_train(trials: Sequence[Trial]) -> bool:
    """Whether an update worked on some device."""
    return any(trial.name == TRAINING and trial.status == "ok" for trial in trials)


def examine_machine(
    folder: Path, done: Callable[[str], None] = lambda group: None, trial_seconds: float | None = None
) -> list[Trial]:
    """Try everything; `folder` is on the disk that counts, `done` hears each group examined, `trial_seconds` is the
    longest time of each group, instead of `SECONDS`."""
    from regpt.tools.doctor.host import host_trials

    load = busy()  # before our own trials
    found = list(host_trials(folder))
    if load:
        found.append(Trial("host", "load", "no", f"{load}: other work may make the trials below too late"))
    done("the host")
    for group, seconds in SECONDS.items():
        found += run_group(group, trial_seconds or seconds, load)
        done(group)
    return found


def run_group(group: str, seconds: float, load: str | None = None) -> list[Trial]:
    """The trials of one group, and one more where its process ended early, or not within `seconds`."""
    end = None
    try:
        ended = subprocess.run([sys.executable, *CHILD, group], capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as late:
        out = late.stdout or b""
        reason = f", perhaps because this machine is busy ({load})" if load else ""
        end = f"did not end within {seconds:.0f} s{reason}; longer: regpt doctor --trial-seconds {4 * seconds:.0f}"
    else:
        out = ended.stdout
        if ended.returncode:
            last = (ended.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
            end = f"the process ended with code {ended.returncode} {last}".rstrip()
    lines = out.decode(errors="replace").splitlines()
    found = [Trial(**json.loads(line.removeprefix(MARK))) for line in lines if line.startswith(MARK)]
    return [*found, Trial(group, "trial", "no", end)] if end else found
