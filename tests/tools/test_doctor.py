"""The doctor's trials on a CPU, and what happens to those that fail, crash or hang."""

import pytest
import torch

import tiny
from regpt.kernels import fp8
from regpt.tools.doctor import device as device_module
from regpt.tools.doctor import doctor as doctor_module
from regpt.tools.doctor import host as host_module
from regpt.tools.doctor.device import close, compile_trials, step_in, step_trials, training_trials
from regpt.tools.doctor.doctor import LONGEST, SECONDS, Trial, attempt, can_train, examine_machine, run_group
from regpt.tools.doctor.host import extras, host_trials, packages_of_extras

OK = Trial("cpu", "training step", "ok", "")


def test_what_a_trial_returns_is_its_result():
    assert attempt("g", "n", lambda: "fine") == Trial("g", "n", "ok", "fine")


def test_whatever_a_trial_raises_is_its_result():
    def fail() -> str:
        raise RuntimeError("no kernel\nand a stack trace")

    assert attempt("g", "n", fail) == Trial("g", "n", "no", "RuntimeError: no kernel")

    def ramble() -> str:
        raise ValueError("x" * 1000)

    assert len(attempt("g", "n", ramble).detail) == LONGEST


# ---- devices --------------------------------------------------------------------------------------------------------


def test_the_cpu_trains():
    found = {trial.name: trial for trial in training_trials(tiny.CPU)}
    assert found["training step"].status == "ok", found["training step"].detail
    assert found["device"].status == "ok"
    assert (found["gloo"].status, found["gloo"].detail) == ("ok", "sum of one process: 1")


def test_a_step_in_every_format_is_compared_with_float64(monkeypatch: pytest.MonkeyPatch):
    found = {trial.name: trial for trial in step_trials(tiny.CPU)}
    assert found.keys() == {f"step {name}" for name in ("fp32", "bf16", "fp16", "fp8")}
    assert {trial.status for trial in found.values()} == {"ok"}
    assert all("relative error" in trial.detail for trial in found.values())
    monkeypatch.setattr(device_module, "TOLERANCE", dict.fromkeys(device_module.TOLERANCE, 1e-12))
    assert {trial.status for trial in step_trials(tiny.CPU)} == {"no"}


def test_a_format_that_the_device_lacks_is_a_no(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fp8, "error_of_linear", lambda device: float("nan"))
    (trial,) = [trial for trial in step_trials(tiny.CPU) if trial.name == "step fp8"]
    assert trial.status == "no"
    assert "wrong" in trial.detail


def test_steps_leave_the_precision_as_it_was():
    torch.set_float32_matmul_precision("highest")
    step_in(tiny.CPU, "tf32")()
    assert torch.get_float32_matmul_precision() == "highest"


def test_not_a_number_is_an_error():
    with pytest.raises(ArithmeticError, match="nan"):
        close(torch.tensor([float("nan")]), torch.tensor([1.0]), 0.1)


