"""The states of random generators come back as they were."""

import random

import numpy as np
import pytest
import torch

from regpt.checkpoint.state import generator_states, restore_generators
from regpt.errors import UserError


def draw(device: torch.device) -> list[float]:
    return [
        torch.rand(1).item(),
        torch.rand(1, device=device).item(),
        np.random.normal(),  # noqa: NPY002
        random.gauss(0, 1),
        random.random(),
    ]


def check_draws(device: torch.device) -> None:
    draw(device)  # half of a pair of normal numbers is kept
    states = generator_states(device)
    expected = [draw(device), draw(device)]
    draw(device)
    restore_generators(states, device)
    assert [draw(device), draw(device)] == expected


def test_every_generator_goes_on_where_it_was():
    check_draws(torch.device("cpu"))


@pytest.mark.gpu
def test_the_gpus_generator_goes_on_where_it_was():
    check_draws(torch.device("cuda", 0))


@pytest.mark.parametrize("name", ["cpu", "python", "numpy"])
@pytest.mark.parametrize("text", ["", "AAAA", "no base64"])
def test_text_that_is_no_state_is_refused(name, text):
    device = torch.device("cpu")
    states = generator_states(device)
    with pytest.raises(UserError, match="holds no states of random generators"):
        restore_generators(states | {name: text}, device)
    restore_generators(states, device)
