"""`python -m benchmarks`: set what has to be set before torch is imported, then run the command."""

import os
import sys

if __name__ == "__main__":
    # OpenMP and Numba read these once. Unpinned, two threads of a virtual machine may share one core for seconds; with
    # pinned threads Numba would find one core.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_PROC_BIND", "true")
    os.environ.setdefault("NUMBA_NUM_THREADS", str(cores))
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # or compile times are those of reading a file

    try:
        from .cli import main

        status = main()
    except KeyboardInterrupt:  # while torch is imported; later, `main` says it
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
