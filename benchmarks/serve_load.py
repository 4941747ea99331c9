"""Load on `regpt serve`: streams, cancels, memory, and what HTTP costs next to the engine alone.

    python benchmarks/serve_load.py [MODEL] --streams 64 --minutes 1 --cancels 1000

Without MODEL a small model of bytes with random weights is made. Every stream's text is compared with that of an engine
in this process: `lost` are streams without an end, `mixed` those with another text. Server and clients share this
machine; the engine alone runs before the server starts, with as many rows.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from regpt.cli.threads import spin_briefly

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


def engine_alone(model: str, rows: int, tokens: int, texts: int) -> tuple[list[str], float]:
    """The texts of the first prompts, and tokens a second with `rows` at once: twice, the second time is measured."""
    from regpt.checkpoint.open import open_model
    from regpt.engine.engine import Engine
    from regpt.engine.generate import encode_prompt
    from regpt.engine.processing import SamplingOptions
    from regpt.engine.request import Request

    opened = open_model(model)
    tokenizer = opened.tokenizer
    options = SamplingOptions(top_k=0)
    requests = [
        Request(encode_prompt(tokenizer, PROMPTS[i % len(PROMPTS)]), tokens, options, i, stop_ids=tokenizer.stop_ids)
        for i in range(texts)
    ]
    engine = Engine(opened.model, tokenizer, max_rows=rows)
    found = [ids for (ids,) in engine.run(requests)]
    began = time.perf_counter()
    engine.run(requests)
    seconds = time.perf_counter() - began
    written = [tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids]) for ids in found]
    tokens_s = sum(map(len, found)) / seconds
    print(
        f"engine alone: {sum(map(len, found))} tokens in {seconds:.1f} s, {engine.stats().recomputed} drawn again",
        flush=True,
    )
    return written, tokens_s


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
        """The text of a stream; None where it has no end."""
        reader, writer = await self.open(i)
        text, done = "", False
        try:
            async for line in reader:
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                done = done or line.startswith(b"data: [DONE]")
        finally:
            writer.close()
        return text if done else None

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


async def load(client: Client, server: psutil.Process, streams: int, minutes: float, expected: list[str]) -> None:
    """`streams` clients, each one request after another, for `minutes`."""
    counts = {"streams": 0, "lost": 0, "mixed": 0}
    memory = list[int]()
    start = before = 0.0
    end = time.perf_counter() + 60 * minutes

    async def one(number: int) -> None:
        i = number
        while time.perf_counter() < end:
            text = await client.text(i)
            counts["streams"] += 1
            counts["lost"] += text is None
            counts["mixed"] += text is not None and text != expected[i]
            i = (i + streams) % len(expected)

    async def watch() -> None:
        while time.perf_counter() < end:
            await asyncio.sleep(min(5, 6 * minutes))
            memory.append(server.memory_info().rss)

    start, before = time.perf_counter(), await client.metric("new_tokens_total")
    await asyncio.gather(watch(), *map(one, range(streams)))
    rate = (await client.metric("new_tokens_total") - before) / (time.perf_counter() - start)
    settled = memory[len(memory) // 4 :]
    grown = settled[-1] / settled[0] - 1
    print(f"{streams} streams for {minutes:g} min: {counts}, {rate:,.0f} tokens/s over HTTP")
    print(f"memory {settled[0] / 2**20:,.0f} to {settled[-1] / 2**20:,.0f} MiB, {grown:+.1%}")
    client.rate = rate


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


async def measure(args: argparse.Namespace, port: int, name: str, pid: int, expected: list[str], alone: float) -> None:
    client, server = Client(port, name, args.tokens), psutil.Process(pid)
    await client.text(0)
    await load(client, server, args.streams, args.minutes, expected)
    print(f"engine alone {alone:,.0f} tokens/s with {args.rows} rows: HTTP costs {1 - client.rate / alone:.1%}")
    await cancels(client, server, args.cancels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cancels", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()
    spin_briefly()  # before torch is imported, as the command does
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(small_model(Path(folder) / "small"))
        expected, alone = engine_alone(model, args.rows, args.tokens, 2 * args.rows)
        command = [sys.executable, "-m", "regpt", "serve", f"load={model}", "--port", "0", "--rows", str(args.rows)]
        with subprocess.Popen(
            [*command, "--queue", "1000", "--device", "cpu"], stdout=subprocess.PIPE, text=True
        ) as server:
            try:
                lines = [server.stdout.readline() for _ in range(2)]
                port = int(lines[1].split("/v1")[0].rpartition(":")[2])
                asyncio.run(measure(args, port, "load", server.pid, expected, alone))
            finally:
                server.terminate()
                print(f"ended with {server.wait(30)}")


if __name__ == "__main__":
    main()
