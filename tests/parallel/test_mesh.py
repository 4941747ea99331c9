"""One process answers every question of a mesh; a device that is not there is refused."""

import contextlib

import pytest
import torch

import tiny
from regpt.errors import UsageError
from regpt.parallel import mesh as mesh_module
from regpt.parallel.mesh import Mesh, choose_device, launcher_rank, launcher_world_size, open_mesh, under_launcher


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_a_mesh_of_one(alone):
    assert (under_launcher(), launcher_rank(), launcher_world_size()) == (False, 0, 1)
    threads = torch.get_num_threads()
    with open_mesh("cpu") as mesh:
        assert (mesh.rank, mesh.world_size, mesh.device, mesh.is_main) == (0, 1, tiny.CPU, True)
        x = torch.tensor([1.5, 2.5])
        assert mesh.sum(x) is x
        assert x.tolist() == [1.5, 2.5]
        assert mesh.any(True)
        assert not mesh.any(False)
        weight = torch.nn.Parameter(torch.zeros(2))
        weight.grad = torch.ones(2)
        mesh.sum_gradients([weight, torch.nn.Parameter(torch.zeros(1))])
        assert weight.grad.tolist() == [1, 1]
        mesh.wait()
    assert torch.get_num_threads() == threads
    assert not torch.distributed.is_initialized()


def test_every_collective_is_watched(monkeypatch):
    """What is not would hang without a word when another process has stopped."""
    mesh = Mesh(0, 2, tiny.CPU)
    seen: list[str] = []

    def all_reduce(x, op=None):
        seen.append(mesh.pulse.doing)

    def all_gather_object(parts, mine):
        seen.append(mesh.pulse.doing)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    for collective in (
        lambda: mesh.sum(torch.ones(1)),
        lambda: mesh.total(torch.ones(1)),
        lambda: mesh.any(True),
        lambda: mesh.gather(b"x"),
        lambda: mesh.smallest(3),
        lambda: mesh.sum_gradients([weight]),
        mesh.wait,
    ):
        seen.clear()
        collective()
        assert seen
        assert all(seen)


def test_the_beginning_and_the_end_of_all_processes_are_watched(monkeypatch):
    seen = []
    monkeypatch.setattr(mesh_module, "watched", lambda pulse, *_: contextlib.nullcontext(seen.append(pulse)))
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(mesh_module.dist, name, lambda *_, **__: seen.append(seen[0].doing))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with open_mesh("cpu") as mesh:
        assert mesh.pulse.doing == ""
    assert seen[1:] == ["the beginning of all processes", "the end of all processes"]


def test_the_launcher_says_who_a_process_is(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert not under_launcher()  # a variable of this name alone may be anyone's
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (under_launcher(), launcher_rank(), launcher_world_size()) == (True, 3, 4)


def there(monkeypatch, *, cuda: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_the_device_is_cuda_then_mps_then_the_cpu(monkeypatch):
    there(monkeypatch, cuda=2, mps=True)
    assert choose_device("auto", index=1) == torch.device("cuda", 1)
    assert choose_device("cpu") == tiny.CPU
    there(monkeypatch, mps=True)
    assert choose_device("auto") == choose_device("mps") == torch.device("mps")
    there(monkeypatch)
    assert choose_device("auto") == tiny.CPU


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    there(monkeypatch, mps=True)
    with pytest.raises(UsageError, match=r"^device 'cuda' is not available on .*; choose from auto, mps, cpu$"):
        choose_device("cuda")
    with pytest.raises(UsageError, match="device 'tpu' is not available"):
        choose_device("tpu")
    there(monkeypatch, cuda=2)
    with pytest.raises(UsageError, match="3 processes need as many CUDA devices and this machine has 2; lower --nproc"):
        choose_device("cuda", index=2)


def test_several_processes_cannot_share_mps(monkeypatch):
    there(monkeypatch, mps=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"cannot share the MPS device; use --train\.device cpu"), open_mesh("auto"):
        pass
