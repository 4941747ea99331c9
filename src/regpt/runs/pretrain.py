"""Pretraining: configuration → objects → `Trainer.fit`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from regpt.checkpoint.load import checkpoints, load_checkpoint, print_warning
from regpt.checkpoint.manifest import MANIFEST
from regpt.checkpoint.saver import Saver
from regpt.config import RunConfig
from regpt.console.drawing import PlainConsole
from regpt.console.lines import print_note
from regpt.engine.generate import encode_prompt
from regpt.engine.request import check_length
from regpt.errors import word
from regpt.files import exists, file_sha256, resolved
from regpt.model.weights import count_parameters
from regpt.parallel.mesh import Mesh
from regpt.parallel.signals import EXIT_SAVED
from regpt.remote import is_address
from regpt.runs.actions import RunActions, say_what_is_left_out, summary, write_epochs
from regpt.runs.adapters import facts_of, keep_base, refuse_remote
from regpt.runs.begin import (
    Run,
    Start,
    choose_checkpoint,
    refuse_changed_data,
    run_mesh,
    start_again,
    start_at,
    start_new,
)
from regpt.runs.build import build_loader, choose_kernels, count_validation_rows, open_corpus
from regpt.runs.changes import changes, refuse_changes
from regpt.runs.evaluations import open_run_suites
from regpt.runs.folder import (
    JsonLines,
    create_run,
    describe_environment,
    made_with,
    owned,
    read_run_config,
    refuse_used_folder,
    write_run_config,
)
from regpt.runs.profile import profiled
from regpt.runs.remote import NOTE, RemoteRun, by_main, deliver, mirrored, on_this_machine
from regpt.runs.rollouts import RolloutLoader
from regpt.runs.stop import StopRequest, stop_request
from regpt.runs.terminal import Terminal
from regpt.runs.trackers import Sink, Tee, check_trackers, open_trackers
from regpt.structured import read_object
from regpt.tensors import REMEDY
from regpt.train.peak import device_peak
from regpt.train.schedule import make_schedule


def check(config: RunConfig, run: Path | None, processes: int = 1, beside: Sequence[str] = ()) -> None:
    """Everything that can be wrong before a process or a device is started; raises what `pretrain` would."""
    if run is not None:
        refuse_used_folder(run, beside)
    corpus = open_corpus(config)
    for folder in corpus.verify_small():
        said = f"{folder}: too large to be compared with its SHA-256 here; that does: regpt data verify {word(folder)}"
        print_note(said)
    make_schedule(config.optim, config.train.steps)
    mesh = Mesh(0, processes, torch.device("cpu"))
    if config.grpo.tasks:
        RolloutLoader(config, corpus, mesh, None)  # pyright: ignore[reportArgumentType] (nothing is written)
    else:
        build_loader(config, corpus, mesh)
    count_validation_rows(config, corpus)
    open_run_suites(config, corpus.tokenizer, corpus.chat())
    check_trackers(config.log)
    for prompt in config.sample.prompts:
        tokens = encode_prompt(corpus.tokenizer, prompt)
        length, longest = config.sample.max_new_tokens, config.model.max_seq_len
        check_length(len(tokens), length, longest, "sample.max_new_tokens")


def pretrain(
    config: RunConfig,
    folder: Path,
    *,
    init_from: str | None = None,
    argv: Sequence[str] = (),
    facts: dict[str, Any] | None = None,
    beside: Sequence[str] = (),
    profile_steps: int = 0,
    remote: RemoteRun | None = None,
    quiet: bool = False,
    stop: StopRequest = stop_request,
) -> int:
    """Start a run in the new `folder`; the exit code.

    Args:
        folder: the staging folder of `remote`, where that is given.
        facts: for env.json.
        beside, profile_steps: as in `create_run` and `runs.profile`.
        quiet: print nothing.
        stop: decides how signals stop the run.
    """
    init_from = str(resolved(init_from)) if init_from and exists(init_from) else init_from
    with run_mesh(config) as mesh, ExitStack() as stack:
        run = Run(config, mesh)
        start = start_new(run, init_from)
        run.begin(start, stack)
        create(stack, run, folder, argv, {"init_from": init_from} | (facts or {}), beside, remote)
        return train(run, folder, start, profile_steps, remote, quiet=quiet, stop=stop)


def fork(
    config: RunConfig,
    source: str | Path,
    folder: Path,
    *,
    argv: Sequence[str] = (),
    profile_steps: int = 0,
    remote: RemoteRun | None = None,
) -> int:
    """Start a run in the new folder `folder` from the checkpoint `source`, a folder or an address, with the settings
    `config`; the exit code. `remote` is as in `pretrain`."""
    with run_mesh(config) as mesh, ExitStack() as stack:
        checkpoint = load_checkpoint(Path(on_this_machine(str(source), mesh, optimizer=True)))
        run = Run(config, mesh)
        found = changes(checkpoint.state.config, run.config.sections())
        refuse_changes(found, checkpoint.step, force=True)
        digest = file_sha256(checkpoint.folder / MANIFEST)
        place = source if is_address(str(source)) else str(checkpoint.folder.resolve())
        parent = {"checkpoint": place, "step": checkpoint.step, "manifest_sha256": digest, "changed": found}
        start = replace(start_at(run, checkpoint, {"name": "fork", "parent": parent}, found), save=True)
        run.begin(start, stack)
        create(stack, run, folder, argv, {"parent": parent}, remote=remote)
        return train(run, folder, start, profile_steps, remote)


def resume(
    folder: Path,
    config: RunConfig | None = None,
    *,
    force: bool = False,
    profile_steps: int = 0,
    remote: RemoteRun | None = None,
    quiet: bool = False,
    stop: StopRequest = stop_request,
) -> int:
    """Go on with the run in `folder` from its newest valid checkpoint; the exit code.

    Args:
        config: instead of the run's config.toml, which it then replaces.
        force: also with settings that make another run of it.
        remote, quiet, stop: as in `pretrain`.
    """
    config = config or read_run_config(folder)
    with run_mesh(config) as mesh, ExitStack() as stack:
        if mesh.is_main:
            stack.enter_context(owned(folder))
        mesh.wait()  # nobody reads before it is certain that nobody else writes
        if remote:
            by_main(mesh, lambda: remote.go_on(stack))
        event: dict[str, object] = {"name": "resume", **made_with(mesh)}
        if checkpoints(folder):
            checkpoint, skipped = choose_checkpoint(folder, mesh)
            skipped = [*(remote.skipped if remote else ()), *skipped]
            run = Run(config, mesh)
            found = changes(checkpoint.state.config, run.config.sections())
            refuse_changes(found, checkpoint.step, force)
            refuse_changed_data(checkpoint.state.data.manifest_sha256, checkpoint.folder, run.corpus)
            start = start_at(run, checkpoint, event | {"changed": found, "skipped": skipped}, found)
        else:
            run = Run(config, mesh)
            if mesh.is_main:
                print_warning(f"{folder} has no checkpoint to continue from: the run begins again, with step 1")
            start = start_again(run, folder, read_object(folder / "env.json", REMEDY), event)
        run.begin(start, stack)
        if mesh.is_main:
            write_run_config(folder, run.config)
        return train(run, folder, start, profile_steps, remote, quiet=quiet, stop=stop)


def create(
    stack: ExitStack,
    run: Run,
    folder: Path,
    argv: Sequence[str],
    facts: dict[str, Any],
    beside: Sequence[str] = (),
    remote: RemoteRun | None = None,
) -> None:
    """Make the folder of a new run, owned by this process until `stack` ends; all processes return when it exists."""
    config, mesh = run.config, run.mesh
    refuse_remote(config, remote is not None)

    def make() -> None:
        env = describe_environment(mesh, run.corpus.facts(), count_parameters(run.model), argv)
        env |= {"peak": asdict(device_peak(mesh.device, config.train.precision))} | run.chosen
        env |= facts_of(run)
        env |= {"kernels": asdict(choose_kernels(config, run.model, mesh.device))}
        if remote is None:
            refuse_used_folder(folder, beside)
        stack.enter_context(owned(folder))
        if remote:
            remote.begin(stack)
        create_run(folder, config, env | facts, (*beside, NOTE))

    by_main(mesh, make)


def train(
    run: Run,
    folder: Path,
    start: Start,
    profile_steps: int = 0,
    remote: RemoteRun | None = None,
    *,
    quiet: bool = False,
    stop: StopRequest = stop_request,
) -> int:
    """Train from `start` to the end of the run; 0, or 75 when a stop was requested and the run saved.

    The folder is copied to `remote` meanwhile; this returns when everything has arrived.
    """
    config, mesh, trainer = run.config, run.mesh, run.trainer
    keep_base(run, folder)
    name = remote.url if remote else str(folder)
    terminal = Terminal(name, config.train.steps, PlainConsole(), enabled=mesh.is_main and not quiet)
    saver = Saver(folder, config.checkpoint)
    every = {"validate_every": config.eval.every_steps, "sample_every": config.sample.every_steps}
    mirroring = mirrored(remote, saver, mesh, terminal.say)
    with stop(config.train.stop_seconds) as asked, mirroring as mirror, ExitStack() as stack:
        metrics, samples = open_sinks(run, folder, terminal, stack)
        over = lambda: asked() or (mirror is not None and mirror.failure is not None)  # noqa: E731
        do = RunActions(run, folder, terminal, saver, metrics, samples, over)
        announce(do, start)
        steps = profile_steps * mesh.is_main
        profile = profiled(steps, folder / "profile", mesh.device, terminal.say)
        with terminal, saver, profile as do.note_step:
            if start.save:
                do.save(trainer.step)
            finished = False
            with killed_compiler_stops(do):
                finished = trainer.fit(do, **every, save_every=config.checkpoint.every_steps)
            mesh.pulse.work = "finishing what it writes"  # the last checkpoint, copies of the metrics
        do.write_saved_rows()
        write_epochs(do, trainer.step, run.loader.epochs(trainer.data_step))
        stack.close()  # the files are whole before they are copied
        if remote:
            deliver(mirror, mesh)
    mesh.wait()  # a launcher ends the others when the first has ended: not while they write
    if not finished:
        terminal.say(f"stopped after step {trainer.step:,} and saved; go on with: regpt train --resume {word(name)}")
    return 0 if finished else EXIT_SAVED


@contextmanager
def killed_compiler_stops(do: RunActions) -> Iterator[None]:
    """Ctrl-C goes to all processes of the terminal: save, as at every stop, where it has killed a C++ compiler.

    Of several processes only one may have compiled, and the others cannot meet it for a save: there it stays an error.
    """
    try:
        yield
    except RuntimeError as error:
        compiling = type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))
        if not (compiling and do.mesh.world_size == 1 and do.stop_requested()):
            raise
        do.save(do.trainer.step)  # no update is half made: the optimizer steps after all that a step compiles


def open_sinks(run: Run, folder: Path, terminal: Terminal, stack: ExitStack) -> list[Sink | None]:
    """metrics.jsonl and samples.jsonl, with the trackers of `[log]`; None where this process writes no files."""
    if not run.mesh.is_main:
        return [None, None]
    files = [stack.enter_context(JsonLines(folder / name)) for name in ("metrics.jsonl", "samples.jsonl")]
    log, step = run.config.log, run.trainer.step
    trackers = open_trackers(log, folder, asdict(run.config), step, stack, terminal.say)
    return [Tee(file, *trackers) for file in files]


def no_validation(run: Run) -> str | None:
    """Why the run has no validation losses, and what asks for them in vain; None where it has some."""
    kept = ", so that checkpoint.keep_best has nothing to choose by" * run.config.checkpoint.keep_best
    if run.config.grpo.tasks or run.config.model.reward_head:
        return None  # of replies, by eval.tasks; of pairs, at the end
    if not run.corpus.tokens("val"):
        tuned = any(folder.manifest.has_parts for folder in run.corpus.folders)
        how = "begin with a larger --val-fraction" if tuned else "prepare them with --val or --val-fraction"
        return f"no validation: the data hold out nothing{kept}; {how}"
    if kept and not run.config.eval.every_steps:
        return f"validation at the end alone{kept}; set eval.every_steps"
    return None


def announce(do: RunActions, start: Start) -> None:
    """Print what is trained and how, and record where it begins."""
    config, terminal, step = do.config, do.terminal, do.trainer.step
    terminal.say(summary(do))
    peak = device_peak(do.mesh.device, config.train.precision)
    terminal.say(f"100 % MFU is {peak}")
    if start.changed:
        terminal.say(start.changed)
    say_what_is_left_out(do, do.run.loader.rows)
    if problem := no_validation(do.run):
        terminal.say(problem)
    if start.event is not None:
        read = {"tokens": do.trainer.tokens, "flops": do.trainer.flops}  # before
        do.write_row({"kind": "event", "step": step, **start.event, **read, "peak": asdict(peak), "time": time.time()})
    if step == config.train.steps:
        terminal.say(f"the run is complete: all {step:,} updates are made; regpt report {word(do.folder)} shows it")
