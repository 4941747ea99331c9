"""Attention under masks of long rows: in chunks of queries against one tensor of booleans; time and memory.

    python benchmarks/long_masks.py [--seq-len 4096] [--rows 2] [--device cpu]

Each line is a process of its own, whose peak is measured: of the process on a CPU, of tensors on a GPU.
"""

import argparse
import resource
import subprocess
import sys
import time
from itertools import product

import torch
from torch import Tensor

from regpt.model import chunked
from regpt.model.masks import AttentionMask, sdpa_mask
from regpt.model.ops import attention

HEADS, HEAD_SIZE = 8, 64
KINDS = ("documents", "window", "tree")


def mask_of(kind: str, B: int, T: int, device: torch.device) -> AttentionMask:
    """Documents of a fifth of a row, a window of a quarter, ten endings of 20 tokens after one context."""
    cuts = sorted({*range(0, B * T, T // 5), *range(0, B * T + 1, T)})
    token = torch.arange(T, device=device)
    ends = torch.where(token < T - 200, T, (token - T) // 20 * 20 + 20 + T).expand(B, T).contiguous()
    return {
        "documents": AttentionMask(documents=torch.tensor(cuts, device=device)),
        "window": AttentionMask(window=T // 4),
        "tree": AttentionMask(tree=ends),
    }[kind]


def measure(way: str, kind: str, train: bool, B: int, T: int, device: torch.device) -> str:
    q, k, v = (torch.randn(B, HEADS, T, HEAD_SIZE, device=device, requires_grad=train) for _ in range(3))
    mask = mask_of(kind, B, T, device)
    chunked.BOOLEANS = 0 if way == "chunks" else chunked.BOOLEANS

    def once() -> float:
        started = time.perf_counter()
        seen = (chunked.plain_mask if way == "chunks" else sdpa_mask)(mask, B, T, T, device)
        out: Tensor = attention(q, k, v, seen)
        if train:
            torch.autograd.grad(out.sum(), (q, k, v))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    before = peak(device)
    seconds = min(once() for _ in range(4))
    what = "forward, backward" if train else "forward"
    return f"{kind:10} {what:18} {way:9} {seconds * 1e3:8.1f} ms  {peak(device) - before:7.0f} MiB"


def peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, kind, train = args.one
        print(measure(way, kind, train == "True", args.rows, args.seq_len, torch.device(args.device)), flush=True)
        return
    for kind, train, way in product(KINDS, (True, False), ("booleans", "chunks")):
        subprocess.run([sys.executable, *sys.argv, "--one", way, kind, str(train)], check=False)


if __name__ == "__main__":
    main()
