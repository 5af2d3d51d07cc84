"""The SRU recurrence in plain torch operations: the text to read first, and what the kernels are held to."""

from __future__ import annotations  # those of an inner function, which torch 2.8 cannot compile

from collections.abc import Callable

import torch
from torch import Tensor

from .backend import is_exporting

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda c: c,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "selu": torch.selu,
}


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
    r"""Run the SRU recurrence over a sequence, one step after the other.

    .. math::
        f_t &= \sigma(u^{(1)}_t + b_f + v_f \odot c_{t-1}) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot u^{(0)}_t \\
        r_t &= \sigma(u^{(2)}_t + b_r + v_r \odot c_{t-1}) \\
        h_t &= r_t \odot m \odot g(c_t) + (1 - r_t) \odot x'_t & \text{("paper")} \\
        h_t &= x'_t + r_t \odot m \odot (g(c_t) - x'_t) & \text{("highway")}

    Version 1 has no :math:`v`: its gates do not see the state. The highway input :math:`x'_t` is `scale_x` times
    :math:`x_t` with K = 3 and :math:`u^{(3)}_t` with K = 4. Direction 1 runs from the last step to the first.

    A padded step hands c on unchanged and gives h = 0. All its gradients are 0, whatever `u` and `x` hold there.

    Args:
        u: All matrix products, shape `(L, B, D, K, H)`: candidate, forget gate, reset gate and, with K = 4, skip.
        x: Highway input, shape `(L, B, D*H)`, split between the directions. None with K = 4; with K = 3 None means
            that there is no highway.
        bias: Forget and reset bias, shape `(D, 2, H)`. Default: zeros.
        c_0: Initial state, shape `(B, D*H)`. Default: zeros.
        weight_c: Recurrent weights :math:`v_f` and :math:`v_r`, shape `(D, 2, H)`. Given: version 2. None: version 1.
        mask_c: Dropout mask :math:`m`, already scaled, shape `(B, D*H)`. Default: no dropout.
        lengths: Number of valid steps of each row, the rest being padding, shape `(B,)`.
        mask_pad: True where a step is padding, shape `(L, B)`. At most one of `lengths` and `mask_pad`.
        cu_seqlens: Where each of B sequences that lie end to end begins, and where the last ends, shape `(B + 1,)`. The
            leading `(L, B` of `u`, `x` and `h` is then `(total_steps`.
        scale_x: Factor on `x`.
        nonlinearity: :math:`g`, one of "identity", "tanh", "relu", "selu". Default: "tanh" for version 1, "identity"
            for version 2.
        dropout_placement: "paper", or "highway", where a dropped unit passes its highway input through.

    Returns:
        `h`, shape `(L, B, D*H)`, and `c_n`, shape `(B, D*H)`: the state after the last step that each direction takes.

    Raises:
        RuntimeError: By torch, for shapes that do not fit. Arguments are not checked.

    Note: Any device; computed in the dtype of the arguments throughout. Differentiable as often as you like in every
    floating argument.

    Source: Version 1: Lei and Zhang, "Training RNNs as Fast as CNNs", arXiv:1709.02755v1. Version 2: Lei et al.,
    "Simple Recurrent Units for Highly Parallelizable Recurrence", arXiv:1709.02755v5. Placement "highway", `scale_x`
    and `mask_pad`: the package `sru`, 2.3.3 and later.

    Example:
        >>> h, c_n = sru_recurrence(torch.randn(5, 2, 1, 3, 4), torch.randn(5, 2, 4), torch.zeros(1, 2, 4))
    """
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        step = torch.arange(int(lengths.max()) if len(lengths) else 0, device=u.device).unsqueeze(1)
        position = (cu_seqlens[:-1] + step).clamp(max=len(u) - 1)
        h, c_n = sru_recurrence(
            u[position],
            None if x is None else x[position],
            bias,
            c_0,
            weight_c=weight_c,
            mask_c=mask_c,
            lengths=lengths,
            scale_x=scale_x,
            nonlinearity=nonlinearity,
            dropout_placement=dropout_placement,
        )
        return h.transpose(0, 1)[(step < lengths).t()], c_n

    length, batch, directions, parts, units = u.shape
    state_shape = (batch, directions, units)
    if nonlinearity is None:
        nonlinearity = "tanh" if weight_c is None else "identity"

    if lengths is not None:
        mask_pad = torch.arange(length, device=u.device).unsqueeze(1) >= lengths
    elif mask_pad is None:
        mask_pad = torch.zeros(length, batch, dtype=torch.bool, device=u.device)

    # Zeros go in before anything is computed: a NaN dropped from h afterwards would still be in the gradients.
    u = u.masked_fill(mask_pad.view(length, batch, 1, 1, 1), 0)
    if parts == 4:
        skip = u[:, :, :, 3]
    elif x is not None:
        skip = scale_x * x.masked_fill(mask_pad.unsqueeze(2), 0).reshape(length, *state_shape)
    else:
        skip = torch.zeros_like(u[:, :, :, 0])

    u, skip = _reverse_direction_1(u), _reverse_direction_1(skip)
    padded = _reverse_direction_1(mask_pad.view(length, batch, 1, 1).expand(-1, -1, directions, -1))
    candidate, forget, reset = u.unbind(dim=3)[:3]

    c = u.new_zeros(state_shape) if c_0 is None else c_0.reshape(state_shape)
    weight_f, weight_r = (None, None) if weight_c is None else weight_c.unbind(1)
    if bias is not None:
        forget, reset = forget + bias[:, 0], reset + bias[:, 1]

    def next_state(
        c: Tensor, forget: Tensor, candidate: Tensor, padded: Tensor, weight_f: Tensor | None = None
    ) -> Tensor:
        f = _gate(forget, c, weight_f)
        return torch.where(padded, c, f * c + (1 - f) * candidate)

    c_all = _scan(next_state, c, (forget, candidate, padded), () if weight_f is None else (weight_f,))
    r = _gate(reset, c_all[:-1], weight_r)
    g = NONLINEARITIES[nonlinearity](c_all[1:])
    m = 1.0 if mask_c is None else mask_c.reshape(state_shape)
    h = r * m * g + (1 - r) * skip if dropout_placement == "paper" else skip + r * m * (g - skip)
    h = _reverse_direction_1(h.masked_fill(padded, 0))
    return h.reshape(length, batch, directions * units), c_all[-1].reshape(batch, directions * units)


