"""A tiny prepared corpus, and the command line as a function."""

from collections.abc import Callable
from pathlib import Path

import pytest
from short_runs import RUN, SHAPE, SHORT

from regpt.__main__ import main
from regpt.prepare.prepare import prepare
from regpt.text.bpe import train_bpe

TEXT = "the cat sat on the mat and the dog ran to the tree while birds sang of rain in spring"
WORDS = TEXT.split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 short documents with a vocabulary of 300."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 60)) for i in range(1, 41)]
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    prepare([str(folder)], folder / "shards", train_bpe(texts, 300), val_fraction=0.2)
    return folder / "shards"


@pytest.fixture(scope="session")
def tiny_flags(corpus: Path) -> list[str]:
    """Flags that make any recipe tiny enough for a test."""
    return ["--data", str(corpus), *SHAPE, *RUN, *SHORT]


@pytest.fixture
def regpt(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`regpt("train", …)`: exit code, standard output and error of one command."""

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out, err

    return run
