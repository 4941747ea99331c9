"""The suite passes whatever the user's environment holds."""

import os
from pathlib import Path

from environment import clean

HOSTILE = {
    "HF_HUB_OFFLINE": "1",
    "HF_ENDPOINT": "http://nowhere.invalid",
    "HUGGING_FACE_HUB_TOKEN": "hf_secret",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TORCH_LOGS": "+dynamo",
    "TORCHINDUCTOR_CACHE_DIR": "/nowhere",
    "PYTORCH_CUDA_ALLOC_CONF": "nonsense",
    "OMP_NUM_THREADS": "64",
    "AWS_PROFILE": "nobody",
    "GOOGLE_APPLICATION_CREDENTIALS": "/nowhere",
    "https_proxy": "http://nowhere.invalid:1",
    "ALL_PROXY": "socks5://nowhere.invalid:1",
    "no_proxy": "*",
    "LANG": "C",
    "LC_ALL": "C",
    "TERM": "dumb",
    "COLUMNS": "20",
    "NO_COLOR": "1",
    "FORCE_COLOR": "1",
    "PYTHONWARNINGS": "error",
    "PYTHONIOENCODING": "ascii",
    "PYTHONUTF8": "0",
    "XDG_CACHE_HOME": "/nowhere",
    "RANK": "3",
    "WORLD_SIZE": "abc",
    "HOME": "/nowhere",
}


def test_the_environment_of_the_tests_is_the_same_whatever_it_was(tmp_path):
    kept = {"PATH": "/bin", "PYTHONPATH": "src", "CUDA_VISIBLE_DEVICES": "1", "TMPDIR": "/tmp/a b"}
    hostile, empty = HOSTILE | kept, dict(kept)
    clean(hostile, tmp_path)
    clean(empty, tmp_path)
    assert hostile == empty
    assert kept.items() <= hostile.items()


def test_a_home_that_can_be_written_stays(tmp_path):
    environment = {"HOME": str(tmp_path)}
    clean(environment, Path("elsewhere"))
    assert environment["HOME"] == str(tmp_path)


def test_it_was_cleaned_before_the_tests():
    assert not {"HF_HUB_OFFLINE", "WANDB_MODE", "LC_ALL", "XDG_CACHE_HOME", "https_proxy", "RANK"} & set(os.environ)
    assert os.environ["OMP_NUM_THREADS"] == "1"
