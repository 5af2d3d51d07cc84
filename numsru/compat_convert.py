"""State dicts of the authors' package `sru` and of `numsru.SRU`, translated into one another."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .nn import highway_scale

FORMATS = ("numsru", "sru-1", "sru-2", "sru-3")

# Where each format keeps a layer's tensors. On the left numsru's names, whose layouts all layers are brought into.
_SRU_NAMES = {
    "sru-1": {"weight": "weight", "bias": "bias"},
    "sru-2": {"weight": "weight", "weight_proj": "weight_proj"},
    "sru-3": {"weight": "transform_module.weight"},
    "sru-3 projected": {"weight": "transform_module.1.weight", "weight_proj": "transform_module.0.weight"},
}
_UNCHANGED = ("layer_norm.weight", "layer_norm.bias")
_SRU_KEY = re.compile(r"rnn_lst\.(\d+)\.(.+)")
_NUMSRU_KEY = re.compile(r"(weight|bias|weight_c|weight_proj|layer_norm)_l(\d+)((?:\.weight|\.bias)?)")

_Layer = dict[str, Tensor]


def gate_major(weight: Tensor, D: int, H: int) -> Tensor:
    """Rows (D, H, K), as `sru` interleaves them, to rows (D, K, H): `(D*H*K, n)` in, `(D*K*H, n)` out."""
    return _swap(weight, (D, H, -1))


def _interleaved(weight: Tensor, D: int, H: int) -> Tensor:
    """The inverse of `gate_major`."""
    return _swap(weight, (D, -1, H))


def _swap(weight: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    rows: Tensor = weight.unflatten(0, sizes)  # type: ignore[no-untyped-call]
    return rows.transpose(1, 2).flatten(0, 2)


def convert_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    to: str,
    bidirectional: bool = False,
    hidden_size: int | None = None,
    rescale: bool | None = None,
    highway_bias: float = 0.0,
) -> dict[str, Tensor]:
    r"""Translate the parameters of an SRU from any of four formats into one of them, bit for bit.

    The format of `state_dict` is seen from its keys:

    ========  ========================================================================================
    "numsru"  `numsru.SRU`: `weight_l0`, `bias_l0`, ...
    "sru-1"   `sru` of 2017: `rnn_lst.0.weight` and `.bias` alone
    "sru-2"   `sru` 2.0 to 2.6 and `numsru.compat.SRU`: also `weight_c`, `scale_x`, `weight_proj`, `layer_norm`
    "sru-3"   `sru` 3.0-dev: `rnn_lst.0.transform_module.weight` in place of `weight`
    ========  ========================================================================================

    Going to "numsru", a `weight_c` that is 0 in all layers is left out: the file is one for `numsru.SRU(version=1)`,
    any other one for `version=2`. Going from "numsru", what the target holds besides is filled in: zeros for
    `weight_c` and `bias`, 1 or the factor of `rescale` for `scale_x`.

    Args:
        state_dict: The parameters. It is not changed; the result shares no memory with it.
        to: The format of the result, one of the four above.
        bidirectional: Whether the model has two directions. Files of `sru` do not tell; of `numsru`, only one without
            biases in version 1 does not.
        hidden_size: H, needed only for a file of `numsru` without biases in version 1, which does not tell.
        rescale, highway_bias: The options of the `numsru.SRU`, which keeps no `scale_x` but computes it from them.
            Going to "numsru", a `scale_x` that they do not yield is refused.

    Returns:
        A new dict for `load_state_dict(strict=True)`.

    Raises:
        ValueError: For keys that belong to no format, for sizes that disagree or have to be given, and for what the
            target cannot hold. The message names the key.

    Source: The layouts are those of the files that the package's releases write.

    Example:
        >>> official = torch.load("sru.pt")
        >>> rnn = numsru.SRU(128, 256, num_layers=2, version=2, dropout_placement="highway")
        >>> rnn.load_state_dict(numsru.compat.convert_state_dict(official, to="numsru"))
        <All keys matched successfully>
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(map(repr, FORMATS))}, got {to!r}")
    if not state_dict:
        raise ValueError("state_dict is empty")
    scale = highway_scale(bool(rescale), highway_bias)
    D = 2 if bidirectional else 1
    other: dict[str, Tensor] = {}
    if any(_NUMSRU_KEY.fullmatch(key) for key in state_dict):
        layers = _split(state_dict, _numsru_name)
        if to != "numsru":
            layers = _read_numsru(layers, D, hidden_size, scale)
    else:
        layers, other = _read_sru(state_dict, D)
        if to == "numsru":
            _check_scale(layers, None if rescale is None else scale)
            if rescale is None and any(_parts(layer) == 3 and layer["scale_x"].item() != 1 for layer in layers):
                raise ValueError(
                    "the file holds a scale_x other than 1, which numsru.SRU computes from its options: "
                    "pass rescale=True and the model's highway_bias"
                )
    if other and to in ("numsru", "sru-1"):
        raise ValueError(
            f"{'numsru.SRU' if to == 'numsru' else 'the package of 2017'} has no input projection for "
            f"{', '.join(other)}: put a torch.nn.Linear in front of it and convert the rest"
        )
    result = _write_numsru(layers) if to == "numsru" else other | _write_sru(layers, to)
    return {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in result.items()}


