"""FastPaths instead of plain operations: chosen here, compared with them in tests, left out by `kernels=False`."""

import copy
import warnings
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from regpt.engine.cache import Pages, PrefillView, View, upload
from regpt.engine.products import FixedOrder
from regpt.kernels.few_rows import FewRows, load_few_rows
from regpt.kernels.select import has_triton
from regpt.model.gpt2 import GPT2
from regpt.model.llama import Llama
from regpt.model.ops import PLAIN
from regpt.model.transformer import Transformer


class FastPaths(NamedTuple):
    """Each None where the plain operation stays.

    Attributes:
        attention, prefill: of `DecodeView` and `PrefillView` (`kernels.paged`).
        model: a decode step's forward of up to `model.most_rows` texts (`kernels.gpt2_decode`, `kernels.llama_decode`).
        draw: of rows with common options (`kernels.sampler`), from logits in float32.
        few_rows: products on a CPU (`kernels.few_rows`).
        fixed_order: the model's products, and so its texts, do not depend on the batch (`products.fix_order`).
    """

    attention: Callable[..., Tensor] | None = None
    prefill: Callable[..., Tensor] | None = None
    model: Any = None
    draw: Callable[[Tensor, Tensor, int], Tensor] | None = None
    few_rows: FewRows | None = None
    fixed_order: bool = False


NO_KERNELS = FastPaths()
SHORTEST, LONGEST = 16, 2048  # sizes of prompts for graphs: powers of two between them, from there on multiples
T = TypeVar("T")


def load_kernels(model: Transformer, dtype: torch.dtype) -> FastPaths:
    """What there is for a model that computes in `dtype`: on CUDA with Triton, in half precision the draw, and the
    whole step of GPT-2 and for one text of Llama; on a CPU in float32 with a C compiler."""
    if model.device.type == "cpu" and dtype == torch.float32:
        return FastPaths(few_rows=load_few_rows())
    if model.device.type != "cuda" or not has_triton():
        return NO_KERNELS
    from regpt.kernels.paged import decode_attention, prefill_attention, prefills  # imports Triton

    prefill = prefill_attention if prefills(model.device, dtype, model.config.resolved().head_size) else None
    if model.adapter is not None or dtype != model.dtype or dtype not in (torch.bfloat16, torch.float16):
        return FastPaths(decode_attention, prefill)
    from regpt.kernels import gpt2_decode, llama_decode
    from regpt.kernels.sampler import draw_into

    if model.ops.head is not PLAIN.head:  # or the fused steps, whose products are their own
        fixed = isinstance(model.ops.head, FixedOrder)
        return FastPaths(decode_attention, prefill, draw=draw_into, fixed_order=fixed)
    step: Any = None
    if isinstance(model, GPT2) and gpt2_decode.fits(model):
        step = gpt2_decode.FusedDecode(model)
    elif isinstance(model, Llama) and llama_decode.fits(model):
        step = llama_decode.LlamaDecode(model)
    return FastPaths(decode_attention, prefill, step, draw_into)


def capture(
    compute: Callable[[], T], put_back: Callable[[], None] = lambda: None, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of `compute`, and where its results are; `put_back` undoes what `compute` changed. `compute` runs
    twice before: kernels are compiled and tuned, workspaces allocated."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            compute()
            put_back()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        results = compute()
    return graph, results


class GivenView(PrefillView):
    """A `PrefillView` of slots (N,) and of what its `lengths` would give, all on the device."""

    def __init__(self, pages: Pages, new: Tensor, kernel: Any, lengths: Any):
        View.__init__(self, pages)
        self.new, self.kernel, self.masks["lengths"] = new, kernel, lengths


class Prefill:
    """Reads prompts, by `kernels.gpt2_decode` or the model itself; sizes that come back as CUDA graphs: the host needs
    milliseconds for the hundreds of kernels of a short prompt."""

    def __init__(self, model: Transformer, fused: Any, pages: Pages, *, graphs: bool):
        self.model, self.fused, self.pages, self.graphs, self.pool = model, fused, pages, graphs, None
        self.captured: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self.met = set[tuple[int, int, int]]()

    def read(self, given: Tensor, new: Tensor, kernel: Any, lengths: Any) -> Tensor:
        if self.fused is not None and self.fused.reads_prompts:
            return self.fused.prefill(given, new, *lengths[:2], self.pages, kernel, lengths[2])
        view = GivenView(self.pages, new, kernel, lengths)
        return self.model.hidden(given[:1], positions=given[1:], cache=view)[0]

    def __call__(self, given: Tensor, view: PrefillView) -> Tensor:
        """Hidden states (N, C) of the tokens and positions `given` (2, N)."""
        _, longest, slots = found = view.lengths()
        N, most = given.size(1), power_of_two(max(longest[0], SHORTEST))
        size = power_of_two(max(N, SHORTEST)) if N <= LONGEST else -(-N // LONGEST) * LONGEST
        ends = [0, *accumulate(span.n for span in view.spans)]
        ends += [*range(N + most, size, most), size] if size > N else []  # texts that no one reads
        key = size, power_of_two(len(ends) - 1), most
        if slots is not None or not self.graphs or key not in self.met:
            self.met.add(key)
            return self.read(given, view.new, view.kernel, found)
        if key not in self.captured:
            try:
                self.captured[key] = self.capture(*key, view.kernel)
            except RuntimeError as error:
                self.graphs = False
                warn_without_graphs("prompts are read", error)
                return self.read(given, view.new, view.kernel, found)
        graph, tokens, cuts, hidden = self.captured[key]
        tokens[:, N:] = 0  # slots of the page that is no one's
        tokens[:2, :N], tokens[2, :N] = given, view.new
        cuts.copy_(upload(ends + [size] * (len(cuts) - len(ends)), cuts.device))
        graph.replay()
        return hidden[:N]

    def capture(
        self, size: int, texts: int, most: int, kernel: Any
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        """The graph for `size` tokens of `texts` texts of up to `most`; tokens, positions and slots (3, size),
        cumulative lengths (texts + 1,) and the hidden states that it computes."""
        device = self.pages.k.device
        tokens = torch.zeros(3, size, dtype=torch.int64, device=device)
        cuts = (torch.arange(texts + 1, device=device, dtype=torch.int32) * most).clamp(max=size)
        given = tokens[:2], tokens[2], kernel, ((cuts, cuts), (most, most), None)
        graph, hidden = capture(lambda: self.read(*given), pool=self.pool)
        self.pool = self.pool or graph.pool()
        return graph, tokens, cuts, hidden


def warn_without_graphs(what: str, error: RuntimeError) -> None:
    reason = str(error).splitlines()[0][:200]
    warnings.warn(f"{what} without CUDA graphs ({reason})", RuntimeWarning, stacklevel=3)


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def half_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy of `model` with weights in `dtype`: what a step reads is halved, and no weight is rounded in each."""
    return copy.deepcopy(model).to(dtype).eval()
