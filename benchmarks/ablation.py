"""Why it is fast: from a cell whose gates see the last output to numsru, one change at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import report
from .contestants import BASE, Contestant, loop, measure, of_sru, sequential_layer, sru
from .points import Point
from .timing import Settings

RECURRENT = "gates see the last output"


def run(result: dict[str, Any], settings: Settings, points: list[Point]) -> None:
    """Fill in `result`."""
    result["entries"] = []
    for point in points:
        for training in (False, True):
            entry = measure(steps(point, settings), point, settings, training)
            result["entries"].append(entry)
            print(report.line(entry, BASE), flush=True)


def steps(point: Point, settings: Settings) -> list[Contestant]:
    """Each differs from the one before in one thing; all but the first compute the same."""
    base, rnn = sru(point, settings)
    weight_h = nn.Parameter(settings.randn(2 * point.hidden_size, point.hidden_size) / point.hidden_size**0.5)
    forms: dict[str, Callable[..., Tensor]] = {
        "they do not: a product per step": product_per_step,
        "one product for all steps": one_product,
        "gates of all steps at once": loop,
        "one fused kernel, sequential": sequential_layer,
    }

    def run_first(x: Tensor) -> Tensor:
        return recurrent_form(x, rnn.weight_l0, rnn.bias_l0, weight_h)

    first = Contestant(RECURRENT, run_first, [*base.parameters, weight_h], base.shape)
    return [first, *(of_sru(name, form, rnn, base) for name, form in forms.items()), base]


def recurrent_form(x: Tensor, weight: Tensor, bias: Tensor, weight_h: Tensor) -> Tensor:
    """The SRU with gates that also see h_{t-1}, as those of an LSTM do. weight_h: `(2*H, H)`, forget and reset."""
    h = c = torch.zeros_like(x[0])
    outputs = []
    for x_t in x.unbind():
        candidate, gates = F.linear(x_t, weight).split([h.shape[1], 2 * h.shape[1]], dim=1)
        h, c = _step(candidate, gates + F.linear(h, weight_h), x_t, bias, c)
        outputs.append(h)
    return torch.stack(outputs)


def product_per_step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The SRU as its equations are written."""
    c, outputs = torch.zeros_like(x[0]), []
    for x_t in x.unbind():
        candidate, gates = F.linear(x_t, weight).split([c.shape[1], 2 * c.shape[1]], dim=1)
        h, c = _step(candidate, gates, x_t, bias, c)
        outputs.append(h)
    return torch.stack(outputs)


def one_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product of all steps before the loop, everything elementwise in it."""
    H = x.shape[2]
    c, outputs = torch.zeros_like(x[0]), []
    for x_t, u_t in zip(x.unbind(), F.linear(x, weight).unbind(), strict=True):
        candidate, gates = u_t.split([H, 2 * H], dim=1)
        h, c = _step(candidate, gates, x_t, bias, c)
        outputs.append(h)
    return torch.stack(outputs)


def _step(candidate: Tensor, gates: Tensor, x: Tensor, bias: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f, r = torch.sigmoid(gates + bias.view(-1)).chunk(2, dim=1)
    c = torch.lerp(candidate, c, f)
    return torch.lerp(x, torch.tanh(c), r), c


def tables(result: dict[str, Any]) -> str:
    """The result as text: ms of each step, and how many times as fast it is as the first."""
    entries = result["entries"]

    def cell(e: dict[str, Any], name: str) -> str:
        if name not in e["times"]:
            return ""
        gain = f" ({report.number(e['ratios'][RECURRENT] / e['ratios'][name])})" if RECURRENT in e["ratios"] else ""
        return report.number(e["times"][name]["median"] * 1e3) + gain

    names = sorted(dict.fromkeys(name for e in entries for name in e["times"]), key=lambda name: name != RECURRENT)
    header = ["", *(f"{e['point']}, {e['pass']}" for e in entries)]
    text = "ms (times as fast as the first row)\n\n"
    text += report.table(header, [[name, *(cell(e, name) for e in entries)] for name in names])
    if reasons := report.could_not_run(entries):
        text += f"\nCould not run:\n\n{reasons}"
    return text
