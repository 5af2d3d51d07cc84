"""The kernels compiled for several GPUs, without one: their resources, their instructions; no compiler at all."""

import functools
import re
import subprocess
import sys
import types
from unittest import mock

import cuda_without_gpu  # noqa: F401  skips this file where numba.cuda cannot be imported
import pytest
import torch
from cuda.core import Linker, LinkerOptions, ObjectCode
from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib
from numba import cuda

from numsru import cuda_kernels, cuda_launch
from numsru.cuda_intrinsics import SIMULATED
from numsru.cuda_kernels import REDUCE_SPANS, SPANS, STORAGE, WHOLE, Tile, backward_kernel, forward_kernel
from numsru.recurrence import (
    HIGHWAY,
    IDENTITY,
    LENGTHS,
    MASK,
    NO_SKIP,
    PACKED,
    RELU,
    SELU,
    SKIP_PROJECTED,
    TANH,
    Options,
)

if SIMULATED:
    pytest.skip("unset NUMBA_ENABLE_CUDASIM to compile the kernels", allow_module_level=True)

from numba.cuda.cudadrv.error import NvvmSupportError  # the simulator has none

float16, bfloat16, float32, float64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# The tiles that are chosen for many columns and for few, forward and backward, where pairs can be loaded and where not.
MANY, FEW = (Tile(128, 1, 8), Tile(64, 2, 4)), (Tile(8, 16, 8),) * 2
PAIRS, MORE_PAIRS = (Tile(16, 8, 8, 2, 2), Tile(16, 8, 4, 2)), (Tile(64, 2, 8, 2, 2), Tile(64, 2, 4, 2))
PAIRS_OF_16_BITS = Tile(32, 8, 8, 2), Tile(16, 8, 8, 2)
FEW_PAIRS_OF_16_BITS = Tile(16, 16, 8, 2, 2), Tile(16, 8, 8, 2)
SPLIT = (Tile(16, 8, 8),) * 2
ONE_CHUNK = (Tile(128, 1, 8),) * 2

PLAIN = Options(save_c=True)
RICH = Options(1, SELU, HIGHWAY, SKIP_PROJECTED, LENGTHS, has_c_0=True, has_mask_c=True, save_c=True)
BARE = Options(1, RELU, skip=NO_SKIP, padding=MASK, save_c=True)
PLAIN_2 = Options(2, IDENTITY, save_c=True)
RICH_2 = Options(2, TANH, padding=PACKED, has_c_0=True, has_mask_c=True, save_c=True)

COMPILED = [
    (PLAIN, MANY, float32, WHOLE),
    (PLAIN, FEW, float32, WHOLE),
    (PLAIN, PAIRS, float32, WHOLE),
    (PLAIN, MORE_PAIRS, float32, WHOLE),
    (PLAIN, SPLIT, float32, REDUCE_SPANS),
    (PLAIN, SPLIT, float32, SPANS),
    (PLAIN, PAIRS_OF_16_BITS, bfloat16, WHOLE),
    (PLAIN, FEW_PAIRS_OF_16_BITS, bfloat16, WHOLE),
    (PLAIN, FEW_PAIRS_OF_16_BITS, float16, WHOLE),
    (PLAIN, FEW_PAIRS_OF_16_BITS, bfloat16, REDUCE_SPANS),
    (PLAIN, MANY, bfloat16, WHOLE),
    (RICH, FEW, float32, WHOLE),
    (RICH, PAIRS, float32, WHOLE),
    (RICH, FEW, float64, WHOLE),
    (RICH, PAIRS_OF_16_BITS, bfloat16, WHOLE),
    (BARE, PAIRS, float32, WHOLE),
    (BARE, FEW_PAIRS_OF_16_BITS, bfloat16, WHOLE),
    (PLAIN_2, ONE_CHUNK, float32, WHOLE),
    (PLAIN_2, ONE_CHUNK, bfloat16, WHOLE),
    (RICH_2, ONE_CHUNK, float64, WHOLE),
]
NAMES = {PLAIN: "plain", RICH: "rich", BARE: "bare", PLAIN_2: "plain", RICH_2: "rich"}
STAGES = {WHOLE: "", REDUCE_SPANS: "-reduce", SPANS: "-spans"}


def _why_not():
    try:
        for library in ("nvvm", "nvrtc", "nvJitLink"):
            load_nvidia_dynamic_lib(library)
    except DynamicLibNotFoundError as error:
        return f"no compiler: {str(error).splitlines()[0]}"
    return ""


needs_compiler = pytest.mark.skipif(bool(reason := _why_not()), reason=reason)


def kernels(compiled):
    ids = [
        f"version_{o.version}-{NAMES[o]}-{t.chunks}x{t.lanes}-{str(dtype)[6:]}{STAGES[stage]}"
        for o, (t, _), dtype, stage in compiled
    ]
    return pytest.mark.parametrize(("options", "tile", "dtype", "stage"), compiled, ids=ids)


