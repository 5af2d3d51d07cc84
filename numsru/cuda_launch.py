"""Compile a kernel once for each device and launch it on torch's current stream.

Numba compiles; the launch itself goes through `cuda.core`, on which numba-cuda is built. It takes a few microseconds,
where `kernel[grid, block](...)` examines every array anew and takes ten to a hundred.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cuda.core import LaunchConfig, Stream
from cuda.core import launch as launch_on_stream
from cuda.pathfinder import DynamicLibNotFoundError
from numba import cuda, float32
from torch import Tensor

_compiled: dict[tuple[Callable[..., None], int], Any] = {}
_compiling = threading.Lock()
_streams: dict[int, Stream] = {}  # by handle: making one costs more than a launch
_config = functools.lru_cache(4096)(lambda grid, block: LaunchConfig(grid=grid, block=block))


def launch(
    kernel: Callable[..., None],
    signature: Any,
    device: torch.device,
    blocks: int,
    block: tuple[int, int],
    *arguments: Any,
) -> None:
    """Launch `kernel`, a plain function, with `block` threads in each of `blocks` blocks.

    Args:
        signature: Numba types of the arguments: pointers, int64 and one floating type. Nothing checks that the
            arguments are of them.
        arguments: Tensors on `device`, contiguous; None for a null pointer; numbers.
    """
    real = np.float32 if float32 in signature.args else np.float64
    values = [_value(a, real) for a in arguments]
    with torch.cuda.device(device):
        compiled = _compiled.get((kernel, device.index)) or _compile(kernel, signature, device.index)
        handle = torch.cuda.current_stream(device).cuda_stream
        stream = _streams.get(handle) or _streams.setdefault(handle, Stream.from_handle(handle))
        launch_on_stream(stream, _config(blocks, block), compiled, *values)


def _value(a: Any, real: Any) -> Any:
    """An argument as `cuda.core` takes it: an address is a Python int, a number a NumPy scalar."""
    if isinstance(a, Tensor):
        return a.data_ptr()  # what `__cuda_array_interface__` gives, at a thirtieth of its cost
    if a is None:
        return 0
    return real(a) if isinstance(a, float) else np.int64(a)


def _compile(kernel: Callable[..., None], signature: Any, device: int) -> Any:
    """The kernel, compiled for the current device and loaded there."""
    with _compiling:
        if (kernel, device) not in _compiled:
            try:
                dispatcher = cuda.jit(signature)(kernel)
                compiled = dispatcher.overloads[signature.args].library.get_cufunc().kernel
            except (ImportError, DynamicLibNotFoundError) as error:
                extra = "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda13"
                raise RuntimeError(
                    f"numsru cannot compile its CUDA kernels: {error}. Install the compiler's libraries with "
                    f"pip install 'numsru[{extra}]'"
                ) from error
            _compiled[kernel, device] = compiled
        return _compiled[kernel, device]
