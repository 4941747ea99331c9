"""What a run survives: the same tiny run killed, stopped, starved of disk, damaged and fed with NaN, again and again.

    nice python benchmarks/faults.py [--scale 1.0] [--only kills,flips] [--folder DIR]

Prints a table and writes benchmarks/results/faults-<hardware>-<date>.json. A run of a hundred updates in deterministic
mode is made once in one piece; every other one has to end with the same bytes, whatever happened on the way. Runs are
forked from this process, which has imported everything, so that a hundred of them are started in minutes: POSIX only.
"""

import contextlib
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro
from fault_campaign import (
    EVERY,
    STEPS,
    Campaign,
    ended,
    events,
    final_bytes,
    intact,
    newest,
    wait_for_new_row,
    wait_for_writing,
)

import regpt
from regpt.checkpoint.load import checkpoint_folder, checkpoints, step_of
from regpt.config import RunConfig
from regpt.data.batch import Batch
from regpt.data.manifest import read_manifest
from regpt.model.transformer import Transformer
from regpt.report.read import rows_by_step
from regpt.runs import build
from regpt.runs.folder import source_commit
from regpt.runs.pretrain import pretrain, resume
from regpt.runs.verify_resume import RunCommands
from regpt.train.backend import DataParallel, make_backend
from regpt.train.objective import Sums

COUNTS = {
    "kills": 100,
    "flips": 50,
    "truncations": 20,
    "full_disk": 20,
    "sigterms": 20,
    "process_deaths": 4,
    "nan": 4,
}


@dataclass(frozen=True)
class Args:
    scale: float = 1.0
    """Share of the full campaign."""
    only: str = ""
    """Kinds of faults, separated by commas; default: all."""
    folder: str = ""
    """Where the runs lie; default: a temporary folder."""
    seed: int = 0
    """Of all random moments and places."""
    write: bool = True
    """Write the results as JSON."""
    out: str = ""
    """Where to; default: benchmarks/results/faults-<hardware>-<date>.json."""


# ---- faults ----------------------------------------------------------------------------------------------------------


def kills(c: Campaign, count: int) -> dict[str, object]:
    """SIGKILL, every second one as soon as a checkpoint is being written; runs are finished and compared every ten."""
    wrong = lost = inside = runs = invalid = done = 0
    config = replace(c.config, checkpoint=replace(c.config.checkpoint, keep_last=5))
    while done < count:
        run = c.folder / f"killed-{runs}"
        for _ in range(min(10, count - done)):
            aimed = done % 2 == 0
            known = {folder.name for folder in checkpoints(run)}
            child = c.start(c.begin_or_resume(run, config))
            wait_for_writing(run, child) if aimed else wait_for_new_row(run, child, c.draw)
            time.sleep(c.draw.random() * (2e-3 if aimed else c.step_seconds * EVERY))
            os.kill(child, signal.SIGKILL)
            ended(child)
            inside += any(run.glob("checkpoints/.step-*.tmp-*"))
            invalid += sum(not intact(folder) for folder in checkpoints(run) if folder.name not in known)
            announced = [row["step"] for row in events(run, "checkpoint")]
            lost += bool(announced) and max(announced) > newest(run)
            lost += newest(run) < max((step_of(run / name) for name in known), default=0)
            done += 1
        wrong += c.run(c.begin_or_resume(run, config)) != 0 or not c.is_straight(run)
        runs += 1
        print(f"{done} of {count} kills, {inside} while writing, {wrong} wrong", file=sys.stderr, flush=True)
    return {
        "faults": done,
        "while writing a checkpoint": inside,
        "runs": runs,
        "lost": lost,
        "invalid": invalid,
        "wrong": wrong,
    }


