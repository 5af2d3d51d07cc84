"""The kernels compiled for several GPUs, without one: their resources, their instructions; no compiler at all."""

import functools
import re
import types
from unittest import mock

import cuda_without_gpu  # noqa: F401  skips this file where numba.cuda cannot be imported
import pytest
from cuda.core import Linker, LinkerOptions, ObjectCode
from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib
from numba import cuda, float32, float64

from numsru import cuda_kernels, cuda_launch
from numsru.cuda_intrinsics import SIMULATED
from numsru.cuda_kernels import Tile, backward_kernel, forward_kernel
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

REGISTERS_OF_A_BLOCK = 65536
ONE_CHUNK, EIGHT_CHUNKS = Tile(128, 1, 8), Tile(32, 8, 8)

PLAIN = Options(save_c=True)
RICH = Options(1, SELU, HIGHWAY, SKIP_PROJECTED, LENGTHS, has_c_0=True, has_mask_c=True, save_c=True)
BARE = Options(1, RELU, skip=NO_SKIP, padding=MASK, save_c=True)
PLAIN_2 = Options(2, IDENTITY, save_c=True)
RICH_2 = Options(2, TANH, padding=PACKED, has_c_0=True, has_mask_c=True, save_c=True)

COMPILED = [
    (PLAIN, ONE_CHUNK, float32),
    (PLAIN, EIGHT_CHUNKS, float32),
    (RICH, EIGHT_CHUNKS, float32),
    (RICH, EIGHT_CHUNKS, float64),
    (BARE, EIGHT_CHUNKS, float32),
    (PLAIN_2, ONE_CHUNK, float32),
    (RICH_2, ONE_CHUNK, float64),
]
NAMES = {PLAIN: "plain", RICH: "rich", BARE: "bare", PLAIN_2: "plain", RICH_2: "rich"}


def _why_not():
    try:
        for library in ("nvvm", "nvrtc", "nvJitLink"):
            load_nvidia_dynamic_lib(library)
    except DynamicLibNotFoundError as error:
        return f"no compiler: {str(error).splitlines()[0]}"
    return ""


needs_compiler = pytest.mark.skipif(bool(reason := _why_not()), reason=reason)


def kernels(compiled):
    ids = [f"version_{o.version}-{NAMES[o]}-{tile.chunks}-{real}" for o, tile, real in compiled]
    return pytest.mark.parametrize(("options", "tile", "real"), compiled, ids=ids)


passes = pytest.mark.parametrize("make_kernel", [forward_kernel, backward_kernel], ids=["forward", "backward"])
capabilities = pytest.mark.parametrize(
    "cc", [(7, 5), (8, 0), (9, 0, "a"), (10, 0, "a")], ids=["7.5", "8.0", "9.0", "10.0"]
)


@functools.cache
def _library(make_kernel, options, tile, real):
    """What `cuda.jit` makes before it knows the device. That takes seconds; the rest, for a device, little time."""
    from numba.cuda.compiler import _compile_pyfunc_with_fixup

    signature = cuda_kernels.signatures(options, real)[make_kernel is backward_kernel]
    device = types.SimpleNamespace(compute_capability=(9, 0))
    with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=device):
        return _compile_pyfunc_with_fixup(
            make_kernel(options, real, tile), signature, device=False, abi="numba", cc=(9, 0), lto=True
        )[0]


def _link(library, cc, kind, **options):
    """Machine code or PTX after optimisation at link time, as `cuda.jit` has it, with the linker's remarks."""
    options = LinkerOptions(arch="sm_" + "".join(map(str, cc)), link_time_optimization=True, **options)
    linker = Linker(ObjectCode.from_ltoir(library.get_ltoir(cc=cc)), options=options)
    return linker.link(kind).code, linker.get_info_log()


@functools.cache
def _ptx(library, cc):
    return _link(library, cc, "ptx", ptx=True)[0].decode()


@needs_compiler
@capabilities
@passes
@kernels(COMPILED)
def test_kernel_fits_into_registers(make_kernel, options, tile, real, cc):
    _, log = _link(_library(make_kernel, options, tile, real), cc, "cubin", ptxas_options=["-v"])
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", log)
    assert int(re.search(r"Used (\d+) registers", log)[1]) * tile.columns * tile.chunks <= REGISTERS_OF_A_BLOCK


@needs_compiler
@capabilities
@passes
@kernels(COMPILED)
def test_kernel_calls_nothing(make_kernel, options, tile, real, cc):
    ptx = _ptx(_library(make_kernel, options, tile, real), cc)
    assert ".entry" in ptx
    assert not re.search(r"\bcall\b", ptx)


@needs_compiler
@capabilities
@passes
@kernels([c for c in COMPILED if c[2] is float32])
def test_float32_kernel_has_no_float64_instruction(make_kernel, options, tile, real, cc):
    assert ".f64" not in _ptx(_library(make_kernel, options, tile, real), cc)


@pytest.mark.parametrize("error", [NvvmSupportError, DynamicLibNotFoundError])
def test_missing_compiler_is_named(monkeypatch, error):
    def jit(signature):
        raise error("no libnvvm")

    monkeypatch.setattr(cuda, "jit", jit)
    monkeypatch.setattr(cuda_launch, "_compiled", {})
    with pytest.raises(RuntimeError, match=r"no libnvvm.*pip install 'numsru\[cuda1[23]\]'"):
        cuda_launch._compile(forward_kernel(PLAIN, float32, ONE_CHUNK), None, 0)
