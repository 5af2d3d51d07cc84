"""Compile a kernel, for a CPU or a GPU, or load what an earlier process compiled and left on disk."""

import contextlib
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import numba
from numba.core.caching import FunctionCache

# All that kernels are compiled from, read when it is imported: later there may be other files in its place.
_SOURCES = b"".join(
    path.read_bytes()
    for files in ("recurrence.py", "*_intrinsics.py", "*_kernels.py")
    for path in sorted(pathlib.Path(__file__).parent.glob(files))
)
# Of Numba's, those that change what it makes of a kernel.
_SETTINGS = "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT", "CUDA_DEBUGINFO_DEFAULT"


def compile_or_load(
    jit: Callable[..., Any], signature: Any, function: Callable[..., None], what: Any, **how: Any
) -> Any:
    """What `jit(signature, **how)` makes of a function, which gets a new name: Numba finds it on disk by that.

    Args:
        what: All else that decides what is made of it: the values that the function holds, and the processor.
    """
    function.__qualname__ = f"{function.__name__}_{_hash(signature, what, how)}"
    try:
        return jit(signature, cache=True, **how)(function)
    except Exception:  # nowhere to write to, a full disk, or a file that is damaged: whatever the cache may raise
        pass
    compiled = jit(signature, **how)(function)  # where the cache is not to blame, this raises the error again
    with contextlib.suppress(Exception):
        FunctionCache(function).flush()  # what is damaged, the next process shall not find again
    return compiled


def _hash(signature: Any, what: Any, how: dict[str, Any]) -> str:
    """A name for what is compiled from just these sources, in this way, for this processor.

    Numba's own index knows only the file in which the kernel stands, for a GPU only its time and size, and none of the
    others whose functions it calls. And where one name stands for two kernels, of two releases or two processors,
    processes that write at once can mix them up.
    """
    settings = [getattr(numba.config, name) for name in _SETTINGS]
    parts = str(signature), what, sorted(how.items()), settings, numba.__version__
    return hashlib.sha256(_SOURCES + repr(parts).encode()).hexdigest()[:32]
