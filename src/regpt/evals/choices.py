"""Multiple choice, HellaSwag included: which of several endings of a context the model finds likeliest."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from regpt.errors import UserError
from regpt.evals.items import Item, hash_of, read_items
from regpt.evals.packing import Prompt
from regpt.evals.score import Scores
from regpt.remote.download import DownloadProgress, RemoteFile, RemoteOptions
from regpt.remote.retry import PATIENCE, Patience
from regpt.remote.web import open_http
from regpt.text.tokenizer import Encoder

KEYS = (("ctx", "endings", "label"), ("query", "choices", "gold"))  # HellaSwag's names, and those of CORE's files
# HellaSwag's validation set.
N_ITEMS = 10_042
LABEL_COUNTS = (2515, 2485, 2584, 2458)  # how often each place holds the right ending
# The authors' own file, and its hash as others have published it.
COMMIT = "a29ff8e9a04bba4bd6588223785ce105328adc57"
URL = f"https://raw.githubusercontent.com/rowanz/hellaswag/{COMMIT}/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"


class Question(NamedTuple):
    """`label` is the number of the right ending. Endings are appended to the context as they are."""

    context: str
    endings: tuple[str, ...]
    label: int


class Choices:
    """A `Task` of questions.

    Metrics: `acc`, the ending with the largest log-likelihood is the right one; `acc_norm`, the one with the largest
    mean log-likelihood of a token is (which is the smallest mean loss). Of equals the first counts.
    """

    def __init__(self, name: str, questions: Sequence[Question], encoder: Encoder, eot: int):
        """Encodes everything: context and endings apart, as the lecture does; an empty context is `eot`.

        Raises:
            UserError: an ending without a token.
        """
        self.name, self.questions, self.n_items = name, questions, len(questions)
        self.items_sha256 = hash_of((question.context, *question.endings) for question in questions)
        self.baseline = float(np.mean([1 / len(question.endings) for question in questions])) if questions else None
        contexts = encoder.encode_prompts([question.context for question in questions])
        empty = np.array([eot], dtype=np.uint32)
        self.contexts = [context if len(context) else empty for context in contexts]
        each = iter(encoder.encode_continuations([ending for question in questions for ending in question.endings]))
        self.endings = [[next(each) for _ in question.endings] for question in questions]
        self.lengths = np.array([max(map(len, endings)) for endings in self.endings], dtype=np.int64)
        for number, endings in enumerate(self.endings):
            if not all(map(len, endings)):
                raise UserError(f"{name}: an ending of item {number} has no token; give it a text")

    def prompts(self, chosen: Sequence[int]) -> list[Prompt]:
        """Every token of an ending is scored."""
        return [Prompt(self.contexts[i], self.endings[i], [len(x) for x in self.endings[i]]) for i in chosen]

    def judge(self, scores: Scores, chosen: Sequence[int]) -> dict[str, np.ndarray]:
        counts = [len(self.questions[i].endings) for i in chosen]
        labels = np.array([self.questions[i].label for i in chosen])
        mean = scores.log_likelihood / np.maximum(1, scores.tokens)
        by = {"acc": scores.log_likelihood, "acc_norm": mean}
        return {metric: (largest(values, counts) == labels).astype(np.float64) for metric, values in by.items()}


def largest(values: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """(groups,) the place of the largest of each group of `counts` neighbouring values, the first of equals."""
    ends = np.cumsum(counts)
    return np.array([values[end - n : end].argmax() for end, n in zip(ends, counts)], dtype=np.int64)


def open_choices(path: Path, name: str, encoder: Encoder, eot: int) -> Choices:
    """The questions of a user's file: a line has `ctx`, `endings`, `label`, or `query`, `choices`, `gold`.

    A space is put before an ending that does not begin with white space.

    Raises:
        UserError: a file that cannot be read, or a malformed line.
    """
    return Choices(name, [question_of(item) for item in read_items(path)], encoder, eot)


def question_of(item: Item) -> Question:
    keys = next((keys for keys in KEYS if keys[1] in item.row), None)
    if keys is None:
        raise UserError(
            f"{item.where}: the item has neither 'endings' nor 'choices'; a question has ctx, endings and label, "
            "or query, choices and gold"
        )
    context, endings, label = keys
    texts = item.texts(endings, at_least=2)
    spaced = tuple(text if text[0].isspace() else f" {text}" for text in texts)
    return Question(item.get(context, str), spaced, item.label(label, len(texts)))


# ---- HellaSwag (Zellers et al. 2019): 10,042 validation questions about what happens next ----------------------------


def open_hellaswag(path: Path | None, encoder: Encoder, eot: int, progress: DownloadProgress | None = None) -> Choices:
    """HellaSwag as a task; raises what `read_hellaswag` does."""
    return Choices("hellaswag", read_hellaswag(path, progress), encoder, eot)


def read_hellaswag(path: Path | None, progress: DownloadProgress | None = None) -> list[Question]:
    """The questions in `path`, or in the authors' repository (kept in `.cache/regpt` of the home folder).

    Both common formats are read: the authors' (`ctx`, `endings`, `label`) and that of CORE's bundle.

    Raises:
        UserError: a file that cannot be read or downloaded, malformed items, or all 10,042 items with other labels.
    """
    questions = [hellaswag_question(item) for item in read_items(path or download(progress=progress))]
    counts = tuple(np.bincount([question.label for question in questions], minlength=4).tolist())
    if len(questions) == N_ITEMS and counts != LABEL_COUNTS:
        raise UserError(
            f"{path or URL} has {N_ITEMS:,} items but the label counts {counts}, HellaSwag's validation set has "
            f"{LABEL_COUNTS}; it was changed, so take another copy"
        )
    return questions


def hellaswag_question(item: Item) -> Question:
    """Exactly the lecture's: the endings get a leading space."""
    context, endings, label = KEYS[0] if "ctx" in item.row else KEYS[1]
    texts = item.texts(endings, at_least=4)
    if len(texts) > 4:
        raise UserError(f"{item.where}: HellaSwag has four endings, the item has {len(texts)}")
    return Question(item.text(context), tuple(f" {text}" for text in texts), item.label(label, 4))


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
        options=RemoteOptions(cache, patience=patience),
        sha256=sha256,
        version=sha256,
        advice="; or give a local copy with --tasks hellaswag:FILE",
    )
    return file.fetch(progress).path