@tiny.IMPORTS_COMPILER
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_step_is_compared_too(monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []
    real = device_module.make_loss_sum
    monkeypatch.setattr(
        device_module,
        "make_loss_sum",
        lambda model, precision, device, compile, kernels: (
            asked.append(compile) or real(model, precision, device, False, kernels)
        ),
    )
    (trial,) = compile_trials(tiny.CPU)
    assert (trial.name, trial.status) == ("compiled step", "ok")
    assert ", compiled: relative error" in trial.detail
    assert asked == [False, True]


# ---- host -----------------------------------------------------------------------------------------------------------


def test_a_missing_c_compiler_is_reported_with_what_it_costs(tmp_path, monkeypatch):
    for compiler, status, said in ((object(), "ok", "compiles"), (None, "no", "int8 is refused")):
        monkeypatch.setattr(host_module, "load_few_rows", lambda compiler=compiler: compiler)
        (found,) = [trial for trial in host_trials(tmp_path) if trial.name == "C compiler"]
        assert found.status == status
        assert said in found.detail


def test_the_host_is_described(tmp_path):
    found = {trial.name: trial for trial in host_trials(tmp_path)}
    assert found["torch"].detail == str(torch.__version__)
    assert found["disk"].detail.endswith(" GiB free")
    assert found["memory"].detail.endswith(" GiB free")
    assert "cores" in found["CPU"].detail


def test_packages_of_extras_are_read_from_the_metadata():
    lines = [
        "torch>=2.11",
        'pyarrow>=18; extra == "data"',
        "zstandard>=0.23 ; extra == 'data'",
        'huggingface_hub[x]>=0.30; python_version > "3" and extra == "hub-tools"',
        'regpt[data]; extra == "all"',
        'pytest>=8; extra == "dev"',
    ]
    assert packages_of_extras(lines) == {"data": ["pyarrow", "zstandard"], "hub-tools": ["huggingface_hub"]}


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    class Metadata:
        requires = ['numpy; extra == "there"', 'no-such-package; extra == "data"']

    monkeypatch.setattr(host_module, "distribution", lambda name: Metadata)
    there, missing = extras()
    assert there.status == "ok"
    assert missing.status == "no"
    assert "no-such-package missing; pip install 'regpt[data]'" in missing.detail


# ---- processes of their own -----------------------------------------------------------------------------------------

PRINTS = 'print(\'regpt-trial {"group": "g", "name": "n", "status": "ok", "detail": "d"}\', flush=True)'


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", None),
        ("import os; os.abort()", "the process ended with code"),
        ("raise SystemExit('broken driver')", "ended with code 1 broken driver"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
    ],
    ids=["fine", "crashes", "fails", "hangs"],
)
def test_a_group_that_ends_badly_keeps_what_it_found(code: str, said: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor_module, "CHILD", ("-c", f"print('noise'); {PRINTS}; {code}"))
    first, *rest = run_group("group", 1.0 if "sleep" in code else 60.0)
    assert first == Trial("g", "n", "ok", "d")
    assert [trial.status for trial in rest] == (["no"] if said else [])
    assert all(said in trial.detail for trial in rest if said)


def test_everything_is_examined(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_module, "host_trials", lambda folder: [])
    monkeypatch.setattr(doctor_module, "run_group", lambda *group: [Trial(group[0], "n", "ok", "")])
    heard: list[str] = []
    trials = examine_machine(tmp_path, heard.append)
    assert heard == ["the host", *(trial.group for trial in trials if trial.group != "host")]
    assert set(heard[1:]) == set(SECONDS) == set(device_module.GROUPS)
    assert not can_train(trials)


def test_load_is_named_where_it_may_be_the_reason(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor_module, "CHILD", ("-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(host_module, "host_trials", lambda folder: [])
    monkeypatch.setattr("psutil.getloadavg", lambda: (123.0, 0.0, 0.0))
    load, *others = examine_machine(tmp_path, trial_seconds=0.1)
    assert load.detail.startswith("load 123.0 on ")
    assert all("busy (load 123.0" in trial.detail and "--trial-seconds" in trial.detail for trial in others)
    monkeypatch.setattr("psutil.getloadavg", lambda: (0.5, 0.0, 0.0))
    assert not any("load" in trial.detail for trial in examine_machine(tmp_path, trial_seconds=0.1))


def test_one_device_that_trains_is_enough():
    broken = Trial("cuda:0", "training step", "no", "")
    assert can_train((broken, OK))
    assert not can_train((broken, Trial("cpu", "product fp32", "ok", "")))


@pytest.mark.slow
def test_the_real_thing_on_this_machine(tmp_path):
    found = {(trial.group, trial.name): trial for trial in examine_machine(tmp_path)}
    assert found["cpu", "training step"].status == "ok"
    assert found["cpu", "gloo"].status == "ok"
    assert found["cpu", "compiled step"].status == "ok"
