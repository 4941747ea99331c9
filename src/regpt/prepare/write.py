"""An `--out` that cannot be written is one sentence, before the work where possible."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from regpt.errors import UserError
from regpt.files import PARTIAL, write_bytes

# No space, no quota, no larger file: the user can mend all three.
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


def try_place(folder: Path) -> None:
    """Make `folder`, and see that files can be written there, before work is spent on what they would hold.

    Raises:
        UserError: it cannot be made or written to.
    """
    above = [one for one in (folder, *folder.parents) if not one.exists()]
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".regpt-try"
        try:
            write_bytes(probe, b"regpt")
        finally:
            with contextlib.suppress(OSError):  # what is in use, or cannot be changed
                for one in (probe, probe.with_name(probe.name + PARTIAL)):
                    one.unlink(missing_ok=True)
                for one in above:
                    one.rmdir()


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Raise a UserError that names `out` for an OSError in the body."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"the disk of {out} is full; free space or choose another --out") from None
        raise UserError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from None
