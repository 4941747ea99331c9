"""What is asked of the engine, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from regpt.engine.noise import check_seed
from regpt.engine.processing import SamplingOptions
from regpt.errors import UsageError, UserError

FinishReason = Literal["stop", "length", "cancelled", "error"]
MOST_TOP = 100  # alternatives reported for a token


class Structure(Protocol):
    """Structured output: which tokens may follow. `llguidance` and the like, behind two methods."""

    def allowed(self) -> Tensor:
        """(V,) bool for the next token; all False where nothing may follow, which ends the text as an error."""
        ...

    def accept(self, token: int) -> None:
        """`token` was drawn."""
        ...


@dataclass(frozen=True)
class Request:
    """A prompt and how it is continued.

    Raises:
        UsageError: a value that is not allowed.
    """

    prompt: Sequence[int]
    """Its tokens, one at least."""
    max_new_tokens: int
    """At most so many; with the prompt's at most the model's length, unless `slide`."""
    options: SamplingOptions = field(default_factory=SamplingOptions)
    """How tokens are drawn."""
    seed: int = 1337
    """A text depends on the weights, the prompt, the options and the seed, nothing else."""
    n: int = 1
    """Texts; the first has the seed itself (`noise.choice_seed`)."""
    stop_ids: Sequence[int] = ()
    """Tokens that end a text; the last event has it."""
    stop: Sequence[str] = ()
    """Strings that end a text, across tokens too; they are no part of it. The engine needs a tokenizer."""
    top_logprobs: int = 0
    """Likeliest tokens reported with each."""
    slide: bool = False
    """Continue past the model's length: from there on each token follows from the last `max_seq_len` alone."""
    user: str = ""
    """Users take turns."""
    structure: Callable[[], Structure] | None = None
    """Makes the structure of each text."""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise UsageError("the prompt has no token; give one at least, such as the one that starts every document")
        if self.n < 1:
            raise UsageError(f"the number of samples is {self.n}, must be at least 1")
        if not 0 <= self.top_logprobs <= MOST_TOP:
            raise UsageError(f"top-logprobs is {self.top_logprobs}, must be between 0 and {MOST_TOP}")
        if not all(self.stop):
            raise UsageError("a stop string is empty; leave it out")
        check_seed(self.seed)


class Event(NamedTuple):
    """One token of one text, or its end.

    Attributes:
        request: as `Engine.submit` returned it.
        choice: which of the request's `n` texts.
        token: None where a text ends without one: cancelled, or logits that are not finite.
        logprob: of the token under the model's softmax, before all processing.
        top: the likeliest tokens and their log-probabilities.
        text: the piece that the token completes, as in `TextStream`; empty without a tokenizer.
        finish_reason: of the last event of a text; `stop`, `length`, `cancelled` or `error`.
    """

    request: int
    choice: int
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Stats:
    """State of an engine.

    Attributes:
        waiting, running: texts; `running` includes those whose prompt is being read.
        free_pages, pages: of the cache; pages kept for prompts that begin alike count as free.
        prompt_tokens, cached_tokens, new_tokens: since the start; `cached_tokens` of prompts were not computed.
        recomputed: tokens drawn again from an uncached forward (`Engine`).
        steps: since the start.
        proposed, accepted: tokens of the draft, and those of them that were drawn.
    """

    waiting: int
    running: int
    free_pages: int
    pages: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    recomputed: int
    steps: int
    proposed: int = 0
    accepted: int = 0


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


def bad_logits() -> UserError:
    return UserError(
        "the model's logits are not finite: its weights are damaged, or the precision has too small a range; "
        "sample from an earlier checkpoint, or with --precision fp32"
    )


def check_request(request: Request, longest: int, n_vocab: int, cache_tokens: int, *, texts: bool) -> None:
    """Refuse what an engine with a model of length `longest`, and with a tokenizer where `texts`, cannot write.

    Raises:
        UserError: prompt and new tokens are longer than the model or the cache.
        UsageError: a token that the model does not have, or stop strings without a tokenizer.
    """
    total = len(request.prompt) + request.max_new_tokens
    check_length(len(request.prompt), request.max_new_tokens, total if request.slide else longest)
    tokens = [*request.prompt, *(token for token, _ in request.options.logit_bias)]
    for wrong in (min(tokens), max(tokens)):
        if not 0 <= wrong < n_vocab:
            raise UsageError(f"token {wrong} is not in the model's vocabulary of {n_vocab}")
    if request.stop and not texts:
        raise UsageError("stop strings need a tokenizer; give the engine one, or name stop_ids")
    if min(total - 1, longest) > cache_tokens:
        raise UserError(f"prompt and new tokens are {total}, the cache holds {cache_tokens}; ask for fewer new tokens")
