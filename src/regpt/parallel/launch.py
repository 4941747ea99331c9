"""Start one command as several processes of this machine, through torchrun's own machinery."""

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from regpt.errors import UsageError


def launch(processes: int, args: Sequence[str]) -> int:
    """Run `regpt ARGS…` as `processes` processes; return the exit code of the first that failed, or 0.

    Raises:
        UsageError: fewer than one process.
    """
    if processes < 1:
        raise UsageError(f"--nproc is {processes}, must be at least 1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="regpt",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "regpt", *args)
    except ChildFailedError as failed:
        codes = [failure.exitcode for failure in failed.failures.values()]
        return next((code for code in codes if code > 0), 1)  # negative: ended by a signal
    except SignalException:
        return 75  # the processes saved and ended; see regpt.runs.stop
    return 0
