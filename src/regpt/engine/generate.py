"""PROMPT → TEXT, in one call: an engine for the texts of one prompt, or of rows of tokens."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regpt.engine.engine import PAGE_SIZE, Engine
from regpt.engine.noise import choice_seed
from regpt.engine.processing import SamplingOptions
from regpt.engine.request import Request, bad_logits
from regpt.engine.text import text_pieces
from regpt.model.transformer import Transformer
from regpt.text.tokenizer import Tokenizer

MOST_ROWS = 256
CAPTURED_TOKENS = 200  # of a text, from which a graph's capture (1 to 2 s on an H200) is worth its time


class Sample(NamedTuple):
    """One text.

    Attributes:
        ids: the prompt's tokens and the new ones, up to and including the one of the tokenizer's `stop_ids` that ended
            the text. For an empty prompt the first is `eot`, which starts every document.
        text: `ids` as text, without the token that started or ended it.
    """

    ids: list[int]
    text: str


def write_samples(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    n: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] | None = None,
    **options: Any,
) -> list[Sample]:
    """`n` texts that continue `prompt` (text, or its tokens), each ending at the first of `stop_ids` (default: the
    tokenizer's); `options`, `seed` and `slide` as in `Request`. The first texts are those of a smaller `n`.

    Raises:
        UserError: see `check_length`, or logits that are not finite.
    """
    prompt_ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    ends = tokenizer.stop_ids if stop_ids is None else stop_ids
    request = Request(prompt_ids, max_new_tokens, n=n, stop_ids=ends, **options)
    (texts,) = engine_for(model, [request]).run([request])
    return [make_sample([*prompt_ids, *new], len(prompt_ids), tokenizer, ends) for new in texts]


def stream_sample(
    model: Transformer, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, **options: Any
) -> Iterator[str]:
    """The text of `write_samples` with `n` = 1, in pieces as it is generated, the prompt first.

    A piece is whole characters: an incomplete one waits for the next token. Wrong arguments raise at once, not with the
    first piece.

    Raises:
        UserError: see `check_length`, or logits that are not finite.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    request = Request(prompt_ids, max_new_tokens, stop_ids=tokenizer.stop_ids, **options)
    engine = engine_for(model, [request])
    engine.submit(request)
    return text_pieces(tokenizer, prompt_ids, stream_tokens(engine))


def stream_tokens(engine: Engine) -> Iterator[int]:
    """The new tokens of the engine's only text, as they are read."""
    while engine.busy:
        for event in engine.step():
            if event.finish_reason == "error":
                raise bad_logits()
            if event.token is not None:
                yield event.token


def engine_for(
    model: Transformer, requests: Sequence[Request], tokenizer: Tokenizer | None = None, **options: Any
) -> Engine:
    """An engine with room for these requests at once, or for `MOST_ROWS` of their texts; `options` are the engine's."""
    longest = model.config.max_seq_len
    sizes = [
        -(-min(len(one.prompt) + one.max_new_tokens, longest) // PAGE_SIZE) * PAGE_SIZE
        for one in requests
        for _ in range(one.n)
    ]
    sizes = sorted(sizes)[-MOST_ROWS:]
    graphs = None if max(one.max_new_tokens for one in requests) >= CAPTURED_TOKENS else False
    return Engine(model, tokenizer, max_rows=len(sizes), cache_tokens=sum(sizes), graphs=graphs, **options)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of `prompt`, with what the tokenizer puts before every text; an empty one becomes `eot`, the start of
    every document: the model must read at least one token."""
    return tokenizer.encode_prompts([prompt])[0].tolist() or [tokenizer.eot]


def make_sample(
    ids: Sequence[int], n_prompt: int, tokenizer: Tokenizer, stop_ids: tuple[int, ...] | None = None
) -> Sample:
    """The sample of a prompt and what follows it, cut after the first new token of `stop_ids`."""
    ids, ends = list(ids), tokenizer.stop_ids if stop_ids is None else stop_ids
    end = next((i for i in range(n_prompt, len(ids)) if ids[i] in ends), len(ids))
    start = 1 if ids[0] == tokenizer.eot else 0
    return Sample(ids[: end + 1], tokenizer.decode(ids[start:end]))


def generate(
    model: Transformer,
    prompt_ids: Tensor,
    max_new_tokens: int,
    *,
    options: SamplingOptions,
    seed: int = 1337,
    stop: Sequence[int] = (),
    slide: bool = False,
) -> Tensor:
    """`prompt_ids` (B, P) and the tokens drawn after them, (B, P + new) int64, new ≤ `max_new_tokens`. Row i has the
    seed `choice_seed(seed, i)`; one that ended with a token of `stop` is filled up with the first of them."""
    requests = [
        Request(row, max_new_tokens, options, choice_seed(seed, i), stop_ids=stop, slide=slide)
        for i, row in enumerate(prompt_ids.tolist())
    ]
    texts = [new for (new,) in engine_for(model, requests).run(requests)]
    longest = max(map(len, texts))
    rows = [new + list(stop[:1]) * (longest - len(new)) for new in texts]
    return torch.cat((prompt_ids, torch.tensor(rows, device=prompt_ids.device)), dim=1)
