"""Compile a kernel, for a CPU or a GPU, or load what an earlier process compiled and left on disk."""

import contextlib
import gc
import hashlib
import pathlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numba
from numba.core.caching import FunctionCache


def compile_or_load(
    jit: Callable[..., Any], signature: Any, function: Callable[..., None], what: Any, helpers: list[ModuleType],
    **how: Any,
) -> Any:  # fmt: skip
    """What `jit(signature, **how)` makes of a function, which gets a new name: Numba finds it on disk by that.

    Args:
        what: All else that decides what is made of it: the values that the function holds, and the processor.
        helpers: The modules, besides its own, of all that the function calls.
    """
    with _collector_paused():
        try:
            function.__qualname__ = f"{function.__name__}_{_hash(function, what, helpers, how)}"
            return jit(signature, cache=True, **how)(function)
        except Exception:  # nowhere to write to, a full disk, or a file that is damaged: whatever the cache may raise
            with contextlib.suppress(Exception):
                FunctionCache(function).flush()  # what is damaged, the next process shall not find again
        return jit(signature, **how)(function)


def _hash(function: Callable[..., None], what: Any, helpers: list[ModuleType], how: dict[str, Any]) -> str:
    """A name that no two kernels share.

    Numba's own index looks at less: of what a kernel for a GPU calls, at the time and the size of one file. And where
    one name stands for two kernels, of two releases or two processors, processes that write at once can mix them up.
    """
    config = numba.config.OPT, numba.config.DEBUGINFO_DEFAULT, numba.config.CUDA_DEBUGINFO_DEFAULT
    digest = hashlib.sha256(repr((what, sorted(how.items()), config, numba.__version__)).encode())
    for path in (function.__code__.co_filename, *(str(module.__file__) for module in helpers)):
        digest.update(pathlib.Path(path).read_bytes())
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep Python from searching for cyclic garbage inside a `with` statement, in all threads.

    Numba makes so many objects that it would be searched for hundreds of times, and the whole program several times:
    a sixth to a third of the time that compiling takes, and more where the program holds many objects. A process that
    another thread forks meanwhile does not search.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
