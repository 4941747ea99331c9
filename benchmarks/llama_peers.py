"""Training steps of Llama 3.2 1B's shape in other people's code, to stand next to `regpt bench train llama3-1b`.

    python benchmarks/llama_peers.py {transformers,torchtitan} [--seq-len 4096] [--steps 8]

Each as its project trains on one GPU: float32 weights, autocast to bfloat16, fused AdamW, clipping; invented tokens,
65,536 a step in micro-batches of 16,384. transformers: `LlamaForCausalLM`, compiled whole, SDPA. torchtitan (installed
by `pip install --no-deps torchtitan==0.2.2`): its model, compiled block by block, its loss compiled, the head tied.
"""

import argparse
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, LAYERS, HEADS, KV_HEADS, C, INNER = 128_256, 16, 32, 8, 2048, 8192
BATCH, MICRO = 65_536, 16_384
PEAK_FLOPS = 989.4e12  # dense bfloat16 of an H200 (its data sheet)

Loss = Callable[[Tensor, Tensor], Tensor]  # (rows of T tokens, their targets) → the mean loss


class Absent(ModuleType):
    """A module that is not installed and whose classes are not used."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def transformers_loss(T: int) -> tuple[nn.Module, Loss]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=C, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=T, rope_theta=500_000.0, tie_word_embeddings=True,
        use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    compiled = torch.compile(model)
    return model, lambda rows, targets: compiled(input_ids=rows, labels=rows, shift_labels=targets).loss


def torchtitan_loss(T: int) -> tuple[nn.Module, Loss]:
    loading = ("datasets", "datasets.distributed", "torchdata", "torchdata.stateful_dataloader")
    absent = [name for name in loading if find_spec(name.split(".")[0]) is None]
    sys.modules.update({name: Absent(name) for name in (*absent, "torch.utils.tensorboard")})  # which its model imports
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    shape = {"dim": C, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "vocab_size": VOCAB}
    sizes = {"ffn_dim_multiplier": 1.5, "multiple_of": 256, "rope_theta": 500_000.0, "max_seq_len": T}
    with torch.device("cuda"):
        model = Transformer(TransformerModelArgs(**shape, **sizes))
        with torch.no_grad():
            model.init_weights()
    model.output.weight = model.tok_embeddings.weight
    assert model.layers["0"].feed_forward.w1.out_features == INNER
    for name, block in model.layers.named_children():
        model.layers.register_module(name, torch.compile(block, fullgraph=True))
    loss = torch.compile(lambda logits, targets: F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()))
    return model, lambda rows, targets: loss(model(rows), targets)


def main() -> None:
    del sys.path[0]  # transformers would take kernels.py of this folder for the package of that name
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["transformers", "torchtitan"])
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    T = args.seq_len
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model, loss = (transformers_loss if args.peer == "transformers" else torchtitan_loss)(T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(VOCAB, (BATCH // T, T + 1), device="cuda")
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        for batch in zip(inputs.split(MICRO // T), targets.split(MICRO // T)):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                mean = loss(*batch)
            (mean * MICRO / BATCH).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = []
    for _ in range(3 + args.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = sorted(times[3:])[args.steps // 2]
    matmul = LAYERS * (C * (2 * C + 2 * C * KV_HEADS // HEADS) + 3 * C * INNER) + C * VOCAB
    mfu = BATCH * (6 * matmul + 12 * LAYERS * C * T) / seconds / PEAK_FLOPS
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"{args.peer} T={T}: {BATCH / seconds:,.0f} tokens/s, {1e3 * seconds:,.1f} ms, {mfu:.1%} MFU, {peak:.1f} GiB")


if __name__ == "__main__":
    main()
