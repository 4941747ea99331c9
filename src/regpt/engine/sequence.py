"""One text on its way, and the queue in front of the engine."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from regpt.engine.request import Request, Structure
from regpt.engine.text import TextStream


@dataclass(eq=False, slots=True)
class Sequence:
    """One of a request's texts.

    Attributes:
        tokens: the prompt's and the new ones that the host has read.
        pages: of the cache, for all positions that it may reach.
        cached: positions whose keys and values are computed or being computed.
        launched: new tokens drawn or being drawn.
        base: the slot of the first position, where the pages are in a row.
    """

    request_id: int
    choice: int
    request: Request
    seed: int
    tokens: list[int]
    stream: TextStream | None = None
    structure: Structure | None = None
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    launched: int = 0
    base: int | None = None
    finished: bool = False
    prompt_tokens: int = 0
    ends: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.prompt_tokens, self.ends = len(self.tokens), frozenset(self.request.stop_ids)

    @property
    def new(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    def steps_left(self, longest: int) -> int:
        """Tokens that can yet be drawn from the cache."""
        return min(self.request.max_new_tokens - self.launched, longest - self.cached)

    @property
    def unread(self) -> int:
        """Tokens that are drawn, or being drawn, and not yet known to the host."""
        return self.launched - (len(self.tokens) - self.prompt_tokens)


class FairQueue:
    """Texts that wait: users take turns, each user's texts keep their order."""

    def __init__(self) -> None:
        self.users: OrderedDict[str, deque[Sequence]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self.users.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for waiting in self.users.values() for sequence in waiting)

    def append(self, sequence: Sequence) -> None:
        self.users.setdefault(sequence.request.user, deque()).append(sequence)

    def prepend(self, sequence: Sequence) -> None:
        self.users.setdefault(sequence.request.user, deque()).appendleft(sequence)
        self.users.move_to_end(sequence.request.user, last=False)

    def first(self) -> Sequence | None:
        return next(iter(self), None)

    def pop(self) -> Sequence:
        """The first; its user goes to the end of the row."""
        user, waiting = next(iter(self.users.items()))
        sequence = waiting.popleft()
        if waiting:
            self.users.move_to_end(user)
        else:
            del self.users[user]
        return sequence

    def remove(self, sequence: Sequence) -> None:
        user = sequence.request.user
        self.users[user].remove(sequence)
        if not self.users[user]:
            del self.users[user]
