"""`regpt chat-from-text`: texts → tokenizer → tokens → base → chat → preferred, each an ordinary file, folder or run.

What the stages do is `prepare`'s, `runs.pretrain`'s and `runs.finetune`'s; the same command again does what is missing.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regpt.checkpoint.load import checkpoint_folder
from regpt.checkpoint.open import open_model
from regpt.config import RunConfig
from regpt.console.lines import print_line
from regpt.console.text import duration
from regpt.engine.generate import write_samples
from regpt.engine.processing import SamplingOptions
from regpt.errors import word
from regpt.files import exists, is_file, write_text
from regpt.parallel.mesh import choose_device
from regpt.prepare.prepare import prepare
from regpt.prepare.work import is_finished, writing_to
from regpt.runs.chat_plan import (
    BASE,
    CONVERSATIONS,
    LEARNED_BYTES,
    PREFERRED,
    TALK,
    TOKENIZER,
    TOKENS,
    VALIDATIONS,
    ChatCorpus,
    ChatFromTextRequest,
    configured,
    documents,
    plan_of,
    print_plan,
    read_corpus,
)
from regpt.runs.finetune import FinetuneRequest, finetune, say_how_it_ended
from regpt.runs.folder import is_run, read_run_config
from regpt.runs.pretrain import pretrain, resume
from regpt.structured import json_lines
from regpt.text.bpe import train_bpe
from regpt.text.chat import ChatTemplate
from regpt.text.folder import CHAT
from regpt.text.open import open_tokenizer

GREEDY = SamplingOptions(top_k=1)
QUESTIONS = (("Hello!",), ("Who are you?",), ("What is the capital of France?", "Thank you!"), ("What is 2 + 3?",))
QUESTIONS += (("Name three fruits",), ("What is the weather today?",))


def chat_from_text(asked: ChatFromTextRequest, page: str, argv: Sequence[str] = ()) -> tuple[int, Path]:
    """Do every stage that is not done; the exit code, and the last run. `page` says what follows."""
    began, corpus = time.monotonic(), read_corpus(asked)
    plan = plan_of(asked, corpus)
    print_plan(plan, asked.out, page)
    runs = {BASE: pretrain_base, TALK: tune, PREFERRED: tune}
    for stage in plan["stages"]:
        name, started = stage["name"], time.monotonic()
        done = is_done(asked.out, name)
        print_line(f"\n{name}{': done before' if done else ''}")
        if name == TOKENIZER and not done:
            learn(asked, corpus, plan["vocab_size"])
        elif name == TOKENS:  # where it is done, its texts are compared
            encode(asked, corpus)
        elif name in runs and not done:
            config = spread(configured(asked.device, plan["size"], name, plan["vocab_size"]), stage["steps"])
            again = is_run(asked.out / name)
            code = resume(asked.out / name) if again else runs[name](asked, corpus, name, config, plan, argv)
            if again and not code:
                say_how_it_ended(asked.out / name)
            if code:
                print_line(f"the same command goes on with {name}")
                return code, asked.out / name
        if not done:
            print_line(f"{name}: {duration(time.monotonic() - started)} (planned {duration(stage['seconds'])})")
    print_line(f"\n{duration(time.monotonic() - began)} in all\n")
    last = asked.out / plan["stages"][-1]["name"]
    print_conversation(last, asked.device)
    return 0, last


def is_done(out: Path, name: str) -> bool:
    if name == TOKENIZER:
        return is_file(out / name)
    if name == TOKENS:
        return is_finished(out / name)
    return is_run(out / name) and exists(checkpoint_folder(out / name, read_run_config(out / name).train.steps))


def learn(asked: ChatFromTextRequest, corpus: ChatCorpus, vocab_size: int) -> None:
    tokenizer = train_bpe(texts_to_learn(asked, corpus), vocab_size)
    with writing_to(asked.out):
        write_text(asked.out / TOKENIZER, tokenizer.to_json())


def texts_to_learn(asked: ChatFromTextRequest, corpus: ChatCorpus) -> Iterator[str]:
    """The conversations that ship, and texts spread evenly over all."""
    for row in json_lines(asked.out / CONVERSATIONS):
        yield from (message["content"] for message in (row[1] or {}).get("messages", ()))
    total, taken, read = sum(one.bytes for one in corpus.texts), 0, 0.0
    for one in documents(corpus.texts, asked.text):
        read += one.source_bytes
        if taken <= LEARNED_BYTES * read / max(1.0, total):
            taken += len(one.text)
            yield one.text


def encode(asked: ChatFromTextRequest, corpus: ChatCorpus) -> None:
    how: dict[str, Any] = {"val_sources": corpus.held_out, "val_fraction": corpus.val_fraction, "text": asked.text}
    how |= {"remote": asked.remote}
    manifest = prepare(corpus.names, asked.out / TOKENS, open_tokenizer(str(asked.out / TOKENIZER)), **how)
    print_line(f"{manifest.tokens('train'):,} training and {manifest.tokens('val'):,} validation tokens")


def pretrain_base(
    asked: ChatFromTextRequest, _: ChatCorpus, name: str, config: RunConfig, plan: dict[str, Any], argv: Sequence[str]
) -> int:
    data, sample = (
        replace(config.data, path=str(asked.out / TOKENS)),
        replace(config.sample, prompt=plan["prompt"], n=1),
    )
    return pretrain(replace(config, data=data, sample=sample), asked.out / name, argv=argv)


def tune(
    asked: ChatFromTextRequest, corpus: ChatCorpus, name: str, config: RunConfig, _: Any, argv: Sequence[str]
) -> int:
    model, files = (BASE, [str(asked.out / CONVERSATIONS), *corpus.data]) if name == TALK else (TALK, corpus.pairs)
    tuned = FinetuneRequest(str(asked.out / model), tuple(files), asked.out / name, None, on_error="skip")
    config = replace(config, sample=replace(config.sample, prompt=QUESTIONS[0][0], n=1))
    return finetune(replace(tuned, add_tokens=name == TALK), config, argv=argv)


def spread(config: RunConfig, steps: int) -> RunConfig:
    """`config` with so many steps, and validations, samples and checkpoints spread over them."""
    every = max(1, steps // VALIDATIONS)
    return replace(
        config,
        train=replace(config.train, steps=steps),
        optim=replace(config.optim, warmup_steps=steps // 20),
        eval=replace(config.eval, every_steps=every),
        sample=replace(config.sample, every_steps=2 * every, max_new_tokens=40),
        checkpoint=replace(config.checkpoint, every_steps=every),
    )


def print_conversation(run: Path, device: str) -> None:
    """Print the likeliest replies of the model in `run`."""
    opened = open_model(str(run), choose_device(device))
    template = ChatTemplate(opened.companions[CHAT], opened.tokenizer)
    stops, longest = template.stop_ids, opened.model.config.max_seq_len
    for questions in QUESTIONS:
        messages: list[dict[str, str]] = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            prompt = template.encode(messages)
            if len(prompt) >= longest:  # of a small vocabulary
                break
            how = {"n": 1, "max_new_tokens": min(64, longest - len(prompt)), "stop_ids": stops, "options": GREEDY}
            (sample,) = write_samples(opened.model.eval(), opened.tokenizer, prompt, **how)
            reply = opened.tokenizer.decode([one for one in sample.ids[len(prompt) :] if one not in stops])
            messages.append({"role": "assistant", "content": reply})
            print_line(f"you    {question}\nmodel  {reply}")
    print_line(f"\ntalk with it: regpt chat {word(run)}")
