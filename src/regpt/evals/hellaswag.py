"""HellaSwag (Zellers et al. 2019): 10,042 validation questions about what happens next."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from regpt.errors import UserError
from regpt.evals.choices import Choices, Question
from regpt.evals.items import Item, read_items
from regpt.remote.download import DownloadProgress, RemoteFile, RemoteOptions
from regpt.remote.retry import PATIENCE, Patience
from regpt.remote.web import open_http
from regpt.text.tokenizer import Encoder

N_ITEMS = 10_042
LABEL_COUNTS = (2515, 2485, 2584, 2458)  # how often each place holds the right ending
# The authors' own file, and its hash as others have published it.
COMMIT = "a29ff8e9a04bba4bd6588223785ce105328adc57"
URL = f"https://raw.githubusercontent.com/rowanz/hellaswag/{COMMIT}/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"


def open_hellaswag(path: Path | None, encoder: Encoder, eot: int, progress: DownloadProgress | None = None) -> Choices:
    """HellaSwag as a task; raises what `read_hellaswag` does."""
    return Choices("hellaswag", read_hellaswag(path, progress), encoder, eot)


def read_hellaswag(path: Path | None, progress: DownloadProgress | None = None) -> list[Question]:
    """The questions in `path`, or in the authors' repository (kept in `.cache/regpt` of the home folder).

    Both formats that are about are read: the authors' (`ctx`, `endings`, `label`) and that of CORE's bundle.

    Raises:
        UserError: a file that cannot be read or downloaded, malformed items, or all 10,042 items with other labels.
    """
    items = read_items(path if path else download(progress=progress))
    return checked(list(questions_of(items)), str(path or URL))


def download(
    url: str = URL,
    sha256: str = SHA256,
    cache: Path | None = None,
    patience: Patience = PATIENCE,
    progress: DownloadProgress | None = None,
) -> Path:
    """The official file on this machine; its hash is compared each time, not only after the download.

    Raises:
        UserError: it cannot be downloaded, or has another hash.
    """
    file = RemoteFile(
        name="hellaswag_val.jsonl",
        bytes=0,
        url=url,
        address=url,
        open_at=open_http,
        options=RemoteOptions(cache or Path.home() / ".cache" / "regpt", None, patience),
        sha256=sha256,
        version=sha256,
        advice="; or give a local copy with --tasks hellaswag:FILE",
    )
    return file.fetch(progress).path


def questions_of(items: Iterable[Item]) -> Iterable[Question]:
    """Exactly the lecture's: the endings get a leading space."""
    for item in items:
        context, endings, label = ("ctx", "endings", "label") if "ctx" in item.row else ("query", "choices", "gold")
        texts = item.texts(endings, at_least=4)
        if len(texts) > 4:
            raise UserError(f"{item.where}: HellaSwag has four endings, the item has {len(texts)}")
        yield Question(item.text(context), tuple(f" {text}" for text in texts), item.label(label, 4))


def checked(questions: list[Question], where: str) -> list[Question]:
    """`questions`; those of the whole validation set must have its labels."""
    counts = tuple(np.bincount([question.label for question in questions], minlength=4).tolist())
    if len(questions) == N_ITEMS and counts != LABEL_COUNTS:
        raise UserError(
            f"{where} has {N_ITEMS:,} items but the label counts {counts}, HellaSwag's validation set has "
            f"{LABEL_COUNTS}; it was changed, so take another copy"
        )
    return questions
