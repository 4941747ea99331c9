"""`regpt scaling`: a power law through the losses of runs, and its predictions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from regpt.cli.parse import OTHER_JSON, parse
from regpt.console.lines import print_json, print_line, print_rows
from regpt.console.text import si
from regpt.errors import UsageError, UserError
from regpt.files import write_errors, write_json
from regpt.ranges import LARGE, Range

if TYPE_CHECKING:
    from regpt.report.scaling import ScalingFit


@dataclass(frozen=True)
class ScalingArgs:
    """Fit L = E + A / N^alpha + B / D^beta to the validation losses of runs: N parameters, D tokens."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders of at least three model sizes and three numbers of tokens."""
    points: Literal["final", "all"] = "final"
    """final: the last validation of each run; all: every one after the warmup, right for learning rates that do not
    decay (schedule constant), too high for others."""
    count: Literal["total", "non-embedding"] = "total"
    """What N counts."""
    bootstrap: Annotated[int, Range(0, 1 << 20)] = 200
    """Fits to resampled residuals, for the uncertainty; 0 for none."""
    predict: Annotated[str | None, tyro.conf.arg(metavar="RECIPE|FILE.toml")] = None
    """Predict the loss of this configuration's run."""
    parameters: Annotated[float | None, tyro.conf.arg(metavar="N"), Range(0, LARGE, above=True)] = None
    """Predict the loss of a run with so many parameters, and --tokens."""
    tokens: Annotated[float | None, tyro.conf.arg(metavar="D"), Range(0, LARGE, above=True)] = None
    """Tokens of the predicted run; with --predict the configuration's own by default."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png|.svg")] = None
    """Draw the law over its points into this file."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the law to this file; - prints it as JSON instead."""


def main(args: list[str]) -> int:
    given = parse(ScalingArgs, args, prog="regpt scaling")
    check_arguments(given)
    from regpt.checkpoint.fetch import local_run
    from regpt.report.read import read_run, with_own_names
    from regpt.report.scaling import doubts_about, fit, points_of

    plan = planned(given)
    runs = with_own_names([read_run(local_run(run)) for run in given.runs])
    points, unit = points_of(runs, given.points, given.count)
    more = ", or use every validation of the runs with --points all" * (given.points == "final")
    found = fit(points, given.bootstrap, more=more)
    found = replace(found, warnings=(*doubts_about(runs, given.points), *found.warnings))
    document = to_dict(found, unit, given, plan)
    if given.json == "-":
        print_json(document)
    else:
        print_fit(found, unit, plan)
    if given.json not in (None, "-"):
        target = Path(given.json)
        with write_errors(target, OTHER_JSON):
            target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, document, OTHER_JSON)
    if given.out is not None:
        from regpt.report.scaling_picture import draw_scaling

        draw_scaling(found, given.out, unit, plan)
        if given.json != "-":
            print_line(given.out)
    return 0


def check_arguments(given: ScalingArgs) -> None:
    """Refuse contradicting arguments."""
    if len(given.runs) < 2:
        raise UsageError("a scaling law needs several runs; regpt scaling RUN RUN RUN …")
    if given.predict is not None and given.parameters is not None:
        raise UsageError("--predict and --parameters both name the run to predict; give one of them")
    if (given.parameters is None) != (given.tokens is None) and given.predict is None:
        raise UsageError("a prediction needs --parameters and --tokens, or --predict RECIPE")
    if given.out is not None:
        from regpt.report.picture import check_picture

        check_picture(given.out)


def planned(given: ScalingArgs) -> tuple[float, float] | None:
    """Parameters, as N counts them, and tokens of the run to predict."""
    if given.predict is None:
        return None if given.parameters is None or given.tokens is None else (given.parameters, given.tokens)

    from regpt.config import read_config
    from regpt.data.ramp import stages_of, tokens_before
    from regpt.model.families import make_model
    from regpt.model.weights import count_parameters, without_memory
    from regpt.report.scaling import non_embedding

    config = read_config(given.predict).with_vocab_size()
    with without_memory():
        total = float(count_parameters(make_model(config.model)))
    parameters = total if given.count == "total" else non_embedding(total, asdict(config.model))
    stages = stages_of(config.train.batch_tokens, config.data.seq_len, config.train.batch_ramp)
    return parameters, given.tokens or float(tokens_before(stages, config.train.steps))


def to_dict(found: ScalingFit, unit: str, given: ScalingArgs, plan: tuple[float, float] | None) -> dict[str, Any]:
    """The law for scripts."""
    from regpt.report.scaling import LEVEL, NAMES

    prediction = None
    if plan is not None:
        value, interval = found.predict(*plan)
        prediction = {"parameters": plan[0], "tokens": plan[1], "loss": value, "interval": interval}
    law = found.law
    return {
        "form": "chinchilla",
        **{name: getattr(law, name) for name in NAMES},
        "unit": unit,
        "parameters": given.count,
        "level": LEVEL,
        "intervals": {name: found.interval(name) for name in NAMES},
        "residual": found.residual,
        "points": [asdict(one) | {"fitted": law.loss(one.parameters, one.tokens)} for one in found.points],
        "prediction": prediction,
        "warnings": found.warnings,
    }


def print_fit(found: ScalingFit, unit: str, plan: tuple[float, float] | None) -> None:
    from regpt.report.scaling import NAMES

    law = found.law
    fitted = [law.loss(p.parameters, p.tokens) for p in found.points]
    rows = [
        [p.run, si(p.parameters), si(p.tokens), f"{p.flops:.3g}", f"{p.loss:.4f}", f"{y:.4f}", f"{p.loss - y:+.4f}"]
        for p, y in zip(found.points, fitted)
    ]
    print_rows(("run", "parameters", "tokens", "FLOPs", f"loss, {unit}", "law", "loss - law"), rows)
    print_line("\nL = E + A / N^alpha + B / D^beta")
    rows = [[name, f"{getattr(law, name):.4g}", interval_text(found.interval(name))] for name in NAMES]
    print_rows(("", "value", "95 % interval"), rows)
    print_line(f"residuals: {100 * found.residual:.2f} % of the loss (root mean square)")
    if plan is not None:
        value, interval = found.predict(*plan)
        run = f"a run of {si(plan[0])} parameters on {si(plan[1])} tokens"
        print_line(f"\n{run}: {value:.4f} {unit} (95 % interval {interval_text(interval)})")
        flops = 6 * plan[0] * plan[1]
        try:
            parameters, tokens = law.optimum(flops)
            best = f"{si(parameters)} parameters and {si(tokens)} tokens: {law.loss(parameters, tokens):.4f}"
            print_line(f"the same {flops:.3g} FLOPs (6·N·D) would do best with {best}")
        except UserError as error:
            print_line(str(error))
    for warning in found.warnings:
        print_line(f"careful: {warning}")


def interval_text(interval: tuple[float, float] | None) -> str:
    return "not known" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"
