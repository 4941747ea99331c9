"""`regpt inspect`: what is in a model's weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import print_json, print_line, print_rows
from regpt.console.text import counted
from regpt.errors import UsageError
from regpt.ranges import MANY, Range

if TYPE_CHECKING:
    from regpt.checkpoint.open import OpenModel
    from regpt.model.transformer import Transformer
    from regpt.report.weights import Tensors


@dataclass(frozen=True)
class InspectArgs:
    """Show a model's parameters, draw its position embeddings and a matrix, and find the tokens nearest to a token."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run or checkpoint folder, the address of one (s3://…), a Hugging Face folder, a GGUF file, or a hub name such
    as gpt2."""
    token: tuple[str, ...] = ()
    """Show the tokens whose embeddings are nearest to those of these tokens; a space at the front counts."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"]), Range(1, MANY)] = 10
    """Nearest tokens shown."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png|.svg")] = None
    """Draw the position embeddings, three of their channels and a corner of a matrix into this file."""
    matrix: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Matrix to draw; default the first of the second block (queries, keys and values) as in the lecture, or of the
    only block."""
    all: bool = False
    """A row for every parameter, instead of one for those of the same name in all blocks."""
    json: bool = False
    """Print one JSON object instead."""


def main(args: list[str]) -> int:
    given = parse(InspectArgs, args, prog="regpt inspect")
    if given.out is not None:
        from regpt.report.picture import check_picture

        check_picture(given.out)
    elif given.matrix is not None:
        raise UsageError("--matrix names the matrix to draw; give the picture's file with --out")
    from regpt.checkpoint.open import open_model
    from regpt.model.weights import count_parameters, state_tensors
    from regpt.report.weights import draw_weights, find_tensor, nearest_tokens, parameter_table, token_id

    opened = open_model(given.model)
    tensors = state_tensors(opened.model)
    ids = {text: token_id(opened.tokenizer, text) for text in given.token}
    embedding = tensors[opened.model.token_embedding]  # (V, C)
    near = {text: nearest_tokens(embedding, opened.tokenizer, i, given.n) for text, i in ids.items()}
    if given.out is not None:
        name = given.matrix or first_matrix(opened.model)
        positions = tensors.get(opened.model.position_embedding or "")
        draw_weights(given.out, positions, (name, find_tensor(tensors, name)))
    table, total = parameter_table(tensors, every=given.all), count_parameters(opened.model)
    if given.json:
        nearest = {text: [asdict(one) for one in found] for text, found in near.items()}
        about = {"source": opened.source, "step": opened.step, "parameters": total, **adapter_facts(opened)}
        print_json(about | {"tensors": [asdict(row) for row in table], "nearest": nearest})
        return 0
    print_parameters(opened, table, total)
    if facts := adapter_facts(opened):
        adapted = facts["adapted"]
        print_line(
            f"\n{facts['trained']:,} parameters in adapters of rank {facts['rank']}, merged into "
            f"{facts['base']}, of {counted(len(adapted), 'layer')}: {', '.join(adapted)}"
        )
    for text, found in near.items():
        print_line(f"\nnearest to {text!r} (token {ids[text]}), by the angle between embeddings")
        rows = [[repr(one.text), str(one.id), f"{one.cosine:.4f}", f"{one.norm:.3f}"] for one in found]
        print_rows(["token", "id", "cosine", "norm"], rows)
    if given.out is not None:
        print_line(f"\n{given.out}")
    return 0


def adapter_facts(opened: OpenModel) -> dict[str, Any]:
    """What was adapted in a model that is a base with adapters; {} of others."""
    parts = opened.adapter
    if parts is None:
        return {}
    names = [name.removesuffix(".lora_A") for name in parts.tensors if name.endswith(".lora_A")]
    trained = sum(parts.tensors[name].numel() for name in parts.tensors)
    return {"adapted": names, "trained": trained, "rank": parts.config.r, "base": parts.base}


def first_matrix(model: Transformer) -> str:
    """Name of the first matrix of the second block, or of the only one."""
    first = next(p for p in model.blocks[:2][-1].parameters() if p.dim() == 2)
    return next(name for name, p in model.named_parameters() if p is first)


def print_parameters(opened: OpenModel, table: list[Tensors], total: int) -> None:
    step = "" if opened.step is None else f", after {counted(opened.step, 'step')}"
    rows = [
        [row.name, " × ".join(map(str, row.shape)), f"{row.parameters:,}", f"{100 * row.parameters / total:.1f} %"]
        + [f"{value:.4f}" for value in (row.mean, row.std, row.least, row.greatest)]
        for row in table
    ]
    print_line(f"{opened.source}{step}: {total:,} parameters")
    print_rows(["parameter", "shape", "values", "share", "mean", "std", "least", "greatest"], rows)
