"""One layer of the authors' package `sru` 2.6.0 on numsru's recurrence."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import check_dtype, sru_recurrence
from .backend import INSTEAD_OF_TORCHSCRIPT, may_look
from .compat_convert import gate_major
from .nn import check_matches, check_probabilities, check_sizes, highway_scale
from .padding import Padding, compute_padded
from .reference import NONLINEARITIES

_ACTIVATION_TYPES = {"none": 0, "tanh": 1, "relu": 2, "selu": 3}


class SRUCell(nn.Module):
    r"""One layer of an SRU over a sequence; one step of it for 2-D input. `sru.SRUCell` of 2.6.0.

    Args:
        input_size: Features of the input.
        hidden_size: Units of each direction, H.
        dropout: Probability of dropping g(c), one mask for all steps; a dropped unit passes the highway input through.
        rnn_dropout: Probability of dropping a feature of the matrix product's input, one mask for all steps.
        bidirectional: Two directions, D = 2.
        n_proj: Where smaller than input and output, the matrix is a product of two, of this inner size. 0: none.
        use_tanh: g = tanh. Default: identity.
        highway_bias: Initial bias of the reset gate.
        has_skip_term: Whether there is a highway.
        layer_norm: Normalise the input of the matrix product, or with `normalize_after` the output.
        rescale: Multiply the highway input by :math:`\sqrt{1 + 2 e^{b}}`, b = `highway_bias`.
        v1: The gates do not see the state: `weight_c` is 0 and not trained.
        custom_m: Computes U in place of the matrix product: `(L, B, D*H*K)`, viewed `(L, B, D, H, K)` with candidate,
            forget gate, reset gate and, where the sizes of input and output differ, highway (K = 4, else 3). Or U and
            V, `(L, B, D*H*2)`: the weights of the gates on the state at each step, in addition to `weight_c`, which is
            then read as `(D, H, 2)`. Such a recurrence is a loop of torch operations: no kernel takes V.
        amp_recurrence_fp16: Without effect; the recurrence is computed in float32 or float64.
        normalize_after: See `layer_norm`.
        weight_c_init: Bound of the uniform initial `weight_c`. Default: :math:`\sqrt{3/2}`.
        projection_size, transform_module: The names of `n_proj` and `custom_m` in 3.0-dev.
        use_relu, use_selu: g, up to 2.1.7.
        is_input_normalized: Up to 2.1.7: initial weights are a tenth, as with `layer_norm`.
        weight_norm: Refused if True.

    Inputs: `input, c0=None, mask_pad=None, *, cu_seqlens=None`
        - **input**: `(L, B, input_size)`, or `(B, input_size)` for one step.
        - **c0**: initial state, `(B, D*H)`. Default: zeros.
        - **mask_pad**: not 0 at padding, `(L, B)`, `(B,)` for one step, any dtype. Padding passes the state on, gives
          0 and gets no gradient. Where the mask is on the CPU, only valid steps are computed, without a `custom_m`.
        - **cu_seqlens**: for input `(total_steps, input_size)`, sequences end to end: see :class:`numsru.SRU`.

    Outputs: `h, c`
        - **h**: as the input, with `D*H` features.
        - **c**: final state, `(B, D*H)`.

    Raises:
        ValueError: For shapes, sizes and options that do not fit; TypeError for types.

    Source: arXiv:1709.02755v5; dropout as in `sru` 2.3.3 and later.
    """

    weight: nn.Parameter
    weight_proj: nn.Parameter | None
    custom_m: nn.Module | None
    transform_module: nn.Module | None
    scale_x: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        dropout: float = 0.0,
        rnn_dropout: float = 0.0,
        bidirectional: bool = False,
        n_proj: int = 0,
        use_tanh: bool = False,
        highway_bias: float = 0.0,
        has_skip_term: bool = True,
        layer_norm: bool = False,
        rescale: bool = True,
        v1: bool = False,
        custom_m: nn.Module | None = None,
        amp_recurrence_fp16: bool = False,
        normalize_after: bool = False,
        weight_c_init: float | None = None,
        *,
        projection_size: int = 0,
        transform_module: nn.Module | None = None,
        use_relu: bool = False,
        use_selu: bool = False,
        is_input_normalized: bool = False,
        weight_norm: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        check_probabilities(dropout=dropout, rnn_dropout=rnn_dropout)
        if weight_norm:
            raise ValueError("weight_norm=True is not supported; `sru` dropped it in 2.1.9. Use layer_norm=True")
        chosen = [g for g, use in (("tanh", use_tanh), ("relu", use_relu), ("selu", use_selu)) if use]
        if len(chosen) > 1:
            raise ValueError(f"expected at most one of use_tanh, use_relu and use_selu, got {' and '.join(chosen)}")
        if n_proj and projection_size:
            raise ValueError("n_proj and projection_size are two names of one argument: expected one, got both")
        check_one_name(custom_m, transform_module)

        self.input_size, self.hidden_size = input_size, hidden_size
        self.num_directions = 2 if bidirectional else 1
        self.output_size = self.num_directions * hidden_size
        self.num_matrices = 4 if has_skip_term and input_size != self.output_size else 3
        self.projection_size = n_proj or projection_size
        check_sizes(at_least=0, projection_size=self.projection_size)
        if not 0 < self.projection_size < min(input_size, self.output_size):
            self.projection_size = 0
        self.dropout, self.rnn_dropout, self.bidirectional = float(dropout), float(rnn_dropout), bool(bidirectional)
        self.activation, self.highway_bias = chosen[0] if chosen else "none", float(highway_bias)
        self.activation_type = _ACTIVATION_TYPES[self.activation]
        self.has_skip_term, self.rescale, self.v1 = bool(has_skip_term), bool(rescale), bool(v1)
        self.normalize_after, self.weight_c_init = bool(normalize_after), weight_c_init
        self.small_init = bool(layer_norm or is_input_normalized)
        self.amp_recurrence_fp16 = amp_recurrence_fp16

        self.custom_m, self.transform_module = custom_m, transform_module
        self.register_parameter("weight_proj", None)
        self.register_parameter("weight", None)
        if self._custom is None:
            product_size = self.projection_size or input_size
            if self.projection_size:
                self.weight_proj = nn.Parameter(torch.empty(input_size, product_size))
            self.weight = nn.Parameter(torch.empty(product_size, self.output_size * self.num_matrices))
        self.weight_c = nn.Parameter(torch.empty(2 * self.output_size), requires_grad=not self.v1)
        self.bias = nn.Parameter(torch.empty(2 * self.output_size))
        self.register_buffer("scale_x", torch.ones(1))
        self.layer_norm = nn.LayerNorm(self.output_size if normalize_after else input_size) if layer_norm else None
        self.reset_parameters()

    @property
    def _custom(self) -> nn.Module | None:
        return self.transform_module if self.custom_m is None else self.custom_m

    @property
    def _own_product(self) -> bool:
        """Whether U is no business of the user's."""
        return self._custom is None

    def reset_parameters(self) -> None:
        """Draw new parameters as `sru` 2.6.0 does. A `custom_m` without a method of this name is left as it is."""
        scale = highway_scale(self.rescale and self.has_skip_term, self.highway_bias)
        c_bound = math.sqrt(1.5) if self.weight_c_init is None else self.weight_c_init
        with torch.no_grad():
            self.scale_x.fill_(scale)
            if self.v1:
                c_bound = 0.0
            self.weight_c.uniform_(-c_bound, c_bound)
            self.bias.zero_()
            self.set_bias(self.highway_bias)
            if self.layer_norm is not None:
                self.layer_norm.reset_parameters()
            if self._custom is not None:
                if hasattr(self._custom, "reset_parameters"):
                    self._custom.reset_parameters()  # type: ignore[operator]
                return
            for matrix in (self.weight_proj, self.weight):
                if matrix is not None:
                    bound = math.sqrt(3 / matrix.shape[0])
                    matrix.uniform_(-bound, bound)
            weight = self.weight.view(-1, self.output_size, self.num_matrices)
            weight[:, :, 0] *= math.sqrt(1 - self.dropout)
            weight *= math.sqrt(1 - self.rnn_dropout) * (0.1 if self.small_init else 1)
            weight[:, :, 3:] *= scale
            if not self.v1:
                weight[:, :, 1:3] *= math.sqrt(0.5)

    def set_bias(self, bias_val: float = 0.0) -> None:
        """Set the bias of the reset gate, as in `sru` 1.x."""
        with torch.no_grad():
            self.bias[self.output_size :] = bias_val

    def forward(
        self,
        input: Tensor,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if cu_seqlens is None:
            return self._forward_padded(input, c0, mask_pad, {})
        check_input(input, self.input_size)
        if input.dim() != 2 or mask_pad is not None or self._custom is not None:
            raise ValueError("with cu_seqlens, input must have two dimensions, without a mask_pad or a custom_m")
        return self._layer(input, c0, Padding(cu_seqlens=cu_seqlens))

    def _forward_padded(
        self, input: Tensor, c0: Tensor | None, mask_pad: Tensor | None, extra: dict[str, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """`forward`; `extra` goes to `_products`."""
        check_input(input, self.input_size)
        x = input if input.dim() == 3 else input.unsqueeze(0)
        padded = as_bool(mask_pad, *x.shape[:2])
        if self._custom is None:
            h, c = compute_padded(self._layer, x, c0, Padding(mask_pad=padded))
        else:
            padding = Padding(mask_pad=None if padded is None else padded.to(x.device))
            # A module of the user's gets what the padding holds.
            h, c = self._layer(padding.zero(x) if self._own_product else x, c0, padding, extra)
        return h if input.dim() == 3 else h.squeeze(0), c

    def _layer(
        self, x: Tensor, c0: Tensor | None, padding: Padding, extra: dict[str, Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """h and the final state of x, (L, B, in) or (total_steps, in)."""
        if self.weight is not None:
            check_matches(x, self.weight)
        B = x.shape[1] if padding.cu_seqlens is None else len(padding.cu_seqlens) - 1
        if c0 is not None:
            check_state(c0, (B, self.output_size))
        v = x
        if self.layer_norm is not None and not self.normalize_after:
            v = self.layer_norm(v)
        if self.training and self.rnn_dropout > 0:
            mask_x = F.dropout(v.new_ones(B, self.input_size), self.rnn_dropout)
            v = v * (mask_x if padding.cu_seqlens is None else mask_x[padding.row_of_step(len(x))])
        u, step_weights = self._products(v, padding.mask_pad, extra or {})
        h, c = self._recurrence(u, x, B, c0, step_weights, padding)
        if self.layer_norm is not None and self.normalize_after:
            h = padding.zero(self.layer_norm(h))
        return h, c

    def compute_U(self, input: Tensor) -> Tensor:  # noqa: N802
        """The product of the input and the weights, `(steps, D*H*K)`, as the package computes it: K innermost."""
        x = input.flatten(0, -2)
        return (x if self.weight_proj is None else x @ self.weight_proj) @ self.weight

    def _products(
        self, v: Tensor, padded: Tensor | None, extra: dict[str, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """U, `(L, B, D, K, H)` or `(total_steps, D, K, H)`, and V, `(L, B, D, H, 2)`, where `custom_m` returns one."""
        if self._custom is not None:
            return self._split_products(self._custom(v), v)
        steps, D, K, H = v.shape[:-1], self.num_directions, self.num_matrices, self.hidden_size
        # The recurrence wants H innermost. The smaller of the two is put into that order: U or the weight.
        if may_look(v) and steps.numel() < len(self.weight):
            return self.compute_U(v).view(*steps, D, H, K).transpose(-2, -1), None
        v = v if self.weight_proj is None else v @ self.weight_proj
        return F.linear(v, gate_major(self.weight.t(), D, H)).view(*steps, D, K, H), None

    def _split_products(self, result: Any, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """`_products`, from what `custom_m` returned for v."""
        L, B, _ = v.shape
        D, K, H = self.num_directions, self.num_matrices, self.hidden_size
        parts = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if len(parts) > 2:
            raise ValueError(f"custom_m must return U, or U and V, got {len(parts)} values")
        for i, part in enumerate(parts):  # torch 2.8 cannot compile a zip of different lengths
            name, size = (("U", D * H * K), ("V", D * H * 2))[i]
            if part.numel() != L * B * size or (part.dim() > 1 and part.shape[:2] != (L, B) and len(part) != L * B):
                raise ValueError(
                    f"custom_m must return {name} of shape {(L, B, size)} for input of shape {tuple(v.shape)}, "
                    f"got {tuple(part.shape)}"
                )
        u = parts[0].reshape(L, B, D, H, K).transpose(3, 4)
        return u, parts[1].reshape(L, B, D, H, 2) + self.weight_c.view(D, H, 2) if len(parts) == 2 else None

    def _recurrence(
        self, u: Tensor, x: Tensor, B: int, c0: Tensor | None, step_weights: Tensor | None, padding: Padding
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if self.bias.dtype == torch.float64 else torch.float32
        D, H = self.num_directions, self.hidden_size
        bias, weight_c = (a.to(dtype).view(2, D, H).transpose(0, 1) for a in (self.bias, self.weight_c))
        highway = self.has_skip_term and self.num_matrices == 3
        scale_x = 1.0
        if highway and self.rescale:
            if self.scale_x.device.type == "cpu" and may_look(x):
                scale_x = self.scale_x.item()
            else:  # reading the number from a GPU would stall it, and cannot be compiled
                x = x * self.scale_x
        mask_c = None
        if self.training and self.dropout > 0:
            mask_c = F.dropout(x.new_ones(B, D * H, dtype=dtype), self.dropout)
        tensors = (
            u.to(dtype),
            x.to(dtype) if highway else None,
            bias,
            None if c0 is None else c0.to(dtype),
        )
        options: dict[str, Any] = {
            "mask_c": mask_c,
            "mask_pad": padding.mask_pad,
            "scale_x": scale_x,
            "nonlinearity": "identity" if self.activation == "none" else self.activation,
        }
        if step_weights is None:
            options.update(weight_c=None if self.v1 else weight_c, dropout_placement="highway")
            h, c = sru_recurrence(*tensors, cu_seqlens=padding.cu_seqlens, **options)
        else:
            h, c = _recurrence_with_step_weights(*tensors, step_weights.to(dtype), **options)
        return h.to(self.bias.dtype), c.to(self.bias.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accepts the layouts of 1.x and 3.0-dev besides that of 2.x."""
        if self._custom is None:
            for theirs, ours in (("1.weight", "weight"), ("0.weight", "weight_proj"), ("weight", "weight")):
                value = state_dict.pop(f"{prefix}transform_module.{theirs}", None)
                if value is not None:
                    state_dict[prefix + ours] = value.t().contiguous()
        else:
            names = "transform_module", "custom_m"
            other, own = names if self.transform_module is None else names[::-1]
            for key in [key for key in state_dict if key.startswith(f"{prefix}{other}.")]:
                state_dict[f"{prefix}{own}{key[len(prefix) + len(other) :]}"] = state_dict.pop(key)
        given = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        if given == {"weight", "bias"} and self._custom is None:  # all that a file of 1.x holds
            bias = state_dict[prefix + "bias"]
            state_dict |= {prefix + "weight_c": torch.zeros_like(bias), prefix + "scale_x": bias.new_ones(1)}
        weight_c = state_dict.get(prefix + "weight_c")
        if self.v1 and weight_c is not None and not weight_c.is_meta and weight_c.any():
            args[-1].append(f"{prefix}weight_c is not 0, as it must be with v1=True: this file needs v1=False.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by `torch.jit.script`."""
        raise RuntimeError(f"numsru's modules cannot be compiled by torch.jit.script: {INSTEAD_OF_TORCHSCRIPT}")

    def extra_repr(self) -> str:
        return repr_of(
            self, "input_size", "hidden_size", dropout=0.0, rnn_dropout=0.0, bidirectional=False, projection_size=0,
            activation="none", highway_bias=0.0, has_skip_term=True, rescale=True, v1=False,
            normalize_after=False,
        )  # fmt: skip


def _recurrence_with_step_weights(
    u: Tensor, x: Tensor | None, bias: Tensor, c0: Tensor | None, weights: Tensor, *, mask_c: Tensor | None,
    mask_pad: Tensor | None, scale_x: float, nonlinearity: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sru_recurrence` with placement "highway" and weights on the state of every step, `(L, B, D, H, 2)`."""
    L, B, D, K, H = u.shape
    padded = torch.zeros(L, B, 1, dtype=torch.bool, device=u.device) if mask_pad is None else mask_pad.unsqueeze(2)
    # Zeros go in first: a NaN that is dropped from h afterwards would still be in the gradients.
    u, weights = (a.masked_fill(padded[:, :, :, None, None], 0) for a in (u, weights))
    if K == 4:
        skip = u[:, :, :, 3]
    else:
        skip = torch.zeros_like(u[:, :, :, 0]) if x is None else scale_x * x.masked_fill(padded, 0).view(L, B, D, H)
    m = u.new_ones(B, D, H) if mask_c is None else mask_c.view(B, D, H)
    start = u.new_zeros(B, D, H) if c0 is None else c0.view(B, D, H)
    outputs, final = [], []
    for d in range(D):
        c, steps = start[:, d], []
        for t in range(L) if d == 0 else reversed(range(L)):
            f = torch.sigmoid(u[t, :, d, 1] + bias[d, 0] + weights[t, :, d, :, 0] * c)
            r = torch.sigmoid(u[t, :, d, 2] + bias[d, 1] + weights[t, :, d, :, 1] * c)
            c = torch.where(padded[t], c, f * c + (1 - f) * u[t, :, d, 0])
            h = skip[t, :, d] + r * m[:, d] * (NONLINEARITIES[nonlinearity](c) - skip[t, :, d])
            steps.append(h.masked_fill(padded[t], 0))
        outputs.append(torch.stack(steps if d == 0 else steps[::-1]) if L else u.new_empty(0, B, H))
        final.append(c)
    return torch.cat(outputs, dim=2), torch.cat(final, dim=1)


def check_input(input: Tensor, size: int) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    if input.dim() not in (2, 3) or input.shape[-1] != size:
        raise ValueError(f"input must have shape (L, B, {size}) or (B, {size}), got {tuple(input.shape)}")
    check_dtype("input", input.dtype)


def check_state(c0: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(c0, Tensor):
        raise TypeError(f"c0 must be a Tensor (an SRU has one state, not LSTM's two), got {type(c0).__name__}")
    check_dtype("c0", c0.dtype)
    if c0.shape != shape:
        raise ValueError(f"c0 must have shape {shape}, got {tuple(c0.shape)}")


def as_bool(mask_pad: Tensor | None, L: int, B: int, name: str = "mask_pad") -> Tensor | None:
    if mask_pad is None:
        return None
    if not isinstance(mask_pad, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(mask_pad).__name__}")
    if mask_pad.shape != (L, B) and not (L == 1 and mask_pad.shape == (B,)):
        raise ValueError(f"{name} must have shape {(L, B)}, got {tuple(mask_pad.shape)}")
    return mask_pad.bool().view(L, B)


def check_one_name(custom_m: Any, transform_module: Any) -> None:
    if custom_m is not None and transform_module is not None:
        raise ValueError("custom_m and transform_module are two names of one argument: expected one, got both")


def repr_of(module: nn.Module, *names: str, **defaults: Any) -> str:
    changed = [f"{n}={getattr(module, n)!r}" for n, default in defaults.items() if getattr(module, n) != default]
    return ", ".join([str(getattr(module, n)) for n in names] + changed)
