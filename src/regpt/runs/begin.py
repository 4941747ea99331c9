"""Start of a run from random weights, another model or a checkpoint (resume, fork), and rewind to a checkpoint."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from regpt.checkpoint.base import BaseRecord
from regpt.checkpoint.best import named_checkpoint
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
from regpt.data.loader import Loader, RampLoader
from regpt.data.prefetch import Prefetcher
from regpt.errors import UserError
from regpt.evals.config import EvalConfig
from regpt.evals.specs import Spec
from regpt.files import exists, file_sha256, is_file
from regpt.files import resolved as whole_path
from regpt.model.config import FAMILIES, LAYERED, ROTARY, ModelConfig
from regpt.model.weights import grown_weights, initialize, state_tensors
from regpt.parallel.mesh import Mesh, open_mesh
from regpt.remote import is_address
from regpt.runs.adapters import begin_base, load_learned, refuse_without_base, restore_weights
from regpt.runs.build import Corpus, build_loader, build_model, build_trainer, open_corpus, with_chosen_rows
from regpt.runs.changes import ROUNDING_KEYS, Changes, describe, first_row, listed, ramp_steps
from regpt.runs.folder import made_with
from regpt.runs.remote import on_this_machine
from regpt.runs.rollouts import RolloutLoader
from regpt.text.companions import read_companions
from regpt.text.tokenizer import Tokenizer
from regpt.train.average import Average
from regpt.train.optim import load_optimizer, make_optimizer
from regpt.train.trainer import Row, Trainer

# Fields of a model that hold no weights: another value computes something else with the same tensors.
WEIGHTLESS = {*ROTARY, *LAYERED, "max_seq_len", "window", "dropout", "norm_eps"}
BITWISE_KEYS = ("torch", "device", "world_size")  # a change reorders sums, even with train.deterministic


def run_mesh(config: RunConfig) -> AbstractContextManager[Mesh]:
    """Open the mesh of processes with the device and timeouts of the `[train]` section."""
    train = config.train
    return open_mesh(train.device, deterministic=train.deterministic, hang_seconds=train.hang_seconds)


class Run:
    """A training run: its corpus, model, optimizer and trainer, built from the configuration.

    Attributes:
        companions: see `keep_companions`.
        base: of a run that trains adapters; set when its weights are.
        loader, trainer, average, chosen: set by `begin`; `chosen` holds settings tuned for this device, for env.json.
    """

    loader: Loader | RampLoader
    trainer: Trainer
    average: Average | None
    chosen: dict[str, Any]

    def __init__(self, config: RunConfig, mesh: Mesh):
        """Open the data, build the model (weights uninitialised) and the optimizer."""
        with mesh.pulse.working("opening its data"):
            self.corpus = open_corpus(config)
        config = config.with_vocab_size(self.corpus.vocab_size)
        data = resolved_config(config.data, self.corpus)
        self.config, self.mesh = replace(config, data=data, eval=with_whole_paths(config.eval)), mesh
        self.model = build_model(self.config, mesh.device)
        self.optimizer = make_optimizer(self.model, config.optim, mesh.device, config.train.seed)
        # Conversations bring the template that they were rendered with.
        self.companions = read_companions(self.corpus.folders[0].path)
        self.base: BaseRecord | None = None

    def keep_companions(self, tokenizer: Tokenizer, companions: Mapping[str, str]) -> None:
        """Hand on the chat template and the options of generation of the model that the run begins with; they name
        tokens of its tokenizer."""
        if tokenizer.sha256 == self.corpus.tokenizer.sha256:
            self.companions = {**companions, **read_companions(self.corpus.folders[0].path)}

    def begin(self, start: "Start", stack: ExitStack) -> None:
        """Build the loader and the trainer at `start`; batches are prefetched in a thread until `stack` is closed."""
        mesh = self.mesh
        if self.config.grpo.tasks:
            self.loader = batches = RolloutLoader(self.config, self.corpus, mesh, self.model, start.first_row)
            batches.load_state(start.random)
        else:
            self.loader = build_loader(self.config, self.corpus, mesh, start.first_row, start.ahead)
            batches = stack.enter_context(Prefetcher(self.loader, steps=self.config.train.steps))
        self.trainer = build_trainer(self.config, mesh, self.model, self.optimizer, batches, step=start.step)
        self.trainer.load_state(start.trainer)
        self.config, self.chosen = with_chosen_rows(self.config, self.trainer)
        if start.random is not None:
            restore_generators(start.random, mesh.device)
        self.average = make_average(self.trainer, start)


def resolved_config(data: DataConfig, corpus: Corpus) -> DataConfig:
    """Return `data` with absolute paths and the tokenizer's name, as stored in config.toml."""
    paths = [str(folder.path.resolve()) for folder in corpus.folders]
    tokenizer = corpus.folders[0].manifest.tokenizer
    if data.mixture:
        return replace(data, mixture=dict(zip(paths, data.mixture.values())), tokenizer=tokenizer)
    return replace(data, path=paths[0], tokenizer=tokenizer)


