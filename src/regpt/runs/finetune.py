"""Fine-tuning: conversations → shards in the run's folder → an ordinary run over them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import BarColumn, TimeRemainingColumn

from regpt.checkpoint.open import OpenModel, open_model
from regpt.config import RunConfig
from regpt.console.drawing import field, print_parts, progress_bar
from regpt.console.lines import print_line, print_note
from regpt.console.text import counted
from regpt.data.batch import Batch
from regpt.data.loader import row_batch
from regpt.data.manifest import SPLITS, Manifest
from regpt.data.masked import masked_rows
from regpt.data.packed import REFERENCE, ConversationRows, reference_file
from regpt.errors import UsageError, UserError
from regpt.evals.task import wilson_interval
from regpt.files import file_sha256, is_file, write_bytes, write_json, write_text
from regpt.hf.added_tokens import add_special_tokens
from regpt.model.adapter_config import EMBEDDING, HEAD
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import choose_device
from regpt.prepare.conversation_shards import TOO_LONG, ConversationOptions, prepare_conversations
from regpt.prepare.named import table_files
from regpt.prepare.work import naming_full_disk, try_place
from regpt.remote.download import REMOTE_OPTIONS, RemoteOptions
from regpt.report.read import current, read_rows
from regpt.runs.build import open_shards
from regpt.runs.folder import read_run_config, refuse_used_folder
from regpt.runs.pretrain import check, pretrain
from regpt.runs.rollouts import grpo_items
from regpt.text.chat import CHATML_TOKENS, TEMPLATES, ChatTemplate
from regpt.text.folder import CHAT
from regpt.train.precision import autocast, parameter_dtype, set_matmul_precision
from regpt.train.preference import Answers, Preference

DATA, SETTINGS, QUESTIONS = "data", "run.toml", "questions.jsonl"  # in the run's folder, in that one
GRADES = "grades.json"  # in the run's folder: held-out questions answered right


@dataclass(frozen=True)
class FinetuneRequest:
    """What is tuned on what.

    Attributes:
        epochs: how often each conversation is read; None leaves train.steps as it is.
        template: a name of `TEMPLATES`, a file, or empty: the model's own, else plain.
        files: on this machine, addresses, or names on the hub.
        add_tokens: add the special tokens of ChatML and use it.
    """

    model: str
    files: tuple[str, ...]
    run: Path
    epochs: float | None = 3.0
    val_fraction: float = 0.05
    on_error: Literal["stop", "skip"] = "stop"
    template: str = ""
    add_tokens: bool = False
    remote: RemoteOptions = REMOTE_OPTIONS


def prepare_run(asked: FinetuneRequest, config: RunConfig) -> RunConfig:
    """Write the shards into the run's folder; the configuration of the run over them.

    Raises:
        UsageError, UserError: a model, template, row or setting that does not fit; what `prepare_conversations` raises.
    """
    refuse_used_folder(asked.run, (DATA,))
    try_place(asked.run)
    if config.data.order not in ("packed", "grouped"):
        raise UsageError(
            f"data.order is {config.data.order}, conversations are read packed or grouped; set one of them"
        )
    if config.preference.reference and asked.add_tokens:
        raise UsageError("--add-tokens changes the model that would be the reference; tune it on conversations first")
    if config.grpo.tasks:
        if asked.files:
            raise UsageError("--data and --tasks were given: grpo learns from replies to the tasks' questions alone")
        asked = replace(asked, files=(str(write_questions(asked.run / DATA, config.grpo.tasks)),), val_fraction=0.0)
    adapted = {EMBEDDING, HEAD} & set(config.adapter.targets)
    if asked.add_tokens and config.adapter.r and not adapted:
        raise UsageError(
            "--add-tokens adds rows to the embedding, which adapters of blocks alone do not train; add embedding to "
            "adapter.targets (with adapter.tied shared where it is the head, too), or leave out --add-tokens"
        )
    opened = open_model(asked.model)
    template = choose_template(asked, opened)
    shape = opened.model.config
    if config.data.seq_len > shape.max_seq_len:
        raise UsageError(
            f"data.seq_len {config.data.seq_len} is longer than the {shape.max_seq_len} positions of {asked.model}; "
            f"set --data.seq-len {shape.max_seq_len}"
        )
    judges = config.preference.method == "reward"
    if judges and config.adapter.r:
        raise UsageError("preference.method is reward, whose head is no adapter; leave out --adapter.r")
    model = replace(shape, vocab_size=template.tokenizer.n_vocab, dropout=config.model.dropout, reward_head=judges)
    options = ConversationOptions(
        config.data.seq_len, asked.val_fraction, asked.on_error, pairs=bool(config.preference.method)
    )
    folder = asked.run / DATA
    files = table_files(asked.files, asked.remote)
    urls = {one.path: one.url for one in files if one.url}
    with naming_full_disk(folder):
        manifest = prepare_conversations([one.path for one in files], folder, template, options, urls)
    say_what_was_read(manifest, template, opened)
    config = replace(config, model=model, data=replace(config.data, path=str(folder), mixture={}))
    if config.grpo.tasks:
        if config.grpo.beta:
            write_json(folder / REFERENCE, {"model": asked.model, "weights_sha256": opened.weights_sha256})
        return config
    return with_epochs(config, asked.epochs)


def write_questions(folder: Path, tasks: str) -> Path:
    """The questions of the tasks' train splits, with a right answer each, as a file of conversations."""
    path = folder / QUESTIONS
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(item.line() for item in grpo_items(tasks)))
    return path


