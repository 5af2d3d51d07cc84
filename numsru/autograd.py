"""The recurrence as one differentiable operation: argument checks, choice of the backend, gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from . import operators, reference
from .backend import (
    check_gradients,
    check_not_traced,
    is_autocast,
    is_exporting,
    is_transformed,
    may_look,
    state_dtype,
    uses_operators,
    uses_reference,
)
from .backend import kernels_for as _kernels
from .operators import check as _check
from .operators import check_lengths, check_rise
from .products import product, product_gradients
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

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class _Call(NamedTuple):
    """A call of the recurrence with its arguments checked. The tensors are contiguous, x and u apart."""

    kernels: ModuleType
    options: Options
    scale_x: float
    L: int
    B: int
    D: int
    H: int
    looked: bool  # whether the values of lengths and cu_seqlens on the CPU have been checked

    def forward(
        self, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, c_0: Tensor | None,
        mask_c: Tensor | None, valid: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """h, c_n and what backward needs of c."""
        return self.kernels.forward(  # type: ignore[no-any-return]
            self.options, u, x, bias, weight_c, c_0, mask_c, valid, self.scale_x, self.L, self.B
        )

    def backward(
        self, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, mask_c: Tensor | None,
        valid: Tensor | None, c: Tensor, grad_h: Tensor, grad_c_n: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:  # fmt: skip
        """Gradients of u, x, bias, weight_c and c_0."""
        check_gradients(grad_h, grad_c_n)
        return self.kernels.backward(  # type: ignore[no-any-return]
            self.options, u, x, bias, weight_c, mask_c, valid, self.scale_x, self.L, self.B, c,
            grad_h.contiguous().resolve_neg(), grad_c_n.contiguous().resolve_neg(),
        )  # fmt: skip


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, c_0: Tensor | None,
        mask_c: Tensor | None, valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h, c_n, c = call.forward(u, x, bias, weight_c, c_0, mask_c, valid)
        ctx.save_for_backward(u, x, bias, weight_c, mask_c, valid, c, c_0)
        ctx.call = call
        return h, c_n

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_c_n: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = _compute_once(_recurrence_gradients, ctx.call, *ctx.saved_tensors, grad_h, grad_c_n)
        needed = ctx.needs_input_grad[1:6]
        return None, *(g if n else None for g, n in zip(grads, needed, strict=True)), None, None


class _TransformedRecurrence(torch.autograd.Function):
    """`_Recurrence` in the form that `torch.func` asks for, which costs five times as much a call."""

    @staticmethod
    def forward(
        call: _Call, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, c_0: Tensor | None,
        mask_c: Tensor | None, valid: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        if not call.looked:
            operators.check_valid(valid, call.options.padding, call.L)
        return call.forward(u, x, bias, weight_c, c_0, mask_c, valid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.call, u, x, bias, weight_c, c_0, mask_c, valid = inputs
        c = output[2]
        if c is not None:
            ctx.mark_non_differentiable(c)
        ctx.save_for_backward(u, x, bias, weight_c, mask_c, valid, c, c_0)

    backward = _Recurrence.backward

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_after_the_other(_TransformedRecurrence, info.batch_size, in_dims, args)


def _one_after_the_other(
    function: Any, batch_size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """What `torch.func.vmap` wants of a Function, by one call of it for each element."""
    calls = [
        # Of what holds no tensor, the dimension is None or as nested as it is itself.
        function.apply(
            *(a.select(d, i).contiguous() if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True))
        )
        for i in range(batch_size)
    ]
    outputs = tuple(None if a[0] is None else torch.stack(a) for a in zip(*calls, strict=True))
    return outputs, tuple(None if a is None else 0 for a in outputs)


def _recurrence_gradients(call: _Call, *tensors: Any) -> tuple[Tensor | None, ...]:
    """The kernels find c_0 in c; it is an argument because the gradients depend on it."""
    u, x, bias, weight_c, mask_c, valid, c, _, grad_h, grad_c_n = tensors
    return call.backward(u, x, bias, weight_c, mask_c, valid, c, grad_h, grad_c_n)


class _Layer(torch.autograd.Function):
    """A matrix product and the recurrence. As one node, the product itself adds to the gradient of the highway."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, highway_is_v: bool, v: Tensor, weight: Tensor, x: Tensor | None, bias: Tensor,
        weight_c: Tensor | None, c_0: Tensor | None, mask_c: Tensor | None, valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        skip = v if highway_is_v else x
        u = _project(call, v, weight)
        h, c_n, c = call.forward(u, skip, bias, weight_c, c_0, mask_c, valid)
        ctx.save_for_backward(u, v, weight, x, bias, weight_c, mask_c, valid, c, c_0)
        ctx.call, ctx.highway_is_v = call, highway_is_v
        return h, c_n

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_c_n: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:8]
        grads = _compute_once(
            _layer_gradients, ctx.call, ctx.highway_is_v, *needed[:2], *ctx.saved_tensors, grad_h, grad_c_n
        )
        return None, None, *(g if n else None for g, n in zip(grads, needed, strict=True)), None, None


