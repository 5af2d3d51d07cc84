"""The recurrence as one differentiable operation: argument checks, choice of the backend, gradients."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu_kernels, reference
from .recurrence import (
    DROPOUT_PLACEMENTS,
    LENGTHS,
    MASK,
    NO_PADDING,
    NO_SKIP,
    NONLINEARITIES,
    PACKED,
    PAPER,
    SKIP_INPUT,
    SKIP_PROJECTED,
    Options,
)

_DTYPES = (torch.float32, torch.float64)


def _kernels(device_type: str) -> ModuleType | None:
    """The backend for tensors on a device; None where there are no kernels for it."""
    if device_type == "cpu":
        return cpu_kernels
    if device_type == "cuda":
        try:
            from . import cuda_kernels  # imported late: numba.cuda is of no use to those without a GPU
        except (ImportError, RuntimeError) as error:
            error.add_note(
                "numsru needs NVIDIA's libraries for its CUDA kernels: pip install 'numsru[cuda13]' or [cuda12]"
            )
            raise
        return cuda_kernels
    return None


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: ModuleType, options: Options, scale_x: float, L: int, B: int, u: Tensor, x: Tensor | None,
        bias: Tensor, weight_c: Tensor | None, c_0: Tensor | None, mask_c: Tensor | None, valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h, c_n, c = kernels.forward(options, u, x, bias, weight_c, c_0, mask_c, valid, scale_x, L, B)
        ctx.save_for_backward(u, x, bias, weight_c, mask_c, valid, c, c_0)
        ctx.constants = kernels, options, scale_x, L, B
        return h, c_n

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_c_n: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode is on in a backward pass that is itself to be differentiated.
        compute: Any = _Gradients.apply if torch.is_grad_enabled() else _gradients
        grads = compute(*ctx.constants, *ctx.saved_tensors, grad_h, grad_c_n)
        needed = ctx.needs_input_grad[5:10]
        return *[None] * 5, *(g if n else None for g, n in zip(grads, needed, strict=True)), None, None


def _gradients(
    kernels: ModuleType, options: Options, scale_x: float, L: int, B: int, u: Tensor, x: Tensor | None, bias: Tensor,
    weight_c: Tensor | None, mask_c: Tensor | None, valid: Tensor | None, c: Tensor, c_0: Tensor | None,
    grad_h: Tensor, grad_c_n: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The kernels' gradients. They find c_0 in c; it is an argument because the gradients depend on it."""
    return kernels.backward(  # type: ignore[no-any-return]
        options, u, x, bias, weight_c, mask_c, valid, scale_x, L, B, c, grad_h.contiguous(), grad_c_n.contiguous()
    )


