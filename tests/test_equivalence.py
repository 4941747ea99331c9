"""The same tiny run in different ways gives the same loss and gradients: one table, tested here, printed in the README.

An error is relative: the length of a tensor's difference over the tensor's length, the largest over the loss, the norm
and every parameter's gradient (of the weights and moments at the end, where whole runs are compared). What is computed
in float64 agrees to rounding, about 1e-15; the tolerances are some ten times what was measured.
"""

import inspect
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import tiny
from conversation_files import invented, write_conversations
from kernels import reference as pieces
from kernels.emulated import emulated
from kernels.reference_fp8 import Rounding
from naive import naive_scores, random_prompts
from plain_cache import KVCache
from regpt.checkpoint.load import checkpoint_folder
from regpt.config import RunConfig
from regpt.data.batch import IGNORE_INDEX, Batch
from regpt.data.loader import Loader
from regpt.data.rows import open_rows
from regpt.evals.score import Scorer
from regpt.hf.weights import WeightsFromHF, weights_to_hf
from regpt.kernels.fused import FusedLoss
from regpt.kernels.gpt2 import FusedGPT2
from regpt.kernels.gpt2_fp8 import FusedGPT2FP8
from regpt.kernels.llama import FusedLlama
from regpt.kernels.masked import TorchAttention, attend_in_band, band, cudnn, flash
from regpt.kernels.select import ops_of
from regpt.model.adapter_config import AdapterConfig
from regpt.model.adapters import Merged, adapt, adapter_parameters, base_tensors, begin_adapters
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.layers import rotation
from regpt.model.ops import PLAIN
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize, load_weights, state_tensors
from regpt.parallel.mesh import open_mesh
from regpt.reference import gpt2, llama
from regpt.runs.folder import read_run_config
from regpt.runs.pretrain import fork, pretrain, resume
from regpt.train import activation_offload
from regpt.train.activation_offload import OnHost
from regpt.train.config import PrecisionName
from regpt.train.precision import autocast, parameter_dtype
from regpt.train.recompute import compile_blocks, mlps_in_pieces, recompute_blocks

README = Path(__file__).parents[1] / "README.md"
Found = dict[str, Tensor]


@dataclass(frozen=True)
class Cell:
    """One line: `run` returns pairs of what A and B found, of which nothing may differ by more than `tolerance`."""

    a: str
    b: str
    what: str
    tolerance: float
    run: Callable[..., list[tuple[Found, Found]]]
    slow: bool = False


DROPOUT = tiny.replace(tiny.CONFIG, dropout=0.2)


def ours(
    *, micro_batch_rows: int = tiny.N_ROWS, pad_vocab: bool = True, compile: bool = False, config=tiny.CONFIG
) -> Found:
    """Loss, norm and gradients of the first step."""
    loader = tiny.Rows(micro_batch_rows=micro_batch_rows, config=config)
    model = tiny.build_model(pad_vocab=pad_vocab, config=config)
    return tiny.step_gradients(tiny.build_trainer(model, loader, compile=compile))


def without_norm(found: Found) -> Found:
    return {name: tensor for name, tensor in found.items() if name != "norm"}


# ---- other implementations -------------------------------------------------------------------------------------------


