"""regpt: train GPTs from scratch. The package in the order of the pipeline:

text/        text → tokens       the GPT-2 tokenizer, training a BPE
data/        tokens → batches    sources, shards, the order of documents, the loader
model/       batch → logits      GPT-2 in plain PyTorch
parallel/    many processes      the mesh, sums over ranks, the launcher
train/       logits → step       loss, optimizer, schedule, the trainer
hf/          other formats     Hugging Face folders of GPT-2, read and written
remote/      other machines      downloads, the Hugging Face hub, runs in buckets
checkpoint/  state → disk        save, load, verify; `open_model` finds a model by path or name
evals/       model → numbers     validation loss, bits per byte
engine/      model → text        logits processing and draws, paged cache, continuous batching
serve/       model → HTTP        OpenAI's paths over engines
report/      run → pictures      one self-contained page a run
tools/       around a run        the plan of a run, the doctor, the benchmarks
runs/        all of it           composition roots: configuration → objects → Trainer.fit()
api/         the Python way in   regpt.load, prepare, train, evaluate, read_run (docs/api.md), imported on first use
cli/         the command line    one short file a command
"""

import time
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

STARTED = time.perf_counter()  # of this process, before what takes seconds to import

if TYPE_CHECKING:
    from regpt.api.data import prepare, train_tokenizer
    from regpt.api.metrics import Table, TrainingRun, read_run
    from regpt.api.model import LanguageModel, load
    from regpt.api.run import evaluate, resume, train
    from regpt.config import RunConfig
    from regpt.errors import UsageError, UserError

    __version__: str

__all__ = [
    "LanguageModel",
    "RunConfig",
    "Table",
    "TrainingRun",
    "UsageError",
    "UserError",
    "evaluate",
    "load",
    "prepare",
    "read_run",
    "resume",
    "train",
    "train_tokenizer",
]
HOMES = {  # module → the names of `__all__` that it defines
    "regpt.api.data": ("train_tokenizer",),
    "regpt.api.metrics": ("Table", "TrainingRun", "read_run"),
    "regpt.api.model": ("LanguageModel", "load"),
    "regpt.api.run": ("evaluate", "resume"),
    "regpt.config": ("RunConfig",),
    "regpt.errors": ("UsageError", "UserError"),
}

FUNCTIONS = {"prepare": "regpt.api.data", "train": "regpt.api.run"}  # with the name of a subpackage


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used (PEP 562): `import regpt` imports neither torch nor NumPy."""
    if name in FUNCTIONS:
        return import_module(f"regpt.{name}")  # which is callable; see `CallablePackage`
    if name == "__version__":
        return globals().setdefault(name, installed_version())
    for home, names in HOMES.items():
        if name in names:
            return globals().setdefault(name, getattr(import_module(home), name))
    raise AttributeError(f"module 'regpt' has no attribute {name!r}")


def installed_version() -> str:
    """Version of the installed package, made from git's tags (setuptools-scm); a source tree that was not installed has
    PEP 440's lowest, with a label that says why."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("regpt")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


class CallablePackage(ModuleType):
    """A subpackage, `regpt.train`, that is the function `regpt.train` too: importing the subpackage puts it under that
    name whatever else was there."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.__wrapped__(*args, **options)

    @property
    def __wrapped__(self) -> Any:  # where `inspect.signature`, and so `help` and editors, look
        name = self.__name__.removeprefix("regpt.")
        return getattr(import_module(FUNCTIONS[name]), name)
