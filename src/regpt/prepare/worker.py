"""`python -m regpt.prepare.worker`: a process that encodes partitions; `prepare/workers.py` starts and feeds it.

A line in is a JSON object: first `{"work", "settings"}`, then `{"partition", "threads"}`. A line out is one too:
`{"counts"}` during a partition, then `{"done"}`, `{"error"}` or `{"full"}`. The process ends with its input, so it does
not outlive the one that started it, however that ended.
"""

import json
import os
import queue
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

# Of mallopt (glibc's malloc.h). Blocks above the second are given back at once: pages of parquet files. The first keeps
# what batches of text take and leave all the time.
MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD = (-1, 8 << 20), (-3, 4 << 20)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first decides
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(requests,), daemon=True).start()
    be_small()
    from regpt.prepare.attempt import attempt  # NumPy comes with it
    from regpt.prepare.partition import Partition
    from regpt.prepare.settings import Settings

    start = json.loads(requests.get())
    work, settings = Path(start["work"]), Settings.from_dict(start["settings"])
    while True:
        request = json.loads(requests.get())
        partition = Partition.from_dict(request["partition"])
        said = attempt(
            work, partition, settings, request["threads"], lambda counts: answer(answers, {"counts": asdict(counts)})
        )
        answer(answers, said)


def listen(requests: "queue.SimpleQueue[str]") -> None:
    """Pass lines on; end the process when there will be none."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)  # also from the middle of a partition: nobody waits for it


def be_small() -> None:
    """One of many: what libraries would take for themselves. To be called before NumPy and pyarrow are there."""
    os.putenv("OPENBLAS_NUM_THREADS", "1")  # NumPy's: no algebra here, and 16 times 16 threads that spin for a while
    os.putenv("ARROW_DEFAULT_MEMORY_POOL", "system")  # others keep twice as much for later
    if sys.platform == "linux":
        import ctypes

        with suppress(AttributeError):  # musl has none
            for threshold in (MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD):
                ctypes.CDLL(None).mallopt(*threshold)


def answer(answers: IO[str], content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
