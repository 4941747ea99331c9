"""Makes `tiny` importable from every folder of tests, and their environment the same everywhere."""

import gc
import shutil

import pytest
from hypothesis import settings

from environment import clean_process

FOLDER = clean_process()  # before libraries are imported that read their variables then
# No timing thresholds; and the same examples every time, so that a failure seen once is seen again.
settings.register_profile("regpt", deadline=None, derandomize=True)
settings.load_profile("regpt")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests run beside each other, one a core; more threads would only wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def small_heap():
    """What lives on after a module, above all the objects of large libraries, is not looked at by later garbage
    collections: `memory.free_memory` and the compiler collect again and again, and each took seconds."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folder of token shards of a small invented language; read only."""
    import tiny

    return tiny.write_shards(tmp_path_factory.mktemp("language") / "data")


@pytest.fixture
def url():
    """The address of a run in an empty store."""
    pytest.importorskip("fsspec")
    from remote_stores import memory_bucket

    with memory_bucket() as url:
        yield url


@pytest.fixture(scope="session")
def config(shards):
    """The configuration of `tiny.run_config`: eight steps, a checkpoint every second one."""
    import tiny

    return tiny.run_config(shards)


@pytest.fixture(scope="session")
def straight(config, tmp_path_factory):
    """The run of eight steps in one piece; read only."""
    from regpt.runs.pretrain import pretrain

    run = tmp_path_factory.mktemp("straight") / "run"
    assert pretrain(config, run) == 0
    return run


@pytest.fixture
def cut(straight, tmp_path):
    """Its copy that ended after the checkpoint of step 4."""
    from regpt.checkpoint.load import checkpoint_folder

    run = shutil.copytree(straight, tmp_path / "run")
    for later in (6, 8):
        shutil.rmtree(checkpoint_folder(run, later))
    return run