class _Gradients(torch.autograd.Function):
    """The gradients as an operation that refuses to be differentiated: without it they would pass for constants."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        return _gradients(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "numsru's kernels can be differentiated once. For second derivatives call "
            "numsru.reference.sru_recurrence, which takes the same arguments"
        )


def sru_recurrence(
    u: Tensor,
    x: Tensor | None = None,
    bias: Tensor | None = None,
    c_0: Tensor | None = None,
    *,
    weight_c: Tensor | None = None,
    mask_c: Tensor | None = None,
    lengths: Tensor | None = None,
    mask_pad: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_x: float = 1.0,
    nonlinearity: str | None = None,
    dropout_placement: str = "paper",
) -> tuple[Tensor, Tensor]:
    r"""Run the SRU recurrence over a sequence, on the device its inputs are on.

    With the matrix products :math:`u = W x` done beforehand, for every unit on its own (version 1; in version 2 the
    gates also see :math:`v \odot c_{t-1}`):

    .. math::
        f_t &= \sigma(u^{(1)}_t + b_f) \qquad r_t = \sigma(u^{(2)}_t + b_r) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot u^{(0)}_t \\
        h_t &= r_t \odot m \odot g(c_t) + (1 - r_t) \odot x_t

    Args:
        u: Projected input, shape `(L, B, D, K, H)`: steps, batch, directions (1 or 2), sub-matrices (candidate,
            forget, reset and, with K = 4, skip), units. Direction 1 runs from the last step to the first. With
            `cu_seqlens`, `(total_steps, D, K, H)`.
        x: Highway input with K = 3, shape `(L, B, D*H)`, or `(total_steps, D*H)`. None with K = 4, where
            `u[..., 3, :]` replaces it, or for a layer without a highway.
        bias: Forget and reset bias, shape `(D, 2, H)`. None for zeros.
        c_0: Initial state, shape `(B, D*H)`. Default: zeros.
        weight_c: Recurrent weights :math:`v_f, v_r`, shape `(D, 2, H)`. Given: version 2. Default: version 1.
        mask_c: Dropout mask :math:`m`, shape `(B, D*H)`, shared by all steps, already scaled by 1/(1-p). Default:
            no dropout. A constant: it gets no gradient.
        lengths: Number of valid steps of each batch row, shape `(B,)`, integers. What lies behind is padding. On a
            GPU the values are not checked (that would stall it) but clamped to [0, L].
        mask_pad: True at padding, anywhere, shape `(L, B)`, bool. At most one of `lengths` and `mask_pad`.
            At padding c passes unchanged, h = 0 and all gradients are 0, whatever the padding holds.
        cu_seqlens: For sequences that lie end to end without padding: where each begins and, last, the end of all,
            shape `(B + 1,)`, integers from 0 to total_steps, none smaller than the one before. Not with `lengths` or
            `mask_pad`. On a GPU the values are not checked, but nothing outside the arrays is touched.
        scale_x: Factor of the highway input, with K = 3.
        nonlinearity: g: "tanh", "identity", "relu" or "selu". Default: tanh in version 1, identity in version 2.
        dropout_placement: "paper", as above, or "highway": :math:`h = x + (g(c) - x) \odot m \odot r`, where a
            dropped unit passes x through.

    Returns:
        `h`, shape `(L, B, D*H)` or `(total_steps, D*H)`, and `c_n`, shape `(B, D*H)`: the state after the last valid
        step of each direction.

    Raises:
        ValueError: If shapes, devices or values disagree, TypeError if dtypes do. The message gives what was
            expected and what came.

    Note:
        float32 and float64. Differentiable once in u, x, bias, c_0 and weight_c. For backward, u, x and the state are
        kept: on a CPU the state of every step, on a GPU of every eighth step or fewer.

    Source:
        Version 1: Lei, Zhang, "Training RNNs as Fast as CNNs", arXiv:1709.02755v1. Version 2: Lei et al., "Simple
        Recurrent Units for Highly Parallelizable Recurrence", arXiv:1709.02755v5.

    Example:
        >>> h, c_n = sru_recurrence(torch.randn(5, 2, 1, 3, 4), torch.randn(5, 2, 4), torch.zeros(1, 2, 4))
        >>> h.shape, c_n.shape
        (torch.Size([5, 2, 4]), torch.Size([2, 4]))
    """
    tensors: dict[str, Any] = {
        "u": u, "x": x, "bias": bias, "c_0": c_0, "weight_c": weight_c, "mask_c": mask_c, "lengths": lengths,
        "mask_pad": mask_pad, "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    for name, a in tensors.items():
        if not isinstance(a, Tensor) and (a is not None or name == "u"):
            raise TypeError(f"{name} must be a Tensor, got {type(a).__name__}")
    leading = "(L, B" if cu_seqlens is None else "(total_steps"
    dims = 5 if cu_seqlens is None else 4
    if u.dim() != dims or u.shape[-3] not in (1, 2) or u.shape[-2] not in (3, 4) or u.shape[-1] == 0:
        raise ValueError(
            f"u must have shape {leading}, D, K, H) with D = 1 or 2 directions, K = 3 or 4 sub-matrices "
            f"and H >= 1 units, got {tuple(u.shape)}"
        )
    D, K, H = u.shape[-3:]
    if u.dtype not in _DTYPES:
        raise TypeError(f"u must be float32 or float64, got {u.dtype}")
    if K == 4 and x is not None:
        raise ValueError("x must be None where u has K = 4 sub-matrices: the fourth replaces it")
    if cu_seqlens is None:
        L, B = u.shape[:2]
        valid = check_padding(lengths, mask_pad, L, B, u.device)
    else:
        if lengths is not None or mask_pad is not None:
            raise ValueError("cu_seqlens leaves no padding: expected lengths=None and mask_pad=None")
        valid, L = check_cu_seqlens(cu_seqlens, u.shape[0], u.device)
        B = len(cu_seqlens) - 1
    _check("x", x, (*u.shape[:-3], D * H), u.dtype, u.device)
    _check("bias", bias, (D, 2, H), u.dtype, u.device)
    _check("c_0", c_0, (B, D * H), u.dtype, u.device)
    _check("weight_c", weight_c, (D, 2, H), u.dtype, u.device)
    _check("mask_c", mask_c, (B, D * H), u.dtype, u.device)
    if mask_c is not None and mask_c.requires_grad:
        raise ValueError("mask_c is a constant of the recurrence and cannot require a gradient; detach it")
    if nonlinearity is None:
        nonlinearity = "tanh" if weight_c is None else "identity"
    _check_choice("nonlinearity", nonlinearity, NONLINEARITIES)
    _check_choice("dropout_placement", dropout_placement, DROPOUT_PLACEMENTS)

    kernels = _kernels(u.device.type)
    if kernels is None:
        return reference.sru_recurrence(
            u, x, bias, c_0, weight_c=weight_c, mask_c=mask_c, lengths=None if lengths is None else valid,
            mask_pad=mask_pad, cu_seqlens=None if cu_seqlens is None else valid, scale_x=scale_x,
            nonlinearity=nonlinearity, dropout_placement=dropout_placement,
        )  # fmt: skip
    padding = NO_PADDING
    for kind, given in ((LENGTHS, lengths), (MASK, mask_pad), (PACKED, cu_seqlens)):
        padding = padding if given is None else kind
    options = Options(
        version=1 if weight_c is None else 2,
        nonlinearity=NONLINEARITIES[nonlinearity],
        placement=PAPER if mask_c is None else DROPOUT_PLACEMENTS[dropout_placement],
        skip=SKIP_PROJECTED if K == 4 else NO_SKIP if x is None else SKIP_INPUT,
        padding=padding,
        has_c_0=c_0 is not None,
        has_mask_c=mask_c is not None,
        save_c=torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (u, x, bias, c_0, weight_c)),
    )
    if bias is None:
        bias = u.new_zeros(D, 2, H)
    h, c_n = _Recurrence.apply(  # type: ignore[no-untyped-call]
        kernels, options, float(scale_x), L, B,
        *(None if a is None else a.contiguous().resolve_neg() for a in (u, x, bias, weight_c, c_0, mask_c, valid)),
    )  # fmt: skip
    return h, c_n


def _check(name: str, a: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if a is None:
        return
    if a.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(a.shape)}")
    if a.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}{'' if dtype == torch.bool else ' as u is'}, got {a.dtype}")
    if a.device != device:
        raise ValueError(f"{name} must be on {device} as u is, got {a.device}")


def check_padding(
    lengths: Tensor | None, mask_pad: Tensor | None, L: int, B: int, device: torch.device
) -> Tensor | None:
    """The array that tells kernels which steps are valid: the lengths as int64 on `device`, or the mask, or None."""
    if mask_pad is not None:
        if lengths is not None:
            raise ValueError("expected at most one of lengths and mask_pad, got both")
        _check("mask_pad", mask_pad, (L, B), torch.bool, device)
    if lengths is None:
        return mask_pad
    if lengths.shape != (B,):
        raise ValueError(f"lengths must have shape {(B,)}, got {tuple(lengths.shape)}")
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.device.type == "cpu" and B and not 0 <= int(lengths.min()) <= int(lengths.max()) <= L:
        raise ValueError(f"lengths must lie between 0 and L = {L}, got {int(lengths.min())} to {int(lengths.max())}")
    if lengths.device.type != "cpu" and lengths.device != device:
        raise ValueError(f"lengths must be on {device} as u is, or on the CPU, got {lengths.device}")
    # A copy: kernels on the CPU rely on the values that were checked here, and read them again in backward.
    return lengths.to(device, torch.int64, copy=lengths.device.type == "cpu")


def check_cu_seqlens(cu_seqlens: Tensor, total_steps: int, device: torch.device) -> tuple[Tensor, int]:
    """cu_seqlens as int64 on `device`, and the most steps that a sequence has."""
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype.is_floating_point or cu_seqlens.dtype.is_complex or cu_seqlens.dtype == torch.bool:
        raise TypeError(f"cu_seqlens must be integers, got {cu_seqlens.dtype}")
    if cu_seqlens.device.type != "cpu":
        if cu_seqlens.device != device:
            raise ValueError(f"cu_seqlens must be on {device} as u is, or on the CPU, got {cu_seqlens.device}")
        return cu_seqlens.long(), total_steps  # a bound
    cu_seqlens = cu_seqlens.to(torch.int64, copy=True)  # differences of narrower integers could wrap
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total_steps or (lengths < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to total_steps = {total_steps}, got {cu_seqlens.tolist()}")
    return cu_seqlens.to(device), int(lengths.max()) if len(lengths) else 0


def _check_choice(name: str, value: str, choices: dict[str, int]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
