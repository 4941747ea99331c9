"""`/metrics` in Prometheus' text format."""

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

from regpt.engine.request import Event
from regpt.serve.gate import Gate
from regpt.serve.paths import ServedModel
from regpt.serve.worker import TextJob

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Timings:
    """Seconds from a request to its first token, as a histogram."""

    def __init__(self) -> None:
        self.counts, self.count, self.sum = [0] * len(BUCKETS), 0, 0.0

    def note(self, job: TextJob, batch: Sequence[tuple[int, Any]]) -> None:
        if job.first_token_s is not None or not any(isinstance(item, Event) for _, item in batch):
            return
        job.first_token_s = seconds = perf_counter() - job.began
        self.count, self.sum = self.count + 1, self.sum + seconds
        for i, edge in enumerate(BUCKETS):
            self.counts[i] += seconds <= edge


async def metrics_text(models: Iterable[ServedModel], gate: Gate, timings: Timings) -> str:
    lines = list[str]()

    def family(name: str, kind: str, what: str, rows: Iterable[tuple[str, float]]) -> None:
        lines.extend([f"# HELP regpt_{name} {what}", f"# TYPE regpt_{name} {kind}"])
        lines.extend(
            f"regpt_{name}{labels} {value:g}" if value < 1e6 else f"regpt_{name}{labels} {value:.0f}"
            for labels, value in rows
        )

    answered = sorted(gate.answered.items())
    rows = [(f'{{path="{path}",status="{status}"}}', n) for (path, status), n in answered]
    family("requests_total", "counter", "answers by path and status", rows)
    known = [
        (f'{{model="{label(one.id)}"}}', one, await one.worker.stats()) for one in models if not one.worker.failure
    ]
    gauges = {
        "texts_running": ("gauge", "texts that are written", "running"),
        "texts_waiting": ("gauge", "texts that wait for a place", "waiting"),
        "pages_free": ("gauge", "pages of the cache that are free", "free_pages"),
        "pages": ("gauge", "pages of the cache", "pages"),
        "prompt_tokens_total": ("counter", "tokens of prompts", "prompt_tokens"),
        "cached_tokens_total": ("counter", "tokens of prompts found in the prefix cache", "cached_tokens"),
        "new_tokens_total": ("counter", "tokens written", "new_tokens"),
        "recomputed_tokens_total": ("counter", "tokens drawn again for exactness", "recomputed"),
        "steps_total": ("counter", "steps of the engine", "steps"),
    }
    for name, (kind, what, attribute) in gauges.items():
        family(name, kind, what, [(labels, getattr(stats, attribute)) for labels, _, stats in known])
    cancelled = [(labels, one.worker.cancelled_texts) for labels, one, _ in known]
    family("texts_cancelled_total", "counter", "texts whose client went away or whose time was up", cancelled)
    buckets = [(f'_bucket{{le="{edge:g}"}}', n) for edge, n in zip(BUCKETS, timings.counts)]
    rest = [('_bucket{le="+Inf"}', timings.count), ("_sum", timings.sum), ("_count", timings.count)]
    family("first_token_seconds", "histogram", "from a request to its first token", [*buckets, *rest])
    return "\n".join(lines) + "\n"


def label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
