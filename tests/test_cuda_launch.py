"""The launcher without a device: what reaches the driver, on which stream, and what is compiled when."""

import contextlib
import types

import cuda_without_gpu  # noqa: F401  skips this file where numba.cuda cannot be imported
import numpy as np
import pytest
import torch
from numba import float32, float64, int64
from numba.types import CPointer, void

from numsru import cuda_launch


class Driver:
    """Stands in for torch's and the driver's state. Records what is compiled and what is launched."""

    def __init__(self):
        self.stream, self.device, self.compiled, self.launched = 70, None, [], []

    @contextlib.contextmanager
    def use(self, device):
        self.device = device
        yield
        self.device = None

    def compile(self, kernel, signature, device):
        self.compiled.append((kernel, signature, device, self.device))
        return cuda_launch._compiled.setdefault((kernel, device), f"{kernel.__name__} on {device}")

    def launch(self, stream, config, compiled, *values):
        launch = types.SimpleNamespace(
            stream=stream, config=config, compiled=compiled, values=values, device=self.device
        )
        self.launched.append(launch)


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "device", driver.use)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=driver.stream + device.index)
    )
    monkeypatch.setattr(cuda_launch, "Stream", types.SimpleNamespace(from_handle=lambda handle: ("stream", handle)))
    monkeypatch.setattr(cuda_launch, "launch_on_stream", driver.launch)
    monkeypatch.setattr(cuda_launch, "_compile", driver.compile)
    monkeypatch.setattr(cuda_launch, "_compiled", {})
    monkeypatch.setattr(cuda_launch, "_streams", {})
    return driver


def kernel(a, b, x, n):
    pass


def other_kernel(a, b, x, n):
    pass


DEVICE, OTHER_DEVICE = torch.device("cuda", 0), torch.device("cuda", 1)


def launch(kernel=kernel, device=DEVICE, real=float32, a=None, x=0.5, n=7):
    signature = void(CPointer(real), CPointer(real), real, int64)
    cuda_launch.launch(kernel, signature, device, 3, (32, 4), a, None, x, n)


def test_tensors_become_addresses(driver):
    a = torch.zeros(4)
    launch(a=a[1:])
    value = driver.launched[0].values[0]
    assert type(value) is int
    assert value == a.data_ptr() + 4


def test_none_becomes_a_null_pointer(driver):
    launch()
    value = driver.launched[0].values[1]
    assert type(value) is int
    assert value == 0


@pytest.mark.parametrize(("real", "scalar"), [(float32, np.float32), (float64, np.float64)], ids=["float32", "float64"])
def test_numbers_have_the_types_of_the_kernel(driver, real, scalar):
    launch(real=real, x=0.1)
    x, n = driver.launched[0].values[2:]
    assert (type(x), x) == (scalar, scalar(0.1))
    assert (type(n), n) == (np.int64, 7)


def test_arguments_keep_their_order(driver):
    a = torch.zeros(4)
    launch(a=a, x=2.0, n=2**40)
    assert driver.launched[0].values == (a.data_ptr(), 0, 2.0, 2**40)


def test_grid_has_the_given_shape(driver):
    launch()
    config = driver.launched[0].config
    assert tuple(config.grid) == (3, 1, 1)
    assert tuple(config.block) == (32, 4, 1)


def test_stream_is_sampled_at_every_launch(driver):
    launch()
    driver.stream = 80
    launch()
    driver.stream = 70
    launch()
    assert [made.stream for made in driver.launched] == [("stream", 70), ("stream", 80), ("stream", 70)]


def test_device_of_the_tensors_is_current_during_the_launch(driver):
    launch(device=OTHER_DEVICE)
    made = driver.launched[0]
    assert made.device == OTHER_DEVICE
    assert made.stream == ("stream", 71)
    assert driver.compiled[0][3] == OTHER_DEVICE


def test_kernel_is_compiled_once(driver):
    launch()
    launch()
    assert [c[0] for c in driver.compiled] == [kernel]
    assert [made.compiled for made in driver.launched] == ["kernel on 0"] * 2


def test_another_device_compiles_again(driver):
    launch()
    launch(device=OTHER_DEVICE)
    launch()
    assert [c[2] for c in driver.compiled] == [0, 1]
    assert [made.compiled for made in driver.launched] == ["kernel on 0", "kernel on 1", "kernel on 0"]


def test_another_kernel_is_compiled_for_itself(driver):
    launch()
    launch(kernel=other_kernel)
    assert [made.compiled for made in driver.launched] == ["kernel on 0", "other_kernel on 0"]
