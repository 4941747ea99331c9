"""Pretraining: configuration → objects → `Trainer.fit`."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from regpt.checkpoint.background import Saver
from regpt.checkpoint.generators import restore_generators
from regpt.checkpoint.load import Checkpoint, load_checkpoint, newest_checkpoint
from regpt.checkpoint.open import open_model
from regpt.config import RunConfig
from regpt.data.config import DataConfig
from regpt.data.loader import Loader
from regpt.data.prefetch import Prefetcher
from regpt.errors import UserError
from regpt.model.transformer import Transformer
from regpt.model.weights import count_parameters, initialize, load_weights, state_tensors
from regpt.parallel.mesh import Mesh, open_mesh
from regpt.runs.actions import (
    Job,
    make_actions,
    say_what_is_left_out,
    summary,
    write_epochs,
    write_row,
    write_saved_rows,
)
from regpt.runs.build import (
    Corpus,
    build_loader,
    build_model,
    build_trainer,
    choose_kernels,
    count_validation_rows,
    open_corpus,
    with_chosen_rows,
)
from regpt.runs.evaluations import Evaluations, open_run_suites
from regpt.runs.folder import JsonLines, create_run, describe_environment, read_run_config, refuse_used_folder
from regpt.runs.profile import profiled
from regpt.runs.stop import EXIT_SAVED, stop_request
from regpt.runs.terminal import Terminal
from regpt.runs.trackers import Tee, check_trackers, open_trackers
from regpt.sample.generate import check_length, encode_prompt
from regpt.train.optim import load_optimizer, make_optimizer
from regpt.train.peak import device_peak
from regpt.train.schedule import make_schedule
from regpt.train.trainer import Every, Row, Trainer
from regpt.train.updates import watch_updates


def check(config: RunConfig, run: Path | None, processes: int = 1) -> None:
    """Everything that can be wrong before a process or a device is started; raises what `pretrain` would."""
    if run is not None:
        refuse_used_folder(run)
    corpus = open_corpus(config)
    make_schedule(config.optim, config.train.steps)
    build_loader(config, corpus, Mesh(0, processes, torch.device("cpu")))
    count_validation_rows(config, corpus)
    open_run_suites(config, corpus.tokenizer)
    check_trackers(config.log)
    prompt = encode_prompt(corpus.tokenizer, config.sample.prompt)
    check_length(len(prompt), config.sample.max_new_tokens, config.model.max_seq_len)


def pretrain(
    config: RunConfig,
    run: Path,
    *,
    init_from: str | None = None,
    argv: Sequence[str] = (),
    facts: dict[str, Any] | None = None,
    beside: Sequence[str] = (),
    profile_steps: int = 0,
) -> int:
    """Start a run in the new folder `run`; the exit code. `facts` go into env.json, `beside` is as in `create_run`,
    `profile_steps` as in `runs.profile`."""
    with open_mesh(config.train.device) as mesh:
        corpus = open_corpus(config)
        config = replace(config, data=resolved(config.data, corpus))
        model = build_model(config, mesh.device)
        start_weights(model, config, init_from)
        optimizer = make_optimizer(model, config.optim, mesh.device)
        loader = build_loader(config, corpus, mesh)
        with Prefetcher(loader, steps=config.train.steps) as batches:
            trainer = build_trainer(config, mesh, model, optimizer, batches)
            config, chosen = with_chosen_rows(config, trainer)
            if mesh.is_main:
                env = describe_environment(mesh, corpus.facts(), count_parameters(model), argv)
                env |= {"peak": asdict(device_peak(mesh.device, config.train.precision)), "init_from": init_from}
                env |= {"kernels": asdict(choose_kernels(config, model, mesh.device))}
                create_run(run, config, env | chosen | (facts or {}), beside)
            mesh.wait()
            return fit(config, run, corpus, loader, trainer, profile_steps)


def resolved(data: DataConfig, corpus: Corpus) -> DataConfig:
    """`data` with whole paths and the tokenizer's name, as config.toml keeps it."""
    paths = [str(folder.path.resolve()) for folder in corpus.folders]
    tokenizer = corpus.folders[0].manifest.tokenizer
    if data.mixture:
        return replace(data, mixture=dict(zip(paths, data.mixture.values())), tokenizer=tokenizer)
    return replace(data, path=paths[0], tokenizer=tokenizer)


