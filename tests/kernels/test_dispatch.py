"""Which implementation runs, and on which device Triton launches."""

import importlib
import pkgutil
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import torch
from torch._library.custom_ops import OPDEFS

from deepseek_v3 import kernels as package
from deepseek_v3.kernels import dispatch
from deepseek_v3.kernels.dispatch import kernels, on_its_device, uses_triton
from deepseek_v3.kernels.rms_norm import rms_norm
from tests.kernels.checks import compare


@pytest.fixture
def entered(monkeypatch) -> list[torch.device]:
    """The devices that were made current, of a machine where cuda:0 is."""
    devices = []

    @contextmanager
    def device(of):
        devices.append(of)
        yield
        devices.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


def on(device: str) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device))


def test_an_op_runs_on_the_device_of_its_first_tensor(entered) -> None:
    run = on_its_device(lambda tensor, number: (list(entered), number))
    assert run(on("cpu"), 1) == ([], 1) and run(on("cuda:0"), 2) == ([], 2)
    assert run(on("cuda:1"), 3) == ([torch.device("cuda:1")], 3)
    assert entered == [torch.device("cuda:1"), "left"]


def test_every_op_of_the_package_does(entered) -> None:
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    ops = {name: op for name, op in OPDEFS.items() if name.startswith("deepseek_v3::")}
    assert {"deepseek_v3::rms_norm", "deepseek_v3::rope_in_place", "deepseek_v3::fp8_linear_backward"} <= ops.keys()
    for name, op in ops.items():
        first, *rest = op._opoverload._schema.arguments
        assert str(first.type) == "Tensor", name
        entered.clear()
        with suppress(Exception):  # whatever it does with a tensor that is none
            op._init_fn(on("cuda:1"), *[None] * len(rest))
        assert entered == [torch.device("cuda:1")], f"{name} launches on the current device, whatever its tensors' is"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one() -> None:
    def exact(x, weight, eps):
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    compare(rms_norm, exact, torch.randn(64, 512, device="cuda:1"), torch.ones(512, device="cuda:1"), eps=1e-6)
    assert torch.cuda.current_device() == 0


@pytest.fixture
def capability(monkeypatch):
    """Sets that of every GPU."""
    dispatch._capability.cache_clear()
    yield lambda found: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    dispatch._capability.cache_clear()


@pytest.mark.parametrize(("found", "triton"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((12, 0), True)])
def test_gpus_that_the_kernels_are_made_for(found, triton, capability) -> None:
    capability(found)
    tensor = SimpleNamespace(device=torch.device("cuda:0"), is_cuda=True, dtype=torch.bfloat16)
    assert uses_triton(tensor) == triton
    with kernels("triton"):
        assert uses_triton(tensor)
    with kernels("reference"):
        assert not uses_triton(tensor)
    tensor.dtype = torch.float64
    assert not uses_triton(tensor)


def test_the_capability_is_asked_for_once_and_is_a_constant_of_a_graph(capability) -> None:
    capability((8, 0))
    assert dispatch._supported(torch.device("cpu"))
    capability(None)
    torch._dynamo.reset()
    add = torch.compile(
        lambda x: x + 1 if dispatch._supported(x.device) else x, backend="aot_eager", fullgraph=True
    )
    assert add(torch.zeros(3)).eq(1).all()
