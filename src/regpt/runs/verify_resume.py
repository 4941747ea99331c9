"""A run that is killed again and again against the same run in one piece: the user's own configuration and data."""

import contextlib
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from regpt.checkpoint.load import Checkpoint, checkpoint_folder, checkpoints, load_checkpoint, step_of
from regpt.config import RunConfig
from regpt.console.text import counted
from regpt.errors import UserError
from regpt.report.read import rows_by_step

POLL_SECONDS = 0.002
COMPARED = ("loss", "grad_norm", "bpb")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Kill:
    """One end by SIGKILL, of all processes at once: rows of metrics and the newest checkpoint there were then."""

    steps_done: int
    checkpoint: int | None


@dataclass(frozen=True)
class Comparison:
    """A run against the straight one.

    Attributes:
        world_sizes: processes of each part of the run, in order.
        kills: where it was killed.
        bitwise: every loss, norm and stored number is the same.
        loss_difference: the largest, relative.
        weight_difference: length of the weights' difference over their length, of the worst tensor.
        must_be_bitwise: same world size and deterministic mode.
    """

    world_sizes: tuple[int, ...]
    kills: tuple[Kill, ...]
    steps: int
    bitwise: bool
    loss_difference: float
    weight_difference: float
    must_be_bitwise: bool
    tolerance: float

    @property
    def passed(self) -> bool:
        if self.must_be_bitwise:
            return self.bitwise
        return max(self.loss_difference, self.weight_difference) <= self.tolerance


