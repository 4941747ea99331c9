"""JSON files of a checkpoint with anything in the place of anything: opened or refused in one sentence, never worse."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regpt.checkpoint.damage import find_damage
from regpt.checkpoint.load import checkpoint_folder
from regpt.checkpoint.manifest import write_manifest
from regpt.checkpoint.open import open_model
from regpt.errors import UserError
from regpt.hf.export import export_hf

GOLDEN = checkpoint_folder(Path(__file__).parents[1] / "goldens" / "run-1", 4)
ANYTHING = [None, True, -1, 0, 1.5, 10**18, 10**40, 1e308, float("nan"), "", "x", "../x", [], ["a"], [[]], {}, {"a": 1}]
MANY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(content: Any, place: tuple = ()) -> Iterator[tuple]:
    """Where something lies in JSON; of long lists the first entries."""
    yield place
    entries = content.items() if isinstance(content, dict) else enumerate(content[:5] if type(content) is list else [])
    for key, inner in entries:
        yield from places(inner, (*place, key))


def replaced(content: Any, place: tuple, value: Any) -> Any:
    """A copy with `value` at `place`."""
    if not place:
        return value
    content = copy.deepcopy(content)
    node = content
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return content


def mutated(data: st.DataObject, folder: Path, names: list[str]) -> str:
    """Put something else somewhere into one of the files; which."""
    name = data.draw(st.sampled_from(names))
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    place = data.draw(st.sampled_from(sorted(places(content), key=lambda place: (len(place), str(place)))))
    value = data.draw(st.sampled_from(ANYTHING))
    (folder / name).write_text(json.dumps(replaced(content, place, value)), encoding="utf-8")
    return name


def refusal(folder: Path) -> str:
    """What `open_model` says against the folder; empty when it opens."""
    said = ""
    try:
        open_model(str(folder))
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    return said


@MANY
@given(data=st.data())
def test_a_checkpoint_opens_or_is_refused(tmp_path: Path, data: st.DataObject):
    folder = tmp_path / "step-00000004"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN, folder)
    name = mutated(data, folder, ["model.json", "state.json", "tokenizer.json", "manifest.json"])
    if name != "manifest.json":
        (folder / "manifest.json").unlink()
        write_manifest(folder)
    assert bool(refusal(folder)) <= bool(find_damage(folder))  # which looks at more


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    golden = open_model(str(GOLDEN))
    return export_hf(golden.model, golden.tokenizer, tmp_path_factory.mktemp("exported") / "hf")


@MANY
@given(data=st.data())
def test_a_hugging_face_folder_opens_or_is_refused(tmp_path: Path, exported: Path, data: st.DataObject):
    folder = tmp_path / "hf"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(exported, folder)
    mutated(data, folder, ["config.json", "tokenizer.json"])
    refusal(folder)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("added_tokens",), 1.5),
        (("added_tokens", 0, "content"), {"a": 1}),
        (("added_tokens", 0, "id"), []),
        (("model", "merges", 3), 1.5),
        (("model", "merges", 0, 0), [[]]),
        (("pre_tokenizer",), "x"),
        (("model", "vocab"), ["a"]),
    ],
)
def test_what_once_was_not_refused(tmp_path: Path, place: tuple, value: Any):
    folder = shutil.copytree(GOLDEN, tmp_path / "step-00000004")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(replaced(content, place, value)), encoding="utf-8")
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    assert "BPE that regpt can use" in refusal(folder)