def finetune(asked: FinetuneRequest, config: RunConfig, argv: Sequence[str] = (), *, quiet: bool = False) -> int:
    """Prepare and train the run; the exit code."""
    config = with_references(asked, prepare_run(asked, config))
    check(config, None)
    code = pretrain(config, asked.run, init_from=asked.model, argv=argv, beside=(DATA,), quiet=quiet)
    if code == 0 and not quiet:
        say_how_it_ended(asked.run)
    return code


def say_how_it_ended(run: Path) -> None:
    """Of a finished run: held-out pairs ranked right, held-out questions answered right."""
    config = read_run_config(run)
    if config.preference.method:
        print_line(rank_held_out(config, run))
    for sentence in grade_held_out(run) if config.grpo.tasks else []:
        print_line(sentence)


def grade_held_out(run: Path) -> list[str]:
    """How many held-out questions of `eval.tasks` were answered right at the end, as sentences; RUN/grades.json has the
    numbers of every evaluation."""
    rows = [row for row in current(read_rows(run / "metrics.jsonl")[0]) if row.get("metric") == "acc"]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        right = round(row["value"] * row["n"])
        interval = [*wilson_interval(right, row["n"])]
        graded = {"step": row["step"], "items": row["n"], "right": right, "share": row["value"], "interval": interval}
        found.setdefault(row["task"], []).append(graded)
    write_json(run / GRADES, found)
    said = []
    for task, each in found.items():
        last = each[-1]
        low, high = last["interval"]
        said.append(
            f"{task}: {last['right']:,} of {last['items']:,} held-out questions answered right: {last['share']:.1%} "
            f"(95 % interval {low:.1%} to {high:.1%}), {each[0]['share']:.1%} after step {each[0]['step']:,}"
        )
    return said


def with_references(asked: FinetuneRequest, config: RunConfig) -> RunConfig:
    """`config`, where its method has a reference with the log-probabilities of all answers under it next to the shards,
    computed once, and a file that names its weights by their hash."""
    if not config.preference.reference:
        return config
    folder = Path(config.data.path)
    opened = open_model(asked.model, choose_device(config.train.device))
    hashes = {"weights_sha256": opened.weights_sha256}
    for split, rows in pair_splits(config):
        path = reference_file(folder, split)
        logps = each_answer(config, opened.model, rows, f"reference, {split}", lambda _, found, __: found.logps)
        write_bytes(path, logps.astype("<f4").tobytes())
        hashes[path.name] = file_sha256(path)
    write_json(folder / REFERENCE, hashes)
    return config


