"""Recorded runs of the official package `sru` (2.6.0, 3.0-dev), and its model on top of any `sru_recurrence`.

Each file of `data/official_golden` holds the constructor arguments (`meta`), the inputs and upstream gradients (`x`,
`c0`, `mask_pad`, `grad_h`, `grad_c_n`), the parameters (`param/<name>`), and what came out: `h`, `c_n`, `grad_x`,
`grad_c0`, `grad/<parameter>`. `c0` and `mask_pad` are optional. `data/official_regression` holds a checkpoint of 2.3.5
with an input and its output.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

DATA = Path(__file__).parent / "data" / "official_golden"
NAMES = sorted(path.stem for path in DATA.glob("v[12]_*.npz"))
NAMES_3 = sorted(path.stem for path in DATA.glob("v3_*.npz"))


class Record(NamedTuple):
    options: dict[str, Any]  # constructor arguments
    inputs: dict[str, Tensor]
    results: dict[str, Tensor]


def load(name: str, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu") -> Record:
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        options = json.loads(str(file["meta"]))["ctor"]
    arrays = {key: a.to(device, dtype if a.is_floating_point() else a.dtype) for key, a in arrays.items()}
    inputs = {key: a for key, a in arrays.items() if _is_input(key)}
    return Record(options, inputs, {key: a for key, a in arrays.items() if key not in inputs})


def parameters(record: Record) -> dict[str, Tensor]:
    """The state dict of the recorded model."""
    return {key.removeprefix("param/"): a for key, a in record.inputs.items() if key.startswith("param/")}


def load_regression() -> dict[str, Tensor]:
    with np.load(DATA.parent / "official_regression" / "sru_2.3.5_golden.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def assert_matches_recording(received: dict[str, Tensor], record: Record, tolerance: float = 1e-5) -> None:
    """Every recorded result is in `received`, within `tolerance` of its largest magnitude."""
    missing = record.results.keys() - received.keys()
    assert not missing
    errors = {}
    for name, expected in record.results.items():
        assert received[name].shape == expected.shape, name
        errors[name] = float((received[name].detach().double() - expected.double()).abs().max() / expected.abs().max())
    wrong = {name: f"{error:.2g}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def run_official(record: Record, recurrence: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Outputs and gradients of the recorded model, under the keys of the recording."""
    options = record.options
    inputs = {k: v.detach().requires_grad_(_is_trained(k, options)) for k, v in record.inputs.items()}
    trained = {k: v for k, v in inputs.items() if v.requires_grad}

    h, c_n = _model(inputs, options, recurrence)
    grads = torch.autograd.grad([h, c_n], list(trained.values()), [inputs["grad_h"], inputs["grad_c_n"]])
    names = [key.replace("param/", "grad/") if key.startswith("param/") else f"grad_{key}" for key in trained]
    return {"h": h.detach(), "c_n": c_n.detach(), **dict(zip(names, grads, strict=True))}


def _is_input(key: str) -> bool:
    return key in ("x", "c0", "mask_pad", "grad_h", "grad_c_n") or key.startswith("param/")


def _is_trained(key: str, options: dict[str, Any]) -> bool:
    if key.endswith("weight_c"):
        return not options.get("v1", False)
    return key in ("x", "c0") or (key.startswith("param/") and not key.endswith("scale_x"))


def _model(inputs: dict[str, Tensor], options: dict[str, Any], recurrence: Callable) -> tuple[Tensor, Tensor]:
    h, layers = inputs["x"], options["num_layers"]
    c_0 = inputs["c0"].unbind(0) if "c0" in inputs else [None] * layers
    if options.get("proj_input_to_hidden_first", False):
        h = h @ inputs["param/input_to_hidden.weight"].T
    states = []
    for i in range(layers):
        prefix = f"param/rnn_lst.{i}."
        params = {key.removeprefix(prefix): value for key, value in inputs.items() if key.startswith(prefix)}
        h, c = _layer(h, c_0[i], inputs.get("mask_pad"), params, options, recurrence)
        states.append(c)
    c_n = torch.stack(states)
    if options.get("nn_rnn_compatible_return", False):
        c_n = c_n.unflatten(2, (-1, options["hidden_size"])).transpose(1, 2).flatten(0, 1)
    return h, c_n


def _layer(
    x: Tensor,
    c_0: Tensor | None,
    mask_pad: Tensor | None,
    params: dict[str, Tensor],
    options: dict[str, Any],
    recurrence: Callable,
) -> tuple[Tensor, Tensor]:
    hidden = options["hidden_size"]
    out = hidden * (2 if options.get("bidirectional", False) else 1)
    parts = params["weight"].shape[1] // out
    norm_before = options.get("layer_norm", False) and not options.get("normalize_after", False)
    norm_after = options.get("layer_norm", False) and options.get("normalize_after", False)

    z = _normalize(x, params) if norm_before else x
    if "weight_proj" in params:
        z = z @ params["weight_proj"]
    h, c = recurrence(
        (z @ params["weight"]).unflatten(2, (-1, hidden, parts)).transpose(3, 4),
        x if parts == 3 and options.get("has_skip_term", True) else None,
        _per_direction(params["bias"], hidden),
        c_0,
        weight_c=None if options.get("v1", False) else _per_direction(params["weight_c"], hidden),
        mask_pad=mask_pad,
        scale_x=params["scale_x"].item(),
        nonlinearity="tanh" if options.get("use_tanh", False) else "identity",
    )
    return _normalize(h, params) if norm_after else h, c


def _per_direction(value: Tensor, hidden: int) -> Tensor:
    return value.view(2, -1, hidden).transpose(0, 1)


def _normalize(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    return layer_norm(x, x.shape[-1:], params["layer_norm.weight"], params["layer_norm.bias"])
