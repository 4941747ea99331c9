"""A Ray cluster of two workers, of which one is killed, writes the same bytes."""

import json
import sys
from pathlib import Path

import pytest

from regpt.errors import UserError
from regpt.prepare import partition
from regpt.prepare.prepare import prepare
from regpt.text.bpe import train_bpe

TOKENIZER = train_bpe(["the cat sat on the mat, and the cats sat on the mats\n" * 4], 270)
FILES, LINES = 6, 40


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(partition, "MIN_BYTES", 1000)
    for k in range(FILES):
        lines = (json.dumps({"text": f"the cat {k} sat on mat {i}"}) + "\n" for i in range(LINES))
        (tmp_path / f"{k}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [str(tmp_path / f"{k}.jsonl") for k in range(FILES)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_cluster_that_loses_a_worker_writes_the_same_bytes(tmp_path, corpus):
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
    options = {"val_fraction": 0.2, "shard_tokens": 500}
    prepare(corpus, tmp_path / "here", TOKENIZER, workers=1, **options)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    def kill_one(_: object) -> None:
        if len(nodes) == 2:
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    try:
        there = {"executor": "ray", "address": cluster.address, "progress": kill_one}
        prepare(corpus, tmp_path / "there", TOKENIZER, **there, **options)
    finally:
        cluster.shutdown()
    assert len(nodes) == 1
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    with pytest.raises(UserError, match=r"no Ray cluster answers at .*; start one with: ray start --head"):
        prepare(corpus, tmp_path / "none", TOKENIZER, executor="ray", address="127.0.0.1:1")


def test_without_ray_it_says_what_to_install(tmp_path, corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--executor ray needs Ray; install it with: pip install 'regpt\[ray\]'"):
        prepare(corpus, tmp_path / "out", TOKENIZER, executor="ray")
    assert not (tmp_path / "out").exists()


def test_an_address_without_a_cluster_is_refused(tmp_path, corpus):
    with pytest.raises(UserError, match="address 'auto' is of a Ray cluster; add --executor ray"):
        prepare(corpus, tmp_path / "out", TOKENIZER, address="auto")
