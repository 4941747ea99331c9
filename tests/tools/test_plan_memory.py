"""Memory by part: against the published sizes, against autograd's own allocations, against what the compiler keeps."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tiny
from regpt.data.batch import Batch
from regpt.model.config import ModelConfig
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.tools.plan.coefficients import PATHS
from regpt.tools.plan.memory import Settings, cpu_memory, gpu_memory, largest_rows, tensors
from regpt.tools.plan.shape import shape_of
from regpt.train.loss import make_loss_sum

SMALL = ModelConfig(n_layer=3, n_head=4, n_embd=64, vocab_size=1000, max_seq_len=64)
GIB = 2**30
MOMENTARY = ("activations", "logits", "low-precision copies", "fresh gradients")


@pytest.mark.parametrize(
    ("layers", "heads", "width", "parameters"),
    [(12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080), (48, 25, 1600, 1_557_611_200)],
)
def test_the_four_sizes_of_gpt2(layers: int, heads: int, width: int, parameters: int):
    """Parameters as counted on OpenAI's weights; FLOPs by hand: 6 a weight of a product, and attention."""
    shape = shape_of(ModelConfig(n_layer=layers, n_head=heads, n_embd=width), 1024, pad_vocab=True)
    assert shape.parameters == parameters
    assert shape.padded == parameters + 47 * width  # 50,257 rows padded to 50,304
    assert shape.matrices == layers * 12 * width**2 + 50304 * width
    products = 6 * (layers * 12 * width**2 + 50257 * width)
    assert shape.flops_per_token == products + 12 * layers * width * 1024


def test_flops_of_the_smallest_are_those_of_the_comparison_tables():
    assert shape_of(ModelConfig(), 1024, pad_vocab=True).flops_per_token == pytest.approx(854.65e6, rel=1e-3)


def peak_of_a_micro_batch(config: ModelConfig, rows: int, precision: str, *, pad_vocab: bool = True) -> int:
    """Most bytes allocated at once by forward and backward, gradients of an earlier micro-batch there already."""
    model = initialize(Transformer(config, pad_vocab=pad_vocab), 0)
    loss_sum = make_loss_sum(model, precision, tiny.CPU, False)  # type: ignore[arg-type]
    tokens = torch.zeros(rows, config.max_seq_len, dtype=torch.int64)
    (loss_sum(Batch(tokens, tokens)) / 7).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        (loss_sum(Batch(tokens, tokens)) / 7).backward()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("change", [{}, {"n_layer": 5}, {"n_embd": 128}, {"vocab_size": 2048}, {"n_head": 2}], ids=str)
def test_the_eager_path_is_exact(precision: str, change: dict):
    config = replace(SMALL, **change)
    shape = shape_of(config, config.max_seq_len, pad_vocab=True)
    parts = tensors(shape, 8, Settings("eager", precision))
    predicted = sum(size for name, size in parts.items() if name in MOMENTARY)
    assert predicted == pytest.approx(peak_of_a_micro_batch(config, 8, precision), rel=0.005)


def test_few_tokens_peak_where_backward_ends():
    """One row of eight tokens: gradients of the large embedding outweigh all activations."""
    config = replace(SMALL, vocab_size=20_000, max_seq_len=8)
    parts = tensors(shape_of(config, 8, pad_vocab=True), 1, Settings("eager", "fp32"))
    assert parts["fresh gradients"] == 3 * 4 * 20_096 * 64  # the head's, the embedding's, their sum
    assert sum(parts[name] for name in MOMENTARY if name in parts) == pytest.approx(
        peak_of_a_micro_batch(config, 1, "fp32"), rel=0.05
    )


@tiny.IMPORTS_COMPILER
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_compiled_path_keeps_what_the_partitioner_keeps(precision: str):
    kept = {layers: kept_by_the_compiler(replace(SMALL, n_layer=layers), 8, precision) for layers in (1, 2)}
    shapes = {n: shape_of(replace(SMALL, n_layer=n), SMALL.max_seq_len, pad_vocab=True) for n in (1, 2)}
    path = PATHS["compiled", "half" if precision == "bf16" else "full"]

    def predicted(layers: int) -> float:
        parts = tensors(shapes[layers], 8, Settings("compiled", precision))
        hidden_gradient = (2 if precision == "bf16" else 4) * 8 * 64 * 64  # not kept, made where backward begins
        return sum(parts[name] for name in MOMENTARY if name in parts) - hidden_gradient

    assert predicted(2) - predicted(1) == pytest.approx(kept[2] - kept[1], rel=0.01)
    assert predicted(2) == pytest.approx(kept[2], rel=0.02)
    assert path.logits == (2 if precision == "bf16" else 4)


def kept_by_the_compiler(config: ModelConfig, rows: int, precision: str) -> int:
    """Bytes that torch.compile's partition of the graph keeps for backward, each memory once, weights left out."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    kept: dict[int, int] = {}

    def forward(graph, inputs):
        for node in next(node for node in graph.graph.nodes if node.op == "output").args[0][1:]:
            if node is None or node.op == "placeholder" or not isinstance(value := node.meta["val"], torch.Tensor):
                continue
            kept[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        return graph

    torch.compiler.reset()
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, inputs: graph,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    model = initialize(Transformer(config), 0)
    loss = torch.compile(make_loss_sum(model, precision, tiny.CPU, False), backend=backend, dynamic=False)  # type: ignore[arg-type]
    tokens = torch.zeros(rows, config.max_seq_len, dtype=torch.int64)
    loss(Batch(tokens, tokens)).backward()
    return sum(kept.values())
