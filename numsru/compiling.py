"""Compile a kernel, for a CPU or a GPU, or load what an earlier process compiled and left on disk."""

import gc
import hashlib
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def hash_sources(*modules: ModuleType) -> str:
    """For `compile_or_load`: of all modules whose functions a kernel calls, but its own, which Numba looks at."""
    return hashlib.sha256(b"".join(pathlib.Path(str(m.__file__)).read_bytes() for m in modules)).hexdigest()[:16]


def compile_or_load(
    jit: Callable[..., Any], signature: Any, function: Callable[..., None], variant: tuple[Any, ...], **how: Any
) -> Any:
    """What `jit(signature, **how)` makes of a function.

    Numba finds it on disk by the function's name and the contents of its file.

    Args:
        variant: All else that decides what is compiled, a part of that name.
    """
    function.__qualname__ = "_".join([function.__name__, *map(str, variant)])
    with _collector_paused():
        try:
            return jit(signature, cache=True, **how)(function)
        except Exception:  # nowhere to write to, a full disk, or a file that is damaged: whatever the cache may raise
            return jit(signature, **how)(function)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep Python from searching for cyclic garbage inside a `with` statement, in all threads.

    Numba makes so many objects that it would be searched for hundreds of times, and the whole program several times:
    a sixth to a third of the time that compiling takes, and more where the program holds many objects.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