def with_whole_paths(config: EvalConfig) -> EvalConfig:
    """Return `config` with absolute paths of task files, so that config.toml works from any folder."""

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
        first_row, ahead: of the loader.
        trainer: the trainer's `state`.
        random: states of this rank's random generators; None when unknown.
        average: EMA of the weights and its number of updates; None to start a new one.
        event: row of metrics.jsonl to log, such as `resume`.
        changed: notice of the settings that differ from the checkpoint's, for the terminal.
        save: save a checkpoint immediately, because the run has none of its own yet.
    """

    step: int = 0
    first_row: int = 0
    ahead: int = 0
    trainer: Mapping[str, Any] = field(default_factory=dict)
    random: dict[str, str] | None = None
    average: tuple[Mapping[str, Tensor], int] | None = None
    event: Row | None = None
    changed: str = ""
    save: bool = False


def start_new(run: Run, init_from: str | None) -> Start:
    """Initialise from `train.seed`, or load the weights of another model whose weights have the same shapes."""
    model, config = run.model, run.config
    refuse_without_base(config, init_from)
    if init_from is None:
        initialize(model, config.train.seed)
        return Start()
    source = open_model(on_this_machine(init_from, run.mesh), narrow=config.train.weight_dtype == "bf16")
    differing = other_fields(source.model.config, config.model)
    if extends(run.corpus.tokenizer, source.tokenizer):
        differing.pop("vocab_size", None)
    if config.model.reward_head:
        differing.pop("reward_head", None)
    refuse_other_weights(init_from, differing, config.model)
    begin_base(run, init_from, grown_weights(model, state_tensors(source.model), config.train.seed))
    run.keep_companions(source.tokenizer, source.companions)
    said = ", ".join(f"model.{key} {here} instead of {there}" for key, (there, here) in differing.items())
    return Start(changed=f"--init-from {init_from}: the same weights in another model: {said}" if said else "")


def extends(tokenizer: Tokenizer, other: Tokenizer) -> bool:
    """Whether `tokenizer` has the tokens of `other`, and more after them."""
    n = other.n_vocab
    return tokenizer.n_vocab > n and all(tokenizer.token_bytes(i) == other.token_bytes(i) for i in range(n))


def other_fields(there: ModelConfig, here: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Fields of two models that differ, with both values."""
    theirs, ours = asdict(there.resolved()), asdict(here.resolved())
    return {key: (theirs[key], ours[key]) for key in ours if theirs[key] != ours[key]}


def refuse_other_weights(name: str, differing: Mapping[str, tuple[Any, Any]], model: ModelConfig) -> None:
    """Raise a UserError where the weights of the model `name` have other shapes, or another meaning."""
    other = {key: values for key, values in differing.items() if key not in WEIGHTLESS}
    if other:
        said = ", ".join(f"{key} {there}, not {here}" for key, (there, here) in other.items())
        raise UserError(f"--init-from {name} is a model of another shape ({said}); set the [model] keys to its values")
    if "max_seq_len" in differing and not FAMILIES[model.family].rotary:
        there, here = differing["max_seq_len"]
        raise UserError(
            f"--init-from {name} has {there} positions and model.max_seq_len is {here}, but {model.family} learns a "
            f"vector for each position, and there are none to begin the others with; set model.max_seq_len {there}, or "
            "train a family with rotary positions (llama)"
        )


def start_at(run: Run, checkpoint: Checkpoint, event: Row, found: Changes | None = None) -> Start:
    """Load weights and moments of `checkpoint` and return its `Start`; `found` holds the settings changed since."""
    state, mesh = checkpoint.state, run.mesh
    with mesh.pulse.working("loading a checkpoint"):
        restore_weights(run, checkpoint)
        load_optimizer(run.model, run.optimizer, checkpoint.optimizer(), state.step)
    run.keep_companions(checkpoint.tokenizer(), checkpoint.companions())
    changed = describe(found, state, run.config) if found else ""
    inexact = not_bitwise(run, state, found or {})
    average = checkpoint.average()
    return Start(
        step=state.step,
        first_row=first_row(state.data, state.step, run.config, run.corpus.manifest_sha256),
        ahead=ramp_steps(state.data, run.config) - state.step,
        trainer={key: value for key, value in state.trainer.items() if f"train.{key}" not in (found or {})},
        random=state.random[mesh.rank] if len(state.random) == mesh.world_size else None,
        average=None if average is None else (average, state.average_updates),
        event=event | ({"not_bitwise": inexact} if inexact else {}),
        changed="\n".join(filter(None, (changed, inexact))),
    )


