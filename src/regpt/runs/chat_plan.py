"""What `regpt chat-from-text` learns from, and its plan: stages with their times, kept in OUT/plan.json."""

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from regpt.config import RunConfig, read_config
from regpt.console.lines import print_line, print_rows
from regpt.console.text import duration, si
from regpt.errors import UserError
from regpt.evals.chat.everyday import conversation_lines, everyday_conversations
from regpt.files import exists, file_sha256, is_file, is_folder, write_json, write_text
from regpt.parallel.mesh import choose_device
from regpt.prepare.conversations import FORMATS, ConversationReader
from regpt.prepare.documents import Document
from regpt.prepare.named import list_sources, table_files
from regpt.prepare.readers import ending_of, is_text, read_table_rows
from regpt.prepare.settings import TEXT_OPTIONS, TextOptions
from regpt.prepare.sources import Source, SourceFile
from regpt.prepare.work import try_place, writing_to
from regpt.remote.download import REMOTE_OPTIONS, RemoteOptions
from regpt.runs.plan import START_SECONDS, USELESS_EPOCHS, make_plan
from regpt.structured import read_object
from regpt.text.bpe import byte_tokenizer, train_bpe
from regpt.text.chat import CHATML_TOKENS
from regpt.tools.measure import free_disk_bytes

TOKENIZER, TOKENS, BASE, TALK, PREFERRED = "tokenizer.json", "tokens", "base", "chat", "preferred"  # in OUT
PLAN, CONVERSATIONS = "plan.json", "conversations.jsonl"
PAIRS = FORMATS[0].name
LEAST_BYTES = 100_000  # of text: some 30,000 tokens, from which even a small model learns little more than words
LARGE_BYTES = 10_000_000  # of text, from which a GPU takes the larger model
SAMPLE_BYTES = 1 << 20  # of text, on which times are taken
LEARNED_BYTES = 64 << 20  # of text that the tokenizer is learned from, spread evenly over all of it
FEW_DOCUMENTS = 20  # a tenth of fewer, by hashes, may be none
LEAST_STEPS, VALIDATIONS = 20, 4  # of a stage
SPARE = 0.06  # of a stage's time: validations, samples, checkpoints
STARTS = {"eager": 2.0, "fused": 15.0, "compiled": START_SECONDS[True]}  # seconds of a run before its first update


class StageSettings(NamedTuple):
    """A run: its recipe, what is changed in it, its share of the time, and how often its data are read at most."""

    recipe: str
    seq_len: int
    batch_tokens: int
    lr: float
    share: float
    epochs: float


SIZES = {  # tokens of the vocabulary, minutes, runs
    "tiny": (2048, 5.0, {
        BASE: StageSettings("quickstart", 256, 1024, 2e-3, 0.45, USELESS_EPOCHS),
        TALK: StageSettings("sft-tiny", 256, 1024, 2e-3, 0.45, 24),
        PREFERRED: StageSettings("dpo-124m", 256, 2048, 5e-5, 0.10, 3),
    }),
    "124m": (32768, 10.0, {
        BASE: StageSettings("gpt2-124m", 1024, 131072, 6e-4, 0.65, USELESS_EPOCHS),
        TALK: StageSettings("sft-124m", 1024, 32768, 2e-4, 0.20, 6),
        PREFERRED: StageSettings("dpo-124m", 1024, 32768, 2e-5, 0.15, 3),
    }),
}  # fmt: skip


@dataclass(frozen=True)
class ChatFromTextRequest:
    """See the flags of the command; `data` and `pairs` are files of conversations."""

    source: str
    out: Path
    data: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    size: Literal["auto", "tiny", "124m"] = "auto"
    minutes: float = 0.0
    vocab_size: int = 0
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    text: TextOptions = TEXT_OPTIONS
    remote: RemoteOptions = REMOTE_OPTIONS


class ChatCorpus(NamedTuple):
    """What is learned from, by kind.

    Attributes:
        names: of the texts, as sources of a preparation.
        held_out: a file of `texts`, for validation; then no others are.
        val_fraction: None for the preparation's own.
    """

    texts: list[Source]
    names: list[str]
    held_out: list[str]
    val_fraction: float | None
    data: list[str]
    pairs: list[str]


def read_corpus(asked: ChatFromTextRequest) -> ChatCorpus:
    """Texts, conversations, pairs, by the columns of first rows.

    Raises:
        UserError: no text, or a file of conversations without any.
    """
    listed = list_sources([asked.source], options=asked.remote, text=asked.text).train
    kinds = [(one, kind_of(one.path, asked.text) if isinstance(one, SourceFile) else "") for one in listed]
    texts = [one for one, kind in kinds if not kind]
    tables = [(kind, str(one.path)) for one, kind in kinds if kind and isinstance(one, SourceFile)]
    if not texts:
        raise UserError(
            f"{asked.source} holds conversations and no text; add texts, of which the model learns to write"
        )
    given = [
        (flag, str(one.path)) for flag in ("data", "pairs") for one in table_files(getattr(asked, flag), asked.remote)
    ]
    for flag, path in given:
        if not is_file(path):
            raise UserError(f"--{flag} {path!r} is not a file; give a file of conversations")
        reader = ConversationReader([Path(path)], skip=True)
        next(iter(reader), None)  # raises for columns of no known format
        kind = reader.formats[path]
        if flag == "pairs" and kind != PAIRS:
            raise UserError(f"--pairs {path} holds {kind}; a file of pairs has the columns chosen and rejected")
        tables.append((kind, path))
    names = [str(one.path) for one in texts if isinstance(one, SourceFile)] if len(texts) < len(listed) else []
    data = [path for kind, path in tables if kind != PAIRS or ("data", path) in given]
    pairs = list(dict.fromkeys(path for kind, path in tables if kind == PAIRS))
    return ChatCorpus(texts, names or [asked.source], *few_held_out(texts, asked.text), data, pairs)


