"""What the launcher says by environment variables, and what somebody else has put there."""

import pytest

from regpt.errors import UsageError
from regpt.parallel.mesh import launcher_rank, launcher_world_size, open_mesh

SOUND = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
WRONG = {
    "RANK": ("x", "-1", "1", "", "1.0"),
    "WORLD_SIZE": ("abc", "-1", "0", "", "9" * 30),
    "LOCAL_RANK": ("x", "-1"),
    "LOCAL_WORLD_SIZE": ("x", "0"),
    "MASTER_ADDR": ("", None),
    "MASTER_PORT": ("x", "-1", "70000", "", None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_variable_that_no_launcher_sets_so_is_named(monkeypatch, name: str, value: str | None):
    for other, sound in SOUND.items():
        monkeypatch.setenv(other, sound)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(
            UsageError, match=f"^the environment variable {name} (is missing|is missing or empty|is '{value}')"
        ),
        open_mesh("cpu"),
    ):
        pass


@pytest.mark.parametrize(("name", "value"), [("RANK", "3"), ("WORLD_SIZE", "abc")])
def test_one_of_both_variables_is_of_no_launcher(monkeypatch, name: str, value: str):
    for other in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    assert (launcher_rank(), launcher_world_size()) == (0, 1)
