"""Actions of a run around its updates: rows of metrics, validation, samples, checkpoints."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regpt.checkpoint.save import Contents
from regpt.checkpoint.saver import Saver
from regpt.checkpoint.state import DataPosition, RunState, generator_states
from regpt.console.text import counted
from regpt.data.batch import Batch
from regpt.data.bos import PackedRows
from regpt.data.loader import RampLoader
from regpt.data.mixture import MixedRows
from regpt.data.packed import ConversationRows
from regpt.data.rows import Rows
from regpt.engine.generate import write_samples
from regpt.engine.processing import SamplingOptions
from regpt.errors import UserError
from regpt.model.weights import count_parameters
from regpt.runs.adapters import learned, record_of, said_of
from regpt.runs.begin import Run, go_back
from regpt.runs.build import choose_kernels, mask_token, validation_parts
from regpt.runs.evaluations import RunEvaluations, open_run_suites
from regpt.runs.examine import examine
from regpt.runs.folder import device_name, made_with
from regpt.runs.items import keep_items
from regpt.runs.rollouts import RolloutLoader
from regpt.runs.terminal import Terminal
from regpt.runs.trackers import Sink
from regpt.runs.validation import Validated, ValidationPart, batch_items, own_sums, part_batches, result
from regpt.train.memory import memory_advice
from regpt.train.optim import optimizer_tensors
from regpt.train.precision import autocast
from regpt.train.trainer import Row, due
from regpt.train.updates import watch_updates

ADVICE = "set a smaller sample.n or sample.max_new_tokens"
SAMPLED_WINDOWS = 16  # a few milliseconds each; what the whole epoch leaves out is said by regpt data info


class RunActions:
    """The actions of a run around its updates (`train.trainer.Actions`), recorded in its folder.

    Args:
        run: begun.
        folder: of the run.
        metrics, samples: None where this process writes no files.
        stop_requested: by a signal, or by what a run cannot go on without.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        terminal: Terminal,
        saver: Saver,
        metrics: Sink | None,
        samples: Sink | None,
        stop_requested: Callable[[], bool],
    ):
        self.run, self.folder, self.terminal, self.saver = run, folder, terminal, saver
        self.config, self.mesh, self.trainer = run.config, run.mesh, run.trainer
        self.metrics, self.samples, self.asked_to_stop = metrics, samples, stop_requested
        self.update_ratios = watch_updates(run.trainer, run.config.log.update_ratios_every_steps)
        self.chat = run.corpus.chat()
        suites = open_run_suites(run.config, run.corpus.tokenizer, self.chat)
        kept = {"average": run.average, "stop_requested": stop_requested}
        self.evaluations = RunEvaluations(run.config, folder, suites, run.model, run.mesh, terminal.say, **kept)
        self.val_parts = validation_parts(run.config, run.corpus)
        self.note_step: Callable[[Row], None] = lambda row: None  # of a profile

    def stop_requested(self) -> bool:
        """After a checkpoint that could not be written the run stops: all processes together, with a second try."""
        return self.asked_to_stop() or self.saver.failed

    def examine(self) -> Row:
        with self.mesh.pulse.working("examining a batch"):
            return examine(self.trainer, self.run.loader.at(self.trainer.data_step), self.run.corpus.tokenizer)

    def rewind(self) -> None:
        """Return to the newest valid checkpoint, and save at once with the position after the present batch."""
        with self.mesh.pulse.working("going back to a checkpoint"):
            self.saver.wait()
            go_back(self.folder, self.trainer, self.run.average)
            self.saver.note_step_back(self.trainer.step)
            self.save(self.trainer.step)

    def log(self, row: Row) -> None:
        with self.mesh.pulse.working("writing its metrics"):
            if isinstance(self.run.loader, RolloutLoader) and row["kind"] == "train":
                row = self.run.loader.completed(row)
            self.write_row(row)
            ratios = self.update_ratios.take()
            if ratios is not None:
                self.write_row(ratios | {"kind": "updates", "step": row["step"], "time": time.time()})
            self.write_saved_rows()
        self.note_step(row)

    def write_row(self, row: Row) -> None:
        """Show a row of metrics, and append it to metrics.jsonl when it is its turn."""
        self.terminal.row(row)
        step, every = int(row["step"]), self.config.log.every_steps  # type: ignore[call-overload]
        turn = row["kind"] != "train" or due(step, every) or step in (1, self.config.train.steps)
        if self.metrics is not None and turn:
            self.metrics.write(row)

    def validate(self, step: int) -> None:
        """Validate where there is held-out text, then the tasks."""
        with self.mesh.pulse.working("evaluating"):
            if self.val_parts:
                self.validate_loss(step)
            for row in self.evaluations.rows(step):
                self.write_row(row)

    @torch.no_grad()
    def validate_loss(self, step: int) -> None:
        """Mean loss and bits per byte over the held-out rows, all processes together; also of each source."""
        parts, corpus, mesh = self.val_parts, self.run.corpus, self.mesh
        lengths, eot = corpus.tokenizer.byte_lengths(), mask_token(self.config, corpus)

        items: list[dict[str, Any]] = []

        def own_share(rows: int) -> Tensor:
            items.clear()  # of an attempt that ran out of memory

            def batches(part: ValidationPart) -> Iterator[Batch]:
                return part_batches(part, mesh, rows, eot)

            def keep(part: ValidationPart, each: Tensor) -> None:
                items.extend(batch_items(part, each, rows, mesh))

            return own_sums(parts, batches, self.trainer.backend.evaluate, lengths, mesh.device, keep)

        def whole_result() -> Validated:
            return result(parts, mesh.total(self.trainer.micro_batch.attempt(own_share)))

        found = whole_result()
        everyone = [one for data in mesh.gather(json.dumps(items).encode()) for one in json.loads(data)]
        if mesh.is_main:
            lines = "".join(json.dumps(one) + "\n" for one in everyone)
            keep_items(self.folder / "evals", "val", lines, step, self.terminal.say)
        averaged: Row = {}
        if self.run.average is not None:
            with self.run.average.applied():
                ema = whole_result().whole
            averaged = {"loss_ema": ema.loss, "bpb_ema": ema.bpb}
        for source, sums in {"": found.whole, **found.sources}.items():
            row: Row = {"kind": "val", "step": step, "loss": sums.loss, "bpb": sums.bpb, "stderr": sums.stderr}
            row |= {"bpb_stderr": sums.bpb_stderr, "tokens": sums.tokens, "time": time.time()}
            row |= {"source": source} if source else averaged
            self.write_row(row)
        if self.config.checkpoint.keep_best and step:  # random weights are no run's best
            unsaved = mesh.is_main and self.saver.is_best_unsaved(step, found.whole.loss)
            if mesh.any(unsaved):
                self.save(step)

    def sample(self, step: int) -> None:
        """Continue the prompts, or answer them in a run over conversations, with the uncompiled model and a generator
        of its own, in the main process."""
        if self.samples is None or self.config.model.reward_head:  # which writes nothing
            return
        config, tokenizer = self.config.sample, self.run.corpus.tokenizer
        options = SamplingOptions(temperature=config.temperature, top_k=config.top_k)
        lengths: dict[str, Any] = {"n": config.n, "max_new_tokens": config.max_new_tokens}
        with self.mesh.pulse.working("sampling"):
            for prompt in config.prompts:
                number_format = autocast(self.config.train.autocast_precision, self.mesh.device)
                try:
                    with number_format, memory_advice("while sampling", ADVICE):
                        options_of = {**lengths, "options": options, "seed": config.seed}
                        asked: str | list[int] = prompt
                        if self.chat is not None:
                            asked = self.chat.encode([{"role": "user", "content": prompt}])
                            options_of |= {"stop_ids": self.chat.stop_ids}
                        found = write_samples(self.run.model, tokenizer, asked, **options_of)
                except UserError as error:  # the next update judges the weights; a sample never ends a run
                    self.terminal.say(f"no sample after step {step:,}: {error}")
                    return
                texts = [one.text for one in found]
                self.samples.write({"step": step, "prompt": prompt, "texts": texts, "time": time.time()})
                self.terminal.say(f"sample after step {step:,}: {texts[0]!r}")

    def save(self, step: int) -> None:
        """Begin to write a checkpoint, with the states of the random generators of all processes."""
        with self.mesh.pulse.working("writing a checkpoint"):
            own = generator_states(self.mesh.device)
            own |= self.run.loader.state() if isinstance(self.run.loader, RolloutLoader) else {}
            states = self.mesh.gather(json.dumps(own).encode())
            if not self.mesh.is_main:
                return
            try:
                self.saver.wait()
            except UserError as error:  # training stops here; see `stop_requested`
                self.terminal.say(f"{error}; trying once more")
            run, average = self.run, self.run.average
            contents = Contents(
                config=self.config.model,
                tokenizer=run.corpus.tokenizer,
                weights=learned(run.model),
                optimizer=optimizer_tensors(run.model, run.optimizer),
                average=None if average is None else average.tensors(),
                state=run_state(run, step, [json.loads(state) for state in states]),
                companions=run.companions,
                adapter=record_of(run),
            )
            self.saver.save(contents, self.mesh.device)

    def write_saved_rows(self) -> None:
        """A row of metrics for every checkpoint that has been finished since the last call."""
        for saved in self.saver.take_done():
            self.write_row({"kind": "event", "name": "checkpoint", **asdict(saved), "time": time.time()})