def rank_held_out(config: RunConfig, run: Path) -> str:
    """How many held-out pairs the run's model ranks right by the method's scores, as a sentence; RUN/preferences.json
    has the numbers."""
    opened = open_model(str(run), choose_device(config.train.device))
    rows = dict(pair_splits(config)).get("val")
    if rows is None:
        return "no pair was held out; see --val-fraction"
    scores = each_answer(config, opened.model, rows, "held-out pairs", Preference.scores)
    margins = scores[::2] - scores[1::2]
    right, n = int((margins > 0).sum()), len(margins)
    low, high = wilson_interval(right, n)
    found = {"pairs": n, "ranked_right": right, "share": right / n, "interval": [low, high], "step": opened.step}
    write_json(run / "preferences.json", found | {"mean_margin": float(margins.mean())})
    return f"{right:,} of {n:,} held-out pairs ranked right: {right / n:.1%} (95 % interval {low:.1%} to {high:.1%})"


def pair_splits(config: RunConfig) -> list[tuple[str, ConversationRows]]:
    """The splits of a run's pairs, whose rows are not permuted."""
    corpus, data = open_shards(config), config.data
    names = [name for name in SPLITS if corpus.tokens(name)]
    rows = [(name, corpus.rows(name, "sequential", data.seed, data.seq_len)) for name in names]
    return [(name, one) for name, one in rows if isinstance(one, ConversationRows)]


