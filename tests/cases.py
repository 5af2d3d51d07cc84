"""Random inputs of the recurrence, its outputs and gradients by name, and the comparison of two such sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from numsru import reference

# Largest error allowed, relative to the largest magnitude in the float64 reference's array. Measured over the tests
# here: at most 2e-15 in float64; in float32 4e-6, most of it from summing gradients over time.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


class Case(NamedTuple):
    """A call of `sru_recurrence`. `highway` is "input" (K = 3), "projected" (K = 4) or "none" (K = 3, x = None)."""

    L: int = 7
    B: int = 3
    D: int = 1
    H: int = 5
    version: int = 1
    highway: str = "input"
    nonlinearity: str = "tanh"
    c_0: bool = True
    mask_c: bool = False
    placement: str = "paper"
    padding: str = "none"  # "lengths", "mask" or "packed": sequences end to end, of which L is the longest
    scale_x: float = 1.0
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        """What differs from the defaults: the id of a parametrised test."""
        changed = [
            str(value).removeprefix("torch.") if name in ("highway", "nonlinearity", "dtype") else f"{name}={value}"
            for name, value in self._asdict().items()
            if value != self._field_defaults[name]
        ]
        return "-".join(changed) or "default"

    def make_inputs(self, seed: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Keyword arguments of `sru_recurrence`, and the gradients of h and c_n to start backward from."""
        L, B, D, H = self.L, self.B, self.D, self.H
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        # The first sequence is as long as any, the second empty.
        sizes = [L, 0, *torch.randint(0, L + 1, (B,), generator=generator).tolist()][:B]
        leading = (sum(sizes),) if self.padding == "packed" else (L, B)
        inputs: dict[str, Any] = {
            "u": normal(*leading, D, 4 if self.highway == "projected" else 3, H),
            "x": normal(*leading, D * H) if self.highway == "input" else None,
            "bias": normal(D, 2, H),
            "c_0": normal(B, D * H) if self.c_0 else None,
            "weight_c": normal(D, 2, H) if self.version == 2 else None,
        }
        for a in inputs.values():
            if a is not None:
                a.requires_grad_()
        inputs |= {"nonlinearity": self.nonlinearity, "dropout_placement": self.placement, "scale_x": self.scale_x}
        if self.mask_c:
            inputs["mask_c"] = (torch.rand(B, D * H, generator=generator) < 0.7).to(self.dtype) / 0.7
        if self.padding == "packed":
            inputs["cu_seqlens"] = torch.tensor([0, *sizes]).cumsum(0)
        elif self.padding == "lengths":
            inputs["lengths"] = torch.tensor(sizes, dtype=torch.int64)
        elif self.padding == "mask":
            inputs["mask_pad"] = torch.rand(L, B, generator=generator) < 0.4
        return inputs, {"grad_h": normal(*leading, D * H), "grad_c_n": normal(B, D * H)}


def padding_of(inputs: dict[str, Any]) -> Tensor:
    """True at padding, (L, B), of inputs with `mask_pad` or `lengths`."""
    if "mask_pad" in inputs:
        return inputs["mask_pad"]
    return torch.arange(len(inputs["u"])).unsqueeze(1) >= inputs["lengths"]


def run_and_grads(function: Callable[..., Any], inputs: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """h, c_n and the gradient of every input that requires one, by name."""
    h, c_n = function(**inputs)
    names = [n for n, a in inputs.items() if isinstance(a, Tensor) and a.requires_grad]
    # Without a step and an initial state, the reference's outputs are constants.
    loss = (h * grads["grad_h"]).sum() + (c_n * grads["grad_c_n"]).sum() + sum(inputs[n].sum() * 0 for n in names)
    values = torch.autograd.grad(loss, [inputs[n] for n in names])
    return {"h": h.detach(), "c_n": c_n.detach()} | {f"grad_{n}": g for n, g in zip(names, values, strict=True)}


def to_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: a.detach().double().requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for name, a in arguments.items()
    }


def assert_agrees(received: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every array of `expected` is in `received`, within `tolerance` of its largest magnitude (at least 1)."""
    assert received.keys() == expected.keys()
    errors = {}
    for name, e in expected.items():
        r = received[name]
        assert r.shape == e.shape, f"{name} has shape {tuple(r.shape)}, expected {tuple(e.shape)}"
        if e.numel():
            errors[name] = float((r.double() - e.double()).abs().max() / e.abs().max().clamp(min=1))
    wrong = {name: f"{error:.2g}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def assert_matches_reference(function: Callable[..., Any], case: Case) -> None:
    """Outputs and all gradients of `function` against the float64 reference's."""
    inputs, grads = case.make_inputs()
    expected = run_and_grads(reference.sru_recurrence, to_float64(inputs), to_float64(grads))
    assert_agrees(run_and_grads(function, inputs, grads), expected, TOLERANCE[case.dtype])


# As TOLERANCE, where u, x, h and their gradients have 16 bits: that of rounding once to 8 or 11 bits.
TOLERANCE_OF_16_BITS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_16_bits_match_reference(function: Callable[..., Any], case: Case, dtype: torch.dtype) -> None:
    """As `assert_matches_reference`, with u and x rounded to `dtype` and everything else float32."""
    inputs, grads = case._replace(dtype=torch.float32).make_inputs()
    for name in ("u", "x"):
        if inputs[name] is not None:
            inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    grads["grad_h"] = grads["grad_h"].to(dtype)
    expected = run_and_grads(reference.sru_recurrence, to_float64(inputs), to_float64(grads))
    received = run_and_grads(function, inputs, grads)
    for name, array in received.items():
        assert array.dtype == (dtype if name in ("h", "grad_u", "grad_x") else torch.float32), name
    assert_agrees(received, expected, TOLERANCE_OF_16_BITS[dtype])
