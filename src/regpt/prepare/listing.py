"""Names, folders and globs → files: the one place that decides what is read, and counts what is left out and why."""

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from regpt.console.text import counted
from regpt.errors import UserError, nearest
from regpt.files import LFS_POINTER_BYTES, identity, is_folder, matching, refuse_lfs_pointer

HIDDEN, BROKEN, LOOP = "hidden", "broken link", "link loop"
SPECIAL, UNREADABLE = "pipe, socket or device", "unreadable"
FOLDER, SHARDS = "folder", "folder of token shards"
TWICE, HELD_OUT = "given twice", "validation file"
REFUSED = {  # where it is the only thing that was named
    BROKEN: "is a link to a file that does not exist",
    LOOP: "is a link that leads back to itself",
    SPECIAL: "is a pipe, a socket or a device; write its text into a file",
}
KIND = re.compile(r"(\.tar)?\.[a-z][a-z0-9]{0,9}$")  # an ending that is worth a count of its own
SHOWN_KINDS = 8

T = TypeVar("T")


class Wanted(NamedTuple):
    """Which files are read.

    Attributes:
        rank: how much a file in a folder is wanted, by its name: 0 not at all, 2 only where nothing there has 1.
        accepts: whether a file is read that was named, or that a glob matches.
        allowed: the kinds, for messages.
        deep: search the folders in a folder, too.
        known: names that mean something else than files.
    """

    rank: Callable[[str], int]
    accepts: Callable[[str], bool]
    allowed: str
    deep: bool = True
    known: Sequence[str] = ()

    def refuse(self, name: str) -> UserError:
        return UserError(f"{printable(name)!r} is of a kind that is not read; allowed are {self.allowed}")


class Found(NamedTuple):
    """A file, and its name as text: inside its folder, or as it was given."""

    path: Path
    name: str


def find_local(source: str, wanted: Wanted, left_out: Counter[str]) -> list[Found]:
    """The files of one SOURCE on this machine, in the order of their names; `left_out` counts what else a folder holds.

    A folder is searched with the folders in it, through links too; names that begin with a dot are hidden.

    Raises:
        UserError: nothing there, nothing wanted there, an unwanted file that was named, or a Git LFS pointer.
    """
    path = Path(source)
    found = search(path, wanted, left_out) if is_folder(path) else given_files(source, wanted, left_out)
    for file in found:
        refuse_pointer(file.path)
    return [Found(file.path, printable(file.name)) for file in found]


def search(folder: Path, wanted: Wanted, left_out: Counter[str]) -> list[Found]:
    others: Counter[str] = Counter()
    inside = sorted((file.relative_to(folder).parts, file) for file in walk(folder, others, wanted.deep))
    names = {"/".join(parts): file for parts, file in inside}
    chosen = choose(names, wanted.rank, others)
    left_out.update(others)
    if not chosen:
        but = f"; left out were {counted_kinds(others)}" if others else ""
        raise UserError(f"folder {printable(str(folder))!r} holds no readable file; allowed are {wanted.allowed}{but}")
    return [Found(names[name], name) for name in chosen]


def given_files(source: str, wanted: Wanted, left_out: Counter[str]) -> list[Found]:
    """The file that `source` names, or those that it matches; folders among them are passed over."""
    matches, files = [Path(source)] if os.path.lexists(source) else matching(source), []
    for file in (match for match in matches if not is_folder(match)):
        reason = reason_against(file)
        if reason and len(matches) > 1:
            left_out[reason] += 1
        elif reason in REFUSED:
            raise UserError(f"{printable(str(file))!r} {REFUSED[reason]}")
        else:
            files.append(file)  # an unreadable one raises when it is opened
    if not files:
        sets = f", or a named set ({', '.join(wanted.known)})" if wanted.known else ""
        name = printable(source)
        raise UserError(
            f"no file matches {name!r}{nearest(name, wanted.known)}; give files, folders or globs of "
            f"{wanted.allowed}{sets}"
        )
    if other := next((file for file in files if not wanted.accepts(file.name)), None):
        raise wanted.refuse(str(other))
    return [Found(file, str(file)) for file in files]


