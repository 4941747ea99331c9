"""Copies of a run's metrics for TensorBoard and Weights & Biases. The run folder stays the record."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from regpt.errors import UserError, first_line
from regpt.files import file_sha256
from regpt.report.read import number
from regpt.train.config import LogConfig

PACKAGES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}
UNDRAWN = ("kind", "step", "time", "tokens", "flops")


class Sink(Protocol):
    """Takes the rows of metrics.jsonl and samples.jsonl."""

    def write(self, row: dict[str, Any]) -> None: ...


class Tee:
    """Writes each row to every sink, in order: the run's own file first."""

    def __init__(self, *sinks: Sink):
        self.sinks = sinks

    def write(self, row: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(row)


def wanted(log: LogConfig) -> list[str]:
    return [name for name in PACKAGES if getattr(log, name) not in (False, "off")]


def check_trackers(log: LogConfig) -> None:
    """Raise a UserError for a tracker whose package is not installed."""
    for name in wanted(log):
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of this name, such as its own logs, is not a package
            raise UserError(
                f"log.{name} asks for {PACKAGES[name]}, which is not installed; install it with: "
                f"pip install 'regpt[{name}]', or leave it out"
            )


def open_trackers(
    log: LogConfig, run: Path, config: Mapping[str, Any], step: int, stack: ExitStack, say: Callable[[str], None]
) -> list[Sink]:
    """The trackers that `[log]` asks for, closed with `stack`; `step` updates were made before. A failing tracker is
    reported once with `say`, and left out."""
    openers: dict[str, Callable[[ExitStack], Sink]] = {
        "tensorboard": lambda inner: TensorBoard(run / "tensorboard", step, inner),
        "wandb": lambda inner: WandB(log, run, config, inner),
    }
    return [GuardedTracker(PACKAGES[name], openers[name], stack, say) for name in wanted(log)]


class GuardedTracker:
    """A tracker whose failures, a full disk or a lost network, never end a run: it gets no rows after the first."""

    sink: Sink | None = None

    def __init__(self, name: str, opener: Callable[[ExitStack], Sink], stack: ExitStack, say: Callable[[str], None]):
        self.name, self.say, self.failed = name, say, False
        inner = ExitStack()
        stack.callback(self.attempt, inner.close)
        self.sink = self.attempt(opener, inner)

    def write(self, row: dict[str, Any]) -> None:
        if self.sink:
            self.attempt(self.sink.write, row)

    def attempt(self, action: Callable[..., Any], *args: Any) -> Any:
        try:
            return action(*args)
        except Exception as error:  # whatever the tracker's library raises: the run folder is the record
            if not self.failed:
                why = f"cannot be written ({first_line(error)}); the run continues without it"
                self.say(f"the copy of the metrics for {self.name} {why}")
            self.sink, self.failed = None, True
            return None


class TensorBoard:
    """Event files in RUN/tensorboard. What a run that is resumed had written beyond its checkpoint is discarded."""

    def __init__(self, folder: Path, step: int, stack: ExitStack):
        from torch.utils.tensorboard import SummaryWriter

        stack.enter_context(without_tracebacks("tensorboard"))
        self.writer = SummaryWriter(log_dir=str(folder), purge_step=step + 1 if step else None)
        stack.callback(self.writer.close)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in scalars(row).items():
            self.writer.add_scalar(name, value, row["step"], walltime=row.get("time"))
        for prompt, text in texts(row):
            self.writer.add_text(f"samples/{prompt}", text, row["step"], walltime=row.get("time"))


@contextmanager
def without_tracebacks(package: str) -> Iterator[None]:
    """Threads of `package` that fail print nothing: the next call raises the same."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith(package):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


class WandB:
    """A run of Weights & Biases: in RUN/wandb, and nowhere else while `log.wandb` is `offline`."""

    def __init__(self, log: LogConfig, run: Path, config: Mapping[str, Any], stack: ExitStack):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=log.wandb_project,
            dir=str(run),
            id=run_id(run),
            name=run.resolve().name,
            config=dict(config),
            mode="online" if log.wandb == "online" else "offline",
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),  # the terminal is ours
        )
        stack.callback(wandb.teardown)  # finish alone returns before its own process has written everything
        stack.callback(self.run.finish)
        # Rows of one step come at several times, and after a resume steps come again: the step is a value like others.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, row: dict[str, Any]) -> None:
        values: dict[str, Any] = dict(scalars(row))
        found = texts(row)
        if found:
            values["samples"] = self.wandb.Table(columns=["prompt", "text"], data=[list(one) for one in found])
        if values:
            self.run.log(values | {"step": row["step"]})


def run_id(run: Path) -> str:
    """Hash of env.json: the same for every part of a run that was stopped and resumed."""
    return file_sha256(run / "env.json")[:12]


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl under names that trackers group by: `train/loss`, `eval/hellaswag/acc`."""
    kind = row.get("kind")
    if kind == "eval":
        found = {f"{row.get('task')}/{row.get('metric')}": row.get("value")}
    elif kind == "updates":
        found = {"all": row.get("ratio"), **(row.get("ratios") or {})}
    elif kind in ("train", "val"):
        prefix = f"{row['source']}/" if "source" in row else ""
        found = {prefix + key: value for key, value in row.items() if key not in UNDRAWN}
    else:
        return {}
    numbers = {key: number(value) for key, value in found.items()}
    return {f"{kind}/{key}": value for key, value in numbers.items() if value is not None}


def texts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Prompt and text of each sample of a row of samples.jsonl."""
    return [(str(row.get("prompt")), str(text)) for text in row.get("texts") or ()]
