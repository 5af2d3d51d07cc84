"""`python -m numsru`: what is installed, what runs where, and whether it computes what it should.

The output is what belongs into a bug report. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

import numsru

from . import cpu_kernels, reference

PACKAGES = ("numba", "numba-cuda", "llvmlite", "cuda-core", "numpy")
COMPILER_LIBRARIES = ("nvvm", "nvrtc", "nvJitLink")
KERNELS = {"cpu": "Numba kernels for the CPU", "cuda": "Numba kernels for CUDA"}
# Of the largest magnitude in a result. Float32 kernels stay below 2e-6 on the check's few steps.
TOLERANCE = 1e-5


def _versions() -> Iterator[tuple[str, str]]:
    yield "numsru", f"{numsru.__version__}, {Path(numsru.__file__).parent}"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    yield "torch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    for package in PACKAGES:
        yield package, _attempt(metadata.version, package)


def _attempt(probe: Callable[..., str], *args: str | int) -> str:
    """What a probe finds, or how it failed: a report has to come out of a broken installation too."""
    try:
        return probe(*args)
    except Exception as error:
        return f"not found ({_describe(error)})"


def _describe(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _threads() -> str:
    shared = "torch's own" if cpu_kernels._start_team is not None else "threads of numsru's own"
    return f"{torch.get_num_threads()}, {shared}"


def _cache_folder() -> str:
    from numba.core.caching import FunctionCache

    return str(FunctionCache(cpu_kernels.forward).cache_path)


def _library(name: str) -> str:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return str(load_nvidia_dynamic_lib(name).abs_path)


def _devices() -> list[tuple[torch.device, str]]:
    """Each device that torch can use, and its name."""
    devices = [(torch.device("cpu"), _processor())]
    devices += [(torch.device("cuda", i), _attempt(_gpu, i)) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append((torch.device("mps"), "Metal"))
    devices += [
        (torch.device("xpu", i), _attempt(torch.xpu.get_device_name, i)) for i in range(torch.xpu.device_count())
    ]
    return devices


def _gpu(i: int) -> str:
    gpu = torch.cuda.get_device_properties(i)
    return f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"


def _check(device: torch.device) -> str:
    """Compare forward and backward on a device with the reference in float64 on the CPU. Empty if they agree."""
    random = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random, dtype=torch.float64)

    L, B, H = 19, 3, 21  # neither a whole number of tiles nor of vectors
    arguments = {"u": draw(L, B, 1, 3, H), "x": draw(L, B, H), "bias": draw(1, 2, H), "c_0": draw(B, H)}
    grad_h, grad_c_n = draw(L, B, H), draw(B, H)

    def compute(function: Callable[..., tuple[Tensor, Tensor]], **where: object) -> dict[str, Tensor]:
        inputs = {name: a.to(**where).detach().requires_grad_() for name, a in arguments.items()}  # type: ignore[call-overload]
        h, c_n = function(**inputs)
        upstream = [grad_h.to(**where), grad_c_n.to(**where)]  # type: ignore[call-overload]
        grads = torch.autograd.grad((h, c_n), list(inputs.values()), upstream)
        named = {f"gradient of {name}": g for name, g in zip(inputs, grads, strict=True)}
        return {"h": h.detach(), "c_n": c_n.detach(), **named}

    expected = compute(reference.sru_recurrence, dtype=torch.float64)
    wrong = []
    for name, a in compute(numsru.sru_recurrence, device=device, dtype=torch.float32).items():
        error = float((a.double().cpu() - expected[name]).abs().max() / expected[name].abs().max())
        if not error <= TOLERANCE:  # also where it is NaN
            wrong.append(f"{name} differs by {error:.1e}")
    return ", ".join(wrong)


def main() -> int:
    """Print the report. Returns the exit status."""

    def show(name: str, text: str) -> None:
        print(f"{name:<16}  {text}", flush=True)

    for name, text in _versions():
        show(name, text)
    show("threads", _threads())
    show("kernel cache", _attempt(_cache_folder))
    for name in COMPILER_LIBRARIES:
        show(name, _attempt(_library, name))
    devices = _devices()
    for device, text in devices:
        show(str(device), text)

    failed = 0
    for device, _ in devices:
        backend = KERNELS.get(device.type, "reference in torch: no kernels for this device")
        start = time.perf_counter()
        try:
            problem = _check(device)
        except Exception as error:
            problem = _describe(error)
        seconds = time.perf_counter() - start
        show(f"check {device}", f"{f'failed: {problem}' if problem else 'ok'} ({backend}; {seconds:.1f} s)")
        failed += bool(problem)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
