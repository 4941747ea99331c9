"""PROMPT → TEXT: the prompt is read once, then one token at a time, with a cache of keys and values."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regpt.errors import UsageError, UserError
from regpt.model.cache import KVCache
from regpt.model.transformer import Transformer
from regpt.sample.sampling import SamplingOptions, sample
from regpt.text.tokenizer import Tokenizer


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
    model: Transformer, tokenizer: Tokenizer, prompt: str, *, n: int, max_new_tokens: int, **options: Any
) -> list[Sample]:
    """`n` texts that continue `prompt`, each ending at the first of `stop_ids`; `options` as in `continue_prompt`.

    Raises:
        UserError: see `check_length`, or logits that are not finite.
    """
    if n < 1:
        raise UsageError(f"the number of samples is {n}, must be at least 1")
    prompt_ids, tokens = continue_prompt(model, tokenizer, prompt, n, max_new_tokens, **options)
    rows = torch.stack(list(tokens), dim=1).tolist()  # (n, new)
    return [make_sample([*prompt_ids, *row], len(prompt_ids), tokenizer) for row in rows]


def stream_sample(
    model: Transformer, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, **options: Any
) -> Iterator[str]:
    """The text of `write_samples` with `n` = 1, in pieces as it is generated, the prompt first.

    A piece is whole characters: an incomplete one waits for the next token. Wrong arguments raise at once, not with the
    first piece.

    Raises:
        UserError: see `check_length`, or logits that are not finite.
    """
    prompt_ids, tokens = continue_prompt(model, tokenizer, prompt, 1, max_new_tokens, **options)
    return text_pieces(tokenizer, prompt_ids, (int(token) for token in tokens))  # waits for the device


def continue_prompt(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    n: int,
    max_new_tokens: int,
    *,
    options: SamplingOptions,
    seed: int,
    slide: bool = False,
) -> tuple[list[int], Iterator[Tensor]]:
    """The ids of `prompt`, and the new tokens of `n` texts, drawn with one generator seeded by `seed`.

    `slide` is as in `generate_tokens`.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    rows = torch.tensor(prompt_ids, device=model.device).expand(n, -1)  # (n, P)
    generator = make_generator(model.device, seed)
    return prompt_ids, generate_tokens(
        model, rows, max_new_tokens, options=options, generator=generator, stop=tokenizer.stop_ids, slide=slide
    )


