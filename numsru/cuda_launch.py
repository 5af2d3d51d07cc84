"""Compile a kernel once for each device and launch it on torch's current stream.

Numba compiles; the launch itself is a call of the driver by ctypes. It takes a few microseconds, where
`kernel[grid, block](...)` examines every array anew and takes ten to a hundred. Once a kernel is compiled nothing here
waits or allocates memory of the device, so that CUDA graphs can capture a launch.
"""

import ctypes
import functools
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from cuda.bindings import driver
from cuda.core import Device
from cuda.pathfinder import DynamicLibNotFoundError
from numba import cuda, types
from torch import Tensor

_compiling = threading.Lock()
_FORMATS = {types.float32: "f", types.float64: "d", types.int64: "q"}  # of `struct`, by the type of an argument

# What cuLaunchKernel takes in place of an array of pointers to the arguments: the arguments in a row, and their size.
_Extra = ctypes.c_char_p * 5
_BUFFER, _SIZE = 1, 2


class Kernel:
    """A plain function that becomes a kernel, compiled on each device where it is launched.

    Args:
        signature: Numba types of the arguments: pointers, one floating type, and int64. Nothing checks that the
            arguments are of them.
        launch_bounds: Of a compute capability: the most threads of a block, and how many blocks a multiprocessor must
            be able to hold at once.
    """

    def __init__(
        self, function: Callable[..., None], signature: Any,
        launch_bounds: Callable[[tuple[int, int]], tuple[int, int]],
    ) -> None:  # fmt: skip
        self.function, self.signature, self.launch_bounds = function, signature, launch_bounds
        arguments = struct.Struct("@" + "".join(_FORMATS.get(a, "P") for a in signature.args))
        self.pack, self.size = arguments.pack, struct.pack("N", arguments.size)
        self.compiled: dict[int, int] = {}  # handles, by index of the device


def _current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# Without checks and the object around the handle, which take longer than the launch. Only builds for CUDA have these.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def launch(
    kernel: Kernel,
    device: int,
    blocks: tuple[int, int],
    block: tuple[int, int],
    arrays: tuple[Tensor | None, ...],
    factor: float,
    numbers: tuple[int, ...],
) -> None:
    """Launch a kernel with `block` threads in each of `blocks` blocks.

    Args:
        device: Its index.
        arrays: Contiguous tensors on the device, the kernel's first arguments; None for a null pointer.
        factor: The argument of floating type.
        numbers: The integers behind it.
    """
    if device != _current_device():
        with torch.cuda.device(device):
            return launch(kernel, device, blocks, block, arrays, factor, numbers)
    function = kernel.compiled.get(device) or _compile(kernel, device)
    # `data_ptr` is what `__cuda_array_interface__` gives, at a thirtieth of its cost.
    arguments = kernel.pack(*[0 if a is None else a.data_ptr() for a in arrays], factor, *numbers)
    extra = _Extra(_BUFFER, arguments, _SIZE, kernel.size, None)
    to_driver = function, *blocks, 1, *block, 1, 0, _current_stream(device), None, extra
    error = _launch_kernel()(*to_driver)
    if error in _NO_CONTEXT:
        # Torch makes a thread's context current late, at its own first launch there.
        Device(device).set_current()
        error = _launch_kernel()(*to_driver)
    if error:
        raise RuntimeError(f"the launch of a CUDA kernel failed: {driver.CUresult(error).name}")


_NO_CONTEXT = (int(driver.CUresult.CUDA_ERROR_INVALID_CONTEXT), int(driver.CUresult.CUDA_ERROR_INVALID_HANDLE))


@functools.cache
def _launch_kernel() -> Callable[..., int]:
    """The driver's cuLaunchKernel. `cuda.bindings` and `cuda.core` have it too, at several times its cost."""
    pointer = _check(driver.cuGetProcAddress(b"cuLaunchKernel", 12000, 0))
    size, address = ctypes.c_uint, ctypes.c_void_p
    return ctypes.CFUNCTYPE(ctypes.c_int, address, *[size] * 7, address, address, address)(int(pointer))


def _check(result: tuple[Any, ...]) -> Any:
    """What a function of the driver returned besides its error code."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver returned {error.name}")
    return values[0]


def _compile(kernel: Kernel, device: int) -> int:
    """The handle of the kernel, compiled for the current device and loaded there."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured and numsru has to compile a kernel, which a graph cannot contain. Call "
            "numsru.warmup, or the module once, before the capture"
        )
    with _compiling:
        if device not in kernel.compiled:
            Device(device).set_current()
            try:
                bounds = kernel.launch_bounds(torch.cuda.get_device_capability(device))
                dispatcher = cuda.jit(kernel.signature, launch_bounds=bounds)(kernel.function)
                compiled = dispatcher.overloads[kernel.signature.args].library.get_cufunc()
            except (ImportError, DynamicLibNotFoundError) as error:
                extra = "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda13"
                raise RuntimeError(
                    f"numsru cannot compile its CUDA kernels: {error}. Install the compiler's libraries with "
                    f"pip install 'numsru[{extra}]'"
                ) from error
            kernel.compiled[device] = int(_check(driver.cuKernelGetFunction(compiled.handle)))
            _modules.append(compiled)
        return kernel.compiled[device]


_modules: list[Any] = []  # the kernels' code stays loaded as long as these live
