"""What compiling a kernel for a CPU and for a GPU have in common."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
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
