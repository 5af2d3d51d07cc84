"""What is kept on disk: found again, unless anything differs, and harmless where it is damaged."""

import types
from pathlib import Path

import numba
import numpy as np
import pytest
from numba import cfunc, int64

from numsru import compiling, cpu_kernels
from numsru.compiling import _hash, compile_or_load
from numsru.recurrence import Options

SIGNATURE = int64(int64)


def make(n):
    def add(x):
        return x + n

    return add


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def add(n):
    """Compile a function that adds n. Whether it was loaded."""
    compiled = compile_or_load(cfunc, SIGNATURE, make(n), n)
    assert compiled.ctypes(1) == 1 + n
    return compiled.cache_hits == 1


def test_what_was_compiled_is_loaded(folder):
    assert [add(1), add(1), add(2), add(2)] == [False, True, False, True]
    assert len([*folder.rglob("*.nbc")]) == 2


def test_whatever_differs_is_compiled(monkeypatch):
    def name(signature=SIGNATURE, what=(1, "zen4"), **how):
        return _hash(signature, what, how)

    names = [name(), name(int64(int64, int64)), name(what=(2, "zen4")), name(what=(1, "zen5")), name(fastmath=True)]
    settings = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT", "CUDA_DEBUGINFO_DEFAULT")
    for owner, attribute in (
        *((numba.config, setting) for setting in settings),
        (numba, "__version__"),
        (compiling, "_SOURCES"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(owner, attribute, b"another")
            names.append(name())
    assert len(set(names)) == len(names) == 12
    assert name() == names[0]


def test_all_files_of_kernels_are_looked_at():
    for name in ("recurrence", "cpu_intrinsics", "cpu_kernels", "cuda_intrinsics", "cuda_kernels"):
        assert Path(compiling.__file__).with_name(f"{name}.py").read_bytes() in compiling._SOURCES


def test_cpu_kernels_are_told_apart_by_all_that_they_are_made_from(monkeypatch):
    names = []

    def compile_or_load(jit, signature, function, what, **how):
        names.append(_hash(signature, what, how))
        return types.SimpleNamespace(address=1)

    monkeypatch.setattr(cpu_kernels, "compile_or_load", compile_or_load)
    for options, storage in ((Options(), np.float32), (Options(save_c=True), np.float32), (Options(), np.float64)):
        cpu_kernels._compile(lambda args: None, options, storage)
    codegen = cpu_kernels.cpu_target.target_context.codegen()
    monkeypatch.setattr(type(codegen), "magic_tuple", lambda self: "another processor")
    cpu_kernels._compile(lambda args: None, Options(), np.float32)
    assert len(set(names)) == 4


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_files_are_compiled_anew_and_replaced(folder, kind):
    add(1)
    (path,) = folder.rglob(f"*.{kind}")
    path.write_bytes(b"damaged")
    assert [add(1), add(1), add(1)] == [False, False, True]


def test_nothing_has_to_be_written(folder):
    tried = []

    def jit(signature, cache=False):
        tried.append(cache)
        if cache:
            raise OSError("no space left on device")
        return cfunc(signature)

    assert compile_or_load(jit, SIGNATURE, make(3), 3).ctypes(1) == 4
    assert tried == [True, False]


def test_error_of_the_compiler_leaves_what_is_on_disk(folder):
    def jit(signature, **how):
        raise MemoryError

    add(1)
    with pytest.raises(MemoryError) as error:
        compile_or_load(jit, SIGNATURE, make(1), 1)
    assert error.value.__context__ is None  # not two errors, of both attempts
    assert add(1)