def kind_of(path: Path, options: TextOptions) -> str:
    """The format of the conversations in a table; empty for text."""
    if is_text(ending_of(path, options)):
        return ""
    row = next(iter(read_table_rows(path, options)), None)
    columns = row.value if row is not None and isinstance(row.value, dict) else {options.text_column: ""}
    found = [one.name for one in FORMATS if all(name in columns for name in one.columns)]
    return found[0] if found and options.text_column not in columns else ""


def few_held_out(texts: list[Source], options: TextOptions) -> tuple[list[str], float | None]:
    """Of a few documents in several files, the file nearest to a tenth of all; nothing, where it is a third or more."""
    files = [one for one in texts if isinstance(one, SourceFile)]
    few = len(list(itertools.islice(documents(texts, options), FEW_DOCUMENTS))) < FEW_DOCUMENTS
    if not few or len(files) < 2:
        return [], None
    total = sum(one.bytes for one in files)
    chosen = min(files, key=lambda one: abs(one.bytes - total / 10))
    return ([str(chosen.path)], None) if chosen.bytes < total / 3 else ([], 0.0)


def documents(texts: Iterable[Source], options: TextOptions) -> Iterator[Document]:
    return itertools.chain.from_iterable(one.documents(options) for one in texts)


def plan_of(asked: ChatFromTextRequest, corpus: ChatCorpus) -> dict[str, Any]:
    """OUT/plan.json; made, with OUT/conversations.jsonl, where no stage is done yet.

    Raises:
        UserError: it is for something else, or there is too little text, time or disk.
    """
    file, out = asked.out / PLAN, asked.out
    hashes = {f"--{key}": [file_sha256(Path(path)) for path in getattr(corpus, key)] for key in ("data", "pairs")}
    flags = {"--size": asked.size, "--minutes": asked.minutes, "--vocab-size": asked.vocab_size}
    inputs = {"FOLDER": asked.source} | hashes | flags  # texts are compared by their shards
    if exists(out / TOKENIZER) and exists(file):
        plan = read_object(file, "delete it, or choose another --out")
        differing = [key for key, value in inputs.items() if plan.get("inputs", {}).get(key) != value]
        if differing:
            said = f"{out} was begun with another {' and '.join(differing)}"
            raise UserError(f"{said}; repeat that command to go on with it, or choose another --out")
        return plan
    if exists(out) and not is_folder(out):
        raise UserError(f"--out {out} is a file; choose a folder that does not exist yet")
    if exists(out) and any(one.name not in (PLAN, CONVERSATIONS) for one in out.iterdir()):
        raise UserError(f"--out {out} is not empty; choose a folder that does not exist yet")
    try_place(out)
    print_line("looking at the text and taking times")
    plan = {"inputs": inputs, **make_stages(asked, corpus)}
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / CONVERSATIONS, conversation_lines(everyday_conversations()))
        write_json(file, plan)
    return plan


def make_stages(asked: ChatFromTextRequest, corpus: ChatCorpus) -> dict[str, Any]:
    """Size, vocabulary, and the stages with their seconds, of runs also their steps."""
    text_bytes, sample = sampled(corpus.texts, asked.text)
    if text_bytes < LEAST_BYTES:
        said = f"{asked.source} holds {si(text_bytes, 'B')} of text, and a model needs {si(LEAST_BYTES, 'B')} at least"
        raise UserError(f"{said} to learn from; add texts")
    cuda = choose_device(asked.device).type == "cuda"
    size = asked.size if asked.size != "auto" else "124m" if cuda and text_bytes >= LARGE_BYTES else "tiny"
    vocab_size, minutes, runs = SIZES[size]
    vocab_size, minutes = asked.vocab_size or vocab_size, asked.minutes or minutes
    began = time.perf_counter()
    try:
        tokenizer = train_bpe(sample, min(vocab_size, 1024))
    except UserError:  # few different words: the stage itself says so, if it is too few for it
        tokenizer = byte_tokenizer()
    learned, n_bytes = time.perf_counter(), size_of(sample)
    rate = sum(map(len, tokenizer.encode_batch(sample))) / n_bytes
    encoding = (time.perf_counter() - learned) * text_bytes / n_bytes
    learning = (learned - began) * min(text_bytes, LEARNED_BYTES) / n_bytes
    found: list[dict[str, Any]] = [
        {"name": TOKENIZER, "what": f"{vocab_size:,} tokens, from {si(text_bytes, 'B')} of text", "seconds": learning},
        {"name": TOKENS, "what": f"about {si(rate * text_bytes)}", "seconds": encoding},
    ]
    names = [name for name in runs if name != PREFERRED or corpus.pairs]
    plans = {name: make_plan(configured(asked.device, size, name, vocab_size), name) for name in names}
    left = 60 * minutes - learning - encoding - sum(map(start_of, plans.values()))
    for name, plan in plans.items():
        seconds = left * runs[name].share / sum(runs[one].share for one in names)
        tokens = rate * (text_bytes if name == BASE else conversation_bytes(corpus, name))
        found.append(make_stage(asked.out, plan, name, seconds, runs[name].epochs * tokens))
    return {"size": size, "vocab_size": vocab_size, "prompt": " ".join(sample[0].split()[:4]), "stages": found}


