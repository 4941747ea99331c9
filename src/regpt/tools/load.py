"""Whether other work shares this machine: figures taken meanwhile are too low."""

import os

from regpt.console.text import counted
from regpt.prepare.placement import available_cores

BUSY_SHARE = 0.75  # of the cores, that want to run: more than one command of ours accounts for


def busy() -> str | None:
    """`load 12.3 on 2 cores` where more than `BUSY_SHARE` of the cores were in use over the last minute; None where
    they were not, and on Windows, which does not tell."""
    if not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], available_cores()
    return f"load {load:.1f} on {counted(cores, 'core')}" if load > max(1.0, BUSY_SHARE * cores) else None