def text_pieces(tokenizer: Tokenizer, prompt_ids: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `prompt_ids` and the `tokens` after them, up to one of `stop_ids`, in pieces of whole characters."""
    ids, shown = list(prompt_ids), 0
    if ids[:1] == [tokenizer.eot]:
        del ids[0]
    for new in chain([[]], ([token] for token in tokens)):  # the prompt alone first
        if new and new[0] in tokenizer.stop_ids:
            break
        ids += new
        text = tokenizer.decode(ids).rstrip("\ufffd")  # may become another character with the next token
        if piece := text[shown:]:
            yield piece
        shown = max(shown, len(text))
    if piece := tokenizer.decode(ids)[shown:]:
        yield piece


def make_generator(device: torch.device, seed: int) -> torch.Generator:
    if not 0 <= seed < 2**64:  # the range of torch.Generator, without its second names for the upper half
        raise UsageError(f"the seed is {seed}, must be between 0 and {2**64 - 1}")
    return torch.Generator(device).manual_seed(seed)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of `prompt`, with what the tokenizer puts before every text; an empty one becomes `eot`, the start of
    every document: the model must read at least one token."""
    return tokenizer.encode_prompts([prompt])[0].tolist() or [tokenizer.eot]


def make_sample(ids: Sequence[int], n_prompt: int, tokenizer: Tokenizer) -> Sample:
    """The sample of one row of `generate`, cut after the first new token of `stop_ids`."""
    ids = list(ids)
    end = next((i for i in range(n_prompt, len(ids)) if ids[i] in tokenizer.stop_ids), len(ids))
    start = 1 if ids[0] == tokenizer.eot else 0
    return Sample(ids[: end + 1], tokenizer.decode(ids[start:end]))


def generate(model: Transformer, prompt_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
    """`prompt_ids` and the tokens of `generate_tokens` after them: (B, P + new) int64, new ≤ `max_new_tokens`."""
    tokens = generate_tokens(model, prompt_ids, max_new_tokens, **options)
    return torch.cat((prompt_ids, *(token[:, None] for token in tokens)), dim=1)


def generate_tokens(
    model: Transformer,
    prompt_ids: Tensor,
    max_new_tokens: int,
    *,
    options: SamplingOptions,
    generator: torch.Generator,
    stop: Sequence[int] = (),
    slide: bool = False,
) -> Iterator[Tensor]:
    """Continue each row of `prompt_ids` (B, P) int64: yield the new tokens one by one, (B,) int64 each.

    A row that has produced one of `stop` is filled up with the first of them, and generation ends early when
    all rows have. Training mode and torch's global random state stay as they were.

    Args:
        generator: on the model's device; one draw a token, no draw when greedy.
        slide: continue past the model's length: from there on each token follows from the last `max_seq_len` alone,
            which are read again for it, since all their positions change.

    Raises:
        UserError: see `check_length`, at once; or logits that are not finite: before their token is yielded with a
            `stop`, at the end without one.
    """
    total, longest = prompt_ids.size(1) + max_new_tokens, model.config.max_seq_len
    check_length(prompt_ids.size(1), max_new_tokens, total if slide else longest)
    capacity = min(total - 1, longest)  # the last token is written, never read
    cache = KVCache(model.config, len(prompt_ids), capacity, device=prompt_ids.device, dtype=attention_dtype(model))
    return token_loop(model, prompt_ids, max_new_tokens, options, generator, stop, cache)


@torch.no_grad()
def token_loop(
    model: Transformer,
    ids: Tensor,
    max_new_tokens: int,
    options: SamplingOptions,
    generator: torch.Generator,
    stop: Sequence[int],
    cache: KVCache,
) -> Iterator[Tensor]:
    longest = model.config.max_seq_len
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # (B,)
    finite = torch.ones((), dtype=torch.bool, device=ids.device)  # whether all logits were so far
    unread = ids
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            fits = ids.size(1) <= longest
            hidden = model.hidden(unread, cache=cache) if fits else model.hidden(ids[:, -longest:])
            logits = model.logits(hidden[:, -1])  # (B, V)
            finite &= logits.isfinite().all()
            token = sample(logits.nan_to_num(), options, generator)  # (B,); to draw from NaN would abort CUDA's process
            if stop:
                token = token.masked_fill(done, stop[0])
                for one in stop:
                    done |= token == one
            ended = bool(stop) and bool(done.all() | ~finite)  # waits for the device
            if ended:
                check_finite(finite)
            yield token
            if ended:
                return
            unread = token[:, None]  # (B, 1)
            ids = torch.cat((ids, unread), dim=1)
    finally:
        model.train(was_training)
    check_finite(finite)


def attention_dtype(model: Transformer) -> torch.dtype:
    """Type of the keys and values that `model` computes: autocast's where it is on, else the weights'."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def check_length(prompt_tokens: int, max_new_tokens: int, max_seq_len: int, name: str = "max-new-tokens") -> None:
    """Prompt and new tokens together must fit into the model's `max_seq_len`; `name` is what the user calls the latter.

    Raises:
        UsageError: fewer than one new token is asked for.
        UserError: they do not fit; the sentence names the largest number that does.
    """
    if max_new_tokens < 1:
        raise UsageError(f"{name} is {max_new_tokens}, must be at least 1")
    room = max_seq_len - prompt_tokens
    if room < 1:
        raise UserError(
            f"the prompt has {prompt_tokens} tokens and the model reads {max_seq_len}; "
            f"shorten the prompt to {max_seq_len - 1} tokens or fewer"
        )
    if max_new_tokens > room:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and {name} {max_new_tokens} exceed the model's length of "
            f"{max_seq_len}; {name} {room} is the most that fits"
        )


def check_finite(finite: Tensor) -> None:
    """Raise a UserError unless `finite`, a scalar bool, is true; waits for the device."""
    if not finite:
        raise UserError(
            "the model's logits are not finite: its weights are damaged, or the precision has too small a range; "
            "sample from an earlier checkpoint, or with --precision fp32"
        )
