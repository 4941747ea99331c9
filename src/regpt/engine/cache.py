"""Keys and values in pages: any text takes any pages, texts with a common beginning share them.

A page holds `page_size` positions of all layers. `Pages` owns them: it hands them out, counts who uses them, and keeps
those of finished texts for prompts that begin alike, as long as no one else needs them. `PrefillView` and `DecodeView`
are what a model's layers see of them (`model.cache.Cache`). Shapes: the glossary in `regpt.model`, and N tokens of a
ragged batch (1, N).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regpt.errors import UserError
from regpt.kernels.few_rows import FewRows
from regpt.model.config import ModelConfig
from regpt.model.masks import AttentionMask, sdpa_mask

FP8, FP8_TOP = torch.float8_e4m3fn, 448.0
ROOT = 0  # serial number of the empty beginning

Key = tuple[int, tuple[int, ...]]  # the serial number of the page before, and the page's tokens


def upload(values: Any, device: torch.device) -> Tensor:
    """Numbers of the host (an array or lists) on a device; on CUDA the host does not wait for the device."""
    host = torch.from_numpy(np.asarray(values))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def as_bytes(x: Tensor) -> Tensor:
    """What is indexed in the place of `x`: not every device can index fp8."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


class Pages:
    """The pool of pages. Page 0 belongs to no one: rows that pad a batch write there.

    Args:
        dtype: of keys and values.
        narrow: keep them in fp8 (e4m3), rounded to nearest, what is above 448 as 448.

    Raises:
        UserError: there is not memory enough.

    Attributes:
        k, v: (L, G, pages · page_size, D); the positions of a page are next to each other.
        page_size: positions a page.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        narrow: bool = False,
    ):
        config = config.resolved()
        shape = (config.n_layer, config.n_kv_head, (n_pages + 1) * page_size, config.head_size)
        self.dtype, self.narrow = dtype, narrow
        stored = FP8 if narrow else dtype
        try:
            # Zeros, as NaN · 0 would be NaN.
            self.k, self.v = (torch.zeros(shape, device=device, dtype=stored) for _ in range(2))
        except (RuntimeError, MemoryError):  # of memory, or of a size that no tensor can have
            positions, size = n_pages * page_size, 2 * math.prod(shape) * stored.itemsize / 2**30
            raise UserError(
                f"a cache of {positions:,} positions takes {size:,.1f} GiB, more than {device.type} has free; ask for "
                "fewer positions (cache_tokens) or fewer texts at once"
            ) from None
        self.page_size, self.n_pages = page_size, n_pages
        self.free = bytearray(b"\0" + b"\1" * n_pages)  # 1 where a page is free and holds nothing of use
        self.users = [0] * (n_pages + 1)
        self.cached: dict[Key, tuple[int, int]] = {}  # to the page and its serial number
        self.keys: dict[int, Key] = {}  # of pages in `cached`
        self.idle: OrderedDict[int, None] = OrderedDict()  # pages in `cached` that no one uses, the oldest first
        self.serial = ROOT

    def rounded(self, x: Tensor) -> Tensor:
        """Keys or values as they are kept."""
        return x.clamp(-FP8_TOP, FP8_TOP).to(FP8) if self.narrow else x.to(self.dtype)

    def write(self, layer: int, slots: Tensor | int, k: Tensor, v: Tensor) -> None:
        """Put keys and values (G, N, D) into N slots."""
        if not self.narrow:
            self.k[layer][:, slots], self.v[layer][:, slots] = k.to(self.dtype), v.to(self.dtype)
            return
        for held, new in ((self.k[layer], k), (self.v[layer], v)):
            as_bytes(held)[:, slots] = as_bytes(self.rounded(new))

    def read(self, layer: int, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Keys and values (G, ..., D) of `slots`, in `dtype`."""
        if not self.narrow:
            return self.k[layer][:, slots], self.v[layer][:, slots]
        k, v = (as_bytes(held[layer])[:, slots].view(FP8).to(self.dtype) for held in (self.k, self.v))
        return k, v

    @property
    def n_free(self) -> int:
        """Pages that can be had: empty ones, and kept ones that no text uses."""
        return self.free.count(1) + len(self.idle)

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self, n: int) -> list[int]:
        """`n` of the `n_free` pages, in a row where there is one: on a CPU attention then reads without a copy."""
        start = self.free.find(b"\1" * n) if n else -1
        if start >= 0:
            found = list(range(start, start + n))
        else:
            found = [page for page, empty in enumerate(self.free) if empty][:n]
            while len(found) < n:
                page, _ = self.idle.popitem(last=False)
                del self.cached[self.keys.pop(page)]
                found.append(page)
        for page in found:
            self.free[page], self.users[page] = 0, 1
        return found

    def release(self, pages: Sequence[int]) -> None:
        """One user less of each; the later ones are given up first."""
        for page in reversed(pages):
            self.users[page] -= 1
            if self.users[page] == 0:
                if page in self.keys:
                    self.idle[page] = None
                else:
                    self.free[page] = 1

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Pages that hold the beginning of `tokens`, whole pages of equal tokens; they have one user more."""
        size, serial, found = self.page_size, ROOT, list[int]()
        for start in range(0, len(tokens) - size + 1, size):
            entry = self.cached.get((serial, tuple(tokens[start : start + size])))
            if entry is None:
                break
            page, serial = entry
            self.idle.pop(page, None)
            self.users[page] += 1
            found.append(page)
        return found

    def reserve(self, beginning: Sequence[int], total: int) -> tuple[list[int], int] | None:
        """Pages for `total` positions, and how many of them hold the `beginning` already; None where there are not
        enough."""
        shared, needed = self.match(beginning), self.needed(total)
        if needed - len(shared) > self.n_free:
            self.release(shared)
            return None
        return shared + self.take(needed - len(shared)), len(shared) * self.page_size

    def keep(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Let later texts find the whole pages of `tokens`, which lie in `pages`."""
        size, serial = self.page_size, ROOT
        for start, page in zip(range(0, len(tokens) - size + 1, size), pages):
            key = serial, tuple(tokens[start : start + size])
            if key not in self.cached and page not in self.keys:
                self.serial += 1  # never used twice: a page whose predecessor was given up is never found again
                self.cached[key], self.keys[page] = (page, self.serial), key
            if key not in self.cached:
                return
            serial = self.cached[key][1]

    def forget(self) -> None:
        """Let no later text find kept pages: the weights have changed. No text is being written."""
        for page in self.keys:
            self.free[page] = 1
        for held in (self.idle, self.cached, self.keys):
            held.clear()

    def base(self, pages: Sequence[int]) -> int | None:
        """The slot of a text's first position where its pages are in a row."""
        in_a_row = all(b - a == 1 for a, b in pairwise(pages))
        return pages[0] * self.page_size if pages and in_a_row else None


