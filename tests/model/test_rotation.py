"""Rotary positions under the compiler: one table a forward."""

import pytest
import torch

import tiny
from regpt.model.layers import of_angles
from regpt.model.transformer import Transformer

pytestmark = tiny.IMPORTS_COMPILER
ROTARY = [family for family, config in tiny.FAMILY_CONFIGS.items() if family != "gpt2"]


@pytest.mark.parametrize("family", ROTARY)
def test_compiled_layers_share_one_table_of_cosines_and_sines(family: str):
    model = tiny.build_model(config=tiny.FAMILY_CONFIGS[family], dtype=torch.float64)
    calls: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method"))
        return graph

    torch.compiler.reset()  # else the models before this one count towards the limit of recompilations
    idx = torch.arange(12).view(2, 6) % model.config.vocab_size
    compiled = torch.compile(Transformer.hidden, backend=record)(model, idx)
    tables = 2 if family == "gemma3_text" else 1  # of layers with and without a window
    assert calls.count("regpt.cos_and_sin") == tables
    assert not {"cos", "sin"} & set(calls)
    torch.testing.assert_close(compiled, model.hidden(idx), rtol=1e-14, atol=1e-14)


def test_positions_of_several_rows_have_angles_of_their_own():
    positions = torch.tensor([[0, 1, 2], [5, 0, 7]])
    cos, sin = torch.ops.regpt.cos_and_sin(positions, torch.tensor([1.0, 0.25]))
    angles = positions[..., None].double() * torch.tensor([1.0, 0.25], dtype=torch.float64)
    torch.testing.assert_close(torch.stack((cos, sin)), torch.stack((angles.cos(), angles.sin())).float())
    torch.testing.assert_close((cos, sin), of_angles(positions, torch.tensor([1.0, 0.25])), rtol=0, atol=0)
