"""A run's checkpoints → one HTML file: the same prompts and noise by each of them, under a slider."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import regpt
from regpt.checkpoint.best import METRICS, validation_losses
from regpt.checkpoint.load import checkpoints, step_of
from regpt.checkpoint.open import open_model
from regpt.console.lines import print_note
from regpt.engine.generate import encode_prompt, engine_for
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Request, bad_logits, check_length
from regpt.errors import UserError
from regpt.files import resolved
from regpt.model.transformer import Transformer
from regpt.parallel.mesh import choose_device
from regpt.ranges import evenly
from regpt.report.markup import embed_json, text
from regpt.report.page import write_page
from regpt.runs.folder import read_run_config
from regpt.serve.page import page_asset, script
from regpt.text.tokenizer import Tokenizer

MOST = 100  # checkpoints, evenly spread
TOP = 5  # likeliest tokens shown with each
NEW_TOKENS = 100  # or what fits
Token = tuple[int, float, list[tuple[int, float]]]  # id, log-probability, the likeliest ones


def write_timelapse(run: Path, out: Path | None, prompts: Sequence[str] = (), new_tokens: int = 0) -> Path:
    """Let each checkpoint of `run` continue `prompts`, by default those of its configuration, with its temperature,
    top-k and seed; write the page and return its path.

    Raises:
        UserError: fewer than two checkpoints can be read, or a prompt with its new tokens is too long.
    """
    sample = read_run_config(run).sample
    prompts = prompts or sample.prompts
    options = SamplingOptions(temperature=sample.temperature, top_k=sample.top_k)
    losses, found, vocabulary = validation_losses(run / METRICS), list[dict[str, Any]](), dict[int, str]()
    for folder in evenly(checkpoints(run), MOST):
        try:
            opened = open_model(str(folder), choose_device("auto"))
        except UserError as error:  # damaged, or deleted by a run that goes on
            print_note(f"warning: left out {folder.name}: {error}")
            continue
        written = [
            continue_prompt(opened.model, opened.tokenizer, one, options, sample.seed, new_tokens) for one in prompts
        ]
        step = step_of(folder)
        measured = max((one for one in losses if one <= step), default=None)
        loss = None if measured is None else {"step": measured, "loss": losses[measured]}
        found.append({"step": step, "loss": loss, "texts": written})
        ids = {id for tokens in written for token in tokens for id in (token[0], *(other for other, _ in token[2]))}
        vocabulary |= {id: opened.tokenizer.token_bytes(id).decode("latin-1") for id in ids}
        print_note(f"step {step:,}: {opened.tokenizer.decode([token[0] for token in written[0]])!r}")
    if len(found) < 2:
        kept = f"{len(found)} checkpoint{'' if len(found) == 1 else 's'} that can be read"
        raise UserError(
            f"run {str(run)!r} has {kept}, a time lapse needs two at least; train with --checkpoint.every-steps N "
            "--checkpoint.keep-last 0, which keeps all"
        )
    said = (
        f"The same prompt and the same noise (temperature {sample.temperature:g}, top-k {sample.top_k or 'off'}, seed "
        f"{sample.seed}) by {len(found)} checkpoints: what changes is what was learned."
    )
    data = {"prompts": list(prompts), "steps": found, "tokens": vocabulary}
    page = timelapse_page(resolved(run).name, said, data)
    return write_page(page, run / "timelapse.html" if out is None else out)


def continue_prompt(
    model: Transformer, tokenizer: Tokenizer, prompt: str, options: SamplingOptions, seed: int, new_tokens: int
) -> list[Token]:
    """The tokens that follow a prompt; 0 `new_tokens`: `NEW_TOKENS`, or what fits."""
    ids = encode_prompt(tokenizer, prompt)
    most = new_tokens or max(1, min(NEW_TOKENS, model.config.max_seq_len - len(ids)))
    check_length(len(ids), most, model.config.max_seq_len, "new-tokens")
    request = Request(ids, most, options, seed, stop_ids=tokenizer.stop_ids, top_logprobs=TOP)
    engine, found = engine_for(model, [request]), list[Token]()
    engine.submit(request)
    while engine.busy:
        for event in engine.step():
            if event.token is None or event.logprob is None:
                raise bad_logits()
            found.append((event.token, round(event.logprob, 3), [(id, round(p, 3)) for id, p in event.top]))
    return found


def timelapse_page(name: str, said: str, data: dict[str, Any]) -> str:
    """One file that needs nothing else; its policy allows this script and this style alone."""
    style, code = page_asset("tokens.css"), script(("tokens.js", "timelapse.js"))
    policy = f"default-src 'none'; img-src data:; script-src {hash_of(code)}; style-src {hash_of(style)}"
    return Template(page_asset("timelapse.html")).substitute(
        name=text(name),
        said=text(said),
        policy=policy,
        style=style,
        script=code,
        data=embed_json(data),
        version=regpt.__version__,
    )


def hash_of(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
