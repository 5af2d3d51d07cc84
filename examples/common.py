"""What the examples share: errors for the user, argument types, the choice of a device, files that are never half."""

import argparse
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch


class InputError(Exception):
    """Something the user gave cannot be used. The message says what, and what to do about it."""


def write(path: Path, data: str | bytes) -> None:
    """Write another file, then rename it to `path`, so that there is never half a file."""
    # The name is always the same, so that what a killed process left is overwritten.
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        # Without it a power failure could leave the new name on an empty file.
        os.fsync(file.fileno())
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Of Python and of those packages in use that can change results."""
    used = [sys.modules[name] for name in ("numpy", "sklearn", "torch", "numba", "numsru") if name in sys.modules]
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in used}}


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} does not work ({str(error).splitlines()[0]}): try --device cpu") from None
    return device


def within(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """An argument type: numbers from `low` to `high`."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text}")
        return value

    return number


positive = within(int, 1, 10**9)


def machine() -> dict[str, str | int | None]:
    """What the program runs on."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return {
        "processor": found[1] if found else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
