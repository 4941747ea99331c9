"""Start of a run: random weights, another model, a checkpoint of its own or of another run; and the way back to it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from regpt.checkpoint.fetch import fetch_model, split_address
from regpt.checkpoint.load import (
    CHECKPOINTS,
    Checkpoint,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    print_warning,
)
from regpt.checkpoint.manifest import MANIFEST, STATE
from regpt.checkpoint.open import open_model
from regpt.checkpoint.state import RunState, read_state, restore_generators
from regpt.config import RunConfig, validate_config
from regpt.data.config import DataConfig
from regpt.data.loader import Loader
from regpt.data.prefetch import Prefetcher
from regpt.errors import UserError
from regpt.evals.config import EvalConfig
from regpt.evals.specs import Spec
from regpt.files import exists, file_sha256, is_file
from regpt.files import resolved as whole_path
from regpt.model.weights import initialize, load_weights, state_tensors
from regpt.parallel.mesh import Mesh, open_mesh
from regpt.remote import is_address
from regpt.runs.build import Corpus, build_loader, build_model, build_trainer, open_corpus, with_chosen_rows
from regpt.runs.changes import ROUNDING_KEYS, Changes, describe, first_row, listed
from regpt.runs.folder import made_with
from regpt.runs.remote import on_this_machine
from regpt.train.average import Average
from regpt.train.optim import load_optimizer, make_optimizer
from regpt.train.trainer import Row, Trainer

SAME_NUMBERS = ("torch", "device", "world_size")  # under others, deterministic sums too have another order


def run_mesh(config: RunConfig) -> AbstractContextManager[Mesh]:
    """The processes of a run, as its `[train]` section wants them."""
    train = config.train
    return open_mesh(train.device, deterministic=train.deterministic, hang_seconds=train.hang_seconds)


class Run:
    """A training run: its parts, from its configuration, and its start.

    Attributes:
        loader, trainer, average, chosen: from `begin` on; `chosen` is what was chosen for this device, for env.json.
    """

    loader: Loader
    trainer: Trainer
    average: Average | None
    chosen: dict[str, Any]

    def __init__(self, config: RunConfig, mesh: Mesh):
        """Open the data, build the model (its weights are not yet set) and the optimizer."""
        with mesh.pulse.working("opening its data"):
            self.corpus = open_corpus(config)
        config = config.with_vocab_size(self.corpus.vocab_size)
        data = resolved_config(config.data, self.corpus)
        self.config, self.mesh = replace(config, data=data, eval=with_whole_paths(config.eval)), mesh
        self.model = build_model(self.config, mesh.device)
        self.optimizer = make_optimizer(self.model, config.optim, mesh.device)

    def begin(self, start: "Start", stack: ExitStack) -> None:
        """Build the loader and the trainer at `start`; batches are made in the background until `stack` ends."""
        mesh = self.mesh
        self.loader = build_loader(self.config, self.corpus, mesh, start.first_row)
        batches = stack.enter_context(Prefetcher(self.loader, steps=self.config.train.steps))
        self.trainer = build_trainer(self.config, mesh, self.model, self.optimizer, batches, step=start.step)
        self.trainer.load_state(start.trainer)
        self.config, self.chosen = with_chosen_rows(self.config, self.trainer)
        if start.random is not None:
            restore_generators(start.random, mesh.device)
        self.average = make_average(self.trainer, start)


def resolved_config(data: DataConfig, corpus: Corpus) -> DataConfig:
    """`data` with whole paths and the tokenizer's name, as config.toml keeps it."""
    paths = [str(folder.path.resolve()) for folder in corpus.folders]
    tokenizer = corpus.folders[0].manifest.tokenizer
    if data.mixture:
        return replace(data, mixture=dict(zip(paths, data.mixture.values())), tokenizer=tokenizer)
    return replace(data, path=paths[0], tokenizer=tokenizer)


def with_whole_paths(config: EvalConfig) -> EvalConfig:
    """`config` with the files of its tasks as config.toml keeps them: found from other folders, too."""

    def whole(spec: Spec) -> Spec:
        first, comma, chosen = spec.argument.partition(",")  # core:DIR/arc_easy,piqa: two of the folder's tasks
        path = Path(first)
        there = exists(path) or (spec.kind == "core" and exists(path.parent))
        return spec._replace(argument=f"{whole_path(path)}{comma}{chosen}") if first and there else spec

    return replace(config, tasks=",".join(str(whole(spec)) for spec in config.specs()))