def run_state(run: Run, step: int, random: list[dict[str, str]]) -> RunState:
    """The content of state.json after `step` updates."""
    config = run.config
    data = config.data
    loader, seq_len, data_step = run.loader, data.seq_len, step + run.trainer.skipped
    if isinstance(loader, RampLoader):
        next_row, seq_len = loader.tokens_before(data_step), 1
    else:
        next_row = loader.first_row + data_step * loader.batch_rows
    lr = config.optim.lr * run.trainer.schedule(step) if step else 0.0
    return RunState(
        step=step,
        data=DataPosition(run.corpus.manifest_sha256, next_row, seq_len, data.order, data.seed, data.shuffle_rows),
        schedule={"name": config.optim.schedule, "steps": config.train.steps, "lr": lr},
        trainer=run.trainer.state(),
        average_updates=run.average.updates if run.average else 0,
        random=tuple(random),
        config=config.sections(),
        made_with=made_with(run.mesh),
    )


def summary(do: RunActions) -> str:
    """One line: what is trained, on what, how."""
    config, mesh = do.config, do.mesh
    name = device_name(mesh.device)
    B, T = do.trainer.micro_batch.rows, config.data.seq_len
    kernels = choose_kernels(config, do.run.model, mesh.device)
    spared = ", activation checkpointing" * config.train.activation_checkpointing
    spared += f", MLPs of {config.train.mlp_tokens:,} tokens at once" * bool(config.train.mlp_tokens)
    spared += ", activations in host memory" * config.train.activation_offload
    spared += ", bfloat16 weights" * (config.train.weight_dtype == "bf16")
    spared += "" if config.optim.state_dtype == "fp32" else f", {config.optim.state_dtype} moments"
    spared += ", moments in host memory" * config.optim.offload
    return (
        f"{count_parameters(do.run.model):,} parameters{said_of(do.run.model)} on "
        f"{mesh.world_size} × {name}, {config.train.precision}"
        f"{', compiled' if config.train.compile and kernels.name == 'plain' else ''}, {kernels.name} kernels "
        f"({kernels.reason}){spared}; {counted(config.train.batch_tokens, 'token')} a step "
        f"({config.train.batch_tokens // (B * mesh.world_size * T)} × {mesh.world_size} × {counted(B, 'row')} of {T}); "
        f"{do.run.corpus.tokens('train'):,} training tokens, tokenizer "
        f"{do.run.corpus.tokenizer.name}"
    )


def say_what_is_left_out(do: RunActions, rows: Rows) -> None:
    """One line for each folder in the order `bos`: how much of it no row holds, from its first windows. Of
    conversations, what share of the tokens is trained on and how much padding there is."""
    if isinstance(rows, ConversationRows) and not do.config.grpo.tasks:
        do.terminal.say(rows.sentence())
    for part in rows.parts if isinstance(rows, MixedRows) else [rows]:
        if isinstance(part, PackedRows):
            share = part.left_out(SAMPLED_WINDOWS)
            do.terminal.say(f"order bos leaves out about {share:.1%} of the tokens in {part.source}")


def write_epochs(do: RunActions, step: int, epochs: list[float]) -> None:
    """How many times each folder has been read."""
    times = {str(folder.path): round(n, 6) for folder, n in zip(do.run.corpus.folders, epochs)}
    do.write_row({"kind": "event", "step": step, "name": "epochs", "epochs": times, "time": time.time()})
    if len(times) > 1:
        do.terminal.say("epochs read: " + ", ".join(f"{n:.3g} of {path}" for path, n in times.items()))
