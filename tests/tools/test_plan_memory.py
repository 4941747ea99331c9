"""Memory by part: against the published sizes, against autograd's own allocations, against what the compiler keeps."""

import gc
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tiny
from kernels import reference
from regpt.data.batch import Batch
from regpt.kernels.fused import FusedLoss
from regpt.kernels.gpt2 import FusedGPT2
from regpt.kernels.llama import FusedLlama
from regpt.kernels.masked import TorchAttention
from regpt.kernels.select import ops_of
from regpt.model import head
from regpt.model.adapter_config import AdapterConfig
from regpt.model.adapters import adapt, adapter_parameters, begin_adapters
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.weights import initialize
from regpt.runs.plan_stages import Room
from regpt.tools.plan.memory import (
    NO_ADAPTERS,
    PlannedStep,
    chunk_of,
    cpu_memory,
    fused_gated_bytes,
    gpu_memory,
    shape_of,
    tensors,
)
from regpt.tools.plan.speed import Target
from regpt.train.backend import make_loss_sum
from regpt.train.optim import make_optimizer
from regpt.train.recompute import recompute_blocks

SMALL = ModelConfig(n_layer=3, n_head=4, n_embd=64, vocab_size=1000, max_seq_len=64)
GIB = 2**30
MOMENTARY = ("activations", "logits, new gradients", "low-precision copies")


def step_of(config: ModelConfig, path: str, precision: str, **options) -> PlannedStep:
    return PlannedStep(config, config.max_seq_len, path, precision, **options)  # type: ignore[arg-type]


def momentary(step: PlannedStep, rows: int = 8) -> float:
    """Bytes at the peak on top of weights, gradients and moments."""
    parts = tensors(step, rows)
    return sum(parts[name] for name in MOMENTARY)


