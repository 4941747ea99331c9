"""`python -m regpt.data.worker`: a process that encodes partitions; `data/workers.py` starts and feeds it.

A line in is a JSON object: first `{"work", "settings", "parquet"}`, then `{"partition", "threads"}`. A line out is one
too: `{"counts"}` during a partition, then `{"done"}`, `{"error"}` or `{"full"}`. The process ends with its input, so it
does not outlive the one that started it, however that ended.
"""

import contextlib
import errno
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from regpt.data.encode import encode_partition, open_encoder
from regpt.data.partition import Partition
from regpt.data.parts import Counts
from regpt.data.settings import Settings
from regpt.errors import UserError

# No space, no quota, no larger file: the user can mend all three.
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first decides
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(requests,), daemon=True).start()
    start = json.loads(requests.get())
    work, settings = Path(start["work"]), Settings.from_dict(start["settings"])
    warm_up(settings, start["parquet"])
    while True:
        request = json.loads(requests.get())
        partition = Partition.from_dict(request["partition"])
        said = attempt(
            work, partition, settings, request["threads"], lambda counts: answer(answers, {"counts": asdict(counts)})
        )
        answer(answers, said)
        if start["parquet"]:
            give_back_memory()


def listen(requests: "queue.SimpleQueue[str]") -> None:
    """Pass lines on; end the process when there will be none."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)  # also from the middle of a partition: nobody waits for it


def warm_up(settings: Settings, parquet: bool) -> None:
    """Load what takes time before there is work."""
    with contextlib.suppress(UserError):  # said when there is work
        open_encoder(settings.tokenizer, settings.encoder)
    if parquet:
        use_one_thread()


def use_one_thread() -> None:
    """pyarrow would start one a core in every worker."""
    with contextlib.suppress(ImportError):  # said when a file is read
        import pyarrow.parquet

        pyarrow.set_cpu_count(1)


def give_back_memory() -> None:
    """pyarrow keeps what it has freed: up to 50 MB a worker."""
    with contextlib.suppress(ImportError):
        import pyarrow

        pyarrow.default_memory_pool().release_unused()


def attempt(
    work: Path,
    partition: Partition,
    settings: Settings,
    threads: int = 1,
    progress: Callable[[Counts], None] | None = None,
) -> dict[str, Any]:
    """Encode `partition` and say how it went; an unexpected error is `{"crash"}` with its traceback."""
    try:
        tokenizer = open_encoder(settings.tokenizer, settings.encoder)
        encode_partition(work, partition, settings, tokenizer, threads, progress)
    except UserError as error:
        return {"error": str(error)}
    except OSError as error:
        if error.errno in FULL:
            return {"full": True}
        return {"crash": traceback.format_exc()}
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError):
        return {"crash": traceback.format_exc()}
    return {"done": True}


def answer(answers: IO[str], content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