def _layer_gradients(
    call: _Call, highway_is_v: bool, v_needs_it: bool, weight_needs_it: bool, u: Tensor, v: Tensor, weight: Tensor,
    x: Tensor | None, *tensors: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of v, weight, x, bias, weight_c and c_0."""
    bias, weight_c, mask_c, valid, c, _, grad_h, grad_c_n = tensors
    grad_u, grad_x, *others = call.backward(
        u, v if highway_is_v else x, bias, weight_c, mask_c, valid, c, grad_h, grad_c_n
    )
    rows = v.view(-1, v.shape[-1])
    grad_v, grad_weight = product_gradients(
        grad_u.view(-1, weight.shape[0]), rows, weight,
        grad_x.view(rows.shape) if highway_is_v and grad_x is not None else None, v_needs_it, weight_needs_it,
    )  # fmt: skip
    return None if grad_v is None else grad_v.view(v.shape), grad_weight, None if highway_is_v else grad_x, *others


def _compute_once(gradients: Callable[..., tuple[Tensor | None, ...]], *args: Any) -> tuple[Tensor | None, ...]:
    # Grad mode is on in a backward pass that is itself to be differentiated.
    return _Once.apply(gradients, *args) if torch.is_grad_enabled() else gradients(*args)  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    """Gradients as an operation that refuses to be differentiated: without it they would pass for constants."""

    @staticmethod
    def forward(gradients: Callable[..., tuple[Tensor | None, ...]], *args: Any) -> Any:
        return gradients(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(operators.ONCE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_after_the_other(_Once, info.batch_size, in_dims, args)


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
            expected and what came. RuntimeError: For a second derivative of the kernels, or where one has to be
            compiled and cannot.

    Note:
        float32, float64, float16 and bfloat16. With u of 16 bits states, gates and sums are float32, and so are
        `c_n` and, unless they are of 16 bits too, the arguments besides u and x. Differentiable once in u, x, bias,
        c_0 and weight_c, and more often inside `use_backend("reference")`. For backward u, x and the state of every
        eighth step or fewer are kept.

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
    check_dtype("u", u.dtype)
    if K == 4 and x is not None:
        raise ValueError("x must be None where u has K = 4 sub-matrices: the fourth replaces it")
    _check("x", x, (*u.shape[:-3], D * H), u.dtype, u.device)
    prepared = _prepare(
        u.shape[:-3], D, K, H, u.dtype, u.device, x is not None, bias, c_0, weight_c, mask_c, lengths, mask_pad,
        cu_seqlens, scale_x, nonlinearity, dropout_placement, _require_grad(u, x, bias, c_0, weight_c),
        may_look(*tensors.values()),
    )  # fmt: skip
    if prepared.call is None:
        return _reference(u, x, prepared.options)
    return _by_kernels(prepared, u, x)


def sru_layer(
    v: Tensor,
    weight: Tensor,
    x: Tensor | None = None,
    bias: Tensor | None = None,
    c_0: Tensor | None = None,
    *,
    directions: int,
    parts: int,
    weight_c: Tensor | None = None,
    mask_c: Tensor | None = None,
    lengths: Tensor | None = None,
    mask_pad: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_x: float = 1.0,
    nonlinearity: str | None = None,
    dropout_placement: str = "paper",
) -> tuple[Tensor, Tensor]:
    """The matrix products of a layer and :func:`sru_recurrence` of them, as one operation.

    Without gradients, a CPU computes long sequences in pieces, so that the products of all steps are never in memory.
    Under autocast v, x and weight are cast to its dtype.

    Args:
        v: What is multiplied by the weight, shape `(L, B, in)`, or `(total_steps, in)` with `cu_seqlens`.
        weight: Shape `(D*K*H, in)`.
        x: Highway input with K = 3, which may be v itself, shape `(L, B, D*H)`, or `(total_steps, D*H)`.
        directions, parts: D and K.

    The other arguments, and what is returned, are as for :func:`sru_recurrence` with `u = v @ weight.T`.
    """
    same = x is v
    if is_autocast(v.device.type) and v.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(v.device.type)
        v, weight = v.to(dtype), weight.to(dtype)
        x = v if same else None if x is None else x.to(dtype)
    D, K, H = directions, parts, weight.shape[0] // (directions * parts)
    look = may_look(v, weight, x, bias, c_0, weight_c, mask_c, lengths, mask_pad, cu_seqlens)
    prepared = _prepare(
        v.shape[:-1], D, K, H, v.dtype, v.device, x is not None, bias, c_0, weight_c, mask_c, lengths, mask_pad,
        cu_seqlens, scale_x, nonlinearity, dropout_placement, _require_grad(v, weight, x, bias, c_0, weight_c),
        look,
    )  # fmt: skip
    if prepared.call is None or not look or v.is_meta:
        u = F.linear(v, weight).view(*v.shape[:-1], D, K, H)
        return _reference(u, x, prepared.options) if prepared.call is None else _by_kernels(prepared, u, x)
    v, weight = v.contiguous().resolve_neg(), weight.contiguous().resolve_neg()
    x = None if same or x is None else x.contiguous().resolve_neg()
    if not prepared.call.options.save_c:
        return _layer_without_gradients(prepared.call, v if same else x, v, weight, *prepared.tensors)
    h, c_n = _Layer.apply(prepared.call, same, v, weight, x, *prepared.tensors)  # type: ignore[no-untyped-call]
    return h, c_n


def plain_sru_layer(
    v: Tensor, weight: Tensor, bias: Tensor | None, c_0: Tensor | None, weight_c: Tensor | None, directions: int,
    skip: int, scale_x: float, nonlinearity: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`sru_layer` of arguments that are known to fit, without its checks.

    All tensors are contiguous, of one dtype and on one device; `skip` is of `recurrence.py`. c_n is of that dtype.
    """
    L, B, _ = v.shape
    if v.itemsize == 2:
        bias, c_0, weight_c = (None if a is None else a.float() for a in (bias, c_0, weight_c))
    H = weight.shape[0] // (directions * (4 if skip == SKIP_PROJECTED else 3))
    if bias is None:
        bias = v.new_zeros(directions, 2, H, dtype=state_dtype(v.dtype))
    requires_grad = _require_grad(v, weight, bias, c_0, weight_c)
    call = _plain_call(
        _kernels("cpu" if v.is_cpu else "cuda"), 1 if weight_c is None else 2, nonlinearity, skip, c_0 is not None,
        requires_grad, scale_x, L, B, directions, H,
    )  # fmt: skip
    same = skip == SKIP_INPUT
    if requires_grad:
        h, c_n = _Layer.apply(call, same, v, weight, None, bias, weight_c, c_0, None, None)  # type: ignore[no-untyped-call]
    else:
        h, c_n = _layer_without_gradients(call, v if same else None, v, weight, bias, weight_c, c_0, None, None)
    return h, c_n if c_n.dtype is v.dtype else c_n.to(v.dtype)


@functools.lru_cache(4096)
def _plain_call(
    kernels: ModuleType, version: int, nonlinearity: str, skip: int, has_c_0: bool, save_c: bool, scale_x: float,
    L: int, B: int, D: int, H: int,
) -> _Call:  # fmt: skip
    options = Options(version, NONLINEARITIES[nonlinearity], PAPER, skip, has_c_0=has_c_0, save_c=save_c)
    return _Call(kernels, options, scale_x, L, B, D, H, looked=True)


def _layer_without_gradients(
    call: _Call, x: Tensor | None, v: Tensor, weight: Tensor, bias: Tensor, weight_c: Tensor | None,
    c_0: Tensor | None, mask_c: Tensor | None, valid: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return call.kernels.layer_forward(  # type: ignore[no-any-return]
        call.options, v, weight, x, bias, weight_c, c_0, mask_c, valid, call.scale_x, call.L, call.B, call.D
    )


def _project(call: _Call, v: Tensor, weight: Tensor) -> Tensor:
    u = product(v.view(-1, v.shape[-1]), weight)
    return u.view(*v.shape[:-1], call.D, call.options.parts, call.H)


class _Prepared(NamedTuple):
    call: _Call | None  # None where the reference is to compute it
    tensors: tuple[Any, ...]  # bias, weight_c, c_0, mask_c and valid, as kernels take them
    options: dict[str, Any]  # the same for the reference


def _reference(u: Tensor, x: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The reference, with the dtypes that kernels compute in and return."""
    state = state_dtype(u.dtype)
    options = {n: a.to(state) if isinstance(a, Tensor) and a.is_floating_point() else a for n, a in options.items()}
    h, c_n = reference.sru_recurrence(u.to(state), None if x is None else x.to(state), **options)
    return h.to(u.dtype), c_n


def _by_kernels(prepared: _Prepared, u: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    call, tensors = prepared.call, prepared.tensors
    assert call is not None
    if uses_operators(u, x, *tensors):
        if is_transformed():
            raise RuntimeError(
                "torch.func cannot transform numsru's operators, which take the place of its kernels under "
                "torch.compile and for subclasses of Tensor. Leave them out, or call the module inside "
                "numsru.use_backend('reference')"
            )
        (bias, weight_c, c_0, mask_c, valid), o = tensors, call.options
        h, c_n, _ = torch.ops.numsru.recurrence(
            u, x, bias, c_0, weight_c, mask_c, valid, call.scale_x, o.nonlinearity, o.placement, o.padding, o.save_c
        )
        return h, c_n
    u, x = u.contiguous().resolve_neg(), None if x is None else x.contiguous().resolve_neg()
    if is_transformed():
        h, c_n, _ = _TransformedRecurrence.apply(call, u, x, *tensors)  # type: ignore[no-untyped-call]
    elif call.options.save_c:
        h, c_n = _Recurrence.apply(call, u, x, *tensors)  # type: ignore[no-untyped-call]
    else:  # a node of autograd costs more than the launch of a kernel
        h, c_n, _ = call.forward(u, x, *tensors)
    return h, c_n


def _require_grad(*tensors: Tensor | None) -> bool:
    return (
        torch.is_grad_enabled()
        and any(a is not None and a.requires_grad for a in tensors)
        # Inference mode wins over `enable_grad` inside of it. A compiler cannot ask for it.
        and (is_compiling() or not torch.is_inference_mode_enabled())
    )


def _prepare(
    leading: torch.Size, D: int, K: int, H: int, dtype: torch.dtype, device: torch.device, has_x: bool,
    bias: Tensor | None, c_0: Tensor | None, weight_c: Tensor | None, mask_c: Tensor | None, lengths: Tensor | None,
    mask_pad: Tensor | None, cu_seqlens: Tensor | None, scale_x: float, nonlinearity: str | None,
    dropout_placement: str, requires_grad: bool, look: bool,
) -> _Prepared:  # fmt: skip
    """Check what does not depend on u and x, of which come the leading sizes, the dtype and the device."""
    if cu_seqlens is None:
        L, B = leading
        valid = check_padding(lengths, mask_pad, L, B, device, look=look)
    else:
        if lengths is not None or mask_pad is not None:
            raise ValueError("cu_seqlens leaves no padding: expected lengths=None and mask_pad=None")
        valid, L = check_cu_seqlens(cu_seqlens, leading[0], device, look=look)
        B = len(cu_seqlens) - 1
    state = state_dtype(dtype)
    _check("bias", bias, (D, 2, H), dtype, device, state)
    _check("c_0", c_0, (B, D * H), dtype, device, state)
    _check("weight_c", weight_c, (D, 2, H), dtype, device, state)
    _check("mask_c", mask_c, (B, D * H), dtype, device, state)
    if mask_c is not None and mask_c.requires_grad:
        raise ValueError("mask_c is a constant of the recurrence and cannot require a gradient; detach it")
    if nonlinearity is None:
        nonlinearity = "tanh" if weight_c is None else "identity"
    _check_choice("nonlinearity", nonlinearity, NONLINEARITIES)
    _check_choice("dropout_placement", dropout_placement, DROPOUT_PLACEMENTS)

    to_reference = uses_reference() or (device.type == "meta" and is_transformed())  # which operators cannot be
    kernels = None if to_reference else _kernels(device.type)
    if kernels is None:
        if cu_seqlens is not None and is_exporting():
            raise ValueError("an exported program takes no cu_seqlens: pad the sequences and give it their lengths")
        options = {
            "bias": bias, "c_0": c_0, "weight_c": weight_c, "mask_c": mask_c,
            "lengths": None if lengths is None else valid, "mask_pad": mask_pad,
            "cu_seqlens": None if cu_seqlens is None else valid, "scale_x": scale_x, "nonlinearity": nonlinearity,
            "dropout_placement": dropout_placement,
        }  # fmt: skip
        return _Prepared(None, (), options)
    check_not_traced()
    padding = NO_PADDING
    for kind, given in ((LENGTHS, lengths), (MASK, mask_pad), (PACKED, cu_seqlens)):
        padding = padding if given is None else kind
    compiled = Options(
        version=1 if weight_c is None else 2,
        nonlinearity=NONLINEARITIES[nonlinearity],
        placement=PAPER if mask_c is None else DROPOUT_PLACEMENTS[dropout_placement],
        skip=SKIP_PROJECTED if K == 4 else SKIP_INPUT if has_x else NO_SKIP,
        padding=padding,
        has_c_0=c_0 is not None,
        has_mask_c=mask_c is not None,
        save_c=requires_grad or (torch.is_grad_enabled() and is_transformed()),
    )
    if bias is None:
        bias = torch.zeros(D, 2, H, dtype=state, device=device)
    tensors = (
        a if a is None or (look and a.dtype == state and a.is_contiguous() and not a.is_neg())
        else a.to(state).contiguous().resolve_neg()
        for a in (bias, weight_c, c_0, mask_c)
    )  # fmt: skip
    valid = None if valid is None else valid.contiguous()
    return _Prepared(_Call(kernels, compiled, float(scale_x), L, B, D, H, look), (*tensors, valid), {})


def check_padding(
    lengths: Tensor | None, mask_pad: Tensor | None, L: int, B: int, device: torch.device, look: bool = True
) -> Tensor | None:
    """The array that tells kernels which steps are valid: the lengths as int64 on `device`, or the mask, or None.

    `look`: whether values on the host may be looked at. Operators check them when they run.
    """
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
    if lengths.device.type != "cpu":
        if lengths.device != device:
            raise ValueError(f"lengths must be on {device} as the input is, or on the CPU, got {lengths.device}")
        return lengths.long()
    # A copy: kernels on the CPU rely on the values that are checked here, and read them again in backward.
    lengths = lengths.to(torch.int64, copy=True)
    if look:
        check_lengths(lengths, L)
    return lengths.to(device)


def check_cu_seqlens(
    cu_seqlens: Tensor, total_steps: int, device: torch.device, look: bool = True
) -> tuple[Tensor, int]:
    """cu_seqlens as int64 on `device`, and the most steps that a sequence has. `look`: as for `check_padding`."""
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype.is_floating_point or cu_seqlens.dtype.is_complex or cu_seqlens.dtype == torch.bool:
        raise TypeError(f"cu_seqlens must be integers, got {cu_seqlens.dtype}")
    if cu_seqlens.device.type != "cpu":
        if cu_seqlens.device != device:
            raise ValueError(f"cu_seqlens must be on {device} as the input is, or on the CPU, got {cu_seqlens.device}")
        return cu_seqlens.long(), total_steps  # a bound
    cu_seqlens = cu_seqlens.to(torch.int64, copy=True)  # differences of narrower integers could wrap
    if not look:
        return cu_seqlens.to(device), total_steps
    check_rise(cu_seqlens, total_steps)
    return cu_seqlens.to(device), int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {dtype}")


def _check_choice(name: str, value: str, choices: dict[str, int]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