def _split(state_dict: Mapping[str, Tensor], name_of: Callable[[str], tuple[int, str] | None]) -> list[_Layer]:
    """The tensors of each layer by their names within it."""
    layers: dict[int, _Layer] = {}
    for key, value in state_dict.items():
        place = name_of(key)
        if place is None:
            raise ValueError(f"unknown key {key!r}: expected the keys of one numsru.SRU or of one sru.SRU")
        layers.setdefault(place[0], {})[place[1]] = value
    if sorted(layers) != list(range(len(layers))):
        raise ValueError(f"expected layers 0 to {len(layers) - 1}, got {', '.join(map(str, sorted(layers)))}")
    return [layers[i] for i in range(len(layers))]


def _numsru_name(key: str) -> tuple[int, str] | None:
    match = _NUMSRU_KEY.fullmatch(key)
    if match is None or (match[1] == "layer_norm") != bool(match[3]):
        return None
    return int(match[2]), match[1] + match[3]


def _sru_name(key: str) -> tuple[int, str] | None:
    match = _SRU_KEY.fullmatch(key)
    return None if match is None else (int(match[1]), match[2])


def _read_numsru(layers: list[_Layer], D: int, hidden_size: int | None, scale: float) -> list[_Layer]:
    for i, layer in enumerate(layers):
        _require(layer, "weight", f"weight_l{i}")
        gates = layer.get("bias", layer.get("weight_c"))
        if gates is not None:
            D, _, H = gates.shape
        elif hidden_size is not None:
            H = hidden_size
        else:
            raise ValueError(
                f"weight_l{i} has no bias_l{i} beside it that would tell its sizes: "
                "pass hidden_size, and bidirectional=True for two directions"
            )
        _check_parts(f"weight_l{i}", layer["weight"].shape[0], D * H)
        zeros = layer["weight"].new_zeros(D, 2, H)
        layer.setdefault("bias", zeros)
        layer.setdefault("weight_c", zeros)
        layer["scale_x"] = layer["weight"].new_tensor([scale])
    return layers


