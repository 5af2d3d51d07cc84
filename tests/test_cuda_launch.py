"""The launcher without a device: what reaches the driver, on which stream, and what is compiled when."""

import contextlib
import sys
import threading
import types

import cuda_without_gpu  # noqa: F401  skips this file where numba.cuda cannot be imported
import numba
import numpy as np
import pytest
import torch
from numba import float32, float64, int64
from numba.types import CPointer, void

import numsru
from numsru import backend, cuda_kernels, cuda_launch
from numsru.cuda_launch import Kernel


class Driver:
    """Stands in for torch's and the driver's state. Records what is compiled and what is launched."""

    def __init__(self):
        self.stream, self.device, self.capturing, self.compiled, self.launched = 70, 0, False, [], []
        self.bound = []  # (thread, device)
        self.names = []  # of what is compiled
        self.loads = True  # whether code from disk can be loaded

    @contextlib.contextmanager
    def use(self, device):
        before, self.device = self.device, device
        yield
        self.device = before

    def jit(self, signature, launch_bounds, cache=False):
        def compile_for_device(function):
            self.compiled.append((function, launch_bounds, self.device))
            self.names.append(function.__qualname__)

            def load():
                if cache and not self.loads:
                    raise RuntimeError("CUDA_ERROR_INVALID_IMAGE")
                return types.SimpleNamespace(kernel=f"{function.__name__} on {self.device}")

            library = types.SimpleNamespace(get_cufunc=load)
            return types.SimpleNamespace(overloads={signature.args: types.SimpleNamespace(library=library)})

        return compile_for_device

    def launch(self, stream, config, compiled, *values):
        launch = types.SimpleNamespace(
            stream=stream, config=config, compiled=compiled, values=values, device=self.device
        )
        self.launched.append(launch)


@pytest.fixture
def driver(monkeypatch, tmp_path):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "device", driver.use)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: driver.device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: driver.capturing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device))
    monkeypatch.setattr(cuda_launch, "_current_stream", lambda device: driver.stream + device)
    monkeypatch.setattr(cuda_launch, "Stream", types.SimpleNamespace(from_handle=lambda handle: ("stream", handle)))
    monkeypatch.setattr(cuda_launch, "launch_on_stream", driver.launch)
    monkeypatch.setattr(cuda_launch.cuda, "jit", driver.jit)
    monkeypatch.setattr(cuda_launch, "_streams", {})
    monkeypatch.setattr(cuda_launch, "_thread", cuda_launch._Thread())
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    bind = lambda index: driver.bound.append((threading.get_ident(), index))  # noqa: E731
    monkeypatch.setattr(cuda_launch, "Device", lambda index: types.SimpleNamespace(set_current=lambda: bind(index)))
    return driver


def function(a, b, x, n, m):
    pass


def other_function(a, b, x, n, m):
    pass


def make_kernel(function=function, real=float32):
    signature = void(CPointer(real), CPointer(real), real, int64, int64)
    return Kernel(function, signature, lambda cc: (128, cc[0]), "what it is made from")


DEVICE, OTHER_DEVICE = torch.device("cuda", 0), torch.device("cuda", 1)


def launch(kernel=None, device=DEVICE, a=None, x=0.5, n=7):
    cuda_launch.launch(kernel or make_kernel(), device, (3, 2), (32, 4), (a, None), x, (n, 8))


def test_code_on_disk_that_cannot_be_loaded_is_compiled_anew(driver):
    driver.loads = False
    launch()
    assert len(driver.compiled) == 2
    assert driver.launched[0].compiled == "function on 0"


def test_kernels_of_two_capabilities_have_two_names_on_disk(driver):
    kernel = make_kernel()
    for device in (DEVICE, OTHER_DEVICE):
        launch(kernel, device)
    assert len(set(driver.names)) == 2


def test_kernels_of_two_releases_of_the_compiler_have_two_names_on_disk(driver, monkeypatch):
    for version in ("1", "2"):
        monkeypatch.setattr(cuda_launch.numba_cuda, "__version__", version)
        launch()
    assert len(set(driver.names)) == 2


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
    launch(make_kernel(real=real), x=0.1)
    x, *numbers = driver.launched[0].values[2:]
    assert (type(x), x) == (scalar, scalar(0.1))
    assert [(type(n), n) for n in numbers] == [(int, 7), (int, 8)]  # which cuda.core passes on as 64 bits


def test_arguments_keep_their_order(driver):
    a = torch.zeros(4)
    launch(a=a, x=2.0, n=2**40)
    assert driver.launched[0].values == (a.data_ptr(), 0, 2.0, 2**40, 8)


def test_grid_has_the_given_shape(driver):
    launch()
    config = driver.launched[0].config
    assert tuple(config.grid) == (3, 2, 1)
    assert tuple(config.block) == (32, 4, 1)


def test_stream_is_sampled_at_every_launch(driver):
    for driver.stream in (70, 80, 70):
        launch()
    assert [made.stream for made in driver.launched] == [("stream", 70), ("stream", 80), ("stream", 70)]


def test_device_of_the_tensors_is_current_during_the_launch(driver):
    launch(device=OTHER_DEVICE)
    made = driver.launched[0]
    assert made.device == 1
    assert made.stream == ("stream", 71)
    assert driver.compiled == [(function, (128, 9), 1)]
    assert driver.device == 0


def test_kernel_is_compiled_once(driver):
    kernel = make_kernel()
    launch(kernel)
    launch(kernel)
    assert driver.compiled == [(function, (128, 9), 0)]
    assert [made.compiled for made in driver.launched] == ["function on 0"] * 2


def test_another_device_compiles_again(driver):
    kernel = make_kernel()
    for device in (DEVICE, OTHER_DEVICE, DEVICE):
        launch(kernel, device)
    assert [device for _, _, device in driver.compiled] == [0, 1]
    assert [made.compiled for made in driver.launched] == ["function on 0", "function on 1", "function on 0"]


def test_another_kernel_is_compiled_for_itself(driver):
    launch()
    launch(make_kernel(other_function))
    assert [made.compiled for made in driver.launched] == ["function on 0", "other_function on 0"]


def test_nothing_is_compiled_into_a_graph(driver):
    driver.capturing = True
    kernel = make_kernel()
    with pytest.raises(RuntimeError, match=r"numsru\.warmup.*before the capture"):
        launch(kernel)
    driver.capturing = False
    launch(kernel)
    driver.capturing = True
    launch(kernel)
    assert len(driver.launched) == 2


def test_every_thread_makes_the_context_current_before_its_first_launch(driver):
    kernel = make_kernel()
    for _ in range(2):
        launch(kernel)
    thread = threading.Thread(target=launch, args=(kernel,))
    thread.start()
    other = thread.ident
    thread.join()
    assert driver.bound == [(threading.get_ident(), 0), (other, 0)]
    assert len(driver.launched) == 3


def test_missing_libraries_are_named(monkeypatch):
    assert backend.kernels_for("cuda") is cuda_kernels
    monkeypatch.setitem(sys.modules, "numsru.cuda_kernels", None)  # importing it is an error
    monkeypatch.delattr(numsru, "cuda_kernels")
    with pytest.raises(ImportError) as raised:
        backend.kernels_for("cuda")
    assert "pip install 'numsru[cuda13]'" in raised.value.__notes__[0]
