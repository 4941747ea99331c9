"""The whole path, small: the Python documentation of this machine → tokenizer → shards → GPT → samples → report."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from regpt.config import RunConfig, read_config
from regpt.console.lines import print_line
from regpt.errors import word
from regpt.evals.perplexity import token_counts, unigram_loss
from regpt.prepare.named import python_docs
from regpt.prepare.prepare import prepare
from regpt.report.page import write_report
from regpt.report.read import rows_by_step
from regpt.runs.build import Corpus, count_validation_rows, open_corpus
from regpt.runs.folder import refuse_used_folder
from regpt.runs.pretrain import pretrain
from regpt.structured import json_lines
from regpt.text.bpe import train_bpe

CHUNK_TOKENS = 1 << 20
VOCAB_SIZE = 2048  # of the BPE: few rows, so the head costs little (docs/log.md, "The quickstart's shape")


def quickstart(run: Path, *, steps: int | None = None, argv: Sequence[str] = ()) -> int:
    """Train the `quickstart` recipe in the new folder `run`, its data in `run/data`; the exit code.

    `steps` replaces the recipe's number of updates.
    """
    started = time.monotonic()
    refuse_used_folder(run)
    config = read_config("quickstart")
    if steps is not None:
        config = replace(config, train=replace(config.train, steps=steps))
    print_line(f"1/4  reading the documentation of this Python, training a BPE of {VOCAB_SIZE:,} tokens")
    tokenizer = train_bpe(python_docs().texts, VOCAB_SIZE)
    manifest = prepare(["pydocs"], run / "data", tokenizer)
    print_line(f"2/4  {manifest.tokens('train'):,} training and {manifest.tokens('val'):,} validation tokens")
    config = replace(config, data=replace(config.data, path=str(run / "data")))
    corpus = open_corpus(config)
    baseline = validation_unigram(config, corpus)
    print_line(f"3/4  training; a model that knows only word frequencies has a validation loss of {baseline:.3f}")
    code = pretrain(config, run, argv=argv, facts={"unigram_loss": baseline}, beside=("data",))
    if code:
        return code
    page = write_report(run)
    print_line(f"4/4  report written: {page}")
    print_outcome(run, baseline, time.monotonic() - started)
    return 0


def validation_unigram(config: RunConfig, corpus: Corpus) -> float:
    """Loss of the unigram model of the training split on the tokens that validation predicts."""
    rows = count_validation_rows(config, corpus)
    V = corpus.vocab_size
    train = token_counts(chunks(corpus, "train", 0, corpus.tokens("train")), V)
    return unigram_loss(train, token_counts(chunks(corpus, "val", 1, rows * config.data.seq_len), V))


def chunks(corpus: Corpus, split: str, start: int, count: int) -> Iterator[np.ndarray]:
    """Tokens [start, start + count) of a split as stored."""
    stream = corpus.folders[0].stream(split, "sequential", 0)
    for first in range(start, start + count, CHUNK_TOKENS):
        yield stream.tokens(first, min(CHUNK_TOKENS, start + count - first))


def print_outcome(run: Path, unigram: float, seconds: float) -> None:
    """Print the first and the last samples, and the last validation loss next to that of word frequencies."""
    losses = {step: row["loss"] for step, row in rows_by_step(run, "val").items()}
    val = losses[max(losses)]
    samples = [row for _, row, _ in json_lines(run / "samples.jsonl") if row]
    for when, row in (("\nbefore", samples[0]), ("after", samples[-1])):
        print_line(f"{when} training:")
        for text in row["texts"]:
            print_line(f"  > {text!r}")
    verdict = "well below" if val < unigram - 0.3 else "not yet well below"
    print_line(
        f"\nvalidation loss {val:.3f}, {verdict} the {unigram:.3f} of word frequencies alone, "
        f"after {seconds:.0f} s\n\ntry next:\n"
        f'  regpt sample {word(run)} --prompt "The method" -n 3\n'
        f"  regpt eval {word(run)} --tasks val\n"
        f"  regpt train --resume {word(run)}          (after Ctrl-C)\n"
        f"  open {run / 'report.html'} in a browser\n"
        "  regpt data prepare YOUR.txt --out data/mine && regpt train gpt2-tiny --data data/mine --out runs/mine",
    )