def _read_sru(state_dict: Mapping[str, Tensor], D: int) -> tuple[list[_Layer], dict[str, Tensor]]:
    """The layers, and what `sru` has in front of them."""
    other = {key: value for key, value in state_dict.items() if key == "input_to_hidden.weight"}
    official = _split({key: value for key, value in state_dict.items() if key not in other}, _sru_name)
    layers = []
    for i, source in enumerate(official):
        layer = dict(source)
        for name in ("weight", "weight_proj"):
            if name in layer:
                layer[name] = layer[name].t()
        for names in (_SRU_NAMES["sru-3"], _SRU_NAMES["sru-3 projected"]):
            if "weight" not in layer:
                layer |= {name: layer.pop(theirs) for name, theirs in names.items() if theirs in layer}
        for name in layer:
            if name not in ("weight", "weight_proj", "bias", "weight_c", "scale_x", *_UNCHANGED):
                raise ValueError(
                    f"rnn_lst.{i}.{name} cannot be converted: only layers whose matrix product is the package's own "
                    "can, without custom_m, a transform_module of another kind, or SRU++"
                )
        _require(layer, "weight", f"rnn_lst.{i}.weight")
        _require(layer, "bias", f"rnn_lst.{i}.bias")
        if layer["bias"].numel() % (2 * D):
            raise ValueError(
                f"rnn_lst.{i}.bias of {layer['bias'].numel()} cannot hold two gates in {D} direction(s); "
                f"is bidirectional={D == 2} right?"
            )
        H = layer["bias"].numel() // (2 * D)
        _check_parts(f"rnn_lst.{i}.weight", layer["weight"].shape[0], D * H)
        layer["weight"] = gate_major(layer["weight"], D, H)
        layer.setdefault("weight_c", torch.zeros_like(layer["bias"]))
        layer.setdefault("scale_x", layer["bias"].new_ones(1))
        for name in ("bias", "weight_c"):
            layer[name] = layer[name].view(2, D, H).transpose(0, 1)
        layers.append(layer)
    return layers, other


def _write_numsru(layers: list[_Layer]) -> dict[str, Tensor]:
    version_1 = not any("weight_c" in layer and layer["weight_c"].any() for layer in layers)
    result = {}
    for i, layer in enumerate(layers):
        for name, value in layer.items():
            if name != "scale_x" and not (name == "weight_c" and version_1):
                module, _, parameter = name.partition(".")
                result[f"{module}_l{i}" + (f".{parameter}" if parameter else "")] = value
    return result


def _write_sru(layers: list[_Layer], to: str) -> dict[str, Tensor]:
    result = {}
    for i, layer in enumerate(layers):
        D, _, H = layer["bias"].shape
        values = dict(layer) | {name: layer[name].transpose(0, 1).flatten() for name in ("bias", "weight_c")}
        values["weight"] = _interleaved(layer["weight"], D, H)
        if to == "sru-1":
            scale_matters = _parts(layer) == 3 and layer["scale_x"].item() != 1
            for name, excess in (("weight_c", bool(layer["weight_c"].any())), ("scale_x", scale_matters)):
                if not excess:
                    values.pop(name)
        if to != "sru-3":
            values |= {name: values[name].t() for name in ("weight", "weight_proj") if name in values}
        names = _SRU_NAMES["sru-3 projected" if to == "sru-3" and "weight_proj" in layer else to]
        for name, value in values.items():
            if to == "sru-1" and name not in names:
                raise ValueError(f"the package of 2017 has no {name}, which layer {i} needs; convert to 'sru-2'")
            result[f"rnn_lst.{i}.{names.get(name, name)}"] = value
    return result


def _check_scale(layers: list[_Layer], expected: float | None) -> None:
    """`numsru.SRU` has one factor for all layers that use it, sqrt(1 + 2 exp(highway_bias)) or 1."""
    for i, layer in enumerate(layers):
        if _parts(layer) == 4:
            continue
        scale = layer["scale_x"].item()
        tolerance = max(1e-6, 2 * torch.finfo(layer["scale_x"].dtype).eps)
        if expected is not None and not math.isclose(scale, expected, rel_tol=tolerance):
            raise ValueError(f"rnn_lst.{i}.scale_x is {scale:.7g}, but rescale and highway_bias yield {expected:.7g}")
        if not scale >= 1:
            raise ValueError(
                f"rnn_lst.{i}.scale_x is {scale:.7g}, which numsru.SRU cannot hold: its factor is 1, or "
                "sqrt(1 + 2 exp(highway_bias)) with rescale=True, which is above 1"
            )
        if expected is None:
            expected = scale


def _parts(layer: _Layer) -> int:
    D, _, H = layer["bias"].shape
    return layer["weight"].shape[0] // (D * H)


def _check_parts(key: str, rows: int, out: int) -> None:
    if rows not in (3 * out, 4 * out):
        raise ValueError(f"{key} must hold 3 or 4 sub-matrices of {out} units, got {rows} rows in all")


def _require(layer: _Layer, name: str, key: str) -> None:
    if name not in layer:
        raise ValueError(f"{key} is missing")