def hugging_face() -> list[tuple[Found, Found]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=3, n_embd=24, vocab_size=97, n_positions=16, bos_token_id=None, eos_token_id=None
    )
    theirs = transformers.GPT2LMHeadModel(config).double().eval()  # eval: without dropout
    model = tiny.build_model()
    unexpected = theirs.load_state_dict(weights_to_hf(state_tensors(model)), strict=False).unexpected_keys
    assert not unexpected
    idx, targets = tiny.Rows().rows(0)
    logits = theirs(idx).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    gradients = WeightsFromHF({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    found = without_norm(ours()) | {"logits": model(idx)}
    return [(found, {"loss": loss, "logits": logits, **gradients})]


def numpy_reference() -> list[tuple[Found, Found]]:
    params = {name: w.numpy() for name, w in state_tensors(tiny.build_model()).items()}
    idx, targets = (x.numpy() for x in tiny.Rows().rows(0))
    scale = 1 / int((targets != IGNORE_INDEX).sum())
    loss, _, gradients = gpt2.loss_and_gradients(params, idx, targets, tiny.CONFIG.n_head, scale)
    by_hand = {"loss": torch.tensor(loss, dtype=torch.float64)}
    return [(without_norm(ours()), by_hand | {name: torch.from_numpy(np.asarray(g)) for name, g in gradients.items()})]


def llama_by_hand() -> list[tuple[Found, Found]]:
    pairs = []
    for tied in (True, False):
        config = tiny.replace(tiny.FAMILY_CONFIGS["llama"], tie_embeddings=tied)
        params = {name: w.numpy() for name, w in state_tensors(tiny.build_model(config=config)).items()}
        idx, targets = (x.numpy() for x in tiny.Rows().rows(0))
        scale = 1 / int((targets != IGNORE_INDEX).sum())
        by = tuple(x.double().numpy() for x in rotation(config.resolved(), torch.arange(tiny.SEQ_LEN)))
        np.testing.assert_allclose(by, llama.rotation(tiny.SEQ_LEN, 4), rtol=0, atol=1e-6)
        loss, _, gradients = llama.loss_and_gradients(
            params, idx, targets, config.n_head, config.n_kv_head, scale, by=by
        )
        by_hand = {name: torch.from_numpy(np.asarray(g)) for name, g in gradients.items()}
        pairs.append((without_norm(ours(config=config)), by_hand | {"loss": torch.tensor(loss, dtype=torch.float64)}))
    return pairs


# ---- every family in every way --------------------------------------------------------------------------------------


def families_accumulated() -> list[tuple[Found, Found]]:
    configs = tiny.FAMILY_CONFIGS.values()
    return [(ours(micro_batch_rows=rows, config=config), ours(config=config)) for config in configs for rows in (1, 4)]


def families_padded() -> list[tuple[Found, Found]]:
    return [(ours(config=config), ours(pad_vocab=False, config=config)) for config in tiny.FAMILY_CONFIGS.values()]


def families_recomputed() -> list[tuple[Found, Found]]:
    pairs = []
    for config in tiny.FAMILY_CONFIGS.values():
        again = recompute_blocks(tiny.build_model(config=config))
        pairs.append((tiny.step_gradients(tiny.build_trainer(again, tiny.Rows())), ours(config=config)))
    return pairs


def families_packed() -> list[tuple[Found, Found]]:
    return [pair for config in tiny.FAMILY_CONFIGS.values() for pair in packed_documents(config)]


def families_with_masks_as_data() -> list[tuple[Found, Found]]:
    """Their kernels emulated; those of a GPU are compared in tests/kernels/test_masked_on_gpu.py."""
    pairs = []
    with pytest.MonkeyPatch.context() as patch, emulated(patch):
        for config, kernel in ((c, k) for c in tiny.FAMILY_CONFIGS.values() for k in (cudnn, flash)):
            exact = tiny.build_model(config=config)
            ops = replace(PLAIN, attention=partial(attend_in_band, attend=kernel), translate_mask=band)
            model = load_weights(make_model(config, ops).double(), state_tensors(exact))
            pairs.append(tuple(tiny.step_gradients(tiny.build_trainer(one, Packed())) for one in (model, exact)))
    return pairs


def families_cached() -> list[tuple[Found, Found]]:
    return [pair for config in tiny.FAMILY_CONFIGS.values() for pair in key_value_cache(config)]


def llama_in_processes() -> list[tuple[Found, Found]]:
    config = tiny.FAMILY_CONFIGS["llama"]
    return [(found, ours(config=config)) for found in tiny.in_processes(2, llama_of_several)]


def llama_of_several() -> Found:
    config = tiny.FAMILY_CONFIGS["llama"]
    with open_mesh("cpu") as mesh:
        loader = tiny.Rows(micro_batch_rows=1, dp_rank=mesh.rank, dp_size=mesh.world_size)
        return tiny.step_gradients(tiny.build_trainer(tiny.build_model(config=config), loader, mesh=mesh))


def llama_compiled() -> list[tuple[Found, Found]]:
    return compiled(tiny.replace(tiny.FAMILY_CONFIGS["qwen3"], window=5))


# ---- other ways to compute a step ------------------------------------------------------------------------------------


def accumulation() -> list[tuple[Found, Found]]:
    return [(ours(micro_batch_rows=rows), ours()) for rows in (1, 2, 4)]


def after_out_of_memory() -> list[tuple[Found, Found]]:
    def limited(rows: int) -> Found:
        trainer = tiny.build_trainer(tiny.build_model(), tiny.Rows())
        whole = tiny.loss_sum_of(trainer)

        def loss_sum(batch: Batch) -> Tensor:
            loss = whole(batch)
            if len(batch.idx) > rows:
                loss.backward()  # leaves something behind
                raise torch.OutOfMemoryError
            return loss

        tiny.compute_by(trainer, loss_sum)
        return tiny.step_gradients(trainer)

    return [(limited(rows), ours(micro_batch_rows=rows)) for rows in (1, 2, 4)]


def processes() -> list[tuple[Found, Found]]:
    expected = [ours(), ours(config=DROPOUT)]
    return [pair for n in (2, 4) for found in tiny.in_processes(n, one_of_several) for pair in zip(found, expected)]


def one_of_several() -> list[Found]:
    """Without and with dropout."""
    found = []
    with open_mesh("cpu") as mesh:
        for config in (tiny.CONFIG, DROPOUT):
            loader = tiny.Rows(micro_batch_rows=1, dp_rank=mesh.rank, dp_size=mesh.world_size, config=config)
            trainer = tiny.build_trainer(tiny.build_model(config=config), loader, mesh=mesh)
            found.append(tiny.step_gradients(trainer))
    return found


def compiled(config=tiny.CONFIG) -> list[tuple[Found, Found]]:
    if not shutil.which("c++"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    return [(ours(compile=True, config=config), ours(config=config))]


def compiled_dropout() -> list[tuple[Found, Found]]:
    return compiled(DROPOUT)


def dropout_accumulated() -> list[tuple[Found, Found]]:
    return [(ours(micro_batch_rows=rows, config=DROPOUT), ours(config=DROPOUT)) for rows in (1, 2, 4)]


def dropout_recomputed() -> list[tuple[Found, Found]]:
    again = recompute_blocks(tiny.build_model(config=DROPOUT))
    return [(tiny.step_gradients(tiny.build_trainer(again, tiny.Rows(config=DROPOUT))), ours(config=DROPOUT))]


@torch.no_grad()
def dropout_evaluated() -> list[tuple[Found, Found]]:
    """In training mode, too: only the batches of training have dropout."""
    model, (idx, _) = tiny.build_model(config=DROPOUT).train(), tiny.Rows().rows(0)
    return [({"logits": model(idx)}, {"logits": tiny.build_model()(idx)})]


ADAPTERS = [AdapterConfig(r=3), AdapterConfig(r=3, rslora=True), AdapterConfig(r=3, dora=True)]


def families_adapted() -> list[tuple[Found, Found]]:
    """Adapters as they begin, with B = 0, and in training mode."""
    return [
        ({"logits": with_adapters(config, adapter).train()(tiny.Rows().rows(0)[0])}, {"logits": plain})
        for config in tiny.FAMILY_CONFIGS.values()
        for plain in [tiny.build_model(config=config)(tiny.Rows().rows(0)[0])]
        for adapter in ADAPTERS
    ]


def families_merged() -> list[tuple[Found, Found]]:
    found = []
    for config in tiny.FAMILY_CONFIGS.values():
        for adapter in ADAPTERS:
            model, plain = with_adapters(config, adapter), tiny.build_model(config=config)
            generator = torch.Generator().manual_seed(9)
            for p in adapter_parameters(model).values():
                p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            shapes = {name: tuple(tensor.shape) for name, tensor in state_tensors(plain).items()}
            load_weights(plain, Merged(shapes, base_tensors(model), adapter_parameters(model), adapter))
            idx = tiny.Rows().rows(0)[0]
            found.append(({"logits": plain(idx)}, {"logits": model(idx)}))
    return found


def with_adapters(config: ModelConfig, adapter: AdapterConfig) -> Transformer:
    plain = tiny.build_model(config=config)
    model = load_weights(adapt(make_model(config).double(), adapter), state_tensors(plain))
    begin_adapters(model, 3)
    return model


def fused_path() -> list[tuple[Found, Found]]:
    return fused_paths(lambda model, *given: FusedGPT2(model, *given, torch.float64))


def fused_path_of_llama() -> list[tuple[Found, Found]]:
    config = tiny.FAMILY_CONFIGS["llama"]
    return fused_paths(lambda model, *given: FusedLlama(model, *given, torch.float64), config)


def fused_path_of_fp8() -> list[tuple[Found, Found]]:
    return fused_paths(lambda model, *given: FusedGPT2FP8(model, *given, Rounding(torch.float64), dtype=torch.float64))


def fused_paths(make: Callable[..., FusedLoss], config: ModelConfig = tiny.CONFIG) -> list[tuple[Found, Found]]:
    model = tiny.build_model(config=config)
    path = make(model, pieces.products, TorchAttention(), pieces)
    rows = tiny.Rows(micro_batch_rows=2, config=config)
    trainer = tiny.build_trainer(model, rows, loss_sum=lambda batch: path.loss_sum(*batch[:4]))
    return [(tiny.step_gradients(trainer), ours(config=config))]


FP8_CONFIG = tiny.replace(tiny.CONFIG, n_head=2, n_embd=32)  # multiples of 16


def linear_layers_in_fp8() -> list[tuple[Found, Found]]:
    def found(precision: PrecisionName) -> Found:
        model = make_model(FP8_CONFIG, ops_of(precision, tiny.CPU))
        model = initialize(model, seed=1).to(parameter_dtype(precision))
        train = tiny.replace(tiny.TRAIN, precision=precision)
        return {
            name: x.double()
            for name, x in tiny.step_gradients(tiny.build_trainer(model, tiny.Rows(), train=train)).items()
        }

    return [(found("fp8"), found("fp64"))]


@torch.no_grad()
def evaluated_in_fp8() -> list[tuple[Found, Found]]:
    idx, _ = tiny.Rows().rows(0)

    def found(precision: PrecisionName) -> Found:
        with autocast(precision, tiny.CPU):
            return {"logits": initialize(make_model(FP8_CONFIG, ops_of(precision, tiny.CPU)), seed=1)(idx)}

    return [(found("fp8"), found("bf16"))]


def recomputed() -> list[tuple[Found, Found]]:
    again = recompute_blocks(tiny.build_model())
    return [(tiny.step_gradients(tiny.build_trainer(again, tiny.Rows())), ours())]


def mlps_of_few_tokens() -> list[tuple[Found, Found]]:
    """5, 5 and 2 tokens of 8 rows; also within recomputed blocks."""
    pairs = []
    for config in (tiny.CONFIG, tiny.FAMILY_CONFIGS["llama"]):
        for change in (lambda model: model, recompute_blocks):
            model = change(mlps_in_pieces(tiny.build_model(config=config), 40))
            pairs.append(
                (tiny.step_gradients(tiny.build_trainer(model, tiny.Rows(config=config))), ours(config=config))
            )
    return pairs


def on_the_host() -> list[tuple[Found, Found]]:
    """Every tensor that forward keeps, however small; without and with activation checkpointing."""
    pairs, least = [], activation_offload.LEAST_BYTES
    try:
        activation_offload.LEAST_BYTES = 1
        for change in (lambda model: model, recompute_blocks):
            model = change(tiny.build_model())
            trainer = tiny.build_trainer(model, tiny.Rows())
            tiny.data_parallel(trainer).context = lambda model=model: OnHost(list(model.parameters()), tiny.CPU)
            pairs.append((tiny.step_gradients(trainer), ours()))
    finally:
        activation_offload.LEAST_BYTES = least
    return pairs


def blocks_compiled() -> list[tuple[Found, Found]]:
    if not shutil.which("c++"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    configs = [tiny.replace(config, n_layer=4) for config in (tiny.CONFIG, tiny.FAMILY_CONFIGS["llama"])]
    models = [compile_blocks(tiny.build_model(config=config)) for config in configs]
    with warnings.catch_warnings():  # torch hides this one; pytest makes errors of hidden ones, too
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        found = [tiny.step_gradients(tiny.build_trainer(m, tiny.Rows(config=m.config))) for m in models]
    return [(one, ours(config=config)) for one, config in zip(found, configs)]


def padded_vocabulary() -> list[tuple[Found, Found]]:
    return [(ours(), ours(pad_vocab=False))]


CONVERSATIONS = invented([7, 5, 3, 12, 9, 2, 4])
DOCUMENTS = [[5, 1, 6], [12], [7, 5]]  # lengths, packed into rows of SEQ_LEN


class Packed(tiny.Rows):
    """Rows of several documents, masked by document."""

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        idx, targets = (x[: len(DOCUMENTS)] for x in self.rows(step))
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
        cu_seqlens = torch.tensor([0, *(n for row in DOCUMENTS for n in row)]).cumsum(0)
        return [Batch(idx, targets, positions, cu_seqlens)]


class Padded(tiny.Rows):
    """The same documents, one a row, filled up behind their ends with tokens that are no target."""

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        idx, targets = (x[: len(DOCUMENTS)] for x in self.rows(step))
        lengths = [n for row in DOCUMENTS for n in row]
        rows = [
            torch.stack([F.pad(part, (0, tiny.SEQ_LEN - len(part)), value=fill) for part in x.flatten().split(lengths)])
            for x, fill in ((idx, 0), (targets, IGNORE_INDEX))
        ]
        return [Batch(*rows)]


def packed_documents(config=tiny.CONFIG) -> list[tuple[Found, Found]]:
    packed, padded = (
        tiny.step_gradients(tiny.build_trainer(tiny.build_model(config=config), rows())) for rows in (Packed, Padded)
    )
    return [(packed, padded)]


class Alone(tiny.Rows):
    """Conversations one at a time, without a mask: answers as targets, whatever their length."""

    def step(self, step: int, micro_batch_rows: int | None = None) -> list[Batch]:
        documents = [(torch.tensor(ids), torch.tensor(parts)) for ids, parts in CONVERSATIONS]
        return [
            Batch(ids[None, :-1], ids[None, 1:].where(parts[None, 1:] > 0, IGNORE_INDEX)) for ids, parts in documents
        ]


def conversations_packed() -> list[tuple[Found, Found]]:
    """With padding at the ends of rows; those of `regpt finetune`, from files."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_conversations(Path(folder), CONVERSATIONS)
        rows = open_rows(Path(folder), replace(manifest, eot=0), "train", "packed", 3, tiny.SEQ_LEN)
        n_rows = rows.epoch_rows(99)
        loader = Loader(rows, batch_tokens=n_rows * tiny.SEQ_LEN, micro_batch_rows=n_rows)
        return [
            tuple(tiny.step_gradients(tiny.build_trainer(tiny.build_model(config=config), one)) for one in each)
            for config in tiny.FAMILY_CONFIGS.values()
            for each in [(loader, Alone())]
        ]


@torch.no_grad()
def key_value_cache(config=tiny.CONFIG) -> list[tuple[Found, Found]]:
    model, (idx, _) = tiny.build_model(config=config), tiny.Rows().rows(0)
    pairs = []
    for parts in ([1] * tiny.SEQ_LEN, [5, 4, 3], [11, 1]):
        cache = KVCache(config, tiny.N_ROWS, tiny.SEQ_LEN, device=tiny.CPU, dtype=torch.float64)
        pieces = [model(part, cache=cache) for part in idx.split(parts, dim=1)]
        pairs.append(({"logits": torch.cat(pieces, dim=1)}, {"logits": model(idx)}))
    return pairs


# ---- evaluation ------------------------------------------------------------------------------------------------------


def packed_endings() -> list[tuple[Found, Found]]:
    """Several endings behind one context, many contexts a batch; some longer than the model's 16 positions."""
    prompts, model = random_prompts(60, tiny.CONFIG.vocab_size, longest=20), tiny.build_model()
    alone = torch.tensor([log_p for log_p, _, _ in naive_scores(model, prompts)], dtype=torch.float64)
    pairs = []
    for batch_tokens in (1, 60, 4096):
        found = Scorer(model, tiny.ALONE, batch_tokens=batch_tokens)(prompts).log_likelihood
        pairs.append(({"log-likelihoods": torch.from_numpy(found)}, {"log-likelihoods": alone}))
    return pairs


# ---- whole runs ------------------------------------------------------------------------------------------------------


def at_the_end(run: Path) -> Found:
    """Weights and moments after the last of eight updates."""
    folder = checkpoint_folder(run, 8)
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def straight_and_cut(config: RunConfig, folder: Path, step: int) -> tuple[Path, Path]:
    """A run, and its copy that has no checkpoint later than `step`."""
    straight, cut = folder / "straight", folder / f"cut-{step}"
    if not straight.exists():
        assert pretrain(config, straight) == 0
    shutil.copytree(straight, cut)
    for later in range(step + 2, 9, 2):
        shutil.rmtree(checkpoint_folder(cut, later))
    return straight, cut


def resumed(shards: Path, folder: Path, config: RunConfig | None = None, at=(2, 4, 6)) -> list[tuple[Found, Found]]:
    runs = [straight_and_cut(config or tiny.run_config(shards), folder, step) for step in at]
    assert [resume(cut) for _, cut in runs] == [0] * len(at)
    return [(at_the_end(cut), at_the_end(straight)) for straight, cut in runs]


def forked(shards: Path, folder: Path) -> list[tuple[Found, Found]]:
    straight, _ = straight_and_cut(tiny.run_config(shards), folder, 4)
    for step in (2, 4, 6):
        assert fork(read_run_config(straight), checkpoint_folder(straight, step), folder / f"fork-{step}") == 0
    return [(at_the_end(folder / f"fork-{step}"), at_the_end(straight)) for step in (2, 4, 6)]


def dropout_resumed(shards: Path, folder: Path) -> list[tuple[Found, Found]]:
    return resumed(shards, folder, tiny.change(tiny.run_config(shards), "model", dropout=0.2), at=[4])


def averaged(shards: Path, folder: Path) -> list[tuple[Found, Found]]:
    """The average of a resumed run; and the weights next to an average, without one."""
    straight, cut = straight_and_cut(tiny.change(tiny.run_config(shards), "train", ema_decay=0.9), folder / "ema", 4)
    assert resume(cut) == 0
    ours, theirs = (load_file(checkpoint_folder(run, 8) / "ema.safetensors") for run in (cut, straight))
    assert pretrain(tiny.run_config(shards), folder / "plain") == 0
    return [(ours, theirs), (at_the_end(straight), at_the_end(folder / "plain"))]


def low_memory(shards: Path) -> RunConfig:
    config = tiny.change(tiny.run_config(shards), "train", precision="bf16", weight_dtype="bf16")
    return tiny.change(config, "optim", state_dtype="bf16")


def low_memory_resumed(shards: Path, folder: Path) -> list[tuple[Found, Found]]:
    return resumed(shards, folder, low_memory(shards), at=[4])


def low_memory_offloaded(shards: Path, folder: Path) -> list[tuple[Found, Found]]:
    runs = [folder / "host", folder / "device"]
    for run in runs:
        assert pretrain(tiny.change(low_memory(shards), "optim", offload=run.name == "host"), run) == 0
    return [(at_the_end(runs[0]), at_the_end(runs[1]))]


def resumed_by_two(shards: Path, folder: Path) -> list[tuple[Found, Found]]:
    straight, cut = straight_and_cut(tiny.run_config(shards), folder, 4)
    assert tiny.in_processes(2, resume, cut) == [0, 0]
    return [(at_the_end(cut), at_the_end(straight))]


def offloaded(shards: Path, folder: Path) -> list[tuple[Found, Found]]:
    runs = [folder / "host", folder / "device"]
    for run in runs:
        assert pretrain(tiny.change(tiny.run_config(shards), "optim", offload=run.name == "host"), run) == 0
    return [(at_the_end(runs[0]), at_the_end(runs[1]))]


CELLS = [
    Cell("regpt", "Hugging Face's GPT-2", "logits, loss, gradients", 1e-14, hugging_face),
    Cell("regpt", "GPT-2 by hand in NumPy", "loss, gradients", 1e-14, numpy_reference),
    Cell("Llama", "Llama by hand in NumPy", "loss, gradients", 1e-14, llama_by_hand),
    Cell("every family, 8 rows", "2 × 4, 8 × 1 rows", "loss, gradients", 1e-14, families_accumulated),
    Cell("every family, vocabulary padded", "not padded", "loss, gradients", 1e-14, families_padded),
    Cell("every family, activation checkpointing on", "off", "loss, gradients", 0.0, families_recomputed),
    Cell("every family, documents packed, masked", "one a row, padded", "loss, gradients", 1e-14, families_packed),
    Cell(
        "every family, documents and windows as data",
        "as booleans",
        "loss, gradients",
        1e-14,
        families_with_masks_as_data,
    ),
    Cell("every family, key-value cache, any split", "whole sequence", "logits", 1e-14, families_cached),
    Cell("Llama in one process", "2 processes", "loss, gradients", 1e-14, llama_in_processes),
    Cell(
        "Qwen 3 with a window, `torch.compile` on",
        "off, angles in float32",
        "loss, gradients",
        2e-6,
        llama_compiled,
        slow=True,
    ),
    Cell("one batch of 8 rows", "2 × 4, 4 × 2, 8 × 1 rows, unequally masked", "loss, gradients", 1e-14, accumulation),
    Cell(
        "out of memory, repeated with fewer rows",
        "fewer rows from the start",
        "loss, gradients",
        0.0,
        after_out_of_memory,
    ),
    Cell("one process, without and with dropout", "2 and 4 processes", "loss, gradients", 1e-14, processes),
    Cell("`torch.compile` on", "off", "loss, gradients", 1e-14, compiled, slow=True),
    Cell("fused path of GPT-2, its pieces in float64", "plain path", "loss, gradients", 1e-13, fused_path),
    Cell("fused path of Llama, its pieces in float64", "plain path", "loss, gradients", 1e-13, fused_path_of_llama),
    Cell("fused path of FP8, rounding nothing, in float64", "plain path", "loss, gradients", 1e-13, fused_path_of_fp8),
    Cell("linear layers in FP8, the rest in bfloat16", "all in float64", "loss, gradients", 0.2, linear_layers_in_fp8),
    Cell("`fp8` without gradients", "`bf16`", "logits", 0.0, evaluated_in_fp8),
    Cell("activation checkpointing on", "off", "loss, gradients", 0.0, recomputed),
    Cell("dropout, 8 rows", "2 × 4, 4 × 2, 8 × 1 rows", "loss, gradients", 1e-14, dropout_accumulated),
    Cell("dropout with activation checkpointing", "without", "loss, gradients", 0.0, dropout_recomputed),
    Cell("dropout with `torch.compile`", "without", "loss, gradients", 1e-14, compiled_dropout, slow=True),
    Cell("evaluation of a model with dropout", "dropout 0", "logits", 0.0, dropout_evaluated),
    Cell("every family, adapters as they begin", "their base", "logits", 0.0, families_adapted),
    Cell("every family, adapters (LoRA, DoRA) merged", "unmerged", "logits", 1e-14, families_merged),
    Cell("moments in the host's memory", "on the device", "weights, moments, in float32", 0.0, offloaded),
    Cell("the same in bfloat16, weights too", "on the device", "weights, moments", 0.0, low_memory_offloaded),
    Cell("MLPs of a few tokens at once", "of all", "loss, gradients", 1e-14, mlps_of_few_tokens),
    Cell("activations in the host's memory", "on the device", "loss, gradients", 0.0, on_the_host),
    Cell("one block compiled for all", "none", "loss, gradients", 1e-14, blocks_compiled, slow=True),
    Cell("vocabulary padded to a multiple of 128", "not padded", "loss, gradients", 1e-14, padded_vocabulary),
    Cell("documents packed into rows, masked", "one a row, padded", "loss, gradients", 1e-14, packed_documents),
    Cell("key-value cache, any split", "whole sequence", "logits", 1e-14, key_value_cache),
    Cell(
        "every family, conversations packed, answers as targets",
        "one at a time",
        "loss, gradients",
        1e-14,
        conversations_packed,
    ),
    Cell("endings behind one context, packed", "one sequence at a time", "log-likelihoods", 1e-14, packed_endings),
    Cell("straight run", "stopped and resumed at any checkpoint", "weights, moments, in float32", 0.0, resumed),
    Cell("straight run", "forked from any checkpoint", "weights, moments, in float32", 0.0, forked),
    Cell("run with dropout", "stopped and resumed", "weights, moments, in float32", 0.0, dropout_resumed),
    Cell("weights, moments in bfloat16", "stopped and resumed", "weights, moments", 0.0, low_memory_resumed),
    Cell("moving average of the weights", "stopped and resumed", "average, in float32", 0.0, averaged),
    Cell("one process", "resumed by two", "weights, moments, in float32", 2e-4, resumed_by_two),
]


def table() -> str:
    lines = ["| A | B | what | tolerance |", "| --- | --- | --- | --- |"]
    for cell in CELLS:
        tolerance = f"{cell.tolerance:.0e}".replace("e-0", "e-") if cell.tolerance else "bitwise"
        lines.append(f"| {cell.a} | {cell.b} | {cell.what} | {tolerance} |")
    return "\n".join(lines)


def marks(cell: Cell) -> list[pytest.MarkDecorator]:
    return [tiny.IMPORTS_COMPILER, *([pytest.mark.slow] if cell.slow else [])]


@pytest.mark.parametrize("cell", [pytest.param(cell, id=cell.run.__name__, marks=marks(cell)) for cell in CELLS])
def test_a_and_b_find_the_same(cell: Cell, request: pytest.FixtureRequest, tmp_path: Path):
    whole_run = "shards" in inspect.signature(cell.run).parameters
    pairs = cell.run(request.getfixturevalue("shards"), tmp_path) if whole_run else cell.run()
    assert pairs
    error = max(tiny.largest_error(a, b) for a, b in pairs)
    print(f"{cell.a} / {cell.b}: {error:.1e}")
    assert error <= cell.tolerance


def test_the_readme_shows_this_table():
    text = README.read_text(encoding="utf-8")
    start, end = "<!-- equivalence -->", "<!-- /equivalence -->"
    assert text.count(start) == text.count(end) == 1
    assert text.split(start)[1].split(end)[0].strip() == table()