def walk(folder: Path, left_out: Counter[str], deep: bool = True) -> Iterator[Path]:
    """The files in `folder`; each folder once, however many links lead to it."""
    waiting, seen = [folder], {identity(folder)}
    while waiting:
        here = waiting.pop()
        try:
            names = sorted(os.listdir(here))
        except OSError as error:
            if here == folder:
                raise UserError(f"folder {printable(str(folder))!r} cannot be read ({error.strerror})") from None
            left_out[UNREADABLE] += 1
            continue
        for path in (here / name for name in names):
            reason = HIDDEN if path.name.startswith(".") else reason_against(path)
            if not reason and path.is_dir():
                reason = reason_against_folder(path, deep, seen)
                waiting += [] if reason else [path]
            elif not reason:
                yield path
            left_out.update([reason] if reason else [])


def reason_against(path: Path) -> str | None:
    """Why `path` cannot be read, whatever kind it is of; None for a file or a folder that can."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return LOOP if error.errno == errno.ELOOP else BROKEN if path.is_symlink() else UNREADABLE
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return SPECIAL
    return None if os.access(path, os.R_OK) else UNREADABLE


def reason_against_folder(path: Path, deep: bool, seen: set[Any]) -> str | None:
    """Why a search does not go into the folder `path`; None if it does, and `path` joins the `seen` ones."""
    if path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
        return LOOP
    if not deep:
        return FOLDER
    if (path / "manifest.json").exists() and (path / "train-00000.idx").exists():
        return SHARDS
    if (name := identity(path)) in seen:
        return TWICE
    seen.add(name)
    return None


def choose(names: Iterable[str], rank: Callable[[str], int], left_out: Counter[str]) -> list[str]:
    """Those of `names` that have the best rank of them, in their order; the others are counted."""
    ranks = {name: rank(name) for name in names}
    best = min(filter(None, ranks.values()), default=None)
    left_out.update(kind_of_other(name) for name in ranks if ranks[name] != best)
    return [name for name in ranks if ranks[name] == best]


def without_hidden(names: Iterable[str], root: str, left_out: Counter[str]) -> list[str]:
    """Those of `names` (with `/`) that are not hidden below the folder `root`."""
    hidden = [name for name in names if any(part.startswith(".") for part in name.removeprefix(root).split("/"))]
    left_out.update(HIDDEN for _ in hidden)
    return [name for name in names if name not in set(hidden)]


def kind_of_other(name: str) -> str:
    """What a file that is not read is counted as: its ending."""
    ending = KIND.search(name.lower())
    return ending[0] if ending else "other"


def refuse_pointer(path: Path) -> None:
    """Raise a UserError if `path` is a Git LFS pointer; an unreadable file raises when it is read."""
    if os.access(path, os.R_OK) and path.stat().st_size <= LFS_POINTER_BYTES:
        refuse_lfs_pointer(path)


def once(files: Iterable[T], key: Callable[[T], Any], seen: dict[Any, str], left_out: Counter[str]) -> list[T]:
    """`files` whose key is not in `seen`, a table of reasons; new keys join it."""
    kept: list[T] = []
    for file in files:
        if (name := key(file)) in seen:
            left_out[seen[name]] += 1
        else:
            seen[name] = TWICE
            kept.append(file)
    return kept


def split_once(
    train: Iterable[T], val: Iterable[T], key: Callable[[T], Any], left_out: Counter[str]
) -> tuple[list[T], list[T]]:
    """Both without repetitions, and `train` without what is in `val`."""
    seen: dict[Any, str] = {}
    held_out = once(val, key, seen, left_out)
    return once(train, key, dict.fromkeys(seen, HELD_OUT), left_out), held_out


def printable(name: str) -> str:
    r"""`name` as text that can be stored and printed: a byte that is not UTF-8 becomes `\xff`."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return name.encode("utf-8", "backslashreplace").decode()


def counted_kinds(left_out: Mapping[str, int]) -> str:
    """`4 files: .csv 2, .py 1, broken link 1`, the most frequent first."""
    total = sum(left_out.values())
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{name} {n:,}" for name, n in kinds[:SHOWN_KINDS]]
    if rest := sum(n for _, n in kinds[SHOWN_KINDS:]):
        shown.append(f"others {rest:,}")
    return f"{counted(total, 'file')}: {', '.join(shown)}"
