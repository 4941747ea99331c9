"""Load on `regpt serve`: what HTTP costs next to the engine alone, streams, cancels, memory, a full queue.

    python benchmarks/serve_load.py [MODEL] --streams 200 --minutes 5 --cancels 10000

Without MODEL a small model of bytes with random weights is made. First `--rows` streams over HTTP and the engine alone,
in this process and with as many texts at once, take turns; the CPU time of server and clients is told apart, since
they share this machine. Then `--streams` clients ask one request after another: every text is compared with that of the
engine in this process (`lost` are streams without an end, `mixed` those with another text). Then clients that leave,
and more requests than the queue holds.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from regpt.cli.threads import spin_briefly

QUEUE = 256
PROMPTS = [f"Text {i} begins like this, and then " for i in range(200)]


def small_model(folder: Path) -> Path:
    """About 3 million parameters with bytes as tokens."""
    from regpt.hf.export import export_hf
    from regpt.model.config import ModelConfig
    from regpt.model.families import make_model
    from regpt.model.weights import initialize
    from regpt.text.bpe import byte_tokenizer

    tokenizer = byte_tokenizer()
    config = ModelConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=tokenizer.n_vocab, max_seq_len=256)
    model = make_model(config)
    initialize(model, 0)
    export_hf(model, tokenizer, folder)
    return folder


class Alone:
    """The engine in this process, kept full."""

    def __init__(self, model: str, rows: int, tokens: int, texts: int):
        from regpt.checkpoint.open import open_model
        from regpt.engine.engine import Engine
        from regpt.engine.generate import encode_prompt
        from regpt.engine.processing import SamplingOptions
        from regpt.engine.request import Request

        opened = open_model(model)
        tokenizer, self.rows = opened.tokenizer, rows
        how = {"options": SamplingOptions(top_k=0), "stop_ids": tokenizer.stop_ids}
        prompts = [encode_prompt(tokenizer, PROMPTS[i % len(PROMPTS)]) for i in range(texts)]
        self.requests = [Request(prompt, tokens, seed=i, **how) for i, prompt in enumerate(prompts)]
        self.engine = Engine(opened.model, tokenizer, max_rows=rows)
        found = [ids for (ids,) in self.engine.run(self.requests)]
        self.texts = [tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids]) for ids in found]

    def rate(self, seconds: float) -> float:
        """Tokens a second."""
        engine, started, tokens = self.engine, 0, 0
        first, began = engine.next_id, time.perf_counter()
        while time.perf_counter() < began + seconds:
            while engine.next_id - first - started < self.rows:
                engine.submit(self.requests[engine.next_id % len(self.requests)])
            for event in engine.step():
                tokens += event.token is not None
                started += event.finish_reason is not None
        found = tokens / (time.perf_counter() - began)
        for number in range(first + 1, engine.next_id + 1):
            engine.cancel(number)
        while engine.busy:
            engine.step()
        return found


class Client:
    """Raw HTTP/1.1 on one connection a request: a client library would cost more than the server."""

    def __init__(self, port: int, model: str, tokens: int):
        self.port, self.model, self.tokens = port, model, tokens

    async def open(self, i: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        fields = {"prompt": PROMPTS[i % len(PROMPTS)], "seed": i, "max_tokens": self.tokens, "stream": True}
        body = json.dumps({"model": self.model, **fields}).encode()
        lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        lines += ["Connection: close", f"Content-Length: {len(body)}", "", ""]
        writer.write("\r\n".join(lines).encode() + body)
        return reader, writer

    async def text(self, i: int) -> str | None:
        """The text of a stream; None where it has no end. Read first and parsed afterwards: a client costs little."""
        reader, writer = await self.open(i)
        data = bytearray()
        try:
            while part := await reader.read(1 << 16):
                data += part
        finally:
            writer.close()
        lines = data.split(b"\n")
        if not any(line.startswith(b"data: [DONE]") for line in lines):
            return None
        return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith(b"data: {"))

    async def status(self, i: int) -> tuple[int, bool]:
        """Of an answer that is not read: its status, and whether it has Retry-After."""
        reader, writer = await self.open(i)
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), b"\nretry-after:" in head.lower()

    async def leave(self, i: int) -> None:
        """Go away after the first event."""
        reader, writer = await self.open(i)
        async for line in reader:
            if line.startswith(b"data: "):
                break
        writer.close()

    async def metric(self, name: str) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        lines = (await reader.read()).decode().splitlines()
        writer.close()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"regpt_{name}"))


async def turns(client: Client, server: psutil.Process, alone: Alone, count: int, seconds: float) -> None:
    """The engine alone and as many streams over HTTP, in turns."""
    costs, mine, its, total = list[float](), 0.0, 0.0, 0.0
    for _ in range(count):
        one = alone.rate(seconds)
        own, theirs, before = time.process_time(), sum(server.cpu_times()[:2]), await client.metric("new_tokens_total")
        began, end = time.perf_counter(), time.perf_counter() + seconds

        async def streams(i: int, end: float = end) -> None:
            while time.perf_counter() < end:
                await client.text(i)

        running = [asyncio.ensure_future(streams(i)) for i in range(alone.rows)]
        await asyncio.sleep(seconds)
        tokens = await client.metric("new_tokens_total") - before
        rate = tokens / (time.perf_counter() - began)
        mine += time.process_time() - own
        its += sum(server.cpu_times()[:2]) - theirs
        total += tokens
        costs.append(1 - rate / one)
        await asyncio.gather(*running)
        print(
            f"alone {one:,.0f} tokens/s, {alone.rows} streams {rate:,.0f}: HTTP costs {costs[-1]:.1%}",
            flush=True,
        )
    cpu = f"CPU of the server {1e3 * its / total:.3f}, of the clients {1e3 * mine / total:.3f} ms a token"
    print(f"HTTP costs {statistics.median(costs):.1%} (median); {cpu}", flush=True)


async def load(client: Client, server: psutil.Process, streams: int, minutes: float, expected: list[str]) -> None:
    """`streams` clients, each one request after another, for `minutes`."""
    counts = {"streams": 0, "lost": 0, "mixed": 0}
    memory = list[int]()
    end = time.perf_counter() + 60 * minutes

    async def one(number: int) -> None:
        i = number
        while time.perf_counter() < end:
            text = await client.text(i % len(expected))
            counts["streams"] += 1
            counts["lost"] += text is None
            counts["mixed"] += text is not None and text != expected[i % len(expected)]
            i += streams

    async def watch() -> None:
        while time.perf_counter() < end:
            await asyncio.sleep(min(5, 6 * minutes))
            memory.append(server.memory_info().rss)

    start, before = time.perf_counter(), await client.metric("new_tokens_total")
    await asyncio.gather(watch(), *map(one, range(streams)))
    rate = (await client.metric("new_tokens_total") - before) / (time.perf_counter() - start)
    settled = memory[len(memory) // 4 :]
    grown = settled[-1] / settled[0] - 1
    print(f"{streams} streams for {minutes:g} min: {counts}, {rate:,.0f} tokens/s over HTTP", flush=True)
    print(f"memory {settled[0] / 2**20:,.0f} to {settled[-1] / 2**20:,.0f} MiB, {grown:+.1%}", flush=True)


async def cancels(client: Client, server: psutil.Process, count: int) -> None:
    began, memory = time.perf_counter(), server.memory_info().rss
    for first in range(0, count, 50):
        await asyncio.gather(*(client.leave(i) for i in range(first, min(first + 50, count))))
    while await client.metric("texts_running") + await client.metric("texts_waiting"):
        await asyncio.sleep(0.05)
    leaked = await client.metric("pages{") - await client.metric("pages_free")
    grown = server.memory_info().rss / memory - 1
    cancelled = await client.metric("texts_cancelled_total")
    print(
        f"{count} clients left in {time.perf_counter() - began:.0f} s: {cancelled:.0f} texts cancelled, "
        f"{leaked:.0f} pages leaked, memory {grown:+.1%}"
    )


async def overload(client: Client, room: int) -> None:
    """Twice as many requests at once as are written or may wait."""
    found = Counter(await asyncio.gather(*(client.status(i) for i in range(2 * room))))
    print(
        f"{2 * room} requests at once, room for {room}: "
        + ", ".join(f"{n} × {status}{' with Retry-After' * retry}" for (status, retry), n in sorted(found.items()))
    )


async def measure(args: argparse.Namespace, port: int, pid: int, alone: Alone) -> None:
    client, server = Client(port, "load", args.tokens), psutil.Process(pid)
    await client.text(0)
    if args.turns:
        await turns(client, server, alone, args.turns, args.turn_seconds)
    if args.minutes:
        await load(client, server, args.streams, args.minutes, alone.texts)
        await cancels(client, server, args.cancels)
        await overload(client, args.rows + QUEUE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cancels", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--turn-seconds", type=float, default=5)
    args = parser.parse_args()
    spin_briefly()  # before torch is imported, as the command does
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(small_model(Path(folder) / "small"))
        alone = Alone(model, args.rows, args.tokens, 3 * args.rows)
        command = [sys.executable, "-m", "regpt", "serve", f"load={model}", "--port", "0", "--rows", str(args.rows)]
        with subprocess.Popen(
            [*command, "--queue", str(QUEUE), "--device", "cpu"], stdout=subprocess.PIPE, text=True
        ) as server:
            try:
                lines = [server.stdout.readline() for _ in range(2)]  # of three
                port = int(lines[1].split("/v1")[0].rpartition(":")[2])
                asyncio.run(measure(args, port, server.pid, alone))
            finally:
                server.terminate()
                print(f"ended with {server.wait(30)}")


if __name__ == "__main__":
    main()