@pytest.mark.parametrize(
    ("layers", "heads", "width", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
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


def batch_of(config: ModelConfig, rows: int, *, masked: bool = False) -> Batch:
    """Zeros; masked, with one document a row."""
    T = config.max_seq_len
    tokens = torch.zeros(rows, T, dtype=torch.int64)
    return Batch(
        tokens, tokens, *((torch.arange(T).expand(rows, T), torch.arange(0, rows * T + 1, T)) if masked else ())
    )


def peak_of_a_micro_batch(
    config: ModelConfig,
    rows: int,
    precision: str,
    *,
    checkpointing: bool = False,
    masked: bool = False,
    adapter: AdapterConfig = NO_ADAPTERS,
) -> int:
    """Most bytes allocated at once by forward and backward, gradients of an earlier micro-batch there already."""
    model = initialize(adapt(make_model(config, ops_of(precision, tiny.CPU)), adapter), 0)
    begin_adapters(model, 0)
    if checkpointing:
        recompute_blocks(model)
    loss_sum = make_loss_sum(model, precision, tiny.CPU, False)  # type: ignore[arg-type]
    batch = batch_of(config, rows, masked=masked)
    (loss_sum(batch) / 7).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        (loss_sum(batch) / 7).backward()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("change", [{}, {"n_layer": 5}, {"n_embd": 128}, {"vocab_size": 2048}, {"n_head": 2}], ids=str)
def test_the_eager_path_is_exact(precision: str, change: dict):
    config = replace(SMALL, **change)
    predicted = momentary(step_of(config, "eager", precision))
    assert predicted == pytest.approx(peak_of_a_micro_batch(config, 8, precision), rel=0.005)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_head_in_chunks_is_counted_as_one_of_them(precision: str, monkeypatch):
    """Of 512 tokens and 1,024 rows, 64 or 128 tokens at once."""
    for name, value in {"SMALL_VOCAB": 0, "WHOLE": 2**17, "CHUNK_BYTES": 2**18, "CHUNK_MULTIPLE": 8}.items():
        monkeypatch.setattr(head, name, value)
    measured = peak_of_a_micro_batch(SMALL, 8, precision)
    for path in ("eager", "compiled"):
        step = step_of(SMALL, path, precision)
        assert chunk_of(step, 8) == (64 if precision == "fp32" else 128)
        assert momentary(step) == pytest.approx(measured, rel=0.02)
    assert chunk_of(step_of(SMALL, "fused", "bf16"), 8) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_document_mask_is_a_matrix_for_each_layer_or_for_all(precision: str):
    config = replace(SMALL, max_seq_len=256)
    predicted = {}
    for path in ("eager", "compiled"):
        plain, masked = (momentary(step_of(config, path, precision, document_mask=m), 4) for m in (False, True))
        predicted[path] = masked - plain
    plain, masked = (peak_of_a_micro_batch(config, 4, precision, masked=m) for m in (False, True))
    assert predicted["eager"] == pytest.approx(masked - plain, rel=0.01)
    assert predicted["eager"] == pytest.approx(3 * predicted["compiled"], rel=0.01)
    fused = [tensors(step_of(config, "fused", "bf16", document_mask=m), 4) for m in (False, True)]
    assert fused[0] == fused[1]


def test_dropout_keeps_the_probabilities_of_attention_their_masks_and_those_of_residuals():
    predicted, kept = [], []
    for dropout in (0.0, 0.1):
        config = replace(SMALL, dropout=dropout)
        predicted.append(tensors(step_of(config, "eager", "fp32"), 8)["activations"])
        model = initialize(make_model(config), 0)
        saved = tiny.SavedTensors(list(model.parameters()))
        with saved:
            make_loss_sum(model, "fp32", tiny.CPU, False)(batch_of(config, 8)._replace(dropout_keys=torch.arange(8)))
        kept.append(saved.bytes)
    assert predicted[1] - predicted[0] == pytest.approx(kept[1] - kept[0], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("change", "error"),
    [({}, 0.005), ({"n_layer": 6}, 0.005), ({"vocab_size": 100}, 0.1), ({"n_embd": 128}, 0.1)],
    ids=str,
)
def test_with_activation_checkpointing(precision: str, change: dict, error: float):
    """The peak is with the logits, or, where these are small, in a block that is computed again."""
    config = replace(SMALL, **change)
    predicted = momentary(step_of(config, "eager", precision, checkpointing=True))
    assert predicted == pytest.approx(peak_of_a_micro_batch(config, 8, precision, checkpointing=True), rel=error)


def test_few_tokens_peak_where_backward_ends():
    """One row of eight tokens: gradients of the large embedding outweigh all activations."""
    config = replace(SMALL, vocab_size=20_000, max_seq_len=8)
    predicted = momentary(step_of(config, "eager", "fp32"), 1)
    assert predicted > 3 * 4 * 20_096 * 64  # the head's, the embedding's, their sum
    assert predicted == pytest.approx(peak_of_a_micro_batch(config, 1, "fp32"), rel=0.05)


@tiny.IMPORTS_COMPILER
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch does, in Dynamo
@pytest.mark.parametrize("masked", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_the_compiled_path_keeps_what_the_partitioner_keeps(precision: str, masked: bool):
    kept = {layers: kept_by_the_compiler(replace(SMALL, n_layer=layers), 8, precision, masked) for layers in (1, 2)}

    def predicted(layers: int) -> float:
        step = step_of(replace(SMALL, n_layer=layers), "compiled", precision, document_mask=masked)
        return momentary(step) - made_where_backward_begins(4 if precision == "fp32" else 2)

    assert predicted(2) - predicted(1) == pytest.approx(kept[2] - kept[1], rel=0.01)
    assert predicted(2) == pytest.approx(kept[2], rel=0.025)  # around the blocks it keeps other tensors


@tiny.IMPORTS_COMPILER
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("precision", "weights"), [("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32")])
def test_of_gated_blocks_the_partitioner_keeps_less(family: str, precision: str, weights: str):
    """A layer's bytes; without autocast's copies of its weights, which the counts of the compiler hold."""
    config = replace(SMALL, family=family, n_embd=128, n_inner=512, n_kv_head=2)
    one, two = (kept_by_the_compiler(replace(config, n_layer=n), 8, precision, False, weights) for n in (1, 2))
    copies = 2 * (3 * 128**2 + 3 * 128 * 512) if (precision, weights) == ("bf16", "fp32") else 0

    def predicted(layers: int) -> float:
        step = step_of(replace(config, n_layer=layers), "compiled", precision, weights=weights)
        return tensors(step, 8)["activations"]

    assert predicted(2) - predicted(1) == pytest.approx(two - one - copies, rel=0.02)


def test_bytes_of_weights_gradients_and_moments_follow_their_types():
    """A parameter's; of moments in 8 bits 1/64 for scales, and float32 for the 2 % in small tensors or odd rows."""
    config = replace(GPT2, n_layer=2)
    for options, (weight, gradient, moments) in {
        (): (4, 4, 8),
        (("weights", "bf16"),): (2, 4, 8),
        (("weights", "bf16"), ("state", "bf16")): (2, 4, 4),
        (("weights", "bf16"), ("gradients", "bf16"), ("state", "bf16")): (2, 2, 4),
        (("weights", "bf16"), ("state", "int8")): (2, 4, 2 + 2 / 64),
    }.items():
        step = step_of(config, "compiled", "bf16", **dict(options))
        parts, n = gpu_memory(step, 1).parts, step.shape.padded
        assert (parts["weights"], parts["gradients"]) == (weight * n, gradient * n)
        assert parts["optimizer"] == pytest.approx(moments * n, rel=2e-3)


def made_where_backward_begins(width: int) -> int:
    """Gradients of the hidden states and of the head, which are not kept."""
    return width * 64 * (8 * 64 + 1024)


def kept_by_the_compiler(config: ModelConfig, rows: int, precision: str, masked: bool, weights: str = "fp32") -> int:
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
    model = initialize(make_model(config, ops_of(precision, tiny.CPU)), 0)
    if weights == "bf16":
        model, precision = model.to(torch.bfloat16), "fp32"  # no autocast
    loss = torch.compile(make_loss_sum(model, precision, tiny.CPU, False), backend=backend, dynamic=False)  # type: ignore[arg-type]
    loss(batch_of(config, rows, masked=masked)).backward()
    return sum(kept.values())


def test_the_fused_path_keeps_what_its_states_hold():
    """Its code with the plain pieces of tests/kernels in place of cuBLASLt and Triton."""
    kept = {layers: kept_by_the_fused_path(replace(SMALL, n_layer=layers), 8) for layers in (1, 2)}

    def predicted(layers: int) -> float:
        parts = tensors(step_of(replace(SMALL, n_layer=layers), "fused", "bf16"), 8)
        kept = sum(parts[name] for name in MOMENTARY) - parts["low-precision copies"] - 2 * 1024 * 64  # and the head's
        return kept - made_where_backward_begins(2)

    assert predicted(2) - predicted(1) == pytest.approx(kept[2] - kept[1], rel=0.01)
    assert predicted(2) == pytest.approx(kept[2], rel=0.015)


def test_the_fused_path_of_llama_keeps_what_is_counted():
    config = replace(tiny.FAMILY_CONFIGS["llama"], n_layer=3, max_seq_len=12)
    step = step_of(config, "fused", "bf16")
    of_head = 2 * 8 * 12 * 128 + 2 * 12 * 2 * 8 * 4 + 8 * 12 * 4  # logits; cosines and sines; of the last norm
    given = kept_by_the_fused_path(config, 8, FusedLlama) - of_head
    statistics = 3 * 8 * 12 * config.n_head * 4  # of softmax, which TorchAttention keeps none of
    assert given + statistics == pytest.approx(fused_gated_bytes(step) * 8 * 12, rel=0.01)


def kept_by_the_fused_path(config: ModelConfig, rows: int, path_of: type[FusedLoss] = FusedGPT2) -> int:
    """Bytes of the tensors in the state of one micro-batch, each memory once, what it was given left out."""
    model = initialize(make_model(config), 0)
    path = path_of(model, reference.products, TorchAttention(), reference, torch.bfloat16)
    path.copy_weights()
    tokens = torch.zeros(rows, config.max_seq_len, dtype=torch.int64)
    _, state = path.forward(tokens, tokens, None, None, gradient=True)
    found: dict[int, int] = {}

    def look(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for part in value:
                look(part)
        elif is_dataclass(value):
            for part in fields(value):
                look(getattr(value, part.name))

    look(state)
    return sum(found.values()) - tokens.nbytes


# ---- the rest of a device and of a process --------------------------------------------------------------------------

GPT2 = ModelConfig()


@pytest.mark.parametrize("path", ["compiled", "eager", "fused"])
def test_memory_grows_with_the_rows(path: str):
    step = step_of(replace(GPT2, n_layer=2), path, "bf16")
    few, many = (gpu_memory(step, rows) for rows in (8, 64))
    for name in ("weights", "gradients", "optimizer"):
        assert few.parts[name] == many.parts[name]
    assert many.parts["activations"] == pytest.approx(8 * few.parts["activations"])
    assert many.parts["logits, new gradients"] > 6 * few.parts["logits, new gradients"]
    assert many.needed > many.peak


def test_rows_are_counted_on_a_line_through_two_passes():
    """What no pass was made with is as exact as the passes themselves."""
    step = step_of(SMALL, "eager", "bf16")
    assert momentary(step, 7) == pytest.approx(peak_of_a_micro_batch(SMALL, 7, "bf16"), rel=0.005)


def test_weights_gradients_and_moments_are_16_bytes_a_parameter():
    step = step_of(GPT2, "compiled", "bf16")
    parts = gpu_memory(step, 1).parts
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 16 * step.shape.padded
    assert parts["low-precision copies"] == pytest.approx(2 * step.shape.block_weights, rel=0.002)
    assert gpu_memory(replace(step, offload=True), 1).parts["optimizer"] == 0


def test_float64_takes_twice_as_much():
    once, twice = (tensors(step_of(SMALL, "eager", precision), 4) for precision in ("fp32", "fp64"))
    assert {name: 2 * size for name, size in once.items()} == twice


def test_a_process_on_the_cpu_has_its_libraries_and_a_checkpoint_s_copy():
    step = step_of(SMALL, "eager", "fp32")
    without, with_copy = (cpu_memory(step, 8, 1e9, checkpoint_copy=copy) for copy in (0, 5e6))
    assert with_copy.peak - without.peak == 5e6
    assert without.peak > 1e9
    assert set(without.parts) == {*tensors(step, 8), "process"}


def test_the_largest_micro_batch_is_the_largest_that_fits():
    step = step_of(SMALL, "eager", "fp32")
    for rows in (None, 1, 4):
        memory = 1 if rows is None else gpu_memory(step, rows).needed
        target = Target("a GPU", "gpu", None, None, memory, 1.0, "stated")
        assert Room(step, target, [1, 2, 4, 8]).largest() == rows


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["compiled", "eager", "fused"])
@pytest.mark.parametrize("rows", [4, 16])
def test_the_peak_on_a_gpu_is_within_ten_per_cent(path: str, rows: int):
    from regpt.train.config import OptimConfig
    from regpt.train.optim import make_optimizer

    device = torch.device("cuda")
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()  # what other tests have left
    torch.cuda.reset_peak_memory_stats()
    config = ModelConfig(n_layer=6)
    with device:
        model = initialize(make_model(config), 0)
    kernels = "fused" if path == "fused" else "plain"
    loss_sum = make_loss_sum(model, "bf16", device, path == "compiled", kernels)
    optimizer = make_optimizer(model, OptimConfig(), device)
    tokens = torch.zeros(rows, 1024, dtype=torch.int64, device=device)
    for _ in range(2):
        for _ in range(2):
            (loss_sum(Batch(tokens, tokens)) / 7).backward()
        optimizer.step()
    predicted = gpu_memory(step_of(config, path, "bf16"), rows).peak
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_adapters_are_counted_with_their_base(kind: str, precision: str):
    """Tensors of weights, gradients and moments as they are; the peak of a micro-batch to a tenth."""
    adapter = AdapterConfig(r=4, base=kind)  # type: ignore[arg-type]
    config = replace(SMALL, n_embd=128)
    model = initialize(adapt(make_model(config, ops_of(precision, tiny.CPU)), adapter), 0)
    begin_adapters(model, 0)
    optimizer = make_optimizer(model, tiny.OPTIM, tiny.CPU)
    learned = list(adapter_parameters(model).values())
    parts = tensors(step_of(config, "eager", precision, adapter=adapter), 8)
    assert parts["weights"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert parts["gradients"] == sum(p.nbytes for p in learned)
    moments = [optimizer.state[p][name].nbytes for p in learned for name in ("exp_avg", "exp_avg_sq")]
    assert parts["optimizer"] == sum(moments)
    measured = peak_of_a_micro_batch(config, 8, precision, adapter=adapter)
    assert sum(parts[name] for name in MOMENTARY) == pytest.approx(measured, rel=0.1)
