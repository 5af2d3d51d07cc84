"""What the measurements were made on and with."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numba
import torch

import numsru

PACKAGES = ("torch", "numpy", "numba", "numba-cuda", "llvmlite", "cuda-core")


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, cores, caches and memory, and those of the GPU if it is measured."""
    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "caches": _caches(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "l2_cache_bytes": gpu.L2_cache_size,
            "driver": _driver(),
        }
    return found


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"numsru": numsru.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found | {"cuda": torch.version.cuda}


def threads() -> dict[str, Any]:
    """How many threads compute, and what was done about their places and about memory allocation."""
    return {
        "torch": torch.get_num_threads(),
        "numba": numba.config.NUMBA_NUM_THREADS,
        "OMP_PROC_BIND": os.environ.get("OMP_PROC_BIND"),
        "malloc": os.environ.get("LD_PRELOAD") or os.environ.get("GLIBC_TUNABLES") or "default",
    }


def short_name(machine: dict[str, Any]) -> str:
    """For names of files: `cpu_intel-xeon`, `cuda_nvidia-h100-80gb-hbm3`."""
    kind, name = ("cuda", machine["gpu"]["name"]) if "gpu" in machine else ("cpu", machine["processor"])
    name = re.sub(r"\((r|tm)\)|\b(\d+-core|processor|cpu)\b|@.*", " ", name.lower())
    return f"{kind}_" + "-".join(re.findall(r"[a-z0-9]+", name))


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Of the first core, by level and kind, where the system tells: {"1 Data": "48K", …}."""
    found = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size"))
        found[f"{level} {kind}"] = size
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None
