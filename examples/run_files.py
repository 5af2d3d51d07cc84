"""What a training run of the classifier leaves in its folder: curves, and of which run the files are."""

import argparse
import json
from pathlib import Path
from typing import Any

from common import InputError, png, write
from matplotlib.figure import Figure

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
    return recorded(out).get("test_accuracy") is not None


def recorded(out: Path) -> dict[str, Any]:
    """What a run has written of itself to its folder; empty if there is none."""
    metrics = out / "metrics.json"
    if not metrics.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
        found["best_dev_accuracy"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{out} holds files of another program: change --out, or delete the folder") from None
    return found


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
    write(path, png(figure))
