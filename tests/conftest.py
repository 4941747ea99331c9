"""Makes `tiny` importable from every folder of tests."""

import pytest
from hypothesis import settings

# No timing thresholds; and the same examples every time, so that a failure seen once is seen again.
settings.register_profile("regpt", deadline=None, derandomize=True)
settings.load_profile("regpt")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests run beside each other, one a core; more threads would only wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folder of token shards of a small invented language; read only."""
    import tiny

    return tiny.write_shards(tmp_path_factory.mktemp("language") / "data")
