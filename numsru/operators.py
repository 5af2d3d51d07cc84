"""The recurrence as operators of torch, `numsru::recurrence` and its backward: what compilers see.

Eager code goes past them, see `autograd.py`. An operator returns no None: in its place stands an empty tensor.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .backend import kernels_for, state_dtype
from .recurrence import LENGTHS, MASK, NO_SKIP, PACKED, SKIP_INPUT, SKIP_PROJECTED, Options, count_saved

ONCE = (
    "numsru's kernels can be differentiated once, in reverse mode. For higher derivatives run the forward pass inside "
    "numsru.use_backend('reference')"
)


def check_lengths(lengths: Tensor, L: int) -> None:
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= L:
        raise ValueError(f"lengths must lie between 0 and L = {L}, got {int(lengths.min())} to {int(lengths.max())}")


def check_rise(cu_seqlens: Tensor, total_steps: int) -> None:
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total_steps or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to total_steps = {total_steps}, got {cu_seqlens.tolist()}")


def check_valid(valid: Tensor | None, padding: int, steps: int) -> None:
    """Look at the values of lengths or cu_seqlens that are on the CPU; kernels on a GPU bring theirs into range."""
    if valid is not None and valid.device.type == "cpu":
        if padding == LENGTHS:
            check_lengths(valid, steps)
        elif padding == PACKED:
            check_rise(valid, steps)


def _options(
    u: Tensor, x: Tensor | None, c_0: Tensor | None, weight_c: Tensor | None, mask_c: Tensor | None,
    nonlinearity: int, placement: int, padding: int, save_c: bool,
) -> Options:  # fmt: skip
    return Options(
        version=1 if weight_c is None else 2,
        nonlinearity=nonlinearity,
        placement=placement,
        skip=SKIP_PROJECTED if u.shape[-2] == 4 else NO_SKIP if x is None else SKIP_INPUT,
        padding=padding,
        has_c_0=c_0 is not None,
        has_mask_c=mask_c is not None,
        save_c=save_c,
    )


def _kernels(u: Tensor) -> Any:
    kernels = kernels_for(u.device.type)
    if kernels is None:
        raise NotImplementedError(f"numsru has no kernels for {u.device}: use numsru.sru_recurrence")
    return kernels


def _batch_size(u: Tensor, valid: Tensor | None, padding: int) -> int:
    if padding != PACKED:
        return u.shape[1]
    assert valid is not None
    return valid.shape[0] - 1


def check(
    name: str,
    a: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    other_dtype: torch.dtype | None = None,
) -> None:
    """Refuse a tensor that does not fit. None fits everywhere."""
    if a is None:
        return
    if a.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(a.shape)}")
    if a.dtype not in (dtype, other_dtype):
        also = "" if other_dtype in (None, dtype) else f" or {other_dtype}"
        raise TypeError(
            f"{name} must be {dtype}{'' if dtype == torch.bool else ' as the input is'}{also}, got {a.dtype}"
        )
    if a.device != device:
        raise ValueError(f"{name} must be on {device} as the input is, got {a.device}")


def _check_operands(
    u: Tensor, x: Tensor | None, bias: Tensor, c_0: Tensor | None, weight_c: Tensor | None, mask_c: Tensor | None,
    valid: Tensor | None, padding: int, B: int,
) -> None:  # fmt: skip
    """A graph calls the operators without the checks of `sru_recurrence`, and kernels read memory as they are told."""
    D, K, H = u.shape[-3:]
    if K not in (3, 4) or (K == 4 and x is not None):
        raise ValueError(f"u must have K = 3 sub-matrices, or 4 without x, got shape {tuple(u.shape)}")
    real = state_dtype(u.dtype)
    check("x", x, (*u.shape[:-3], D * H), u.dtype, u.device)
    for name, a, shape in (
        ("bias", bias, (D, 2, H)), ("weight_c", weight_c, (D, 2, H)), ("c_0", c_0, (B, D * H)),
        ("mask_c", mask_c, (B, D * H)),
    ):  # fmt: skip
        check(name, a, shape, real, u.device)
    if padding == MASK:
        check("mask_pad", valid, tuple(u.shape[:2]), torch.bool, u.device)
    elif valid is not None:
        check("valid", valid, (B + (padding == PACKED),), torch.int64, u.device)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if a is None else a.contiguous().resolve_neg() for a in tensors]


def _or_empty(a: Tensor | None, u: Tensor) -> Tensor:
    return u.new_empty(0) if a is None else a


@torch.library.custom_op(
    "numsru::recurrence",
    mutates_args=(),
    schema="(Tensor u, Tensor? x, Tensor bias, Tensor? c_0, Tensor? weight_c, Tensor? mask_c, Tensor? valid, "
    "float scale_x, int nonlinearity, int placement, int padding, bool save_c) -> (Tensor, Tensor, Tensor)",
)
def recurrence(
    u: Tensor, x: Tensor | None, bias: Tensor, c_0: Tensor | None, weight_c: Tensor | None, mask_c: Tensor | None,
    valid: Tensor | None, scale_x: float, nonlinearity: int, placement: int, padding: int, save_c: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """h, c_n and, with `save_c`, the states that the backward pass starts from.

    Values of `valid` on the CPU are checked here, because they are not known while a program is compiled.
    """
    check_valid(valid, padding, len(u))
    options = _options(u, x, c_0, weight_c, mask_c, nonlinearity, placement, padding, save_c)
    B = _batch_size(u, valid, padding)
    _check_operands(u, x, bias, c_0, weight_c, mask_c, valid, padding, B)
    u, x, bias, weight_c, c_0, mask_c, valid = _contiguous(u, x, bias, weight_c, c_0, mask_c, valid)  # type: ignore[assignment]
    h, c_n, saved = _kernels(u).forward(options, u, x, bias, weight_c, c_0, mask_c, valid, scale_x, len(u), B)
    return h, c_n, _or_empty(saved, u)


@recurrence.register_fake
def _(
    u: Tensor, x: Tensor | None, bias: Tensor, c_0: Tensor | None, weight_c: Tensor | None, mask_c: Tensor | None,
    valid: Tensor | None, scale_x: float, nonlinearity: int, placement: int, padding: int, save_c: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, DH = _batch_size(u, valid, padding), u.shape[-3] * u.shape[-1]
    saved = bias.new_empty(count_saved(padding, u.shape[0], B), DH) if save_c else u.new_empty(0)
    return u.new_empty(*u.shape[:-3], DH), bias.new_empty(B, DH), saved


@torch.library.custom_op(
    "numsru::recurrence_backward",
    mutates_args=(),
    schema="(Tensor grad_h, Tensor grad_c_n, Tensor u, Tensor? x, Tensor bias, Tensor? weight_c, Tensor? mask_c, "
    "Tensor? valid, Tensor saved, float scale_x, int nonlinearity, int placement, int padding) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def recurrence_backward(
    grad_h: Tensor, grad_c_n: Tensor, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None,
    mask_c: Tensor | None, valid: Tensor | None, saved: Tensor, scale_x: float, nonlinearity: int, placement: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, x, bias, c_0 and weight_c."""
    options = _options(u, x, None, weight_c, mask_c, nonlinearity, placement, padding, True)
    B, D, H = _batch_size(u, valid, padding), u.shape[-3], u.shape[-1]
    _check_operands(u, x, bias, grad_c_n, weight_c, mask_c, valid, padding, B)
    check_valid(valid, padding, len(u))
    check("grad_h", grad_h, (*u.shape[:-3], D * H), u.dtype, u.device)
    check("saved", saved, (count_saved(padding, len(u), B), D * H), bias.dtype, u.device)
    u, x, bias, weight_c, mask_c, valid, saved, grad_h, grad_c_n = _contiguous(  # type: ignore[assignment]
        u, x, bias, weight_c, mask_c, valid, saved, grad_h, grad_c_n
    )
    grad_u, grad_x, grad_bias, grad_weight_c, grad_c_0 = _kernels(u).backward(
        options, u, x, bias, weight_c, mask_c, valid, scale_x, len(u), B, saved, grad_h, grad_c_n
    )
    return grad_u, _or_empty(grad_x, u), grad_bias, grad_c_0, _or_empty(grad_weight_c, u)


@recurrence_backward.register_fake
def _(
    grad_h: Tensor, grad_c_n: Tensor, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None,
    mask_c: Tensor | None, valid: Tensor | None, saved: Tensor, scale_x: float, nonlinearity: int, placement: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def like(a: Tensor | None) -> Tensor:
        return u.new_empty(0) if a is None else a.new_empty(a.shape)

    return like(u), like(x), like(bias), like(grad_c_n), like(weight_c)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    u, x, bias, _, weight_c, mask_c, valid, *ctx.options, ctx.save_c = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(u, x, bias, weight_c, mask_c, valid, output[2])


def _gradients(ctx: Any, grad_h: Tensor, grad_c_n: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if not ctx.save_c:
        raise RuntimeError("numsru::recurrence keeps what its backward needs with save_c=True only")
    grads = torch.ops.numsru.recurrence_backward(grad_h, grad_c_n, *ctx.saved_tensors, *ctx.options)
    return *(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 7


def _refuse(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(ONCE)


recurrence.register_autograd(_gradients, setup_context=_save)
recurrence_backward.register_autograd(_refuse)
