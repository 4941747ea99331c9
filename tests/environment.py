"""The environment of the tests: what the user's own would change is taken out before anything is imported."""

import os
import re
import signal
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

# Settings of libraries, of terminals and languages, of launchers. CUDA_VISIBLE_DEVICES stays the user's choice.
FOREIGN = re.compile(
    r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS|DATASETS|TOKENIZERS|TIKTOKEN|DATA_GYM|WANDB|TORCH|TORCHINDUCTOR|"
    r"TORCHDYNAMO|TORCHELASTIC|PYTORCH|NCCL|GLOO|OMP|MKL|KMP|OPENBLAS|AWS|GOOGLE|GCLOUD|CLOUDSDK|STORAGE|FSSPEC|XDG|LC|"
    r"REGPT|MASTER|GROUP|ROLE|LOCAL)_.*|.*_PROXY|RANK|WORLD_SIZE|LANG|LANGUAGE|TERM|COLUMNS|LINES|NO_COLOR|FORCE_COLOR|"
    r"CLICOLOR.*|COLORTERM|PYTHON(?!PATH$|HOME$).*|CUBLAS_WORKSPACE_CONFIG|GIT_.*",
    re.IGNORECASE,
)
FIXED = {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "AWS_EC2_METADATA_DISABLED": "true"}


def clean(environment: MutableMapping[str, str], folder: Path) -> None:
    """Make `environment` the same whatever it was; libraries find their settings and caches in the empty `folder`."""
    for name in [name for name in environment if FOREIGN.fullmatch(name)]:
        del environment[name]
    environment.update(FIXED)
    environment["HF_HOME"] = str(folder / "huggingface")
    environment["FSSPEC_CONFIG_DIR"] = environment["CLOUDSDK_CONFIG"] = str(folder / "none")
    environment["AWS_CONFIG_FILE"] = environment["AWS_SHARED_CREDENTIALS_FILE"] = str(folder / "none")
    home = environment.get("HOME", "")
    if os.name == "posix" and not (os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK)):
        environment["HOME"] = str(folder)


def clean_process() -> tempfile.TemporaryDirectory:
    """Clean the environment of this process and of those that it starts; its folder lasts as long as the result."""
    os.umask(0o022)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a shell's background, as CI may do
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tempfile.TemporaryDirectory(prefix="regpt-tests-", ignore_cleanup_errors=True)
    clean(os.environ, Path(folder.name))
    return folder
