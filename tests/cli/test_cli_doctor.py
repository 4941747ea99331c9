"""`regpt doctor`: its lines, its JSON, its exit codes."""

import json

import pytest

from regpt.tools.doctor import doctor as doctor_module
from regpt.tools.doctor.doctor import Trial

FOUND = (
    Trial("cpu", "training step", "ok", "loss 5.6, then 5.1"),
    Trial("cpu", "step fp32", "ok", "relative error 1e-7"),
    Trial("extras", "data", "no", "pyarrow missing; pip install 'regpt[data]'"),
    Trial("versions", "torch", "note", "2.13"),
)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch):
    def use(*trials: Trial) -> None:
        monkeypatch.setattr(doctor_module, "examine_machine", lambda folder, done, seconds: trials)

    return use


def test_one_line_a_trial(regpt, found):
    found(*FOUND)
    code, out, _ = regpt("doctor")
    assert code == 0  # although an extra is missing
    assert out.splitlines() == [
        "cpu",
        "  ✓ training step  loss 5.6, then 5.1",
        "  ✓ step fp32      relative error 1e-7",
        "extras",
        "  ✗ data  pyarrow missing; pip install 'regpt[data]'",
        "versions",
        "  · torch  2.13",
        "this machine can train",
    ]


def test_the_json_has_the_trials(regpt, found):
    found(*FOUND)
    code, out, _ = regpt("doctor", "--json")
    assert code == 0
    values = json.loads(out)
    assert values.keys() == {"can_train", "trials"}
    assert values["can_train"]
    assert values["trials"][1] == {
        "group": "cpu",
        "name": "step fp32",
        "status": "ok",
        "detail": "relative error 1e-7",
    }


def test_only_a_machine_that_cannot_train_is_a_failure(regpt, found):
    found(Trial("cpu", "training step", "no", "RuntimeError: broken"))
    code, out, _ = regpt("doctor")
    assert code == 1
    assert out.endswith("nothing on this machine can train: see ✗ above\n")


def test_a_mistake_is_one_sentence(regpt):
    code, out, err = regpt("doctor", "--jsn")
    assert code == 2
    assert err.count("\n") == 1
    assert not out
