"""PROMPT → TEXT: the prompt is read once, then one token at a time behind a cache of keys and values."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

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
        ids: the prompt's tokens and the new ones, up to and including the `<|endoftext|>` that ended the text. For an
            empty prompt the first is `<|endoftext|>`, which starts every document.
        text: `ids` as text, without any `<|endoftext|>` that started or ended it.
    """

    ids: list[int]
    text: str


def write_samples(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    n: int,
    max_new_tokens: int,
    options: SamplingOptions,
    seed: int,
    slide: bool = False,
    show: Callable[[str], object] | None = None,
) -> list[Sample]:
    """`n` texts that continue `prompt`, drawn with one generator seeded by `seed`; each ends at `<|endoftext|>`.

    `slide` is as in `generate`. `show` receives the one text (`n` is 1) in pieces of whole characters as it is made,
    the prompt first: together they are the sample's text.

    Raises:
        UserError: see `check_length`, or logits that are not finite.
    """
    if n < 1:
        raise UsageError(f"the number of samples is {n}, must be at least 1")
    if not 0 <= seed < 2**64:  # what torch.Generator takes, less its second names for the upper half
        raise UsageError(f"the seed is {seed}, must be between 0 and {2**64 - 1}")
    device = model.wte.weight.device
    prompt_ids = encode_prompt(tokenizer, prompt)
    stream = Stream(tokenizer, prompt_ids, show) if show is not None and n == 1 else None
    texts = generate(
        model,
        torch.tensor(prompt_ids, device=device).expand(n, -1),  # (n, P)
        max_new_tokens,
        options=options,
        generator=torch.Generator(device).manual_seed(seed),
        stop=tokenizer.eot,
        slide=slide,
        note=stream.note if stream else None,
    )
    samples = [finished(ids, len(prompt_ids), tokenizer) for ids in texts.tolist()]
    if stream:
        stream.advance(samples[0].text)
    return samples


class Stream:
    """Shows a text while its tokens are made. What may become another character with the next token is held back."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], show: Callable[[str], object]):
        self.tokenizer, self.show = tokenizer, show
        self.ids, self.shown = list(prompt_ids), 0
        if self.ids[0] == tokenizer.eot:
            del self.ids[0]
        self.advance(self.decided())

    def note(self, tokens: Tensor) -> None:
        """The next token, (1,); waits for the device."""
        if (token := int(tokens)) != self.tokenizer.eot:
            self.ids.append(token)
            self.advance(self.decided())

    def decided(self) -> str:
        """The text so far, without a character at its end of which only some bytes are there."""
        return self.tokenizer.decode(self.ids).rstrip("\ufffd")

    def advance(self, text: str) -> None:
        if piece := text[self.shown :]:
            self.show(piece)
        self.shown = max(self.shown, len(text))


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of `prompt`; an empty one is `<|endoftext|>`: the model has something to read, a document's start."""
    return tokenizer.encode(prompt) or [tokenizer.eot]


def finished(ids: Sequence[int], n_prompt: int, tokenizer: Tokenizer) -> Sample:
    """The sample of one row of `generate`: what comes after the first new `<|endoftext|>` is cut off."""
    ids = list(ids)
    end = ids.index(tokenizer.eot, n_prompt) if tokenizer.eot in ids[n_prompt:] else len(ids)
    start = 1 if ids[0] == tokenizer.eot else 0
    return Sample(ids[: end + 1], tokenizer.decode(ids[start:end]))


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_ids: Tensor,
    max_new_tokens: int,
    *,
    options: SamplingOptions,
    generator: torch.Generator,
    stop: int | None = None,
    cache_dtype: torch.dtype | None = None,
    slide: bool = False,
    note: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue each row of `prompt_ids` (B, P) int64; (B, P + new) int64, new ≤ `max_new_tokens`.

    A row that has produced `stop` is filled up with `stop`, and generation ends early when all rows have. Training
    mode and torch's global random state stay as they were.

    Args:
        generator: on the model's device; one draw a token, none when greedy.
        cache_dtype: type of the cached keys and values; by default what the model's attention computes in.
        slide: go past the model's length: from there on each token follows from the last `max_seq_len` alone, which
            are read again for it, since all their positions change.
        note: receives each token (B,) as it is drawn.

    Raises:
        UserError: see `check_length`, or logits that are not finite.
    """
    B, P = prompt_ids.shape
    longest = model.config.max_seq_len
    check_length(P, max_new_tokens, P + max_new_tokens if slide else longest)
    was_training = model.training
    model.eval()
    try:
        capacity = min(P + max_new_tokens - 1, longest)  # the last token is written, never read
        dtype = cache_dtype or attention_dtype(model)
        cache = KVCache(model.config, B, capacity, device=prompt_ids.device, dtype=dtype)
        return extend(model, prompt_ids, max_new_tokens, options, generator, stop, cache, note)
    finally:
        model.train(was_training)


def extend(
    model: Transformer,
    ids: Tensor,
    max_new_tokens: int,
    options: SamplingOptions,
    generator: torch.Generator,
    stop: int | None,
    cache: KVCache,
    note: Callable[[Tensor], object] | None,
) -> Tensor:
    """The loop of `generate`; `cache` is empty."""
    longest = model.config.max_seq_len
    done = torch.zeros(ids.size(0), dtype=torch.bool, device=ids.device)  # (B,)
    finite = torch.ones((), dtype=torch.bool, device=ids.device)  # whether all logits so far were
    unread = ids
    for _ in range(max_new_tokens):
        fits = ids.size(1) <= longest
        hidden = model.hidden(unread, cache=cache) if fits else model.hidden(ids[:, -longest:])
        logits = model.logits(hidden[:, -1])  # (B, V)
        finite &= logits.isfinite().all()
        token = sample(logits.nan_to_num(), options, generator)  # (B,); to draw from NaN would abort CUDA's process
        if stop is not None:
            token = token.masked_fill(done, stop)
            done |= token == stop
        unread = token[:, None]  # (B, 1)
        ids = torch.cat((ids, unread), dim=1)
        if note is not None:
            note(token)
        if stop is not None and done.all():  # waits for the device
            break
    check_finite(finite)
    return ids


def attention_dtype(model: Transformer) -> torch.dtype:
    """Type of the keys and values that `model` computes here: autocast's where it is on, else the weights'."""
    kind = model.wte.weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.wte.weight.dtype


def check_length(prompt_tokens: int, max_new_tokens: int, max_seq_len: int) -> None:
    """Prompt and new tokens together must fit into the model's `max_seq_len`.

    Raises:
        UsageError: fewer than one new token is asked for.
        UserError: they do not fit; the sentence names the largest number that does.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max-new-tokens is {max_new_tokens}, must be at least 1")
    room = max_seq_len - prompt_tokens
    if room < 1:
        raise UserError(
            f"the prompt has {prompt_tokens} tokens and the model reads {max_seq_len}; "
            f"shorten the prompt to {max_seq_len - 1} tokens or fewer"
        )
    if max_new_tokens > room:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and max-new-tokens {max_new_tokens} exceed the model's length of "
            f"{max_seq_len}; max-new-tokens {room} is the most that fits"
        )


def check_finite(finite: Tensor) -> None:
    """Raise a UserError unless `finite`, a scalar bool, is true; waits for the device."""
    if not finite:
        raise UserError(
            "the model's logits are not finite: its weights are damaged, or the precision has too small a range; "
            "sample from an earlier checkpoint, or with --precision fp32"
        )
