"""One partition in a process that does nothing else: how it went, as an answer that can be sent."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regpt.errors import UserError
from regpt.prepare.encode import encode_partition, open_encoder
from regpt.prepare.partition import Partition
from regpt.prepare.parts import Counts
from regpt.prepare.settings import Settings
from regpt.prepare.write import FULL


def attempt(
    work: Path,
    partition: Partition,
    settings: Settings,
    threads: int = 1,
    progress: Callable[[Counts], None] | None = None,
) -> dict[str, Any]:
    """Encode `partition` and say how it went; an unexpected error is `{"crash"}` with its traceback."""
    try:
        encode_partition(work, partition, settings, open_encoder(work, settings), threads, progress)
    except UserError as error:
        return {"error": str(error)}
    except OSError as error:
        if error.errno in FULL:
            return {"full": True}
        return {"crash": traceback.format_exc()}
    except MemoryError:
        files = ", ".join(dict.fromkeys(reading.source.file for reading in partition.readings))
        return {
            "error": f"{files}: more memory is needed than there is; divide large documents, or use fewer --workers"
        }
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return {"crash": traceback.format_exc()}
    finally:
        give_back_memory()
    return {"done": True}


def give_back_memory() -> None:
    """pyarrow keeps what it has freed: up to 50 MB a process."""
    if "pyarrow" in sys.modules:
        import pyarrow

        pyarrow.default_memory_pool().release_unused()
