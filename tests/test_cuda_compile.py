"""The kernels compiled for several GPUs, without one: their resources, their instructions; no compiler at all."""

import functools
import hashlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import cuda_without_gpu  # skips this file where numba.cuda cannot be imported
import numba
import pytest
import torch
from cuda.core import Linker, LinkerOptions, ObjectCode
from cuda.pathfinder import DynamicLibNotFoundError
from numba import cuda

from numsru import cuda_kernels, cuda_launch
from numsru.cuda_intrinsics import SIMULATED
from numsru.cuda_kernels import REDUCE_SPANS, SPANS, STORAGE, WHOLE, Tile, backward_kernel, forward_kernel
from numsru.recurrence import (
    HIGHWAY,
    IDENTITY,
    LENGTHS,
    MASK,
    NO_PADDING,
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

from numba.cuda import dispatcher  # the simulator has none of these
from numba.cuda.cudadrv import devices
from numba.cuda.cudadrv.error import NvvmSupportError

float16, bfloat16, float32, float64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

PLAIN = Options(save_c=True)
RICH = Options(1, SELU, HIGHWAY, SKIP_PROJECTED, LENGTHS, has_c_0=True, has_mask_c=True, save_c=True)
BARE = Options(1, RELU, skip=NO_SKIP, padding=MASK, save_c=True)
PLAIN_2 = Options(2, IDENTITY, save_c=True)
RICH_2 = Options(2, TANH, padding=PACKED, has_c_0=True, has_mask_c=True, save_c=True)


def chosen(options, dtype, columns, lanes, stage=WHOLE, L=2000):
    """Everything but the direction that makes a kernel, with the tiles of forward and backward."""
    tiles = (cuda_kernels.choose_tile(b, options, STORAGE[dtype], L, columns, lanes) for b in (False, True))
    return options, tuple(tiles), dtype, stage


MANY = 10**6
COMPILED = [
    chosen(PLAIN, float32, MANY, 1),
    chosen(PLAIN, float32, 2**13, 2),
    chosen(PLAIN, float32, 2**12, 2, L=2**13),
    chosen(PLAIN, float32, 2**10, 1),
    chosen(PLAIN, float32, 2**9, 1, REDUCE_SPANS),
    chosen(PLAIN, float32, 2**9, 1, SPANS),
    chosen(PLAIN, bfloat16, 2**15, 2),
    chosen(PLAIN, bfloat16, 2**13, 2, L=2**13),
    chosen(PLAIN, bfloat16, 2**12, 2),
    chosen(PLAIN, float16, 2**12, 2),
    chosen(PLAIN, bfloat16, 2**10, 2, REDUCE_SPANS),
    chosen(PLAIN, bfloat16, 2**10, 2, SPANS),
    chosen(PLAIN, bfloat16, MANY, 1),
    chosen(RICH, float32, 2**13, 2),
    chosen(RICH, float64, 2**9, 1),
    chosen(RICH, bfloat16, 2**13, 2),
    chosen(BARE, float32, 2**13, 2),
    chosen(BARE, bfloat16, 2**12, 2),
    chosen(PLAIN_2, float32, MANY, 1),
    chosen(PLAIN_2, bfloat16, MANY, 1),
    chosen(RICH_2, float64, MANY, 1),
]
NAMES = {PLAIN: "plain", RICH: "rich", BARE: "bare", PLAIN_2: "plain", RICH_2: "rich"}
STAGES = {WHOLE: "", REDUCE_SPANS: "-reduce", SPANS: "-spans"}


needs_compiler = pytest.mark.skipif(bool(reason := cuda_without_gpu.no_compiler()), reason=reason)


def kernels(compiled):
    parameters = []
    for options, tiles, dtype, stage in compiled:
        tile = "x".join(map(str, tiles[0][:4]))
        name = f"version_{options.version}-{NAMES[options]}-{tile}-{str(dtype)[6:]}{STAGES[stage]}"
        parameters.append(pytest.param(options, tiles, dtype, stage, id=name))
    return pytest.mark.parametrize(("options", "tile", "dtype", "stage"), parameters, scope="module")


# With this scope the tests of a kernel follow each other, which share what takes long, in most cases on one process.
passes = pytest.mark.parametrize(
    "make_kernel", [forward_kernel, backward_kernel], ids=["forward", "backward"], scope="module"
)
capabilities = pytest.mark.parametrize(
    "cc", [(7, 5), (8, 0), (9, 0, "a"), (10, 0, "a")], ids=["7.5", "8.0", "9.0", "10.0"]
)


def _kernel(make_kernel, options, tile, dtype, stage):
    return cuda_kernels._kernel(make_kernel, options, STORAGE[dtype], tile, stage)


@functools.cache
def _library(make_kernel, options, tile, dtype, stage, cc):
    """What `cuda.jit` makes before it knows the device. That takes seconds; the rest, for a device, little time."""
    from numba.cuda.compiler import _compile_pyfunc_with_fixup

    kernel = _kernel(make_kernel, options, tile, dtype, stage)
    device = types.SimpleNamespace(compute_capability=cc)
    with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=device):
        return _compile_pyfunc_with_fixup(
            kernel.function, kernel.signature, device=False, abi="numba", cc=cc, lto=True,
            launch_bounds=kernel.launch_bounds(cc[:2]),
        )[0]  # fmt: skip


