"""Run folders to report on."""

import json
from pathlib import Path

import pytest
from run_files import CONFIG, ENV, train_row, val_row, write_rows


@pytest.fixture
def make_run(tmp_path):
    """make_run(rows=…, samples=…, env=…, config=…) → folder; what is not given is ordinary."""

    def make(rows=None, samples=None, env=None, config=CONFIG, name="run-1") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        if rows is None:
            rows = [val_row(0, 8.0), *(train_row(step) for step in range(1, 41)), val_row(20, 3.5), val_row(40, 3.25)]
        if samples is None:
            samples = [
                {"step": step, "prompt": "Hello", "texts": [f"Hello at {step}", "Hello you"]} for step in (0, 20, 40)
            ]
        write_rows(folder / "metrics.jsonl", rows)
        write_rows(folder / "samples.jsonl", samples)
        (folder / "env.json").write_text(json.dumps(ENV if env is None else env), encoding="utf-8")
        (folder / "config.toml").write_text(config, encoding="utf-8")
        return folder

    return make
