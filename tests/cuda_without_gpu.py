"""Run the CUDA kernels on CPU tensors: in Numba's simulator, or as compiled code in an emulator of the GPU's assembly.

Both stand in for `cuda_launch.launch`. The emulator is a module `ptxemu`, found in the folder that the environment
variable NUMSRU_PTXEMU names. Importing this file skips the tests that import it where numba.cuda has no CUDA runtime.
"""

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cuda.pathfinder import DynamicLibNotFoundError

try:
    from numba import cuda, float32

    from numsru import cuda_intrinsics
except DynamicLibNotFoundError as error:
    pytest.skip(f"numba.cuda cannot be imported: {error}", allow_module_level=True)

Kernel = Callable[..., None]
OUTPUTS = {
    "forward": ("h", "c_n", "saved"),
    "backward": ("grad_u", "grad_x", "grad_c_0", "sum_bias", "sum_weight_c"),
}


def why_not(where: str) -> str:
    """Why the kernels cannot run there in this process; empty if they can."""
    if where == "simulator" and not cuda_intrinsics.SIMULATED:
        return "set NUMBA_ENABLE_CUDASIM=1 to run the kernels in the simulator"
    if where != "simulator" and cuda_intrinsics.SIMULATED:
        return "unset NUMBA_ENABLE_CUDASIM to compile the kernels"
    if where == "emulator" and "NUMSRU_PTXEMU" not in os.environ:
        return "set NUMSRU_PTXEMU to the folder of the PTX emulator"
    if where == "device" and not torch.cuda.is_available():
        return "no CUDA device"
    return ""


def simulate(kernel: Kernel, signature: Any, device: Any, blocks: int, block: tuple[int, int], *arguments: Any) -> None:
    with warnings.catch_warnings():
        # NumPy warns of arithmetic with infinities, a GPU does not.
        warnings.simplefilter("ignore", RuntimeWarning)
        cuda.jit(kernel)[blocks, block](*_flat(signature, arguments))


def emulate(kernel: Kernel, signature: Any, device: Any, blocks: int, block: tuple[int, int], *arguments: Any) -> None:
    """Every load and store is checked; so are races, and that every element of every result is written."""
    values = [0 if a is None else a for a in _flat(signature, arguments)]
    names = list(inspect.signature(kernel).parameters)
    arrays = [i for i, a in enumerate(values) if isinstance(a, np.ndarray)]
    outputs = [i for i in arrays if names[i] in OUTPUTS[kernel.__name__]]
    for i in set(arrays) - set(outputs):
        values[i].flags.writeable = False
    result = _emulator().launch(
        _compile(kernel, signature), blocks, block, values, check_races=True, poison=outputs, stats=False,
        # The error that float32's instructions may have. Float64's tanh uses them only where they are exact.
        approx_error=1.0 if float32 in signature.args else 0.0,
    )  # fmt: skip
    assert not result.errors
    assert not result.races, "\n".join(map(str, result.races))
    # Rows of different lengths leave some of `saved` unused; were it read, the NaN there would spread.
    unwritten = {names[i]: int(result.unwritten(i).sum()) for i in outputs if names[i] != "saved"}
    assert not any(unwritten.values()), f"elements never written: {unwritten}"


@functools.cache
def _compile(kernel: Kernel, signature: Any) -> Any:
    return _emulator().compile(kernel, signature, cc=(9, 0), lto=True)


@functools.cache
def _emulator() -> Any:
    sys.path.append(os.environ["NUMSRU_PTXEMU"])
    import ptxemu

    return ptxemu


def _flat(signature: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments as a kernel sees them, with arrays in place of addresses."""
    scalar = np.float32 if float32 in signature.args else np.float64
    values: list[Any] = []
    for a in arguments:
        if isinstance(a, torch.Tensor):
            flat = a.detach().view(-1)  # refuses what is not contiguous
            value = (flat.view(torch.uint8) if flat.dtype == torch.bool else flat).numpy()
        else:
            value = scalar(a) if isinstance(a, float) else None if a is None else np.int64(a)
        values.append(value)
    return values