def _link(compiled, cc, kind, **options):
    """Machine code or PTX after optimisation at link time, as `cuda.jit` has it, with the linker's remarks."""
    # What Numba makes of a kernel differs between devices in copies to shared memory and rounding to bfloat16, below
    # 8.0, and in one line: how many blocks a multiprocessor must be able to hold. It is written anew for each.
    bounds = _kernel(*compiled).launch_bounds
    assert bounds(cc[:2])[0] == bounds((9, 0))[0]
    library = _library(*compiled, (9, 0) if cc >= (8, 0) else cc)
    blocks = f'!"minctasm", i32 {bounds(cc[:2])[1]}'
    library._llvm_strs = [re.sub(r'!"minctasm", i32 \d+', blocks, ir) for ir in library.llvm_strs]
    library._ltoir_cache.clear()  # compiled from the former lines
    assert blocks in library.get_llvm_str()
    options = LinkerOptions(arch="sm_" + "".join(map(str, cc)), link_time_optimization=True, **options)
    linker = Linker(ObjectCode.from_ltoir(library.get_ltoir(cc=cc)), options=options)
    return linker.link(kind).code, linker.get_info_log()


@functools.cache
def _ptx(compiled, cc=(7, 5)):
    # By default of the capability whose code differs most from the emulator's tests, which run that of 9.0.
    return _link(compiled, cc, "ptx", ptx=True)[0].decode()


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


@needs_compiler
@passes
@kernels([c for c in COMPILED if c[3] == WHOLE and c[2].itemsize * c[1][0].lanes >= 4])
def test_next_tile_is_copied_while_one_is_computed(make_kernel, options, tile, dtype, stage):
    tile, backward = tile[make_kernel is backward_kernel], make_kernel is backward_kernel
    ptx = _ptx((make_kernel, options, tile, dtype, stage), (9, 0, "a"))
    copies = tile.steps * (3 + (options.skip != NO_SKIP) + backward) + backward  # dL/dh, and a state
    assert ptx.count("cp.async") == len(cuda_without_gpu.COPY.findall(ptx)) + 1
    what = re.findall(r"cp\.async\.ca|cp\.async\.wait_all|ld\.shared|bar\.sync|st\.global", ptx)
    start, wait = "cp.async.ca", "cp.async.wait_all"
    assert what[: copies + 1] == [start] * copies + [wait]  # the first tile's
    next_copies = what[copies + 1 :].index(start) + copies + 1
    assert set(what[copies + 1 : next_copies]) == {"ld.shared"}  # all that was copied, before it is written over
    assert what[next_copies : next_copies + copies] == [start] * copies
    assert start not in what[next_copies + copies :]


def compile_without_driver():
    """How many kernels are compiled, not loaded from disk, and a hash of the code that a device would be given."""
    compiled, code, compile_kernel = [], hashlib.sha256(), dispatcher._Kernel.__init__
    device = types.SimpleNamespace(compute_capability=(9, 0), id=0)

    def count(self, *args, **options):
        compiled.append(self)
        compile_kernel(self, *args, **options)

    def load(cubin, *_):
        code.update(cubin.code)
        function = types.SimpleNamespace(kernel=None, module=types.SimpleNamespace(initialized=True))
        return types.SimpleNamespace(get_function=lambda name: function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher._Kernel, "__init__", count)
        patch.setattr(dispatcher, "get_current_device", lambda: device)
        context = types.SimpleNamespace(device=device, create_module_image=load)
        patch.setattr(devices, "get_context", lambda *_: context)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        for make_kernel, dtype in ((forward_kernel, float32), (backward_kernel, bfloat16)):
            tile, options = Tile(128, 1, 1), BARE._replace(padding=NO_PADDING)
            kernel = cuda_kernels._kernel.__wrapped__(make_kernel, options, STORAGE[dtype], tile, WHOLE)
            cuda_launch._compile(kernel, 0)
    return len(compiled), code.hexdigest()


@needs_compiler
def test_compiled_kernels_are_kept_on_disk(monkeypatch, tmp_path):
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_cuda_compile as t; "
    command = [sys.executable, "-c", program + "print(*t.compile_without_driver())"]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    compiled, code = done.stdout.split()
    assert compiled == "2"
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert compile_without_driver() == (0, code)
    for path in tmp_path.rglob("*.nbc"):
        path.write_bytes(b"damaged")
    assert [compile_without_driver()[0] for _ in range(3)] == [2, 2, 0]  # not kept, kept, loaded


def test_kernels_on_disk_are_told_apart_by_all_that_they_are_made_from():
    tile = Tile(4, 2, 2)
    made_from = [
        (PLAIN, tile, float32, WHOLE),
        (RICH, tile, float32, WHOLE),
        (PLAIN, Tile(4, 2, 3), float32, WHOLE),
        (PLAIN, tile, bfloat16, WHOLE),
        (PLAIN, tile, float32, SPANS),
    ]
    assert len({repr(_kernel(forward_kernel, *args).what) for args in made_from}) == len(made_from)


@pytest.mark.parametrize("error", [NvvmSupportError, DynamicLibNotFoundError])
def test_missing_compiler_is_named(monkeypatch, error):
    def jit(signature, **options):
        raise error("no libnvvm")

    monkeypatch.setattr(cuda, "jit", jit)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernel = _kernel(forward_kernel, PLAIN, Tile(128, 1, 8), float32, WHOLE)
    with pytest.raises(RuntimeError, match=r"no libnvvm.*pip install 'numsru\[cuda1[23]\]'"):
        cuda_launch._compile(kernel, 0)
