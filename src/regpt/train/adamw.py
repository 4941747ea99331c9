"""torch's AdamW without its import of the compiler, and the same with the moments in the host's memory.

Offloaded, the moments visit the device piece by piece: while one piece is updated, the next comes in and the last one
goes back, each on a stream of its own. So an update takes as long as eight bytes a parameter take over the bus, in both
directions at once, and it is bitwise the update of the ordinary optimizer, whose kernel it calls. (An update on the CPU
would move half the bytes, a gradient down and a weight up, but then read and write 28 bytes a parameter at the speed of
the host's memory, which is slower than the bus on most machines, and it rounds differently.)
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from regpt.parallel.reduce import buckets
from regpt.train.rounding import Moment, Part, RoundedUpdate

ARENA_BYTES = 2**30  # of a host tensor: torch rounds page-locked memory up to a power of two, which wastes little here
PIECE_ELEMENTS = 2**23  # 32 MiB of each moment: large enough for the bus's full speed
SLOTS = 3  # pieces on the device: one comes in, one is used, one goes back


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that starts sooner, its state allocated; its update is the same, and cannot be compiled.

    torch guards these methods against torch.compile, and for that imports all of its compiler: 1 to 6 seconds, which
    a run that compiles nothing has no use for. Here they are called without the guard.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def __init__(self, groups: Sequence[dict[str, Any]], **options: Any):
        super().__init__(groups, **options)
        self.allocate_state()

    def allocate_state(self) -> None:
        """Make the state of every parameter now, not in its first update."""
        for group in self.param_groups:
            for p in group["params"]:
                # The fused step wants its counter next to the parameter, the plain one keeps it on the host.
                counter = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                self.state[p] = {"step": counter, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


class Piece(NamedTuple):
    """Consecutive elements of both moments in host memory, and the parts of parameters that they belong to."""

    group: dict[str, Any]
    moments: tuple[Tensor, Tensor]
    parts: list[Part]


class OffloadedAdamW(AdamW):
    """`AdamW` with its moments in host memory, page-locked where the parameters are on a CUDA device.

    `state[p]` holds `step`, `exp_avg` and `exp_avg_sq`; the moments are views of larger tensors. `step` returns when
    they are back.

    Args:
        state_dtype: of the moments; that of the parameters by default.
        rule: instead of torch's update (`train.low_memory.RoundedUpdate`).
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        state_dtype: torch.dtype | None = None,
        rule: RoundedUpdate | None = None,
        **options: Any,
    ):
        self.state_dtype, self.rule = state_dtype, rule
        super().__init__(groups, **options)

    def allocate_state(self) -> None:
        self.device = self.param_groups[0]["params"][0].device
        cuda = self.device.type == "cuda"
        self.pieces = [piece for group in self.param_groups for piece in self.pieces_of(group, pin=cuda)]
        largest = max((piece.moments[0] for piece in self.pieces), key=len)
        self.rooms = [largest.new_empty(2, len(largest), device=self.device) for _ in range(SLOTS)]
        self.streams = [torch.cuda.Stream(self.device) for _ in range(SLOTS)] if cuda else []

    def pieces_of(self, group: dict[str, Any], pin: bool) -> Iterator[Piece]:
        """Make the state of the parameters of `group`; its pieces."""
        for members in buckets(group["params"], ARENA_BYTES):
            size, dtype = sum(p.numel() for p in members), self.state_dtype or members[0].dtype
            first, second = (torch.zeros(size, dtype=dtype, pin_memory=pin) for _ in range(2))
            start = 0
            for p in members:
                assert p.is_contiguous()
                of_p = slice(start, start := start + p.numel())
                views = {"exp_avg": first[of_p].view(p.shape), "exp_avg_sq": second[of_p].view(p.shape)}
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32)} | views
            for start in range(0, size, PIECE_ELEMENTS):
                stop = min(start + PIECE_ELEMENTS, size)
                yield Piece(group, (first[start:stop], second[start:stop]), list(parts(members, start, stop)))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter; all of them must have a gradient."""
        for state in self.state.values():
            state["step"] += 1
        if self.rule is not None:
            self.rule.begin(self.param_groups, int(next(iter(self.state.values()))["step"]))
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream(self.device))  # for the gradients
        for number, piece in enumerate(self.pieces):
            slot = number % SLOTS  # its stream is in order: the room is free when the last piece in it is back
            with torch.cuda.stream(self.streams[slot]) if self.streams else nullcontext():
                self.update(piece, self.rooms[slot])
        for stream in self.streams:
            stream.synchronize()

    def update(self, piece: Piece, room: Tensor) -> None:
        """AdamW on the parts of one piece, its moments in `room` meanwhile."""
        there = [of_room[: len(moment)] for of_room, moment in zip(room, piece.moments)]
        for of_room, moment in zip(there, piece.moments):
            of_room.copy_(moment, non_blocking=True)
        sizes = [part.stop - part.start for part in piece.parts]
        moments = list(there[0].split(sizes)), list(there[1].split(sizes))
        if self.rule is not None:
            for part, first, second in zip(piece.parts, *moments):
                self.rule(part, piece.group, Moment(first), Moment(second))
        else:
            self.torchs_update(piece, *moments)
        for of_room, moment in zip(there, piece.moments):
            moment.copy_(of_room, non_blocking=True)

    def torchs_update(self, piece: Piece, first: list[Tensor], second: list[Tensor]) -> None:
        group, fused = piece.group, bool(piece.group["fused"])
        # The kernel counts the steps itself, once for each part: it gets counters of its own.
        done = float(self.state[piece.parts[0].parameter]["step"]) - 1  # the same for all
        counters = torch.full((len(first),), done, dtype=torch.float32, device=self.device if fused else "cpu")
        adamw(
            [part.of(part.parameter) for part in piece.parts],
            [part.of(part.parameter.grad) for part in piece.parts],
            first,
            second,
            [],
            list(counters.unbind()),
            foreach=False,
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def parts(members: Sequence[Tensor], start: int, stop: int) -> Iterator[Part]:
    """The parts of `members`, laid out one after another, that [start, stop) covers."""
    begin = 0
    for p in members:
        part = Part(p, max(start - begin, 0), min(stop - begin, p.numel()))
        if part.start < part.stop:
            yield part
        begin += p.numel()