@torch.no_grad()
def each_answer(
    config: RunConfig,
    model: Transformer,
    rows: ConversationRows,
    what: str,
    of: Callable[[Preference, Answers, Batch], torch.Tensor],
) -> np.ndarray:
    """(documents,) float32: `of` each answer, in the run's precision and micro-batches."""
    model = model.to(parameter_dtype(config.train.precision, config.train.weight_dtype)).eval()
    objective, B = Preference(model, config.preference), config.train.first_rows
    found = np.zeros(len(rows.lengths), dtype=np.float32)
    set_matmul_precision(config.train.precision)
    with progress_bar(BarColumn(), field("description"), TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task(what, total=rows.n_rows)
        for first in range(0, rows.n_rows, B):
            documents, row, _ = rows.layout(first, B)
            with autocast(config.train.autocast_precision, model.device):
                batch = row_batch(rows, first, B).to(model.device)
                values = of(objective, objective.answers(batch), batch)
            inside = first + row < rows.n_rows  # rows after the last are the first ones again
            found[documents[inside]] = values.float().cpu().numpy().reshape(-1)[: len(documents)][inside]
            bar.update(task, advance=B)
    return found


def write_settings(asked: FinetuneRequest, config: RunConfig) -> Path:
    """Prepare the run and write its configuration next to the data, for the processes of --nproc; return the file."""
    config = with_references(asked, prepare_run(asked, config))
    path = asked.run / DATA / SETTINGS
    write_text(path, config.to_toml())
    return path


def choose_template(asked: FinetuneRequest, opened: OpenModel) -> ChatTemplate:
    """The template that conversations are rendered with, and the tokenizer with the tokens that it needs.

    Raises:
        UsageError: a template that is not there.
        UserError: a template that needs special tokens which the tokenizer lacks.
    """
    own = opened.companions.get(CHAT, "")
    name = asked.template or ("chatml" if asked.add_tokens else "")
    if asked.add_tokens and name != "chatml":
        raise UsageError(f"--add-tokens adds the tokens of ChatML, --template is {name!r}; leave out one of them")
    if not name and own:
        return ChatTemplate(own, opened.tokenizer)
    name = name or "plain"
    if name not in TEMPLATES and not is_file(name):
        raise UsageError(f"--template {name!r} is not a file; give one, or one of {', '.join(TEMPLATES)}")
    source = TEMPLATES.get(name) or Path(name).read_text(encoding="utf-8", errors="replace")
    tokenizer = opened.tokenizer
    if asked.add_tokens:
        tokenizer = add_special_tokens(tokenizer, CHATML_TOKENS, CHATML_TOKENS[1:])
    template = ChatTemplate(source, tokenizer)
    missing = [token for token in CHATML_TOKENS if name == "chatml" and token not in template.special]
    if missing:
        raise UserError(
            f"the tokenizer of {asked.model} has no special token {missing[0]}, which ChatML needs; add it with "
            "--add-tokens, or use --template plain"
        )
    return template


def with_epochs(config: RunConfig, epochs: float | None) -> RunConfig:
    """`config` with as many steps as read every row `epochs` times, rounded up."""
    if epochs is None:
        return config
    rows = training_rows(config)
    steps = max(1, math.ceil(epochs * rows.n_rows / (config.train.batch_tokens // config.data.seq_len)))
    warmup = config.optim.warmup_steps
    if warmup >= steps:
        warmup = steps // 10
        print_note(f"optim.warmup_steps is {warmup}, a tenth of the {steps:,} steps, which are fewer than the recipe's")
    optim = replace(config.optim, warmup_steps=warmup)
    return replace(config, train=replace(config.train, steps=steps), optim=optim)


def training_rows(config: RunConfig) -> ConversationRows:
    """The rows of a run over conversations.

    Raises:
        UserError: its data are not conversations.
    """
    data = config.data
    batch_rows = config.train.batch_tokens // data.seq_len
    rows = open_shards(config).rows("train", data.order, data.seed, data.seq_len, batch_rows=batch_rows)
    if not isinstance(rows, ConversationRows):
        raise UserError(f"the data of this run, {data.path or 'a mixture'}, are not conversations")
    return rows


def look(config: RunConfig, count: int, step: int = 1) -> None:
    """Print `count` rows of the batch of update `step`, and what share of it is trained on.

    Raises:
        UsageError: a step that the run does not have.
    """
    if step > config.train.steps:
        raise UsageError(f"--step is {step}, must be from 1 to the {config.train.steps} of the run")
    rows, tokenizer = training_rows(config), open_shards(config).tokenizer
    batch_rows = config.train.batch_tokens // config.data.seq_len
    whole = masked_rows(rows, (step - 1) * batch_rows, batch_rows, tokenizer)
    for row in whole[:count]:
        print_line(
            f"row {row.number:,}: {counted(len(row.conversations), 'conversation')}, {row.trained:,} of "
            f"{row.tokens:,} tokens are trained on, {row.padding:,} of padding"
        )
        for conversation in row.conversations:
            print_parts(conversation)
    trained, tokens = sum(row.trained for row in whole), sum(row.tokens for row in whole)
    print_line(
        f"step {step:,}, {len(whole):,} rows: {trained:,} of {tokens:,} tokens are trained on ({trained / tokens:.0%})"
    )
    print_line(f"all of the run: {rows.sentence()}")


def say_what_was_read(manifest: Manifest, template: ChatTemplate, opened: OpenModel) -> None:
    """Formats, what was skipped, the template, and tokens that were added."""
    for source in manifest.sources:
        print_line(f"{source.get('url', source['source'])}: {source['format']}")
    seq_len = manifest.options["seq_len"]
    for kind, counts in manifest.removed.items():
        why = f"longer than data.seq_len {seq_len:,}" if kind == TOO_LONG else "bad"
        print_line(f"{counted(counts['documents'], 'row')} skipped: {why}")
    end = template.tokenizer.token_bytes(template.end_of_turn or 0).decode("utf-8", "replace")
    print_line(f"template {template.sha256[:12]}…, certified; an answer ends with {end}")
    added = template.tokenizer.n_vocab - opened.tokenizer.n_vocab
    if added:
        print_line(
            f"{added} special tokens added; their rows begin at the mean of the others, with a tenth of their spread"
        )
