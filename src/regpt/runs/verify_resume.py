"""A run that is killed again and again against the same run in one piece: the user's own configuration and data."""

import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from regpt.checkpoint.load import Checkpoint, checkpoint_folder, checkpoints, load_checkpoint, step_of
from regpt.config import RunConfig
from regpt.console.text import counted
from regpt.errors import UserError
from regpt.files import write_errors
from regpt.report.read import rows_by_step

POLL_SECONDS = 0.002
COMPARED = ("loss", "grad_norm", "bpb")


@dataclass(frozen=True)
class RunDifference:
    """A run against another one of the same configuration.

    Attributes:
        bitwise: every loss, norm and stored number is the same.
        loss_difference: the largest, relative.
        weight_difference: length of the weights' difference over their length, of the worst tensor.
    """

    steps: int
    bitwise: bool
    loss_difference: float
    weight_difference: float


@dataclass
class RunCommands:
    """Commands in processes of their own, their output in `folder`/output.txt.

    Attributes:
        folder: of all runs.
        draw: the moments of the kills.
        commands: those started so far.
    """

    folder: Path
    draw: random.Random
    say: Callable[[str], None]
    commands: list[str] = field(default_factory=list)

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        self.commands.append(" ".join(["regpt", *args]))
        with (self.folder / "output.txt").open("ab") as output:
            output.write(f"$ {self.commands[-1]}\n".encode())
            output.flush()
            return subprocess.Popen([sys.executable, "-m", "regpt", *args], stdout=output, stderr=subprocess.STDOUT)

    def finish(self, *args: str) -> None:
        """Run a command to its end; raise a UserError where that is a failure."""
        process = self.start(*args)
        try:
            code = process.wait()
        except BaseException:
            kill(process)
            raise
        if code:
            raise self.failure(code)

    def failure(self, code: int) -> UserError:
        """The last command ended with `code` by itself; with its last message."""
        lines = (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.removeprefix("regpt: ") for line in lines if line.startswith("regpt: ")]
        why = f": {said[-1]}" if said else "; keep what it printed with --out FOLDER"
        return UserError(f"{self.commands[-1]} ended with {code}{why}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the launcher and all ranks at once, as in a power cut: no handler of theirs runs."""
    try:
        ranks = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        ranks = []
    process.kill()
    for rank in ranks:
        try:
            rank.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def verify_resume(
    config: RunConfig, commands: RunCommands, *, processes: int, other_processes: int, kills: int, tolerance: float
) -> dict[str, Any]:
    """The certificate: a run in one piece against one that is killed, and one finished in another world size.

    Args:
        config: of the run; its checkpoints are made at least eight times.
        processes: of the straight and of the killed run.
        other_processes: that continue a third run after one kill.
        tolerance: relative, without deterministic mode or in another world size.

    Raises:
        UserError: a run fails by itself.
    """
    config = with_checkpoints(config)
    file, straight = commands.folder / "config.toml", commands.folder / "straight"
    with write_errors(commands.folder, "choose another --out"):
        commands.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(config.to_toml(), encoding="utf-8")
    commands.say(f"straight: {counted(config.train.steps, 'step')} on {counted(processes, 'process', 'processes')}")
    commands.finish("train", str(file), "--out", str(straight), *nproc(processes))
    comparisons: dict[str, dict[str, Any]] = {}
    for name, n_kills, last in (("killed", kills, processes), ("other_world_size", 1, other_processes)):
        run = commands.folder / name
        ends = killed_run(commands, file, run, config.train.steps, processes, n_kills, last)
        found = compare_runs(straight, run)
        exact = config.train.deterministic and last == processes
        passed = found.bitwise if exact else max(found.loss_difference, found.weight_difference) <= tolerance
        facts = {"world_sizes": [*[processes] * n_kills, last], "kills": ends, **asdict(found)}
        comparisons[name] = facts | {"must_be_bitwise": exact, "tolerance": tolerance, "passed": passed}
        commands.say(f"{name}: {sentence(comparisons[name])}")
    return {
        "passed": all(one["passed"] for one in comparisons.values()),
        "deterministic": config.train.deterministic,
        "made_with": load_checkpoint(checkpoint_folder(straight, config.train.steps)).state.made_with,
        "comparisons": comparisons,
        "config": config.sections(),
        "commands": commands.commands,
    }


def with_checkpoints(config: RunConfig) -> RunConfig:
    """Checkpoints often enough for a kill between two of them, and a row of metrics every step."""
    every = config.checkpoint.every_steps or config.train.steps
    checkpoint = replace(config.checkpoint, every_steps=min(every, max(1, config.train.steps // 8)))
    return replace(config, checkpoint=checkpoint, log=replace(config.log, every_steps=1))


def killed_run(
    commands: RunCommands, file: Path, run: Path, steps: int, processes: int, kills: int, last_processes: int
) -> list[dict[str, Any]]:
    """Make `run`, killed `kills` times, each at a random moment of its part of the steps, and finish it in another
    world size; for each kill, the rows of metrics and the newest checkpoint at that moment."""

    def command() -> list[str]:
        begun = (run / "config.toml").is_file()
        return ["train", "--resume", str(run)] if begun else ["train", str(file), "--out", str(run)]

    ends: list[dict[str, Any]] = []
    for number in range(kills):
        first, last = steps * number // (kills + 1), steps * (number + 1) // (kills + 1)
        process = commands.start(*command(), *nproc(processes))
        step = commands.draw.randint(first + 1, max(first + 1, last))
        while process.poll() is None and step not in rows_by_step(run, "train"):
            time.sleep(POLL_SECONDS)
        rows = rows_by_step(run, "train")
        time.sleep(commands.draw.random() * (rows[max(rows)]["dt_ms"] / 1e3 if rows else 0.0))
        code = process.poll()
        kill(process)
        if code:
            raise commands.failure(code)
        if code == 0:  # a certificate without kills would be worth nothing
            if not ends:
                raise UserError(f"{run.name}: the run was complete before it could be killed; give more --steps")
            commands.say(f"{run.name}: complete before kill {number + 1}; more --steps give more room")
            break
        folders = checkpoints(run)
        newest = step_of(folders[-1]) if folders else None
        ends.append({"steps_done": len(rows_by_step(run, "train")), "checkpoint": newest})
        commands.say(f"{run.name}: killed after step {ends[-1]['steps_done']}, newest checkpoint {newest}")
    commands.finish(*command(), *nproc(last_processes))
    return ends


def compare_runs(straight: Path, run: Path) -> RunDifference:
    """The rows and the last checkpoint of `run` against those of `straight`."""
    theirs, ours = numbers_of(straight), numbers_of(run)
    steps = [step for kind, step, key in theirs if (kind, key) == ("train", "loss")]
    here, there = (load_checkpoint(checkpoint_folder(one, max(steps, default=0))) for one in (run, straight))
    losses = [key for key in theirs if key[2] == "loss"]
    a, b = here.weights(), there.weights()
    return RunDifference(
        steps=len(steps),
        bitwise=ours == theirs and same_numbers(here, there),
        loss_difference=max((relative(ours.get(key), theirs[key]) for key in losses), default=0.0),
        weight_difference=max(float((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-12)) for name in b),
    )


def numbers_of(run: Path) -> dict[tuple[str, int, str], float]:
    """Every compared number of the metrics of a run, by kind of row, step and key."""
    rows = [(kind, step, row) for kind in ("train", "val") for step, row in rows_by_step(run, kind).items()]
    return {(kind, step, key): row[key] for kind, step, row in rows for key in COMPARED if key in row}


def relative(ours: float | None, theirs: float) -> float:
    return math.inf if ours is None else abs(ours - theirs) / max(abs(theirs), 1e-12)


def same_numbers(ours: Checkpoint, theirs: Checkpoint) -> bool:
    """Whether weights, moments and the average of the weights are the same, bit by bit."""
    averages = (ours.average() or {}, theirs.average() or {})
    pairs = ((ours.weights(), theirs.weights()), (ours.optimizer(), theirs.optimizer()), averages)
    return all(set(a) == set(b) and all(a[name].equal(b[name]) for name in a) for a, b in pairs)


def sentence(found: dict[str, Any]) -> str:
    """One comparison of the certificate in a line."""
    worlds = " → ".join(str(n) for n in dict.fromkeys(found["world_sizes"]))
    ends = ", ".join(str(one["steps_done"]) for one in found["kills"])
    differs = f"losses differ by {found['loss_difference']:.1e}, weights by {found['weight_difference']:.1e}, relative"
    wanted = "bitwise" if found["must_be_bitwise"] else f"within {found['tolerance']:g}"
    verdict = "as it must be" if found["passed"] else "NOT as it must be"
    on = f"{worlds} {'process' if worlds == '1' else 'processes'}"
    same = "bitwise equal" if found["bitwise"] else differs
    return f"{counted(found['steps'], 'step')} on {on}, killed after {ends}: {same}, {verdict} ({wanted})"


def nproc(processes: int) -> list[str]:
    return ["--nproc", str(processes), "--max-restarts", "0"] if processes > 1 else []