def not_bitwise(run: Run, state: RunState, found: Changes) -> str:
    """Explain why a deterministic run does not resume bitwise; empty if it does."""
    before, now = (facts | {"device": device_kind(facts)} for facts in (state.made_with, made_with(run.mesh)))
    others = [f"{key} {before.get(key)} → {now[key]}" for key in BITWISE_KEYS if before.get(key) != now[key]]
    others += [listed({key: found[key]}) for key in ROUNDING_KEYS if key in found]
    if not run.config.train.deterministic or not others:
        return ""
    return f"not bitwise the run that was stopped, in spite of train.deterministic: {', '.join(others)}"


def device_kind(facts: Mapping[str, Any]) -> str:
    """Name of the device without the number of its threads, which a checkpoint restores."""
    return str(facts.get("device", "")).partition(" with ")[0]


def start_again(run: Run, folder: Path, env: Mapping[str, Any], event: Row) -> Start:
    """Repeat the start of a run that ended before its first checkpoint; `env` is its env.json."""
    parent = env.get("parent")
    if parent is None:
        return replace(start_new(run, env.get("init_from")), event=event)
    source = Path(on_this_machine(parent["checkpoint"], run.mesh, optimizer=True))
    checkpoint = load_checkpoint(source)
    if file_sha256(source / MANIFEST) != parent["manifest_sha256"]:
        raise UserError(
            f"{parent['checkpoint']} is no longer the checkpoint that {folder} started from; fork again into another "
            "--out"
        )
    return replace(start_at(run, checkpoint, event), save=True)


def choose_checkpoint(run: Path, mesh: Mesh) -> tuple[Checkpoint, list[str]]:
    """Open the newest valid checkpoint, chosen by the main rank; also return its warnings about damaged ones."""
    skipped: list[str] = []

    def warn(message: str) -> None:
        skipped.append(message)
        print_warning(message)

    with mesh.pulse.working("checking its checkpoints"):
        chosen = newest_checkpoint(run, warn=warn).name.encode() if mesh.is_main else b""
    name = mesh.gather(chosen)[0].decode()
    return load_checkpoint(run / CHECKPOINTS / name, verified=True), skipped


def go_back(run: Path, trainer: Trainer, average: Average | None) -> None:
    """Rewind `trainer`, and the EMA `average` if there is one, to the newest valid checkpoint of `run`.

    The next batch is the one after the current one: all batches since the checkpoint are skipped. This is PaLM's
    remedy (Chowdhery et al. 2022, section 5.1), whose authors found that neither the state nor the
    data alone caused a spike.

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
    load_learned(trainer.model, checkpoint.weights())
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
    """The folder of the checkpoint `name`; of one at an address, a copy on this machine."""
    if not is_address(name):
        return named_checkpoint(name)
    if not split_address(name)[1]:
        raise UserError(f"--fork-from {name!r} is not a checkpoint; give RUN/{CHECKPOINTS}/step-…")
    return fetch_model(name, optimizer=True)


def fork_config(source: Path) -> RunConfig:
    """Read the configuration of the run that saved the checkpoint `source`.

    Raises:
        UserError: it is not a checkpoint of a run.
    """
    if folders := checkpoints(source):
        raise UserError(f"--fork-from {str(source)!r} is a run; give one of its checkpoints, such as {folders[-1]}")
    if not is_file(source / STATE):
        raise UserError(f"--fork-from {str(source)!r} is not a checkpoint; give RUN/{CHECKPOINTS}/step-…")
    values = read_state(source / STATE).config
    if not values:
        raise UserError(f"checkpoint {str(source)!r} stores no run configuration; give one that a run has saved")
    return validate_config(values, str(source / STATE))


def refuse_changed_data(manifest_sha256: str, trained: Path, corpus: Corpus) -> None:
    """Raise a UserError unless the corpus has the shards that `trained` read: row numbers are valid in no others."""
    if manifest_sha256 != corpus.manifest_sha256:
        raise UserError(
            f"the shards in {corpus.facts()['path']} are not those that {trained} was trained on (another "
            "manifest.json); restore them, or start a new run with --fork-from"
        )


def make_average(trainer: Trainer, start: Start) -> Average | None:
    """Return the EMA of the weights, continued from `start` or new; None without `train.ema_decay`."""
    if not trainer.config.ema_decay:
        return None
    average = Average(trainer.model, trainer.optimizer, trainer.config.ema_decay)
    if start.average is not None:
        average.load(*start.average)
    return average
