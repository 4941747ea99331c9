"""`regpt diff` on runs that were trained, evaluated and compared by the commands themselves."""

import json

import tiny
from regpt.cli.diff import main
from regpt.cli.report import main as report
from regpt.runs.pretrain import pretrain


def test_two_trained_runs_are_compared_item_by_item_and_reported(tmp_path, capsys):
    words = ["ba", "do", "mi", "ta", "ru"]
    questions = tmp_path / "questions.jsonl"
    rows = [{"ctx": words[i % 5], "endings": [words[(i + k) % 5] for k in range(4)], "label": i % 4} for i in range(60)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = tiny.change(tiny.run_config(tiny.write_shards(tmp_path / "data")), "eval", tasks=f"hellaswag:{questions}")
    for seed in (1, 2, 3):
        assert pretrain(tiny.change(config, "train", seed=seed), tmp_path / f"seed-{seed}") == 0
    capsys.readouterr()
    runs = [str(tmp_path / f"seed-{seed}") for seed in (1, 2, 3)]
    assert main([*runs[:2], "--seeds", runs[2], "--json", "--out", str(tmp_path / "diff.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    measures = {one["name"]: one for one in found["measures"]}
    for metric in ("acc", "acc_norm"):
        one = measures[f"hellaswag {metric}"]
        assert (one["test"]["name"], one["test"]["n"]) == ("McNemar, exact", 60)
        assert abs(one["test"]["difference"] - one["difference"]) < 1e-9
    for name in ("validation loss", "bits per byte"):
        one = measures[name]
        assert (one["test"]["name"], one["test"]["n"]) == ("paired t", 3)  # validation reads three rows, one at once
        assert abs(one["test"]["difference"] - one["difference"]) < 1e-9
    assert measures["validation loss"]["seeds"]["runs"] == [2, 1]
    assert list(found["config"]) == ["train.seed"]
    assert report([*runs, "--out", str(tmp_path / "overlay.html")]) == 0
