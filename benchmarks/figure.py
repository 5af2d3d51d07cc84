"""The two panels of the original comparison: LSTM, convolutions and SRUs of 1 to 4 layers, in ms per batch of 32.

Tao Lei, Yu Zhang, "Training RNNs as Fast as CNNs", arXiv:1709.02755v1, figure of section 3.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from . import report
from .contestants import PASSES, Contestant, check, convolution, measure, recurrent, sru
from .points import Point
from .timing import Settings

LAYERS = (1, 2, 4)
BASE = "SRU, 1 layer"


def run(result: dict[str, Any], settings: Settings, points: list[Point]) -> None:
    """Fill in `result`."""
    result["entries"] = []
    for point in points:
        for training in (False, True):
            found = _contestants(point, settings)
            for layers, stack in zip(LAYERS, found[-len(LAYERS) :], strict=True):
                check(
                    [stack._replace(is_sru=True)],
                    point._replace(num_layers=layers),
                    settings,
                    training,
                    base=stack.name,
                )
            entry = measure(found, point, settings, training, base=BASE)
            result["entries"].append(entry)
            print(report.line(entry, BASE), flush=True)


def _contestants(point: Point, settings: Settings) -> list[Contestant]:
    found = [recurrent("LSTM", nn.LSTM, point, settings)]
    found += [convolution(k, point, settings) for k in (3, 2)]
    for layers in LAYERS:
        name = f"SRU, {layers} layer{'s' * (layers > 1)}"
        found.append(sru(point._replace(num_layers=layers), settings)[0]._replace(name=name, is_sru=layers == 1))
    return found


def tables(result: dict[str, Any]) -> str:
    """The result as text."""
    parts = []
    for name in PASSES:
        entries = [e for e in result["entries"] if e["pass"] == name]
        table = report.times_table(entries, "point", 1e3)
        parts.append(f"{name.capitalize()}: ms per batch (ratio to one layer of SRU)\n\n{table}")
    if reasons := report.could_not_run(result["entries"]):
        parts.append(f"Could not run:\n\n{reasons}")
    return "\n".join(parts)