def sampled(texts: Iterable[Source], options: TextOptions) -> tuple[float, list[str]]:
    """Bytes of all text, reckoned from the bytes of their files in the first MiB of it, and that."""
    sample, read = [""], 0.0
    for one in documents(texts, options):
        sample.append(one.text[:SAMPLE_BYTES])
        read += one.source_bytes * len(sample[-1]) / max(1, len(one.text))
        if size_of(sample) >= SAMPLE_BYTES:
            break
    sample = [text for text in sample if text.strip()] or [""]
    return sum(one.bytes for one in texts) * size_of(sample) / max(1.0, read), sample


def size_of(texts: Iterable[str]) -> int:
    return sum(len(text.encode(errors="replace")) for text in texts)


def conversation_bytes(corpus: ChatCorpus, name: str) -> int:
    """Of all messages, and a few for what the template writes around each."""
    paths = [Path(path) for path in (corpus.data if name == TALK else corpus.pairs)]
    read = [one for path in paths for one in ConversationReader([path], skip=True)]
    sides = [one.messages for one in read] + [one.rejected or [] for one in read if name == PREFERRED]
    sides += everyday_conversations() if name == TALK else []
    return size_of(message["content"] for side in sides for message in side) + 12 * sum(map(len, sides))


def configured(device: Any, size: str, name: str, vocab_size: int) -> RunConfig:
    """The recipe of a run with the changes of its size."""
    runs = SIZES[size][2]
    given, T = runs[name], runs[name].seq_len
    config, base = read_config(given.recipe), read_config(runs[BASE].recipe)
    n_vocab = vocab_size + len(CHATML_TOKENS) * (name != BASE)
    kernels = "plain" if name == PREFERRED else config.train.kernels  # preferences are not fused
    how: dict[str, Any] = {
        "kernels": kernels,
        "precision": base.train.precision,
        "compile": base.train.compile,
        "device": device,
    }
    rows = min(given.batch_tokens // T, 8 if size == "tiny" else 64)
    return replace(
        config,
        model=replace(base.model, max_seq_len=T, vocab_size=n_vocab),
        data=replace(config.data, seq_len=T),
        train=replace(config.train, batch_tokens=given.batch_tokens, micro_batch_rows=rows, **how),
        optim=replace(config.optim, lr=given.lr),
        eval=replace(config.eval, val_tokens=64 * T * (1 if size == "tiny" else 8)),
    )


def start_of(plan: dict[str, Any]) -> float:
    """Seconds of a run before its first update."""
    return STARTS[plan["memory"]["path"]]


def make_stage(out: Path, plan: dict[str, Any], name: str, seconds: float, most_tokens: float) -> dict[str, Any]:
    """As many steps as there is time for, and use.

    Raises:
        UserError: not even a few, or no room for their checkpoints.
    """
    step, B = plan["time"]["step_ms"] / 1e3, plan["run"]["batch_tokens"]
    if seconds < LEAST_STEPS * step:
        said = f"{duration(max(0.0, seconds))} are left for {name}, and {LEAST_STEPS} steps take"
        raise UserError(f"{said} {duration(LEAST_STEPS * step)} here; give more --minutes, or a smaller --size")
    steps = max(LEAST_STEPS, int(min(seconds * (1 - SPARE) / step, most_tokens / B)))
    needed, free = 3 * plan["disk"]["checkpoint_gib"] * 2**30, free_disk_bytes(out)
    if needed > free:
        raise UserError(
            f"the checkpoints of {name} take {si(needed, 'B')}, and {si(free, 'B')} are free; free some space"
        )
    what = f"{si(plan['model']['parameters'])} parameters, {steps:,} steps of {B:,} tokens on {plan['machine']['name']}"
    return {"name": name, "what": what, "seconds": start_of(plan) + steps * step / (1 - SPARE), "steps": steps}


def print_plan(plan: dict[str, Any], out: Path, page: str) -> None:
    rows = [(one["name"], one["what"], duration(one["seconds"])) for one in plan["stages"]]
    total = duration(sum(one["seconds"] for one in plan["stages"]))
    print_rows((), [*rows, ("page", page, ""), ("", f"planned, in {out}", total)], left=(0, 1))
