"""What is kept on disk: found again, unless anything differs, and harmless where it is damaged."""

import gc
import types

import numba
import pytest
from numba import cfunc, int64

from numsru import recurrence
from numsru.compiling import _hash, compile_or_load

SIGNATURE = int64(int64)


def make(n):
    def add(x):
        return x + n

    return add


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def add(n, what=None):
    """A compiled function that adds n, and whether it was loaded."""
    compiled = compile_or_load(cfunc, SIGNATURE, make(n), what or n, [recurrence])
    assert compiled.ctypes(1) == 1 + n
    return compiled.cache_hits == 1


def test_what_was_compiled_is_loaded(folder):
    assert [add(1), add(1), add(2), add(2)] == [False, True, False, True]
    assert len([*folder.rglob("*.nbc")]) == 2


def helper(path, text):
    path.write_text(text)
    return types.SimpleNamespace(__file__=str(path))


def test_whatever_differs_is_compiled(monkeypatch, tmp_path):
    function, path = make(1), tmp_path / "helper.py"

    def name(function=function, what=(1, "zen4"), text="a = 1", **how):
        return _hash(function, what, [recurrence, helper(path, text)], how)

    names = [name(), name(what=(2, "zen4")), name(what=(1, "zen5")), name(text="a = 2"), name(fastmath=True)]
    elsewhere = helper(tmp_path / "elsewhere.py", "# another file\n").__file__
    code = function.__code__.replace(co_filename=elsewhere)
    names.append(name(types.FunctionType(code, {}, closure=function.__closure__)))
    for setting in ("OPT", "DEBUGINFO_DEFAULT", "CUDA_DEBUGINFO_DEFAULT"):
        with monkeypatch.context() as changed:
            changed.setattr(numba.config, setting, "another")
            names.append(name())
    monkeypatch.setattr(numba, "__version__", "another")
    names.append(name())
    assert len(set(names)) == len(names) == 10
    monkeypatch.undo()
    assert name() == names[0]


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

    assert compile_or_load(jit, SIGNATURE, make(3), 3, []).ctypes(1) == 4
    assert tried == [True, False]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collector_pauses_meanwhile(folder, enabled):
    paused = []

    def jit(signature, cache=False):
        paused.append(not gc.isenabled())
        raise RuntimeError("cannot compile")

    try:
        if not enabled:
            gc.disable()
        with pytest.raises(RuntimeError, match="cannot compile") as error:
            compile_or_load(jit, SIGNATURE, make(1), 1, [])
        assert error.value.__context__ is None  # one error, not that of the first attempt as well
        assert paused == [True, True]
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