@dataclass
class RunCommands:
    """Where the runs are made and how.

    Attributes:
        folder: of all runs.
        environment: of the processes.
        draw: the moments of the kills.
        commands: what was run.
    """

    folder: Path
    environment: Mapping[str, str]
    draw: random.Random
    say: Say
    commands: list[str] = field(default_factory=list)

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        """`regpt ARGS…`, its output in a file of the folder, its launcher's notes in `folder/tmp`."""
        self.commands.append(" ".join(["regpt", *args]))
        tmp = self.folder / "tmp"
        tmp.mkdir(exist_ok=True)
        with (self.folder / "output.txt").open("ab") as output:
            output.write(f"$ {self.commands[-1]}\n".encode())
            output.flush()
            env = {**self.environment, "TMPDIR": str(tmp)}
            command = [sys.executable, "-m", "regpt", *args]
            return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)

    def finish(self, *args: str) -> None:
        process = self.start(*args)
        try:
            code = process.wait()
        except BaseException:
            self.kill(process)
            raise
        if code:
            raise self.failure(code)

    def failure(self, code: int) -> UserError:
        """The last command ended with `code` by itself; with what it said last."""
        lines = (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.removeprefix("regpt: ") for line in lines if line.startswith("regpt: ")]
        why = f": {said[-1]}" if said else "; keep what it printed with --out FOLDER"
        return UserError(f"{self.commands[-1]} ended with {code}{why}")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End the launcher and all its processes at once, as a power cut would: nothing of theirs runs afterwards."""
        with contextlib.suppress(psutil.Error):  # it has ended
            launcher = psutil.Process(process.pid)
            for one in [launcher, *launcher.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    one.kill()
        process.wait()


def verify_resume(
    config: RunConfig,
    commands: RunCommands,
    *,
    processes: int = 1,
    other_processes: int = 2,
    kills: int = 3,
    tolerance: float = 0.01,
) -> dict[str, Any]:
    """The certificate: what was run, killed and compared, and whether all of it holds.

    Args:
        config: of the run; its checkpoints are made at least eight times.
        processes: of the straight and of the killed run.
        other_processes: that go on with a third run after it was killed once.
        tolerance: relative, where bitwise equality is not to be had.

    Raises:
        UserError: a run cannot be made at all.
    """
    config = with_checkpoints(config)
    file = commands.folder / "config.toml"
    commands.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(config.to_toml(), encoding="utf-8")
    straight = commands.folder / "straight"
    commands.say(f"straight: {counted(config.train.steps, 'step')} on {counted(processes, 'process', 'processes')}")
    commands.finish("train", str(file), "--out", str(straight), *nproc(processes))
    found: dict[str, Comparison] = {}
    for name, n_kills, last in (("killed", kills, processes), ("other_world_size", 1, other_processes)):
        run = commands.folder / name
        ends = killed_run(commands, file, run, config.train.steps, processes, n_kills, last)
        worlds = (*[processes] * n_kills, last)
        found[name] = compare_runs(straight, run, worlds, ends, config.train.deterministic, tolerance)
        commands.say(f"{name}: {sentence(found[name])}")
    return {
        "passed": all(comparison.passed for comparison in found.values()),
        "deterministic": config.train.deterministic,
        "made_with": load_checkpoint(checkpoint_folder(straight, config.train.steps)).state.made_with,
        "comparisons": {name: asdict(c) | {"passed": c.passed} for name, c in found.items()},
        "config": config.sections(),
        "commands": commands.commands,
    }


def with_checkpoints(config: RunConfig) -> RunConfig:
    """Saved often enough to be killed between two saves, every step written down."""
    every = config.checkpoint.every_steps or config.train.steps
    checkpoint = replace(config.checkpoint, every_steps=min(every, max(1, config.train.steps // 8)))
    return replace(config, checkpoint=checkpoint, log=replace(config.log, every_steps=1))


def killed_run(
    commands: RunCommands, file: Path, run: Path, steps: int, processes: int, kills: int, last_processes: int
) -> tuple[Kill, ...]:
    """Make `run`, killed `kills` times, each at a random moment of its part of the steps, and finish it."""
    args = ["train", str(file), "--out", str(run), *nproc(processes)]
    ends = []
    for number in range(kills):
        first, last = steps * number // (kills + 1), steps * (number + 1) // (kills + 1)
        process = commands.start(*args)
        wait_for(run, process, commands.draw.randint(first + 1, max(first + 1, last)))
        time.sleep(commands.draw.random() * step_seconds(run))
        code = process.poll()
        commands.kill(process)
        if code:
            raise commands.failure(code)
        if code == 0:  # a certificate of kills that were none would be worth nothing
            commands.say(
                f"{run.name}: complete before it could be killed a {number + 1}. time; more --steps give more room"
            )
            break
        ends.append(Kill(len(rows_by_step(run, "train")), newest(run)))
        commands.say(f"{run.name}: killed after step {ends[-1].steps_done}, newest checkpoint {ends[-1].checkpoint}")
        if (run / "config.toml").is_file():
            args = ["train", "--resume", str(run), *nproc(processes)]
    if not ends:
        raise UserError(f"{run.name}: the run was complete before it could be killed; give more --steps")
    if (run / "config.toml").is_file():
        args = ["train", "--resume", str(run)]
    commands.finish(*[arg for arg in args if arg not in nproc(processes)], *nproc(last_processes))
    return tuple(ends)


def wait_for(run: Path, process: subprocess.Popen[bytes], step: int) -> None:
    """Return when the run has written row `step`, or has ended."""
    while process.poll() is None and step not in rows_by_step(run, "train"):
        time.sleep(POLL_SECONDS)


def step_seconds(run: Path) -> float:
    rows = rows_by_step(run, "train")
    return float(rows[max(rows)]["dt_ms"]) / 1e3 if rows else 0.0


def newest(run: Path) -> int | None:
    folders = checkpoints(run)
    return step_of(folders[-1]) if folders else None


def compare_runs(
    straight: Path, run: Path, worlds: tuple[int, ...], ends: tuple[Kill, ...], deterministic: bool, tolerance: float
) -> Comparison:
    """The rows and the last checkpoint of `run` against those of `straight`."""
    rows = [{kind: rows_by_step(r, kind) for kind in ("train", "val")} for r in (run, straight)]
    numbers = [
        {
            (k, step, key): row[key]
            for k, of in both.items()
            for step, row in of.items()
            for key in COMPARED
            if key in row
        }
        for both in rows
    ]
    steps = len(rows[1]["train"])
    folders = [checkpoint_folder(r, max(rows[1]["train"], default=0)) for r in (run, straight)]
    ours, theirs = (load_checkpoint(folder) for folder in folders)
    losses = [key for key in numbers[1] if key[2] == "loss"]
    return Comparison(
        world_sizes=worlds,
        kills=ends,
        steps=steps,
        bitwise=numbers[0] == numbers[1] and same_numbers(ours, theirs),
        loss_difference=max((relative(numbers[0].get(key), numbers[1][key]) for key in losses), default=0.0),
        weight_difference=weight_difference(ours, theirs),
        must_be_bitwise=deterministic and len(set(worlds)) == 1,
        tolerance=tolerance,
    )


def relative(ours: float | None, theirs: float) -> float:
    return math.inf if ours is None else abs(ours - theirs) / max(abs(theirs), 1e-12)


def same_numbers(ours: Checkpoint, theirs: Checkpoint) -> bool:
    """Whether weights, moments and the average of the weights are the same, bit by bit."""
    averages = (ours.average() or {}, theirs.average() or {})
    pairs = ((ours.weights(), theirs.weights()), (ours.optimizer(), theirs.optimizer()), averages)
    return all(set(a) == set(b) and all(a[name].equal(b[name]) for name in a) for a, b in pairs)


def weight_difference(ours: Checkpoint, theirs: Checkpoint) -> float:
    a, b = ours.weights(), theirs.weights()
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-12)) for name in b)


def sentence(c: Comparison) -> str:
    """What was found, in one line."""
    worlds = " → ".join(str(n) for n in dict.fromkeys(c.world_sizes))
    ends = ", ".join(str(kill.steps_done) for kill in c.kills)
    same = (
        "bitwise equal"
        if c.bitwise
        else (f"losses differ by {c.loss_difference:.1e}, weights by {c.weight_difference:.1e}, relative")
    )
    wanted = "bitwise" if c.must_be_bitwise else f"within {c.tolerance:g}"
    verdict = "as it must be" if c.passed else "NOT as it must be"
    on = f"{worlds} {'process' if worlds == '1' else 'processes'}"
    return f"{counted(c.steps, 'step')} on {on}, killed after {ends}: {same}, {verdict} ({wanted})"


def nproc(processes: int) -> list[str]:
    return ["--nproc", str(processes), "--max-restarts", "0"] if processes > 1 else []
