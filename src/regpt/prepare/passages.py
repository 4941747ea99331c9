"""Documents → PASSAGES in an index that ranks them by BM25: FTS5 of SQLite, which comes with Python, in a file.

A passage is paragraphs in a row, of about `PASSAGE_CHARS` characters; a longer paragraph is cut at the end of a
sentence or between words, and what is short, such as a heading, stays with what follows. Words are runs of letters and
digits, without accents, English ones by their stem (Porter 1980). The index is kept under the hash of the files'
contents: it is built once.
"""

import itertools
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from regpt.compression import Unreadable
from regpt.console.text import counted
from regpt.errors import UserError
from regpt.files import rename
from regpt.prepare.conversations import FORMATS, Wrong, question_fraction
from regpt.prepare.named import open_sources
from regpt.prepare.ngrams import WORD, ngram_hashes
from regpt.prepare.readers import read_table_rows
from regpt.prepare.settings import TextOptions
from regpt.prepare.sources import OTHERS, LocalSource, SourceFile, localized
from regpt.remote.download import REMOTE_OPTIONS, RemoteOptions
from regpt.text.retrieved import Passage

VERSION = "1"  # of everything that decides what is in an index
PASSAGE_CHARS = 800  # about 200 tokens of English
MOST_WORDS = 64  # of a question, the first ones
MANY_PASSAGES = 10_000
RUN = 8  # words in a row by which an answer is recognized in a passage
TABLES = """
CREATE TABLE passages (id INTEGER PRIMARY KEY, text TEXT, place TEXT, asked REAL);
CREATE TABLE facts (files INTEGER, passages INTEGER, unreadable INTEGER, reason TEXT);
CREATE VIRTUAL TABLE words USING fts5(text, content='passages', content_rowid='id', tokenize='porter unicode61');
"""


def passages_of(text: str) -> Iterator[tuple[int, str]]:
    """The passages of a document, each with the number of its first line."""
    held, size, first = list[str](), 0, 0
    for line, piece in (one for paragraph in paragraphs(text) for one in pieces(*paragraph)):
        if size >= PASSAGE_CHARS // 4 and size + len(piece) > PASSAGE_CHARS:
            yield first, "\n\n".join(held)
            held, size = [], 0
        first = first if held else line
        held.append(piece)
        size += len(piece)
    if held:
        yield first, "\n\n".join(held)


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Lines in a row that are not empty, with the number of the first."""
    numbered = enumerate(text.split("\n"), 1)
    for empty, lines in itertools.groupby(numbered, key=lambda one: not one[1].strip()):
        if not empty:
            numbers, kept = zip(*lines)
            yield numbers[0], "\n".join(kept)


def pieces(line: int, paragraph: str) -> Iterator[tuple[int, str]]:
    """A paragraph, cut where it is longer than a passage."""
    while len(paragraph) > PASSAGE_CHARS:
        head = paragraph[:PASSAGE_CHARS]
        sentence = max(head.rfind(mark) for mark in (". ", "? ", "! ", "\n")) + 1
        at = sentence if sentence > PASSAGE_CHARS // 2 else head.rfind(" ") + 1 or PASSAGE_CHARS
        yield line, paragraph[:at].strip()
        line += paragraph.count("\n", 0, at)
        paragraph = paragraph[at:]
    yield line, paragraph.strip()


def row_text(value: Any) -> tuple[str, float | None]:
    """The text of a row: its column `text`, the messages of a conversation, or all of its texts; of a conversation also
    its `question_fraction`."""
    if isinstance(value, str):
        return value, None
    if not isinstance(value, dict):
        return "", None
    if isinstance(value.get("text"), str):
        return value["text"], None
    for form in FORMATS:
        if all(column in value for column in form.columns):
            try:
                found = form.read(value)
            except Wrong:
                continue
            messages = found[0] if isinstance(found, tuple) else found
            return "\n\n".join(one["content"] for one in messages), question_fraction(messages)
    return "\n".join(one for one in value.values() if isinstance(one, str)), None


def rows_of(source: LocalSource, refuse: Callable[[Unreadable], object]) -> Iterator[tuple[Any, str]]:
    """Values and places of a source's rows; `refuse` receives what cannot be read."""
    if not isinstance(source, SourceFile):
        yield from ((text, f"{source.file}, document {n}") for n, text in enumerate(source.texts, 1))
        return
    file = source.path.name if source.file == source.source else source.file
    try:
        for number, row in enumerate(read_table_rows(source.path, TextOptions(on_error="skip")), 1):
            if isinstance(row.value, Unreadable):
                refuse(row.value)
            else:
                yield row.value, file if isinstance(row.value, str) else f"{file}, row {number}"
    except Unreadable as error:
        refuse(error)


