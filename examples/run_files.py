"""What a training run leaves in its folder: files that are never half written, curves, and of which run they are."""

import argparse
import io
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from sentence_data import InputError

# Arguments that do not change what an epoch computes; the device and the data are compared as such.
FREE = ("out", "resume", "epochs", "patience", "tensorboard", "data_dir", "device")


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that have to be the same where a run is resumed, as JSON has them."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name not in FREE}


def difference_of(recorded: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What two configurations differ in, in words; empty if nothing."""
    names = [name for name in {**wanted, **recorded} if recorded.get(name) != wanted.get(name)]
    if names == ["data"]:
        return "other data"
    return ", ".join(f"{name} {recorded.get(name)}, not {wanted.get(name)}" for name in names if name != "data")


def is_finished(out: Path) -> bool:
    metrics = out / "metrics.json"
    return metrics.exists() and json.loads(metrics.read_text())["test_accuracy"] is not None


def write(path: Path, data: str | bytes | memoryview) -> None:
    """Write another file, then rename it to `path`, so that there is never half a file."""
    # Always the same name: what a killed process left of it is overwritten.
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    used = [sys.modules[name] for name in ("numpy", "sklearn", "torch", "numba", "numsru") if name in sys.modules]
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in used}}


def draw_curves(path: Path, epochs: list[dict[str, Any]]) -> None:
    """Save the learning curves as a picture with two panels."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name in ((left, "train_loss"), (right, "train_accuracy"), (right, "dev_accuracy")):
        values = [record[name] for record in epochs]
        axes.plot(range(1, len(values) + 1), values, marker=".", label=name.replace("_", " "))
    for axes, quantity in ((left, "loss"), (right, "accuracy")):
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.legend()
    # A figure made without pyplot is drawn by Agg, which needs no display.
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write(path, picture.getvalue())


def open_tensorboard(out: Path, first_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as missing:
        raise InputError(
            f"no module {missing.name}: run `pip install tensorboard`, or leave --tensorboard out"
        ) from None
    # purge_step: TensorBoard forgets what was written of epochs that are trained again.
    return SummaryWriter(str(out / "tensorboard"), purge_step=first_epoch)
