"""Run the CUDA kernels on CPU tensors: in Numba's simulator, or as compiled code in an emulator of the GPU's assembly.

Both stand in for `cuda_launch.launch`. The emulator is a module `ptxemu`, found in the folder that the environment
variable NUMSRU_PTXEMU names. Importing this file skips the tests that import it where numba.cuda has no CUDA runtime.
"""

import functools
import inspect
import os
import re
import sys
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

try:
    from numba import cuda, float32

    from numsru import cuda_intrinsics
    from numsru.cuda_kernels import REDUCE_SPANS
except DynamicLibNotFoundError as error:
    pytest.skip(f"numba.cuda cannot be imported: {error}", allow_module_level=True)

Shape = tuple[int, int]
# An asynchronous copy to shared memory, which writes zeros if the predicate p is true.
COPY = re.compile(r"cp\.async\.ca\.shared\.global \[([^]]+)\], \[([^]]+)\], ([48]), p;")
FINISH_COPIES = "cp.async.wait_all;"
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
    if where == "emulator":
        return no_compiler()
    if where == "device" and not torch.cuda.is_available():
        return "no CUDA device"
    return ""


def no_compiler() -> str:
    """Which of the libraries that compile kernels is missing; empty if none."""
    try:
        for library in ("nvvm", "nvrtc", "nvJitLink"):
            load_nvidia_dynamic_lib(library)
    except DynamicLibNotFoundError as error:
        return f"no compiler: {str(error).splitlines()[0]}"
    return ""


def simulate(kernel: Any, device: Any, blocks: Shape, block: Shape, *arguments: Any) -> None:
    assert min(blocks) > 0, "a GPU refuses a launch without blocks"
    with warnings.catch_warnings():
        # NumPy warns of arithmetic with infinities, a GPU does not.
        warnings.simplefilter("ignore", RuntimeWarning)
        cuda.jit(kernel.function)[blocks, block](*_flat(kernel, *arguments))


def emulate(kernel: Any, device: Any, blocks: Shape, block: Shape, *arguments: Any) -> None:
    """Every load and store is checked; so are races, and that every element of every result is written."""
    run_emulator(kernel, blocks, block, arguments, check_races=True, stats=False)


def run_emulator(kernel: Any, blocks: Shape, block: Shape, arguments: tuple[Any, ...], **options: Any) -> Any:
    assert min(blocks) > 0, "a GPU refuses a launch without blocks"
    values = [0 if a is None else a for a in _flat(kernel, *arguments)]
    names = list(inspect.signature(kernel.function).parameters)
    reduces = inspect.getclosurevars(kernel.function).nonlocals["stage"] == REDUCE_SPANS
    written = ("span_decay", "span_offset") if reduces else OUTPUTS[kernel.function.__name__]
    outputs = [i for i, a in enumerate(values) if isinstance(a, np.ndarray) and names[i] in written]
    for i, a in enumerate(values):
        if isinstance(a, np.ndarray) and i not in outputs:
            a.flags.writeable = False
    result = _emulator().launch(
        _compile(kernel), blocks, block, values, poison=outputs,
        # The error that float32's instructions may have. Float64's tanh uses them only where they are exact.
        approx_error=1.0 if float32 in kernel.signature.args else 0.0, **options,
    )  # fmt: skip
    assert not result.errors
    assert not result.races, "\n".join(map(str, result.races))
    # Rows of different lengths leave some of `saved` unused; were it read, the NaN there would spread.
    unwritten = {names[i]: int(result.unwritten(i).sum()) for i in outputs if names[i] != "saved"}
    assert not any(unwritten.values()), f"elements never written: {unwritten}"
    return result


def _compile(kernel: Any) -> Any:
    if kernel not in _compiled:
        emulator = _emulator()

        def program(modules: list[Any]) -> Any:
            return make_program([_copy_at_once(m if isinstance(m, str) else m.decode()) for m in modules])

        make_program = emulator.Program
        with mock.patch.object(emulator, "Program", program):
            _compiled[kernel] = emulator.compile(
                kernel.function, kernel.signature, cc=(9, 0), lto=True, launch_bounds=kernel.launch_bounds((9, 0))
            )
    return _compiled[kernel]


def _copy_at_once(ptx: str) -> str:
    """The emulator knows no asynchronous copies: they become a load and a store, of the same addresses and size."""

    def load_and_store(copy: re.Match[str]) -> str:
        to, start, size = copy.groups()
        b = f"b{8 * int(size)}"
        return f".reg .{b} v; mov.{b} v, 0; @!p ld.global.{b} v, [{start}]; st.shared.{b} [{to}], v;"

    return COPY.sub(load_and_store, ptx).replace(FINISH_COPIES, "")


_compiled: dict[Any, Any] = {}


@functools.cache
def _emulator() -> Any:
    sys.path.append(os.environ["NUMSRU_PTXEMU"])
    import ptxemu

    return ptxemu


def _flat(kernel: Any, arrays: tuple[torch.Tensor | None, ...], factor: float, numbers: tuple[int, ...]) -> list[Any]:
    """The arguments as a kernel sees them, with arrays of words in place of addresses."""
    values: list[Any] = []
    for a, pointer in zip(arrays, kernel.signature.args, strict=False):
        if a is not None:
            flat = a.detach().view(-1)  # refuses what is not contiguous
            bits = flat.view({1: torch.uint8, 2: torch.int16}.get(flat.itemsize, flat.dtype)).numpy()
            a = bits.view(getattr(np, pointer.dtype.name))
        values.append(a)
    return [*values, kernel.real(factor), *map(np.int64, numbers)]
