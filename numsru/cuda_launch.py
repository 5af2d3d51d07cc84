"""Compile a kernel once for each device and launch it on torch's current stream.

Numba compiles; the launch itself goes through `cuda.core`, on which numba-cuda is built. It takes a few microseconds,
where `kernel[grid, block](...)` examines every array anew and takes ten to a hundred. Once a kernel is compiled nothing
here waits or allocates memory of the device, so that CUDA graphs can capture a launch.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import numba_cuda
import numpy as np
import torch
from cuda.core import Device, LaunchConfig, Stream
from cuda.core import launch as launch_on_stream
from cuda.pathfinder import DynamicLibNotFoundError
from numba import cuda, float32
from torch import Tensor

from .compiling import compile_or_load

_compiling = threading.Lock()
_streams: dict[int, Stream] = {}  # by handle: making one costs more than a launch
_config = functools.lru_cache(4096)(lambda blocks, block: LaunchConfig(grid=blocks, block=block))


class _Thread(threading.local):
    device: int | None = None  # whose context was made current


_thread = _Thread()


class Kernel:
    """A plain function that becomes a kernel, compiled on each device where it is launched.

    Args:
        signature: Numba types of the arguments: pointers, one floating type, and int64. Nothing checks that the
            arguments are of them.
        launch_bounds: Of a compute capability: the most threads of a block, and how many blocks a multiprocessor must
            be able to hold at once.
        what: All that `function` was made from.
    """

    def __init__(
        self, function: Callable[..., None], signature: Any,
        launch_bounds: Callable[[tuple[int, int]], tuple[int, int]], what: Any,
    ) -> None:  # fmt: skip
        self.function, self.signature, self.launch_bounds, self.what = function, signature, launch_bounds, what
        self.real = np.float32 if float32 in signature.args else np.float64
        self.compiled: dict[int, Any] = {}  # by index of the device


def _current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# The handle without the object around it, which takes longer than the launch. Only builds for CUDA have it.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)


def launch(
    kernel: Kernel,
    device: torch.device,
    blocks: tuple[int, int],
    block: tuple[int, int],
    arrays: tuple[Tensor | None, ...],
    factor: float,
    numbers: tuple[int, ...],
) -> None:
    """Launch a kernel with `block` threads in each of `blocks` blocks.

    Args:
        arrays: Contiguous tensors on `device`, the kernel's first arguments; None for a null pointer.
        factor: The argument of floating type.
        numbers: The integers behind it.
    """
    index = device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(kernel, device, blocks, block, arrays, factor, numbers)
    if _thread.device != index:
        # Torch does this late, at its own first launch in a thread. The driver refuses a launch before.
        Device(index).set_current()
        _thread.device = index
    compiled = kernel.compiled.get(index) or _compile(kernel, index)
    handle = _current_stream(index)
    stream = _streams.get(handle) or _streams.setdefault(handle, Stream.from_handle(handle))
    # An int goes to the kernel as 64 bits, which both addresses and int64 have. `data_ptr` is what
    # `__cuda_array_interface__` gives, at a thirtieth of its cost.
    addresses = [0 if a is None else a.data_ptr() for a in arrays]
    launch_on_stream(stream, _config(blocks, block), compiled, *addresses, kernel.real(factor), *numbers)


def _jit(signature: Any, **how: Any) -> Callable[[Callable[..., None]], Any]:
    """`cuda.jit`, up to what is launched: so that code on disk that cannot be loaded is compiled anew."""

    def compile_and_load(function: Callable[..., None]) -> Any:
        return cuda.jit(signature, **how)(function).overloads[signature.args].library.get_cufunc().kernel

    return compile_and_load


def _compile(kernel: Kernel, device: int) -> Any:
    """The kernel, compiled for the current device and loaded there."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured and numsru has to compile a kernel, which a graph cannot contain. Call "
            "numsru.warmup, or the module once, before the capture"
        )
    with _compiling:
        if device not in kernel.compiled:
            try:
                capability = torch.cuda.get_device_capability(device)
                kernel.compiled[device] = compile_or_load(
                    _jit, kernel.signature, kernel.function, (kernel.what, capability, numba_cuda.__version__),
                    launch_bounds=kernel.launch_bounds(capability),
                )  # fmt: skip
            except (ImportError, DynamicLibNotFoundError) as error:
                extra = "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda13"
                raise RuntimeError(
                    f"numsru cannot compile its CUDA kernels: {error}. Install the compiler's libraries with "
                    f"pip install 'numsru[{extra}]'"
                ) from error
        return kernel.compiled[device]
