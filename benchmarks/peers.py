"""The same tokens in the formats of nanoGPT, build-nanogpt and llm.c, to train those beside regpt; see peers.md.

    python benchmarks/peers.py [--data DIR] [--tokens 50000000] --out PEERS

Writes PEERS/nanogpt/{train,val}.bin, PEERS/edu_fineweb10B/*.npy and PEERS/llmc/{train,val}.bin. Without --data the
tokens are invented, as frequent as Zipf's law has it, in PEERS/regpt, which `regpt bench train --data` reads.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from regpt.data.manifest import read_manifest
from regpt.data.stream import StoredTokens
from regpt.tools.bench.data import MEAN_LENGTH, invent_shards, invented_lengths

VOCAB = 50257
LLMC_MAGIC, LLMC_VERSION, HEADER_INTS = 20240520, 1, 256  # llm.c: dev/data/data_common.py
VAL_SHARE = 0.1  # of the tokens: each of the peers wants a validation file, of at least one of its batches


@dataclass(frozen=True)
class Args:
    out: str
    """New folder for the peers' files."""
    data: str = ""
    """Folder of token shards in GPT-2's vocabulary; default: invented tokens."""
    tokens: int = 50_000_000
    """Tokens to take from the start of the training split, or to invent."""


def main(args: Args) -> None:
    out = Path(args.out)
    out.mkdir(parents=True)
    folder = Path(args.data) if args.data else out / "regpt"
    if not args.data:
        invent_shards(folder, invented_lengths(args.tokens // MEAN_LENGTH), VOCAB)
    tokens = read_tokens(folder, args.tokens)
    n_val = int(VAL_SHARE * len(tokens))
    for split, part in {"train": tokens[n_val:], "val": tokens[:n_val]}.items():
        write_split(out, split, part)
        print(f"{split}: {len(part):,} tokens")


def read_tokens(folder: Path, count: int) -> np.ndarray:
    """(count,) uint16: the training tokens of a data folder as stored, or all of them where there are fewer."""
    corpus = StoredTokens(folder, read_manifest(folder), "train")
    if corpus.vocab_size != VOCAB:
        raise SystemExit(f"{folder} has a vocabulary of {corpus.vocab_size:,} tokens; the peers' models have {VOCAB:,}")
    end = min(count, corpus.n_tokens)
    return corpus.read(np.array([0]), np.array([end])).astype("<u2")


def write_split(out: Path, split: str, tokens: np.ndarray) -> None:
    """nanoGPT: the bare tokens; build-nanogpt: a NumPy array; llm.c: the tokens behind 256 int32."""
    for name in ("nanogpt", "edu_fineweb10B", "llmc"):
        (out / name).mkdir(exist_ok=True)
    tokens.tofile(out / "nanogpt" / f"{split}.bin")
    np.save(out / "edu_fineweb10B" / f"edufineweb_{split}_000000.npy", tokens)
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = LLMC_MAGIC, LLMC_VERSION, len(tokens)
    with (out / "llmc" / f"{split}.bin").open("wb") as file:
        file.write(header.tobytes() + tokens.tobytes())


if __name__ == "__main__":
    main(tyro.cli(Args))
