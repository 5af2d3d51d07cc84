"""What the examples share: errors for the user, argument types, the choice of a device, files that are never half."""

import argparse
import io
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure


class InputError(Exception):
    """Something the user gave cannot be used. The message says what, and what to do about it."""


def tells_what_to_do(error: Exception) -> bool:
    """Whether an error is for the user: of RuntimeErrors only numsru's, where the CUDA compiler is missing."""
    return not isinstance(error, RuntimeError) or "pip install" in str(error)


def write(path: Path, data: str | bytes | memoryview) -> None:
    """Write another file, then rename it to `path`, so that there is never half a file."""
    # The name is always the same, so that what a killed process left is overwritten.
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            # Without it a power failure could leave the new name on an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(file: Any, name: Path, device: torch.device, key: str, advice: str) -> dict[str, Any]:
    """What `torch.save` has written to a file, which is called `name` and holds `key` if it is of this program."""
    try:
        saved: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
        saved["configuration"], saved[key]
    except Exception as error:  # zip, pickle and key errors: there is no common class
        raise InputError(f"{name} is not a checkpoint of this program ({type(error).__name__}): {advice}") from None
    return saved


def png(figure: Figure, dpi: float | str = "figure") -> bytes:
    """A picture of a figure that was made without pyplot: Agg draws it, which needs no display."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi)
    return data.getvalue()


def open_tensorboard(out: Path, first: int) -> Any:
    """A writer of TensorBoard's files, in `out`. It forgets what a killed run wrote from step or epoch `first` on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as missing:
        raise InputError(
            f"no module {missing.name}: run `pip install tensorboard`, or leave --tensorboard out"
        ) from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=first)


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


def fill_in(
    parser: argparse.ArgumentParser, args: argparse.Namespace, options: dict[str, tuple[Any, bool, str]]
) -> None:
    """Give the options that were left out their values, and refuse those that were given without effect.

    Args:
        options: Of each its value, whether it has an effect, and the error if not.
    """
    for name, (value, has_effect, error) in options.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif not has_effect:
            parser.error(error)


positive = within(int, 1, 10**9)
above_zero = within(float, 1e-30, math.inf)


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