@dataclass(frozen=True)
class Start:
    """Start of a run.

    Attributes:
        step: updates made.
        first_row: of the loader.
        trainer: the trainer's `state`.
        random: the states of this process's random generators, where they are known.
        average: of the weights, and the updates in it; None where the run begins with a new one.
        event: its row of metrics.jsonl.
        changed: settings, from those before, in words.
        save: whether to save at once: the first checkpoint of the run's own.
    """

    step: int = 0
    first_row: int = 0
    trainer: Mapping[str, Any] = field(default_factory=dict)
    random: dict[str, str] | None = None
    average: tuple[Mapping[str, Tensor], int] | None = None
    event: Row | None = None
    changed: str = ""
    save: bool = False


def start_new(run: Run, init_from: str | None) -> Start:
    """Random weights from `train.seed`, or those of another model of the same shape."""
    model, config = run.model, run.config
    if init_from is None:
        initialize(model, config.train.seed)
        return Start()
    source = open_model(on_this_machine(init_from, run.mesh)).model
    shape = replace(source.config, dropout=config.model.dropout)  # which is no part of it
    if shape != config.model:
        ours, theirs = asdict(config.model), asdict(shape)
        other = ", ".join(f"{key} {theirs[key]} there, {ours[key]} here" for key in ours if ours[key] != theirs[key])
        raise UserError(
            f"--init-from {init_from} is a model of another shape ({other}); set the [model] keys to its values"
        )
    load_weights(model, state_tensors(source))
    return Start()


def start_at(run: Run, checkpoint: Checkpoint, event: Row, found: Changes | None = None) -> Start:
    """Weights, moments and all the rest of `checkpoint`; `found` has changed since."""
    state, mesh = checkpoint.state, run.mesh
    with mesh.pulse.working("loading a checkpoint"):
        load_weights(run.model, checkpoint.weights())
        load_optimizer(run.model, run.optimizer, checkpoint.optimizer(), state.step)
    said = [describe(found, state, run.config) if found else "", not_bitwise(run, state, found or {})]
    average = checkpoint.average()
    return Start(
        step=state.step,
        first_row=first_row(state.data, state.step, run.config, run.corpus.manifest_sha256),
        trainer={key: value for key, value in state.trainer.items() if f"train.{key}" not in (found or {})},
        random=state.random[mesh.rank] if len(state.random) == mesh.world_size else None,
        average=None if average is None else (average, state.average_updates),
        event=event | ({"not_bitwise": said[1]} if said[1] else {}),
        changed="\n".join(filter(None, said)),
    )


def not_bitwise(run: Run, state: RunState, found: Changes) -> str:
    """Why a deterministic run does not go on bitwise as it would have; empty when it does."""
    before, now = (facts | {"device": kind_of(facts)} for facts in (state.made_with, made_with(run.mesh)))
    others = [f"{key} {before.get(key)} → {now[key]}" for key in SAME_NUMBERS if before.get(key) != now[key]]
    others += [listed({key: found[key]}) for key in ROUNDING_KEYS if key in found]
    if not run.config.train.deterministic or not others:
        return ""
    return f"not bitwise the run that was stopped, in spite of train.deterministic: {', '.join(others)}"


def kind_of(facts: Mapping[str, Any]) -> str:
    """The device without its threads, whose number the checkpoint sets."""
    return str(facts.get("device", "")).partition(" with ")[0]


def start_again(run: Run, folder: Path, env: Mapping[str, Any], event: Row) -> Start:
    """Where the run began that ended before its first checkpoint; `env` is its env.json."""
    parent = env.get("parent")
    if parent is None:
        return replace(start_new(run, env.get("init_from")), event=event)
    source = Path(on_this_machine(parent["checkpoint"], run.mesh, optimizer=True))
    checkpoint = load_checkpoint(source)
    if file_sha256(source / MANIFEST) != parent["manifest_sha256"]:
        raise UserError(
            f"{parent['checkpoint']} is no longer the checkpoint that {folder} began with; fork again into another "
            "--out"
        )
    return replace(start_at(run, checkpoint, event), save=True)


