"""`python -m regpt.tools.doctor.child GROUP`: a group of trials in a process of its own.

What is tried may crash, hang, or leave a GPU in a state in which nothing works any more; here it takes nothing with it.
Each trial is printed as soon as it is made, one JSON object a line, so that those before a crash are known.
"""

import json
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict

from regpt.tools.doctor.doctor import MARK, Trial


def trials(group: str) -> Iterable[Trial]:
    """The trials of `group`, made as they are taken."""
    from regpt.tools.doctor import device

    tried = {"training": device.training_trials, "rates": device.rate_trials, "steps": device.step_trials}
    tried |= {"compile": device.compile_trials, "collectives": device.collective_trials}
    return (trial for each in device.devices() for trial in tried[group](each))


def main(group: str) -> None:
    warnings.simplefilter("ignore")
    for trial in trials(group):
        print(MARK + json.dumps(asdict(trial)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
