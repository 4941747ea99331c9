"""`python -m regpt.parallel.worker FOLDER RANK ARGS…`: `regpt ARGS…` as one process of `launch`; writes its exit code.

torchrun reports how the first process ended that failed, and nothing after a signal; FOLDER gets all exit codes.
"""

import runpy
import sys
from pathlib import Path

from regpt.files import write_text
from regpt.parallel.signals import leave_when_terminated


def main(folder: Path, rank: str, args: list[str]) -> None:

    def note(code: int) -> None:
        write_text(folder / f"{rank}.exit", str(code))

    if args[:1] == ["train"]:
        leave_when_terminated(note)
    sys.argv = ["regpt", *args]
    code: object = 1
    try:
        runpy.run_module("regpt", run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
        raise
    finally:
        note(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