passes = pytest.mark.parametrize("make_kernel", [forward_kernel, backward_kernel], ids=["forward", "backward"])
capabilities = pytest.mark.parametrize(
    "cc", [(7, 5), (8, 0), (9, 0, "a"), (10, 0, "a")], ids=["7.5", "8.0", "9.0", "10.0"]
)


@functools.cache
def _library(make_kernel, options, tile, dtype, stage, cc):
    """What `cuda.jit` makes before it knows the device. That takes seconds; the rest, for a device, little time."""
    from numba.cuda.compiler import _compile_pyfunc_with_fixup

    kernel = cuda_kernels._kernel(make_kernel, options, STORAGE[dtype], tile, stage)
    device = types.SimpleNamespace(compute_capability=cc)
    with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=device):
        return _compile_pyfunc_with_fixup(
            kernel.function, kernel.signature, device=False, abi="numba", cc=cc, lto=True,
            launch_bounds=kernel.launch_bounds(cc[:2]),
        )[0]  # fmt: skip


def _link(compiled, cc, kind, **options):
    """Machine code or PTX after optimisation at link time, as `cuda.jit` has it, with the linker's remarks."""
    # What Numba makes of a kernel differs between these devices only in launch bounds and rounding to bfloat16.
    library = _library(*compiled, (9, 0) if (8, 0) <= cc < (10, 0) else cc)
    options = LinkerOptions(arch="sm_" + "".join(map(str, cc)), link_time_optimization=True, **options)
    linker = Linker(ObjectCode.from_ltoir(library.get_ltoir(cc=cc)), options=options)
    return linker.link(kind).code, linker.get_info_log()


@functools.cache
def _ptx(compiled):
    # The capability whose code differs most from the emulator's tests, which run that of 9.0.
    return _link(compiled, (7, 5), "ptx", ptx=True)[0].decode()


@functools.cache
def _resources(compiled, cc):
    """Registers of a thread, bytes of its stack, bytes of registers moved to memory."""
    _, log = _link(compiled, cc, "cubin", ptxas_options=["-v"])
    stack, stores, loads = map(
        int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
    )
    return int(re.search(r"Used (\d+) registers", log)[1]), stack, stores + loads


@needs_compiler
def test_kernels_compile_without_what_numpy_2_5_has_removed():
    code = """
import numpy as np
if hasattr(np, "row_stack"):
    del np.row_stack
    np.__all__.remove("row_stack")
from numba import cuda
import numsru.cuda_kernels
cuda.compile_ptx(lambda: None, (), cc=(9, 0))
print(hasattr(np, "row_stack"))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@needs_compiler
@capabilities
@passes
@kernels(COMPILED)
def test_kernel_fits_into_registers(make_kernel, options, tile, dtype, stage, cc):
    tile = tile[make_kernel is backward_kernel]
    registers, stack, spilled = _resources((make_kernel, options, tile, dtype, stage), cc)
    allowed = 0
    if tile.lanes == 2 and dtype.itemsize == 2:
        allowed = 128  # bytes: to fill the GPU, a few registers are moved to memory, which measured is faster
    elif dtype == float64 and cc >= (10, 0):
        allowed = 256  # the compiler for these takes more than the 255 registers that a thread can have
    assert max(stack, spilled) <= allowed
    threads, blocks = cuda_kernels.launch_bounds(make_kernel, options, STORAGE[dtype], tile, cc[:2])
    warps = threads * blocks // 32
    assert -(-registers // 8) * 8 * 32 * warps <= 65536  # a multiprocessor's; a warp gets registers in eights


@needs_compiler
@passes
@kernels(COMPILED)
def test_kernel_calls_nothing(make_kernel, options, tile, dtype, stage):
    ptx = _ptx((make_kernel, options, tile[make_kernel is backward_kernel], dtype, stage))
    assert ".entry" in ptx
    assert not re.search(r"\bcall\b", ptx)


@needs_compiler
@passes
@kernels([c for c in COMPILED if c[2] != float64])
def test_float32_kernel_has_no_float64_instruction(make_kernel, options, tile, dtype, stage):
    assert ".f64" not in _ptx((make_kernel, options, tile[make_kernel is backward_kernel], dtype, stage))


@pytest.mark.parametrize("error", [NvvmSupportError, DynamicLibNotFoundError])
def test_missing_compiler_is_named(monkeypatch, error):
    def jit(signature, **options):
        raise error("no libnvvm")

    monkeypatch.setattr(cuda, "jit", jit)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernel = cuda_kernels._kernel(forward_kernel, PLAIN, STORAGE[float32], MANY[0], WHOLE)
    with pytest.raises(RuntimeError, match=r"no libnvvm.*pip install 'numsru\[cuda1[23]\]'"):
        cuda_launch._compile(kernel, 0)