def flips(c: Campaign, count: int) -> dict[str, object]:
    """One bit of one file of the newest checkpoint, all files in turn."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        place = c.draw.randrange(len(data) * 8)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)

    return damaged(c, count, flip)


def truncations(c: Campaign, count: int) -> dict[str, object]:
    return damaged(c, count, lambda path: os.truncate(path, c.draw.randrange(path.stat().st_size)))


def damaged(c: Campaign, count: int, damage: Callable[[Path], None]) -> dict[str, object]:
    """Each damage must be seen, the checkpoint before it be chosen, the damaged one stay; some runs are finished."""
    unseen = deleted = wrong = finished = 0
    files: dict[str, int] = {}
    for number in range(count):
        last = STEPS // EVERY * EVERY
        run = c.copy("damaged", last)
        folder = checkpoint_folder(run, last)
        names = sorted(path.name for path in folder.iterdir())
        name = names[number % len(names)]
        files[name] = files.get(name, 0) + 1
        damage(folder / name)
        unseen += newest(run) != last - EVERY
        if number % 10 == 0:
            finished += 1
            wrong += c.run(lambda run=run: resume(run)) != 0 or not c.is_straight(run)
            kept = [path for path in (run / "checkpoints").iterdir() if path.name.startswith(f"{folder.name}.damaged")]
            deleted += not kept
    return {"faults": count, "files": files, "unseen": unseen, "runs": finished, "lost": deleted, "wrong": wrong}


def full_disk(c: Campaign, count: int) -> dict[str, object]:
    """A small file system with a random number of bytes left: the run says so, and goes on when there is room again.

    Where none may be mounted (that takes root), no file may grow beyond a random size instead.
    """
    wrong = unsaid = lost = 0
    sizes = [path.stat().st_size for path in checkpoint_folder(c.straight, STEPS).iterdir()]
    with small_file_system(c.folder / "small", 2 * folder_bytes(c.straight) + sum(sizes)) as small:
        for _ in range(count):
            upto = EVERY * c.draw.randint(2, STEPS // EVERY - 2)
            run = c.copy("full", upto, inside=small)
            with (run / "metrics.jsonl").open("rb+") as file:
                file.truncate(0)  # so that the limit is met by the checkpoint rather than by the rows
            filler = fill(small, c.draw.randint(sum(sizes) // 8, sum(sizes))) if small else None
            limit = None if small else c.draw.randint(max(sizes) // 8, max(sizes) - 1)
            code = c.run(lambda run=run, limit=limit: limited(run, limit))
            unsaid += code != 1 or "cannot write" not in c.said()
            lost += newest(run) < upto or any(not intact(folder) for folder in checkpoints(run))
            if filler:
                filler.unlink()
            wrong += c.run(lambda run=run: resume(run)) != 0 or final_bytes(run) != c.expected
    how = "a small file system" if small else "a file-size limit"
    return {"faults": count, "unseen": unsaid, "lost": lost, "runs": count, "wrong": wrong, "by": how}


def limited(run: Path, limit: int | None) -> int:
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return resume(run)


def folder_bytes(folder: Path) -> int:
    """What the files below take, in whole pages."""
    pages = [-(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file()]
    return 4096 * (sum(pages) + len(pages))


def fill(folder: Path, left: int) -> Path:
    """A file that leaves `left` bytes of its file system."""
    path = folder / "filler"
    with path.open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(folder).free - left)))
    return path


@contextlib.contextmanager
def small_file_system(folder: Path, size: int) -> Iterator[Path | None]:
    """`folder`, a file system of its own in memory; None where it cannot be mounted."""
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def sigterms(c: Campaign, count: int) -> dict[str, object]:
    """The run must save and end with 75; then it is stopped again, or finished and compared."""
    wrong = refused = done = runs = 0
    longest = 0.0
    while done < count:
        run = c.folder / f"stopped-{runs}"
        for _ in range(min(5, count - done)):
            child = c.start(c.begin_or_resume(run))
            wait_for_new_row(run, child, c.draw)
            began = time.monotonic()
            os.kill(child, signal.SIGTERM)
            code = ended(child)
            longest = max(longest, time.monotonic() - began)
            refused += code != 75 or newest(run) != max(rows_by_step(run, "train"))
            done += 1
        wrong += c.run(c.begin_or_resume(run)) != 0 or not c.is_straight(run)
        runs += 1
    return {"faults": done, "unseen": refused, "runs": runs, "wrong": wrong, "longest stop, s": round(longest, 2)}


def process_deaths(c: Campaign, count: int) -> dict[str, object]:
    """One of 2, then of 4 processes is killed; the launcher starts all again; compared with as many undisturbed."""
    wrong = done = 0
    config = replace(c.config, train=replace(c.config.train, micro_batch_rows=1))
    (c.folder / "ranks.toml").write_text(config.to_toml(), encoding="utf-8")
    for processes in (2, 4):
        bench = RunCommands(c.folder / f"ranks-{processes}", c.draw, print)
        bench.folder.mkdir()
        start = ["train", str(c.folder / "ranks.toml"), "--nproc", str(processes), "--out"]
        bench.finish(*start, str(bench.folder / "straight"))
        for number in range(count // 2):
            run = bench.folder / f"killed-{number}"
            process = bench.start(*start, str(run))
            while not checkpoints(run) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(c.draw.random() * c.step_seconds * 20)
            if victims := psutil.Process(process.pid).children():
                c.draw.choice(victims).kill()
            wrong += process.wait() != 0 or final_bytes(run) != final_bytes(bench.folder / "straight")
            wrong += len(events(run, "resume")) != 1
            done += 1
    return {"faults": done, "runs": done, "wrong": wrong}


def nan(c: Campaign, count: int) -> dict[str, object]:
    """In a shard (a token beyond the vocabulary), in the loss, a gradient, a weight: refused, never applied."""
    unseen = wrong = 0
    for kind in ["data", "loss", "gradient", "weight"][:count]:
        run = c.folder / f"nan-{kind}"
        config = c.config
        if kind == "data":
            spoiled = c.folder / "spoiled"
            shutil.copytree(config.data.path, spoiled)
            shard = next(s for s in read_manifest(spoiled).shards if s.split == "train")
            with (spoiled / shard.file).open("rb+") as file:
                file.seek(2 * (shard.tokens // 2))
                file.write(b"\xff\xff")
            config = replace(config, data=replace(config.data, path=str(spoiled)))
        code = c.run(lambda config=config, run=run, kind=kind: injected(config, run, kind))
        said = c.said()
        unseen += code != 1 or ("vocabulary" if kind == "data" else "was not applied") not in said
        if kind != "data":
            unseen += [row["at_step"] for row in events(run, "non_finite")] != [51] or 51 in rows_by_step(run, "train")
            wrong += any(not intact(folder) for folder in checkpoints(run))
            wrong += c.run(lambda run=run: resume(run)) != 0 or not c.is_straight(run)
    return {"faults": min(count, 4), "unseen": unseen, "runs": max(0, min(count, 4) - 1), "wrong": wrong}


def injected(config: RunConfig, run: Path, kind: str) -> int:
    """The run with a NaN in the loss, a gradient or a weight of update 51."""
    calls = [0]

    def make(model: Transformer, *args: Any, **options: Any) -> DataParallel:
        backend = make_backend(model, *args, **options)
        good = backend.loss_sum
        weight = next(model.parameters())

        def loss_sum(batch: Batch) -> Sums:
            loss, extras = good(batch)
            calls[0] += torch.is_grad_enabled()
            if calls[0] >= 51 and torch.is_grad_enabled():
                if kind == "loss":
                    return loss * math.nan, extras
                if kind == "gradient":
                    loss.register_hook(lambda grad: grad * math.nan)
                if kind == "weight":
                    with torch.no_grad():
                        weight.view(-1)[5] = math.nan
                    return good(batch)
            return loss, extras

        backend.loss_sum = loss_sum
        return backend

    if kind != "data":
        build.make_backend = make
    return pretrain(config, run)


# ---- the table -------------------------------------------------------------------------------------------------------

KINDS = {f.__name__: f for f in (kills, flips, truncations, full_disk, sigterms, process_deaths, nan)}


def main(args: Args) -> int:
    torch.set_num_threads(1)
    chosen = args.only.split(",") if args.only else list(KINDS)
    if unknown := set(chosen) - set(KINDS):
        sys.exit(f"--only names {', '.join(sorted(unknown))}; choose from {', '.join(KINDS)}")
    load = [os.getloadavg()[0]]
    with folder_of(args) as base:
        campaign = Campaign(base, args.seed)
        results: dict[str, dict[str, object]] = {}
        print("| fault | faults | runs finished | unseen | lost | wrong | also |\n" + "| --- " * 7 + "|", flush=True)
        for kind in chosen:
            began = time.monotonic()
            results[kind] = KINDS[kind](campaign, max(1, round(COUNTS[kind] * args.scale)))
            results[kind]["seconds"] = round(time.monotonic() - began)
            load.append(os.getloadavg()[0])
            print(line(kind, results[kind]), flush=True)
    if args.write:
        write_results(args, results, load)
    bad = ("unseen", "lost", "invalid", "wrong")
    return int(any(result.get(key) for result in results.values() for key in bad))


def write_results(args: Args, results: dict[str, dict[str, object]], load: list[float]) -> None:
    """The table as JSON, with what it was made on; `load` of the machine before and after each kind."""
    name = f"faults-{platform.machine()}-{os.cpu_count()}cores-{datetime.now(UTC):%Y-%m-%d}.json"
    path = Path(args.out) if args.out else Path(__file__).parent / "results" / name
    machine = {
        "cores": os.cpu_count(),
        "load": load,
        "platform": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "regpt": regpt.__version__,
        "commit": source_commit(),
    }
    content = {"machine": machine, "scale": args.scale, "seed": args.seed, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def folder_of(args: Args) -> Iterator[Path]:
    if args.folder:
        Path(args.folder).mkdir(parents=True)
        yield Path(args.folder).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="regpt-faults-") as folder:
        yield Path(folder)


def line(kind: str, result: dict[str, object]) -> str:
    known = ("faults", "runs", "unseen", "lost", "wrong")
    also = ", ".join(f"{key} {value}" for key, value in result.items() if key not in known)
    return f"| {kind} | " + " | ".join(str(result.get(key, "")) for key in known) + f" | {also} |"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
