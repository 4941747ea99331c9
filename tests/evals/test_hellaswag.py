import hashlib
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny
from regpt.errors import UserError
from regpt.evals.choices import LABEL_COUNTS, N_ITEMS, URL, Choices, download, open_hellaswag, read_hellaswag
from regpt.evals.score import Scorer
from regpt.evals.task import evaluate_task
from regpt.model.transformer import Transformer
from regpt.remote.retry import PATIENCE
from regpt.text.bpe import BPETokenizer, train_bpe

SHARED = Path(__file__).parents[3] / "shared" / "data" / "evals" / "hellaswag_val.jsonl.zst"
needs_shared = pytest.mark.skipif(not SHARED.is_file(), reason="the benchmark files beside the repository are absent")
OFFICIAL = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "split": "val",
    "split_type": "indomain",
    "label": 3,
    "endings": ["is using wrap.", "is ripping tiles off.", "is holding a cube.", "starts pulling up roofing."],
    "source_id": "activitynet~v_-JhWjGDPHMY",
}


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe([json.dumps(OFFICIAL)], 260)


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_official_format_and_the_bundles_give_the_same(tmp_path):
    bundle = {key: OFFICIAL[key] for key in ("ctx", "endings", "label", "activity_label")}
    core = {"query": OFFICIAL["ctx"], "choices": OFFICIAL["endings"], "gold": 3}
    for row in (OFFICIAL, bundle, core):
        (question,) = read_hellaswag(write(tmp_path / "h.jsonl", row))
        assert question.context == "A man is sitting on a roof. he"
        assert question.endings[0] == " is using wrap."  # the leading space is the lecture's
        assert question.label == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"endings": ["a", "b", "c"]}, "'endings' holds 3, an item needs at least 4"),
        ({"endings": list("abcde")}, "HellaSwag has four endings, the item has 5"),
        ({"endings": ["a", "b", "c", ""]}, r"'endings'\[3\] is \"\", must be text"),
        ({"label": 4}, "'label' is 4, must be 0 to 3"),
        ({"label": None}, "'label' is null"),
        ({"ctx": ""}, "'ctx' is empty"),
    ],
)
def test_a_malformed_item_names_its_line(tmp_path, change, said):
    with pytest.raises(UserError, match=f"h.jsonl, line 2: {said}"):
        read_hellaswag(write(tmp_path / "h.jsonl", OFFICIAL, OFFICIAL | change))


def test_the_whole_set_must_have_its_labels(tmp_path):
    counts = list(LABEL_COUNTS)
    assert sum(counts) == N_ITEMS
    rows = [{"ctx": "a", "endings": list("abcd"), "label": label} for label, n in enumerate(counts) for _ in range(n)]
    assert len(read_hellaswag(write(tmp_path / "h.jsonl", *rows))) == N_ITEMS
    rows[0]["label"] = 3
    with pytest.raises(UserError, match=r"10,042 items but the label counts \(2514, 2485, 2584, 2459\)"):
        read_hellaswag(write(tmp_path / "h.jsonl", *rows))


@pytest.fixture
def web(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/h.jsonl"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_official_file_is_downloaded_once_and_its_hash_compared_each_time(tmp_path, web):
    folder, url = web
    sha256 = hashlib.sha256(write(folder / "h.jsonl", OFFICIAL).read_bytes()).hexdigest()
    patience = tiny.replace(PATIENCE, tries=1)
    there = partial(download, url, sha256, tmp_path / "cache", patience)
    path = there()
    assert json.loads(path.read_text(encoding="utf-8")) == OFFICIAL
    (folder / "h.jsonl").unlink()
    assert there() == path  # without the server's file
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="hellaswag:FILE"):  # changed since: it would be downloaded again
        there()


def test_a_download_with_another_hash_is_refused(tmp_path, web):
    folder, url = web
    write(folder / "h.jsonl", OFFICIAL)
    with pytest.raises(UserError, match="another sha256 hash than the published one"):
        download(url, "0" * 64, tmp_path / "cache", tiny.replace(PATIENCE, tries=1))


@pytest.mark.network
def test_the_authors_file_has_the_hash_that_others_published(tmp_path):
    assert URL.startswith("https://raw.githubusercontent.com/rowanz/hellaswag/")
    assert len(read_hellaswag(download(cache=tmp_path))) == N_ITEMS


@pytest.mark.shared
@needs_shared
def test_the_file_beside_the_repository_is_whole(tokenizer):
    task = open_hellaswag(SHARED, tokenizer, tokenizer.eot)
    assert task.n_items == N_ITEMS
    assert tuple(np.bincount([question.label for question in task.questions])) == LABEL_COUNTS


@torch.no_grad()
def lecture(model: Transformer, task: Choices, tokenizer: BPETokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(items,) predictions by sum and by mean: four padded rows an item, one item at a time, all logits."""
    found = []
    for question in task.questions:
        context = tokenizer.encode(question.context)
        endings = [tokenizer.encode(ending) for ending in question.endings]
        length = len(context) + max(map(len, endings))
        tokens, mask = torch.zeros(2, 4, length, dtype=torch.long)
        for k, ending in enumerate(endings):
            tokens[k, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[k, len(context) : len(context) + len(ending)] = 1
        logits = model(tokens[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        sums = (losses * mask[:, 1:]).sum(1)
        found.append((sums.argmin().item(), (sums / mask[:, 1:].sum(1)).argmin().item()))
    first, second = np.array(found).T
    return first, second


def equal_to_the_lecture(task: Choices, tokenizer: BPETokenizer, longest: int) -> None:
    model = tiny.build_model(config=tiny.replace(tiny.CONFIG, vocab_size=tokenizer.n_vocab, max_seq_len=longest))
    found = evaluate_task(task, Scorer(model, tiny.ALONE, batch_tokens=4096))
    labels = np.array([question.label for question in task.questions])
    for metric, predicted in zip(("acc", "acc_norm"), lecture(model, task, tokenizer)):
        assert found.outcomes[metric].tolist() == (predicted == labels).tolist()
        assert 0.15 < found.estimates()[metric].value < 0.35  # random weights guess


@pytest.mark.shared
@needs_shared
def test_300_items_are_judged_as_by_the_lectures_loop():
    some = read_hellaswag(SHARED)[::33]
    tokenizer = train_bpe((" ".join((q.context, *q.endings)) for q in some), 1024)
    equal_to_the_lecture(Choices("hellaswag", some, tokenizer, tokenizer.eot), tokenizer, 400)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.shared
@needs_shared
def test_all_items_are_judged_as_by_the_lectures_loop():
    every = read_hellaswag(SHARED)
    tokenizer = train_bpe((" ".join((q.context, *q.endings)) for q in every[::10]), 1024)
    equal_to_the_lecture(Choices("hellaswag", every, tokenizer, tokenizer.eot), tokenizer, 500)
