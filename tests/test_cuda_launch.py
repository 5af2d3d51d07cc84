"""The launcher without a device: what reaches the driver, on which stream, and what is compiled when."""

import contextlib
import ctypes
import struct
import threading
import types

import cuda_without_gpu  # noqa: F401  skips this file where numba.cuda cannot be imported
import numpy as np
import pytest
import torch
from cuda.bindings.driver import CUresult
from numba import float32, float64, int64
from numba.types import CPointer, void

from numsru import cuda_launch
from numsru.cuda_launch import Kernel

HANDLES = {"function on 0": 10, "function on 1": 11, "other_function on 0": 20}


class Driver:
    """Stands in for torch's and the driver's state. Records what is compiled and what is launched."""

    def __init__(self):
        self.stream, self.device, self.capturing, self.compiled, self.launched = 70, 0, False, [], []
        self.contexts = {}  # by thread, the device whose context is current
        self.without_context, self.error = CUresult.CUDA_ERROR_INVALID_CONTEXT, CUresult.CUDA_SUCCESS

    @contextlib.contextmanager
    def use(self, device):
        before, self.device = self.device, device
        yield
        self.device = before

    def set_context(self, device):
        self.contexts[threading.get_ident()] = device

    def jit(self, signature, launch_bounds):
        def compile_for_device(function):
            self.compiled.append((function, launch_bounds, self.device))
            compiled = types.SimpleNamespace(handle=f"{function.__name__} on {self.device}")
            library = types.SimpleNamespace(get_cufunc=lambda: compiled)
            return types.SimpleNamespace(overloads={signature.args: types.SimpleNamespace(library=library)})

        return compile_for_device

    def launch(self, function, *others):
        *shape, shared, stream, pointers, extra = others
        if self.contexts.get(threading.get_ident()) != self.device:
            return int(self.without_context)
        pairs = (ctypes.c_void_p * 5).from_buffer(extra)
        assert (shared, pointers, pairs[0], pairs[2], pairs[4]) == (0, None, 1, 2, None)
        size = ctypes.c_size_t.from_address(pairs[3]).value
        made = types.SimpleNamespace(
            stream=stream, shape=tuple(shape), function=function, arguments=ctypes.string_at(pairs[1], size)
        )
        self.launched.append(made)
        return int(self.error)


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "device", driver.use)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: driver.capturing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device))
    monkeypatch.setattr(cuda_launch, "_current_device", lambda: driver.device)
    monkeypatch.setattr(cuda_launch, "_current_stream", lambda device: driver.stream + device)
    monkeypatch.setattr(cuda_launch, "_launch_kernel", lambda: driver.launch)
    monkeypatch.setattr(cuda_launch.cuda, "jit", driver.jit)
    monkeypatch.setattr(
        cuda_launch.driver, "cuKernelGetFunction", lambda handle: (CUresult.CUDA_SUCCESS, HANDLES[handle])
    )
    set_context = driver.set_context
    monkeypatch.setattr(
        cuda_launch, "Device", lambda index: types.SimpleNamespace(set_current=lambda: set_context(index))
    )
    return driver


def function(a, b, x, n, m):
    pass


def other_function(a, b, x, n, m):
    pass


def make_kernel(function=function, real=float32):
    return Kernel(function, void(CPointer(real), CPointer(real), real, int64, int64), lambda cc: (128, cc[0]))


def launch(kernel=None, device=0, a=None, x=0.5, n=7):
    cuda_launch.launch(kernel or make_kernel(), device, (3, 2), (32, 4), (a, None), x, (n, 8))


# As C lays out the kernel's parameters: 64 bits each, a float in the lower half.
LAYOUT = {float32: "<QQf4xqq", float64: "<QQdqq"}


@pytest.mark.parametrize("real", [float32, float64], ids=str)
def test_arguments_are_laid_out_as_the_kernel_expects_them(driver, real):
    a = torch.zeros(4)
    launch(make_kernel(real=real), a=a[1:], x=0.1, n=2**40)
    x = float(np.float32(0.1)) if real == float32 else 0.1
    arguments = driver.launched[0].arguments
    assert struct.unpack(LAYOUT[real], arguments) == (a.data_ptr() + 4, 0, x, 2**40, 8)


def test_grid_has_the_given_shape(driver):
    launch()
    assert driver.launched[0].shape == (3, 2, 1, 32, 4, 1)


def test_stream_is_sampled_at_every_launch(driver):
    for driver.stream in (70, 80, 70):
        launch()
    assert [made.stream for made in driver.launched] == [70, 80, 70]


def test_device_of_the_tensors_is_current_during_the_launch(driver):
    launch(device=1)
    made = driver.launched[0]
    assert (made.function, made.stream) == (11, 71)
    assert driver.compiled == [(function, (128, 9), 1)]
    assert driver.device == 0


def test_kernel_is_compiled_once(driver):
    kernel = make_kernel()
    launch(kernel)
    launch(kernel)
    assert driver.compiled == [(function, (128, 9), 0)]
    assert [made.function for made in driver.launched] == [10, 10]


def test_another_device_compiles_again(driver):
    kernel = make_kernel()
    for device in (0, 1, 0):
        launch(kernel, device)
    assert [device for _, _, device in driver.compiled] == [0, 1]
    assert [made.function for made in driver.launched] == [10, 11, 10]


def test_another_kernel_is_compiled_for_itself(driver):
    launch()
    launch(make_kernel(other_function))
    assert [made.function for made in driver.launched] == [10, 20]


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


@pytest.mark.parametrize("error", [CUresult.CUDA_ERROR_INVALID_CONTEXT, CUresult.CUDA_ERROR_INVALID_HANDLE])
def test_threads_need_no_context(driver, error):
    kernel = make_kernel()
    launch(kernel)
    driver.without_context = error
    thread = threading.Thread(target=launch, args=(kernel,))
    thread.start()
    thread.join()
    assert len(driver.launched) == 2


def test_errors_of_the_driver_are_named(driver):
    driver.error = CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
    with pytest.raises(RuntimeError, match="launch of a CUDA kernel failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        launch()