def choose_checkpoint(run: Path, mesh: Mesh) -> tuple[Checkpoint, list[str]]:
    """The newest valid checkpoint, and what was wrong with newer ones; read and chosen by one process for all."""
    skipped: list[str] = []

    def warn(message: str) -> None:
        skipped.append(message)
        print_warning(message)

    with mesh.pulse.working("checking its checkpoints"):
        chosen = newest_checkpoint(run, warn=warn).name.encode() if mesh.is_main else b""
    name = mesh.gather(chosen)[0].decode()
    return load_checkpoint(run / CHECKPOINTS / name, verified=True), skipped


def go_back(run: Path, trainer: Trainer, average: Average | None) -> None:
    """Give `trainer` the state of the newest valid checkpoint of `run`; its next batch is the one after the present.
    So with the `average` of its weights, where one is kept.

    All batches from the checkpoint on are left out, the present one too: PaLM's remedy (Chowdhery et al. 2022, section
    5.1), whose authors found that neither the state nor the data alone made a spike.

    Raises:
        UserError: there is no checkpoint.
    """
    mesh, failed_at, following = trainer.mesh, trainer.step, trainer.data_step + 1
    if mesh.any(mesh.is_main and not checkpoints(run)):
        raise UserError(
            f"step {failed_at + 1} is not finite and run {str(run)!r} has no checkpoint to go back to; set a smaller "
            "checkpoint.every_steps, or train.on_non_finite skip"
        )
    checkpoint, _ = choose_checkpoint(run, mesh)
    load_weights(trainer.model, checkpoint.weights())
    load_optimizer(trainer.model, trainer.optimizer, checkpoint.optimizer(), checkpoint.step)
    if average is not None:
        average.load(checkpoint.average() or checkpoint.weights(), checkpoint.state.average_updates)
    trainer.load_state(checkpoint.state.trainer, rewound=True)
    states = checkpoint.state.random
    if len(states) == mesh.world_size:
        restore_generators(states[mesh.rank], mesh.device)
    trainer.step = checkpoint.step
    trainer.skipped = following - checkpoint.step
    back = failed_at - checkpoint.step
    trainer.event("rewind", checkpoint=checkpoint.folder.name, updates=back, batches_left_out=back + 1)


def checkpoint_at(name: str) -> Path:
    """The folder of the checkpoint `name`: `name` itself, or a copy on this machine of what lies at that address."""
    if not is_address(name):
        return Path(name)
    if not split_address(name)[1]:
        raise UserError(f"--fork-from {name!r} is no checkpoint; give RUN/{CHECKPOINTS}/step-…")
    return fetch_model(name, optimizer=True)


def fork_config(source: Path) -> RunConfig:
    """The configuration that the checkpoint `source` was made with.

    Raises:
        UserError: it is no checkpoint of a run.
    """
    if folders := checkpoints(source):
        raise UserError(f"--fork-from {str(source)!r} is a run; give one of its checkpoints, such as {folders[-1]}")
    if not is_file(source / STATE):
        raise UserError(f"--fork-from {str(source)!r} is no checkpoint; give RUN/{CHECKPOINTS}/step-…")
    values = read_state(source / STATE).config
    if not values:
        raise UserError(f"checkpoint {str(source)!r} holds no configuration of a run; give one that a run has saved")
    return validate_config(values, str(source / STATE))


def refuse_changed_data(manifest_sha256: str, trained: Path, corpus: Corpus) -> None:
    """The row at which a run goes on means something in the shards only that the run or checkpoint `trained` read."""
    if manifest_sha256 != corpus.manifest_sha256:
        raise UserError(
            f"the shards in {corpus.facts()['path']} are not those that {trained} was trained on (another "
            "manifest.json); restore them, or start a new run with --fork-from"
        )


def make_average(trainer: Trainer, start: Start) -> Average | None:
    """The moving average of the weights where one is wanted: that of `start`, or one that begins there."""
    if not trainer.config.ema_decay:
        return None
    average = Average(trainer.model, trainer.optimizer, trainer.config.ema_decay)
    if start.average is not None:
        average.load(*start.average)
    return average
