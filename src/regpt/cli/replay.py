"""`regpt replay`: one step of a run once more."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from regpt.cli.parse import local_folder, parse
from regpt.cli.train import chosen_data
from regpt.console.lines import print_json, print_line
from regpt.ranges import MANY, Range


@dataclass(frozen=True)
class Replay:
    """Repeat one step of a run from the checkpoint before it: loss, gradient norm, the loss of each document."""

    run: tyro.conf.Positional[str]
    """The run's folder; nothing in it changes."""
    step: Annotated[int, Range(1, MANY)]
    """The update, counted from 1 as in metrics.jsonl."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Where the run's token shards are now; repeated as DIR=WEIGHT, a mixture of several."""
    op_level: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also find the first module whose output is not finite."""
    documents: Annotated[int, tyro.conf.arg(aliases=["-n"]), Range(0, MANY)] = 10
    """Documents shown: those not finite first, then from the largest loss down; 0 for all."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead, with all documents."""


def main(args: list[str]) -> int:
    given = parse(Replay, args, prog="regpt replay")
    from regpt.runs.replay import config_of, replay

    run = local_folder(given.run, "regpt replay")
    config = config_of(run, given.step)
    if given.data:
        config = replace(config, data=chosen_data(config.data, given.data))
    found = replay(run, given.step, config, op_level=given.op_level)
    if given.json:
        print_json(found)
    else:
        print_line("\n".join(lines(found, given.documents)))
    return 0


def lines(found: dict[str, Any], shown: int) -> list[str]:
    """What is printed."""
    text = [
        f"step {found['step']:,}, from the checkpoint of step {found['from_step']:,}: loss {found['loss']}, "
        f"gradient norm {found['grad_norm']}, learning rate {found['lr']:.3e}",
        f"the run has {compared(found)}",
    ]
    for key, what in (("spoiled_weight", "weights"), ("spoiled_gradient", "gradients")):
        if found[key]:
            text.append(f"{what} that are not finite, the first: {found[key]}")
    if "first_not_finite" in found:
        text.append(first_module(found["first_not_finite"]))
    first, last = found["rows"]
    documents = found["documents"][: shown or None]
    text.append(f"rows {first:,} to {last:,}, {len(found['documents']):,} parts of documents:")
    for d in documents:
        loss = d["loss"] if isinstance(d["loss"], str) else "-" if d["loss"] is None else f"{d['loss']:.4f}"
        place = f"document {d['document']:,} from token {d['offset']:,}, row {d['row']:,}, {d['tokens']:,} tokens"
        text.append(f"  {loss:>8}  {place}: {d['text']!r}")
    return text


def compared(found: dict[str, Any]) -> str:
    recorded = found["recorded"]
    if recorded is None:
        return "no row for this step"
    same = all(recorded[key] == found[key] for key in ("loss", "grad_norm"))
    return f"loss {recorded['loss']}, gradient norm {recorded['grad_norm']}: {'the same' if same else 'not the same'}"


def first_module(first: dict[str, Any] | None) -> str:
    if first is None:
        return "every module's output is finite"
    inputs = "finite" if first["inputs_finite"] else "not finite either"
    kind = f" ({first['kind']})" if "kind" in first else ""
    return (
        f"the first output that is not finite: {first['module']}{kind}, row {first['row']:,}; its inputs are {inputs}"
    )