def start_weights(model: Transformer, config: RunConfig, init_from: str | None) -> None:
    """Random weights from `train.seed`, or those of another model of the same shape."""
    if init_from is None:
        initialize(model, config.train.seed)
        return
    source = open_model(init_from).model
    if source.config != config.model:
        ours, theirs = asdict(config.model), asdict(source.config)
        other = ", ".join(f"{key} {theirs[key]} there, {ours[key]} here" for key in ours if ours[key] != theirs[key])
        raise UserError(
            f"--init-from {init_from} is a model of another shape ({other}); set the [model] keys to its values"
        )
    load_weights(model, state_tensors(source))


def resume(run: Path, profile_steps: int = 0) -> int:
    """Go on with the run in `run` from its newest valid checkpoint; the exit code."""
    config = read_run_config(run)
    with open_mesh(config.train.device) as mesh:
        corpus = open_corpus(config)
        checkpoint = load_checkpoint(newest_checkpoint(run), verified=True)
        refuse_changed_data(checkpoint, corpus)
        if checkpoint.config != config.model:
            raise UserError(
                f"{checkpoint.folder} holds a model of another shape than {run}/config.toml; restore that file"
            )
        model = load_weights(build_model(config, mesh.device), checkpoint.weights())
        optimizer = make_optimizer(model, config.optim, mesh.device)
        load_optimizer(model, optimizer, checkpoint.optimizer(), checkpoint.step)
        loader = build_loader(config, corpus, mesh)
        with Prefetcher(loader, steps=config.train.steps) as batches:
            trainer = build_trainer(config, mesh, model, optimizer, batches, step=checkpoint.step)
            trainer.load_state(checkpoint.state.trainer)
            restore_random(checkpoint, mesh)
            return fit(config, run, corpus, loader, trainer, profile_steps)


def restore_random(checkpoint: Checkpoint, mesh: Mesh) -> None:
    """Set this process's global generators as they were, where there were as many processes."""
    states = checkpoint.state.random
    if len(states) == mesh.world_size:
        restore_generators(states[mesh.rank], mesh.device)


def refuse_changed_data(checkpoint: Checkpoint, corpus: Corpus) -> None:
    """The row at which a run goes on means something in the shards that it was trained on only."""
    if checkpoint.state.data.manifest_sha256 != corpus.manifest_sha256:
        raise UserError(
            f"the shards in {corpus.facts()['path']} are not those that {checkpoint.folder} was trained on (another "
            "manifest.json); restore them, or start a new run from its weights with --init-from"
        )


def fit(config: RunConfig, run: Path, corpus: Corpus, loader: Loader, trainer: Trainer, profile_steps: int = 0) -> int:
    """Train until the end of the run; 0, or 75 when a stop was requested and the run saved."""
    mesh, step = trainer.mesh, trainer.step
    terminal = Terminal(str(run), config.train.steps, Console(), enabled=mesh.is_main)
    with ExitStack() as stack:
        names = ("metrics.jsonl", "samples.jsonl")
        files = [stack.enter_context(JsonLines(run / name)) if mesh.is_main else None for name in names]
        if mesh.is_main:
            trackers = open_trackers(config.log, run, asdict(config), step, stack)
            files = [Tee(file, trackers) for file in files if file is not None]
        saver = Saver(run, config.checkpoint)
        ratios = watch_updates(trainer, config.log.update_ratios_every_steps)
        suites = open_run_suites(config, corpus.tokenizer)
        evaluations = Evaluations(config, run, suites, trainer.model, mesh, terminal.say)
        parts = (trainer.model, trainer.optimizer, trainer, ratios, evaluations, terminal)
        job = Job(config, run, mesh, corpus, *parts, *files, saver=saver)
        terminal.say(summary(job))
        peak = device_peak(mesh.device, config.train.precision)
        terminal.say(f"100 % MFU is {peak}")
        say_what_is_left_out(job, loader.rows)
        if step:
            resumed: Row = {"kind": "event", "step": step, "name": "resume", "world_size": mesh.world_size}
            write_row(job, resumed | {"peak": asdict(peak)})
        every = Every(config.eval.every_steps, config.sample.every_steps, config.checkpoint.every_steps)
        if step == config.train.steps:
            terminal.say(f"the run is complete: all {step:,} updates are made; regpt report {run} shows it")
        profile = profiled(profile_steps * mesh.is_main, run / "profile", mesh.device, terminal.console, terminal.say)
        with stop_request() as stop_requested, terminal, saver, profile as note_step:
            do = make_actions(job, stop_requested)
            finished = trainer.fit(replace(do, log=lambda row: (do.log(row), note_step(row))[0]), every)
        write_saved_rows(job)
        write_epochs(job, trainer.step, loader.epochs(trainer.step))
    if not finished:
        terminal.say(f"stopped after step {trainer.step:,} and saved; go on with: regpt train --resume {run}")
    return 0 if finished else EXIT_SAVED