def _gate(z: Tensor, c: Tensor, weight: Tensor | None) -> Tensor:
    return torch.sigmoid(z if weight is None else z + weight * c)


def _scan(
    step: Callable[..., Tensor], c: Tensor, of_each_step: tuple[Tensor, ...], of_all: tuple[Tensor, ...]
) -> Tensor:
    """c and then what becomes of it, step by step, stacked."""
    if is_exporting():  # a loop in the program, for sequences of any length

        def twice(*args: Tensor) -> list[Tensor]:
            c = step(*args)
            return [c, c.clone()]  # what is handed on, and what is kept: two tensors are asked for

        of_each_step = tuple(a.contiguous() for a in of_each_step)
        _, states = torch.ops.higher_order.scan(twice, [c], [*of_each_step], additional_inputs=of_all)
        return torch.cat([c.unsqueeze(0), states])
    states = [c]
    for arguments in zip(*of_each_step, strict=True):
        states.append(step(states[-1], *arguments, *of_all))
    return torch.stack(states)


def _reverse_direction_1(value: Tensor) -> Tensor:
    """Reverse the time of direction 1 in `(L, B, D, ...)`, so that one loop serves both directions. Its own inverse."""
    return torch.stack([v.flip(0) if d == 1 else v for d, v in enumerate(value.unbind(dim=2))], dim=2)