@dataclass(frozen=True)
class PromptSpan:
    """Tokens of one text in a ragged batch.

    Attributes:
        first, n: the tokens' place in the batch and their number.
        start: position of the first in the text; earlier ones are in the cache.
        pages: of the text, for `start` + `n` positions at least.
        base: the slot of the text's first position where they are in a row.
    """

    first: int
    n: int
    start: int
    pages: Sequence[int]
    base: int | None = None

    def slots(self, start: int, page_size: int) -> np.ndarray:
        """Slots of the positions from `start` on."""
        at = np.arange(start, self.start + self.n)
        if self.base is not None:
            return at + self.base
        return np.array(self.pages)[at // page_size] * page_size + at % page_size


def ragged(
    parts: Sequence[tuple[Sequence[int], int, Sequence[int], int | None]], device: torch.device
) -> tuple[Tensor, list[PromptSpan]]:
    """Tokens and positions (2, N) of several texts' tokens, and their spans; of each its tokens, the position of the
    first, the text's pages and its base."""
    spans, idx, positions = list[PromptSpan](), list[int](), list[int]()
    for tokens, start, pages, base in parts:
        spans.append(PromptSpan(len(idx), len(tokens), start, pages, base))
        idx += tokens
        positions += range(start, start + len(tokens))
    return upload([idx, positions], device), spans


class View:
    """Base of the two: no positions are counted, each token has its own."""

    ragged = True

    def __init__(self, pages: Pages):
        self.pages, self.length = pages, 0
        self.masks: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made in the first layer and kept for the others."""
        if key not in self.masks:
            self.masks[key] = make()
        return self.masks[key]


class PrefillView(View):
    """Several tokens each of several texts."""

    def __init__(self, pages: Pages, spans: Sequence[PromptSpan], kernel: Callable[..., Tensor] | None = None):
        super().__init__(pages)
        self.kernel = kernel
        self.spans, self.size = spans, pages.page_size
        new = np.concatenate([span.slots(span.start, self.size) for span in spans])
        self.new = upload(new, pages.k.device)  # (N,)

    def all_slots(self, span: PromptSpan) -> slice | Tensor:
        """Slots of all positions of a text: a slice where they are in a row."""
        if span.base is not None:
            return slice(span.base, span.base + span.start + span.n)
        return upload(span.slots(0, self.size), self.new.device)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, attention: Callable[..., Tensor]
    ) -> Tensor:
        self.pages.write(layer, self.new, k[0], v[0])
        q = q.to(self.pages.dtype)
        if self.kernel is not None:
            return self.attend_by_kernel(self.kernel, layer, q, (k, v), mask)
        found = torch.empty_like(q)
        for i, span in enumerate(self.spans):
            slots = self.once(i, lambda: self.all_slots(span))  # noqa: B023
            part = slice(span.first, span.first + span.n)
            total = span.start + span.n
            seen = self.once((mask.window, span.n, total), lambda: sdpa_mask(mask, 1, span.n, total, q.device))  # noqa: B023
            keys, values = self.pages.read(layer, slots)
            found[:, :, part] = attention(q[:, :, part], keys[None], values[None], seen)
        return found

    def attend_by_kernel(
        self,
        kernel: Callable[..., Tensor],
        layer: int,
        q: Tensor,
        new: tuple[Tensor, Tensor],
        mask: AttentionMask,
    ) -> Tensor:
        """The same for all texts at once; `new` keys and values (1, G, N, D), which the pages have, too."""
        lengths, longest, slots = self.once("lengths", self.lengths)
        if slots is None:
            k, v = (self.pages.rounded(y).to(q.dtype) for y in new)
        else:
            k, v = (y[None] for y in self.pages.read(layer, slots))
        return kernel(q, k, v, lengths, longest, mask.window)

    def lengths(self) -> tuple[tuple[Tensor, Tensor], tuple[int, int], Tensor | None]:
        """Cumulative lengths of queries and keys, the longest of each, and the slots of all keys; None where no text
        has earlier ones."""
        device, spans = self.pages.k.device, self.spans
        new, total = [span.n for span in spans], [span.start + span.n for span in spans]
        starts = upload(np.cumsum([[0, *new], [0, *total]], axis=1, dtype=np.int32), device)
        slots = None
        if new != total:
            slots = upload(np.concatenate([span.slots(0, self.size) for span in spans]), device)
        return (starts[0], starts[1]), (max(new), max(total)), slots


Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int | None], Tensor]


class DecodeView(View):
    """The next token of B texts.

    Args:
        tables: (B, most pages of a text) int64.
        positions: (B,) int64, of the tokens.
        attention: a kernel in the place of `attend_pages`, with its arguments.
        alone: for one text whose pages are in a row, the slots of its positions.
        longest: the largest number of positions, the new one included, where known.
        few_rows: attention of one text on a CPU.
    """

    def __init__(
        self,
        pages: Pages,
        tables: Tensor,
        positions: Tensor,
        *,
        attention: Attention | None = None,
        alone: slice | None = None,
        longest: int = 0,
        few_rows: FewRows | None = None,
    ):
        super().__init__(pages)
        self.few_rows = few_rows
        self.tables, self.positions, self.attention, self.alone = tables, positions, attention, alone
        self.longest = longest or tables.size(1) * pages.page_size

    def new_slots(self) -> Tensor:
        size = self.pages.page_size
        page = self.tables.gather(1, (self.positions // size)[:, None])[:, 0]
        return page * size + self.positions % size  # (B,)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, attention: Callable[..., Tensor]
    ) -> Tensor:
        pages = self.pages
        q = q.to(pages.dtype)
        if self.alone is not None:
            end = self.alone.stop
            pages.write(layer, end - 1, k[0, :, 0], v[0, :, 0])
            seen = slice(max(self.alone.start, end - mask.window) if mask.window else self.alone.start, end)
            held = pages.read(layer, seen)
            fits = self.few_rows is not None and self.few_rows.attends(*held)
            return (self.few_rows.attend_one if fits and self.few_rows else attend_alone)(q[0], *held)[None]
        pages.write(layer, self.once("new", self.new_slots), k[0], v[0])
        rows = q[0].transpose(0, 1)  # (B, H, D)
        if self.attention is not None:
            held = pages.k[layer], pages.v[layer]  # (G, slots, D)
            y = self.attention(rows, *held, self.tables, self.positions, pages.page_size, mask.window)
        else:
            y = self.attend_pages(rows, layer, mask)
        return y.transpose(0, 1)[None]  # (1, H, B, D)

    def attend_pages(self, q: Tensor, layer: int, mask: AttentionMask) -> Tensor:
        """Plain attention of rows q (B, H, D) to the positions up to their own: (B, H, D)."""
        slots = self.once("all", lambda: table_slots(self.tables, self.longest, self.pages.page_size))  # (B, S)
        seen = self.once(mask.window, lambda: seen_by(self.positions, slots.size(1), mask.window))  # (B, 1, 1, S)
        k, v = (y.transpose(0, 1) for y in self.pages.read(layer, slots))  # (B, G, S, D)
        grouped = q.size(1) != k.size(1)
        return torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], k, v, attn_mask=seen, enable_gqa=grouped
        )[:, :, 0]


def attend_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query q (H, 1, D) to all of k and v (G, S, D), by products that no thread waits in: on a busy
    CPU that costs more than they do."""
    H, G, D = q.size(0), k.size(0), k.size(2)
    grouped = q.view(G, H // G, D) * D**-0.5
    return ((grouped @ k.transpose(1, 2)).softmax(dim=-1) @ v).view(H, 1, D)


def table_slots(tables: Tensor, longest: int, page_size: int) -> Tensor:
    """(B, S) int64: the slots of the first S = `longest` positions."""
    pages = tables[:, : -(-longest // page_size)]
    within = torch.arange(page_size, device=tables.device)
    return (pages[:, :, None] * page_size + within).flatten(1)[:, :longest]


def seen_by(positions: Tensor, S: int, window: int | None) -> Tensor:
    """(B, 1, 1, S) bool: which of S positions the tokens at `positions` (B,) see."""
    at = torch.arange(S, device=positions.device)
    seen = at <= positions[:, None]
    if window is not None:
        seen &= positions[:, None] - at < window
    return seen[:, None, None]
