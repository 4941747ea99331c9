"""AdamW whose moments live in the host's memory: half as much on the device as weights, gradients and moments need.

For the update the moments visit the device piece by piece: while one piece is used, the next comes in and the last one
goes back, on streams of their own. So an update takes as long as eight bytes a parameter take over the bus, in both
directions at once, and it is bitwise the update of the ordinary optimizer, whose kernel it calls. (An update on the CPU
would move half the bytes, a gradient down and a weight up, but then read and write 28 bytes a parameter at the speed of
the host's memory, which is slower than the bus is on most machines, and round otherwise.)
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from regpt.train.adamw import AdamW

ARENA_ELEMENTS = 2**28  # 1 GiB: torch rounds page-locked memory up to a power of two, which wastes little of that
PIECE_ELEMENTS = 2**23  # 32 MiB of each moment: large enough for the bus's full speed
SLOTS = 3  # pieces on the device: one comes in, one is used, one goes back


@dataclass(frozen=True)
class OffloadedPart:
    """Elements [start, stop) of a parameter, flattened."""

    parameter: Tensor
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of both moments in host memory, and the parts of parameters that they belong to."""

    group: dict[str, Any]
    moments: tuple[Tensor, Tensor]
    parts: tuple[OffloadedPart, ...]


class OffloadedAdamW(AdamW):
    """`torch.optim.AdamW` with its moments in host memory, page-locked where the parameters are on a CUDA device.

    `state[p]` holds `step`, `exp_avg` and `exp_avg_sq` from the beginning; the moments are views of larger tensors.
    `step` returns when they are back.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, device: torch.device, **options: Any):
        super().__init__(groups, **options)
        self.device = device
        self.pieces = [piece for group in self.param_groups for piece in self.allocate(group)]
        self.slots = [Slot(device, self.largest()) for _ in range(min(SLOTS, len(self.pieces)))]

    def allocate(self, group: dict[str, Any]) -> Iterator[Piece]:
        """Make the state of the parameters of `group`; its pieces."""
        pin = self.device.type == "cuda"
        for members in arenas(group["params"]):
            size, dtype = sum(p.numel() for p in members), members[0].dtype
            first, second = (torch.zeros(size, dtype=dtype, pin_memory=pin) for _ in range(2))
            start = 0
            for p in members:
                assert p.is_contiguous()
                of_p = slice(start, start := start + p.numel())
                views = {"exp_avg": first[of_p].view(p.shape), "exp_avg_sq": second[of_p].view(p.shape)}
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32)} | views
            for piece_start in range(0, size, PIECE_ELEMENTS):
                of_piece = slice(piece_start, min(piece_start + PIECE_ELEMENTS, size))
                yield Piece(group, (first[of_piece], second[of_piece]), tuple(parts(members, of_piece)))

    def largest(self) -> dict[torch.dtype, int]:
        """Elements of the largest piece of each type."""
        sizes: dict[torch.dtype, int] = {}
        for piece in self.pieces:
            moment = piece.moments[0]
            sizes[moment.dtype] = max(sizes.get(moment.dtype, 0), moment.numel())
        return sizes

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter; all of them must have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] += 1
        for number, piece in enumerate(self.pieces):
            slot = self.slots[number % len(self.slots)]
            moments = slot.bring(piece.moments)
            self.update(piece, moments)
            slot.take_back(piece.moments, moments)
        for slot in self.slots:
            slot.wait()

    def update(self, piece: Piece, moments: Sequence[Tensor]) -> None:
        """AdamW on the parts of one piece, its moments on the device."""
        group, fused = piece.group, bool(piece.group["fused"])
        sizes = [part.stop - part.start for part in piece.parts]
        gradients = [part.parameter.grad for part in piece.parts]
        # The kernel counts the steps itself, once for each part: it gets counters of its own.
        done = float(self.state[piece.parts[0].parameter]["step"]) - 1  # the same for all
        counters = torch.full((len(sizes),), done, dtype=torch.float32, device=self.device if fused else "cpu")
        adamw(
            [flat(part.parameter, part) for part in piece.parts],
            [flat(gradient, part) for gradient, part in zip(gradients, piece.parts)],
            list(moments[0].split(sizes)),
            list(moments[1].split(sizes)),
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


class Slot:
    """Room on the device for one piece, used again and again."""

    def __init__(self, device: torch.device, sizes: dict[torch.dtype, int]):
        self.room = {
            dtype: [torch.empty(size, dtype=dtype, device=device) for _ in range(2)] for dtype, size in sizes.items()
        }
        self.cuda = device.type == "cuda"
        self.device = device
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if self.cuda else []  # in, out
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream(device))  # which may still use what the room was made of

    def bring(self, host: Sequence[Tensor]) -> list[Tensor]:
        """The moments on the device, for the current stream; waits there until the room is free."""
        there = [room[: moment.numel()] for room, moment in zip(self.room[host[0].dtype], host)]
        with self.on(0, after=1):
            for room, moment in zip(there, host):
                room.copy_(moment, non_blocking=True)
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_stream(self.streams[0])
        return there

    def take_back(self, host: Sequence[Tensor], there: Sequence[Tensor]) -> None:
        """Copy the moments to the host after what the current stream has been given."""
        if self.cuda:
            self.streams[1].wait_stream(torch.cuda.current_stream(self.device))
        with self.on(1):
            for room, moment in zip(there, host):
                moment.copy_(room, non_blocking=True)

    def on(self, number: int, after: int | None = None) -> AbstractContextManager[object]:
        """Make that stream the current one, after the work queued on the stream `after`."""
        if not self.cuda:
            return contextlib.nullcontext()
        if after is not None:
            self.streams[number].wait_stream(self.streams[after])
        return torch.cuda.stream(self.streams[number])

    def wait(self) -> None:
        """Return when the last copy is on the host."""
        if self.cuda:
            self.streams[1].synchronize()


def arenas(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive parameters of one type, together at most `ARENA_ELEMENTS`, or a single one that is larger."""
    members: list[Tensor] = []
    for p in parameters:
        full = sum(q.numel() for q in members) + p.numel() > ARENA_ELEMENTS
        if members and (full or p.dtype != members[0].dtype):
            yield members
            members = []
        members.append(p)
    if members:
        yield members


def parts(members: Sequence[Tensor], of_piece: slice) -> Iterator[OffloadedPart]:
    """The parts of `members`, laid out one after another, that lie in `of_piece`."""
    begin = 0
    for p in members:
        start, stop = max(of_piece.start - begin, 0), min(of_piece.stop - begin, p.numel())
        if start < stop:
            yield OffloadedPart(p, start, stop)
        begin += p.numel()


def flat(tensor: Tensor | None, part: OffloadedPart) -> Tensor:
    assert tensor is not None
    return tensor.detach().view(-1)[part.start : part.stop]
