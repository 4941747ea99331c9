"""Encode partitions on a Ray cluster whose machines share the storage of the sources and of the output (extra `ray`).

A task is one partition. When its machine or process is lost, Ray starts it again elsewhere; the files that a lost one
was writing never get their names.
"""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from regpt.errors import UserError
from regpt.prepare.attempt import attempt
from regpt.prepare.partition import Partition
from regpt.prepare.settings import Settings
from regpt.prepare.workers import Finished, raise_failure
from regpt.text.fast import available

TRIES = 5  # after the first
CONNECT_S = 10


def encode_on_ray(work: Path, tasks: Iterator[Partition], settings: Settings, address: str | None) -> Finished:
    """Partitions in the order in which the cluster at `address` finishes them; without one, on this machine's cores.

    Raises:
        UserError: Ray is not installed or does not answer, or what a worker says about the text.
        DiskFull: a worker could not write.
    """
    ray = import_ray()
    connect(ray, address)
    encode = ray.remote(num_cpus=1, max_retries=TRIES)(encode_task)
    running: dict[Any, Partition] = {}
    work = work.resolve()  # the same path on every machine
    try:
        while True:
            limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
            while len(running) < limit and (partition := next(tasks, None)):
                running[encode.remote(str(work), partition.to_json(), settings)] = partition
            if not running:
                return
            (done, *_), _ = ray.wait(list(running))
            partition = running.pop(done)
            raise_failure(result(ray, done, partition))
            yield partition
    finally:
        ray.shutdown()


def encode_task(work: str, partition: str, settings: Settings) -> dict[str, Any]:
    """One partition, on the machine that Ray chose."""
    if not available():  # here, or in this version
        settings = replace(settings, encoder="exact")
    return attempt(Path(work), Partition.from_json(partition), settings)


def result(ray: Any, task: Any, partition: Partition) -> dict[str, Any]:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:  # the task's own errors come back as answers
        what = str(error).strip().splitlines()[0]
        name = partition.readings[0].source.file
        raise UserError(f"Ray gave up on {name} after {TRIES + 1} tries ({what}); look at the cluster's logs") from None


def connect(ray: Any, address: str | None) -> None:
    if address is None:
        ray.init(log_to_driver=False, include_dashboard=False)
        return
    try:
        knock(address)
        ray.init(address=address, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        what = str(error).strip().splitlines()[0]
        raise UserError(f"no Ray cluster answers at {address!r} ({what}); start one with: ray start --head") from None


def knock(address: str) -> None:
    """Raise an OSError when nobody listens at `address`: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), CONNECT_S).close()


def import_ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--executor ray needs Ray; install it with: pip install 'regpt[ray]'") from None
    return ray