class PassageIndex:
    """The passages of files, folders or addresses, found by BM25 (k1 = 1.2, b = 0.75). Threads may share it.

    Attributes:
        name: as the user typed it.
        files, passages, unreadable: how many; `reason` is why the first of the latter cannot be read.
        seconds: of building it; 0 where it was there.
    """

    def __init__(self, name: str, options: RemoteOptions = REMOTE_OPTIONS):
        """
        Raises:
            UserError: no text, a file that cannot be had, no room for the index, or SQLite without FTS5.
        """
        self.name, self.lock, self.seconds = name, threading.Lock(), 0.0
        try:
            found = list(localized(open_sources([name], options)))
        except UserError as error:
            raise UserError(f"--retrieve: {error}".replace(f"; {OTHERS}", "")) from None
        key = sha256("\n".join([VERSION, *(f"{one.file}\t{one.record()['sha256']}" for one in found)]).encode())
        path = options.folder / "passages" / f"{key.hexdigest()[:32]}.sqlite"
        if not path.exists():
            started = time.perf_counter()
            build(path, name, found)
            self.seconds = time.perf_counter() - started
        self.database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
        try:
            (facts,) = self.database.execute("SELECT files, passages, unreadable, reason FROM facts")
        except sqlite3.DatabaseError as error:
            raise UserError(f"the index {str(path)!r} is damaged ({error}); delete it") from None
        self.files, self.passages, self.unreadable, self.reason = facts
        self.is_common = lru_cache(1 << 14)(self.occurs_in_most)

    def sentence(self) -> str:
        """What is in it, for people."""
        time = f", built in {self.seconds:.1f} s" if self.seconds else ""
        bad = f"; {counted(self.unreadable, 'document')} cannot be read, the first: {self.reason}" * bool(self.reason)
        return f"{counted(self.passages, 'passage')} of {counted(self.files, 'file')} in {self.name}{time}{bad}"

    def occurs_in_most(self, word: str) -> bool:
        """Whether more than half of the passages have `word`, of which BM25 makes nothing, and so many that ranking
        them all takes time."""
        (count,) = self.database.execute("SELECT count(*) FROM words WHERE words MATCH ?", (f'"{word}"',)).fetchone()
        return 2 * count > max(self.passages, MANY_PASSAGES)

    def search(self, question: str, count: int, held_out: float = 0.0, answer: str = "") -> tuple[list[Passage], int]:
        """The `count` best passages for `question`, and how many better ones were passed over.

        Args:
            held_out: rows whose question is held out at this fraction are passed over,
            answer: and so are passages that share half of their runs of eight words with this text, or it with them.
        """
        with self.lock:
            words = list(dict.fromkeys(WORD.findall(question.lower())))[:MOST_WORDS]
            match = " OR ".join(f'"{word}"' for word in words if not self.is_common(word))
            ranked = "SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words), rowid"
            runs, kept, passed = np.unique(ngram_hashes(answer, RUN)), list[Passage](), 0
            for (row,) in self.database.execute(ranked, (match,)) if match else ():
                if len(kept) == count:
                    break
                one = "SELECT text, place, asked FROM passages WHERE id = ?"
                text, place, asked = self.database.execute(one, (row,)).fetchone()
                if (asked is not None and asked < held_out) or overlaps(text, runs):
                    passed += 1
                else:
                    kept.append(Passage(text, place))
        return kept, passed


def overlaps(text: str, runs: np.ndarray) -> bool:
    """Whether `text` and an answer with these runs of words share at least half of the runs of one of them."""
    own = np.unique(ngram_hashes(text, RUN))
    fewest = min(len(own), len(runs))
    return bool(fewest) and 2 * len(np.intersect1d(own, runs, assume_unique=True)) >= fewest


def build(path: Path, name: str, sources: Sequence[LocalSource]) -> None:
    """Write the index of `sources` to `path`, atomically."""
    reasons = list[str]()

    def refuse(error: Unreadable) -> None:
        reasons.append(str(error))

    def passages() -> Iterator[tuple[str, str, float | None]]:
        for source in sources:
            for value, place in rows_of(source, refuse):
                text, asked = row_text(value)
                for line, passage in passages_of(text):
                    where = f"{place}, line {line}" if isinstance(value, str) else place
                    yield passage.encode(errors="replace").decode(), where, asked

    partial = path.with_name(f"{path.name}.{threading.get_ident()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(partial)) as database:
            database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + TABLES)
            database.executemany("INSERT INTO passages (text, place, asked) VALUES (?, ?, ?)", passages())
            (count,) = database.execute("SELECT count(*) FROM passages").fetchone()
            if not count:
                why = f" (of {counted(len(sources), 'file')}, the first: {reasons[0]})" if reasons else ""
                raise UserError(f"{name!r} holds no text to retrieve passages from{why}; give files with text")
            database.execute("INSERT INTO words (words) VALUES ('rebuild')")
            facts = len(sources), count, len(reasons), reasons[0] if reasons else ""
            database.execute("INSERT INTO facts VALUES (?, ?, ?, ?)", facts)
            database.commit()
        rename(partial, path)
    except sqlite3.OperationalError as error:
        if "fts5" in str(error):
            raise UserError(
                "this Python's SQLite has no FTS5, which ranks passages; use a Python that has it, such as those of "
                "python.org, conda, Debian and uv"
            ) from None
        raise UserError(f"cannot write the index {str(path)!r} ({error}); make room there") from None
    except OSError as error:
        raise UserError(f"cannot write the index {str(path)!r} ({error.strerror}); make room there") from None
    finally:
        partial.unlink(missing_ok=True)
