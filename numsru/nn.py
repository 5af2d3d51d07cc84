"""SRU layers as torch modules: parameters, initialisation, layers, directions, dropout, padding."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import cpu_kernels
from .autograd import DTYPES, check_cu_seqlens, check_dtype, check_padding, plain_sru_layer, sru_layer
from .backend import (
    INSTEAD_OF_TORCHSCRIPT,
    PLAIN,
    is_autocast,
    is_exporting,
    may_look,
    state_dtype,
    takes_shortcuts,
)
from .padding import Padding, compute_packed, compute_padded, is_on_host
from .products import product
from .recurrence import DROPOUT_PLACEMENTS, NO_SKIP, NONLINEARITIES, SKIP_INPUT, SKIP_PROJECTED


def check_sizes(at_least: int = 1, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < at_least:
            raise ValueError(f"{name} must be at least {at_least}, got {size}")


def check_flags(**flags: bool) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {flag!r}")


def check_probabilities(**probabilities: float) -> None:
    for name, p in probabilities.items():
        if not isinstance(p, numbers.Real):
            raise TypeError(f"{name} must be a number, got {type(p).__name__}")
        if not 0 <= p < 1:
            raise ValueError(f"{name} must be a probability in [0, 1), got {p}")


def check_matches(input: Tensor, weight: Tensor) -> None:
    """Refuse an input of another dtype than the parameters', unless autocast casts both. It leaves float64 alone."""
    if input.dtype != weight.dtype and (
        not is_autocast(input.device.type) or torch.float64 in (input.dtype, weight.dtype)
    ):
        raise TypeError(f"input must be {weight.dtype} as the parameters are, got {input.dtype}")


def highway_scale(rescale: bool, highway_bias: float) -> float:
    """The factor of the highway input (arXiv:1709.02755v5, section 3.2)."""
    return math.sqrt(1 + 2 * math.exp(highway_bias)) if rescale else 1.0


def _one_of(state: Tensor | None, hx: Tensor | None, name: str) -> Tensor | None:
    if state is not None and hx is not None:
        raise TypeError(f"{name} and hx are two names of one argument: expected one of them, got both")
    return state if hx is None else hx


class _SRUBase(nn.Module):
    """The parameters of a stack of SRU layers and how one layer is computed."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        dropout: float,
        bidirectional: bool,
        rnn_dropout: float,
        nonlinearity: str | None,
        highway: bool,
        highway_bias: float,
        rescale: bool,
        version: int,
        dropout_placement: str,
        layer_norm: str | None,
        projection_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_dtype("dtype", dtype or torch.get_default_dtype())
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_flags(bias=bias, bidirectional=bidirectional, highway=highway, rescale=rescale)
        check_probabilities(dropout=dropout, rnn_dropout=rnn_dropout)
        check_sizes(at_least=0, projection_size=projection_size)
        if version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {version!r}")
        if nonlinearity is None:
            nonlinearity = "tanh" if version == 1 else "identity"
        for name, value, choices in (
            ("nonlinearity", nonlinearity, tuple(NONLINEARITIES)),
            ("dropout_placement", dropout_placement, tuple(DROPOUT_PLACEMENTS)),
            ("layer_norm", layer_norm, (None, "pre", "post")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")

        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.dropout, self.bidirectional = bias, float(dropout), bidirectional
        self.rnn_dropout, self.nonlinearity, self.highway = float(rnn_dropout), nonlinearity, highway
        self.highway_bias, self.rescale, self.version = float(highway_bias), rescale, version
        self.dropout_placement, self.layer_norm, self.projection_size = dropout_placement, layer_norm, projection_size

        D, H = self.num_directions, hidden_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of all parameters but those of the normalisation
        for i in range(num_layers):
            in_size, product_size = self._in_size(i), self._product_size(i)
            if product_size < in_size:
                self._shapes[f"weight_proj_l{i}"] = product_size, in_size
            self._shapes[f"weight_l{i}"] = D * self._parts(i) * H, product_size
            if bias:
                self._shapes[f"bias_l{i}"] = D, 2, H
            else:
                self.register_parameter(f"bias_l{i}", None)
            if version == 2:
                self._shapes[f"weight_c_l{i}"] = D, 2, H
            if layer_norm is not None:
                self.add_module(f"layer_norm_l{i}", nn.LayerNorm(in_size if layer_norm == "pre" else D * H, **factory))
        for name, shape in self._shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
        self.reset_parameters()

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _in_size(self, i: int) -> int:
        return self.input_size if i == 0 else self.num_directions * self.hidden_size

    def _product_size(self, i: int) -> int:
        """Length of the vectors that weight_l{i} multiplies."""
        projects = 0 < self.projection_size < min(self._in_size(i), self.num_directions * self.hidden_size)
        return self.projection_size if projects else self._in_size(i)

    def _parts(self, i: int) -> int:
        """K: the highway needs a matrix of its own where a layer's input and output differ in size."""
        return 4 if self.highway and self._in_size(i) != self.num_directions * self.hidden_size else 3

    @property
    def _scale_x(self) -> float:
        return highway_scale(self.rescale, self.highway_bias)

    def reset_parameters(self) -> None:
        r"""Draw new parameters.

        Weights are uniform in ±sqrt(3 / fan_in), so that u has the variance of x; biases are 0, the reset gate's
        `highway_bias`. With `rescale`, the skip matrix is multiplied by sqrt(1 + 2 exp(highway_bias)). Version 2 also
        follows its authors' package: weight_c uniform in ±sqrt(3/2), gate weights divided by sqrt(2), candidate
        weights multiplied by sqrt(1 - dropout) where there is dropout, all by sqrt(1 - rnn_dropout), and by 0.1 with
        layer normalisation.
        """
        D, H = self.num_directions, self.hidden_size
        with torch.no_grad():
            for i in range(self.num_layers):
                for name in (f"weight_proj_l{i}", f"weight_l{i}"):
                    if hasattr(self, name):
                        bound = math.sqrt(3 / getattr(self, name).shape[1])
                        getattr(self, name).uniform_(-bound, bound)
                if self.bias:
                    bias = getattr(self, f"bias_l{i}")
                    bias[:, 0].zero_()
                    bias[:, 1].fill_(self.highway_bias)
                if self.layer_norm:
                    getattr(self, f"layer_norm_l{i}").reset_parameters()
                if self.version == 1 and not (self.rescale and self._parts(i) == 4):
                    continue  # without a view by sub-matrices, which a weight that is spread over devices may not have
                weight = getattr(self, f"weight_l{i}").view(D, self._parts(i), H, -1)
                if self.rescale and self._parts(i) == 4:
                    weight[:, 3] *= self._scale_x
                if self.version == 2:
                    getattr(self, f"weight_c_l{i}").uniform_(-math.sqrt(1.5), math.sqrt(1.5))
                    weight[:, 1:3] *= math.sqrt(0.5)
                    weight[:, 0] *= math.sqrt(1 - self.dropout) if i < self.num_layers - 1 else 1
                    weight *= math.sqrt(1 - self.rnn_dropout) * (0.1 if self.layer_norm else 1)

    def _layer(self, i: int, x: Tensor, B: int, c_0: Tensor | None, padding: Padding) -> tuple[Tensor, Tensor]:
        """Layer i of x, (L, B, in) or (total_steps, in): h, as x with D*H features, and c_n, (B, D*H)."""
        D, K, H = self.num_directions, self._parts(i), self.hidden_size
        weight: Tensor = getattr(self, f"weight_l{i}")
        v = getattr(self, f"layer_norm_l{i}")(x) if self.layer_norm == "pre" else x
        if self.training and self.rnn_dropout > 0:
            mask_x = F.dropout(v.new_ones(B, v.shape[-1]), self.rnn_dropout)
            v = v * (mask_x if padding.cu_seqlens is None else mask_x[padding.row_of_step(len(x))])
        if self._product_size(i) < self._in_size(i):
            v = F.linear(v, getattr(self, f"weight_proj_l{i}"))
        mask_c = None
        if self.training and self.dropout > 0 and i < self.num_layers - 1:
            mask_c = F.dropout(x.new_ones(B, D * H, dtype=state_dtype(x.dtype)), self.dropout)
        h, c_n = sru_layer(
            v,
            weight,
            x if self.highway and K == 3 else None,
            getattr(self, f"bias_l{i}"),
            None if c_0 is None else c_0.to(state_dtype(c_0.dtype)),
            directions=D,
            parts=K,
            weight_c=getattr(self, f"weight_c_l{i}") if self.version == 2 else None,
            mask_c=mask_c,
            lengths=padding.lengths,
            mask_pad=padding.mask_pad,
            cu_seqlens=padding.cu_seqlens,
            scale_x=self._scale_x,
            nonlinearity=self.nonlinearity,
            dropout_placement=self.dropout_placement,
        )
        c_n = c_n.to(weight.dtype)
        if self.layer_norm == "post":
            h = padding.zero(getattr(self, f"layer_norm_l{i}")(h))
        return h, c_n

    def _is_plain(self, x: Tensor, c: Tensor | None) -> bool:
        """Whether x, states and parameters fit together: nothing to check, drop or normalise.

        Asked at every call, so that what remains is a matrix product and a kernel for each layer.
        """
        dtype, device, given = x.dtype, x.device, self._parameters
        if not (
            takes_shortcuts(x, c)
            and (x.is_cpu or x.is_cuda)
            and not (self.training and (self.rnn_dropout or self.dropout))
            and not self._modules  # no layer normalisation, no parametrizations
            and not self.projection_size
            and dtype in DTYPES
            and x.is_contiguous()
            and not x.is_neg()
            and (c is None or (c.dtype is dtype and c.device == device and c.is_contiguous() and not c.is_neg()))
            and not torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda")
        ):
            return False
        for name, shape in self._shapes.items():
            a = given.get(name)  # not there if something else computes it
            if a is None or a.shape != shape or a.dtype is not dtype or a.device != device:
                return False
            if type(a) not in PLAIN or not a.is_contiguous() or a.is_neg():
                return False
        return True

    def _has_step(self, x: Tensor) -> bool:
        return x.is_cpu and x.dtype in (torch.float32, torch.float64) and not torch.is_grad_enabled()

    def _plain_layer(self, i: int, x: Tensor, c_0: Tensor | None) -> tuple[Tensor, Tensor]:
        """`_layer` where `_is_plain`."""
        parameters = self._parameters
        weight = cast(Tensor, parameters[f"weight_l{i}"])
        return plain_sru_layer(
            x, weight, parameters[f"bias_l{i}"], c_0, parameters.get(f"weight_c_l{i}"),
            self.num_directions, self._skip(i), self._scale_x, self.nonlinearity,
        )  # fmt: skip

    def _skip(self, i: int) -> int:
        return (SKIP_PROJECTED if self._parts(i) == 4 else SKIP_INPUT) if self.highway else NO_SKIP

    def _step(self, x: Tensor, c: Sequence[Tensor]) -> Tensor:
        """One step of x, (B, in), where `_is_plain` and `_has_step`: h, (B, H).

        c: the states of the layers, before and then after.
        """
        scale_x = self._scale_x if self.rescale else 1.0
        parameters = self._parameters  # as attributes they take half a microsecond each
        for i, state in enumerate(c):
            weight = cast(Tensor, parameters[f"weight_l{i}"])
            bias: Tensor | None = parameters[f"bias_l{i}"]
            weight_c = parameters.get(f"weight_c_l{i}")
            skip = self._skip(i)
            u = product(x, weight)
            if bias is None:
                bias = u.new_zeros(2, self.hidden_size)
            kernel = cpu_kernels.step_kernel(self.version, self.nonlinearity, skip, x.dtype)
            x = cpu_kernels.step(kernel, u, x if skip == SKIP_INPUT else None, bias, weight_c, scale_x, state)
        return x

    def _check_input(self, input: Tensor, dims: tuple[int, int]) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
        if input.dim() not in dims:
            expected = " or ".join(map(str, dict.fromkeys(dims)))
            raise ValueError(f"input must have {expected} dimensions, got shape {tuple(input.shape)}")
        if input.shape[-1] != self.input_size:
            raise ValueError(
                f"input must have input_size = {self.input_size} features in its last dimension, "
                f"got shape {tuple(input.shape)}"
            )
        weight: Tensor | None = self._parameters.get("weight_l0")  # as an attribute it takes half a microsecond
        if weight is None:  # something else computes it
            weight = cast(Tensor, self.weight_l0)
        check_dtype("input", input.dtype)
        check_matches(input, weight)
        if input.device != weight.device:
            raise ValueError(f"input must be on {weight.device} as the parameters are, got {input.device}")

    def flatten_parameters(self) -> None:
        """Does nothing: parameters need no flattening. For code written for `torch.nn.GRU`."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by `torch.jit.script`."""
        raise RuntimeError(f"numsru's modules cannot be compiled by torch.jit.script: {INSTEAD_OF_TORCHSCRIPT}")

    def extra_repr(self) -> str:
        s = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False,
            "rnn_dropout": 0.0, "nonlinearity": "tanh" if self.version == 1 else "identity", "highway": True,
            "highway_bias": 0.0, "rescale": False, "version": 1, "dropout_placement": "paper", "layer_norm": None,
            "projection_size": 0,
        }  # fmt: skip
        for name, default in defaults.items():
            value = getattr(self, name, default)
            if value != default:
                s += f", {name}={value!r}"
        return s


class SRU(_SRUBase):
    r"""Multi-layer Simple Recurrent Unit. Takes the place of `torch.nn.GRU`: same arguments, shapes and results.

    Each layer computes one matrix product of all time steps and then, for every unit on its own,

    .. math::
        f_t &= \sigma(W_f x_t + b_f) \qquad r_t = \sigma(W_r x_t + b_r) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot W x_t \\
        h_t &= r_t \odot g(c_t) + (1 - r_t) \odot x_t

    (:func:`numsru.sru_recurrence`). Where a layer's input and output differ in size, a fourth matrix product
    :math:`W_4 x_t` takes the place of :math:`x_t` in the last line. A bidirectional layer runs a second recurrence from
    the last step to the first; the halves of :math:`x_t` go to the two directions.

    Args:
        input_size: Features of the input.
        hidden_size: Units of each direction, H.
        num_layers: Layers, each reading the output of the one before.
        bias: Whether the gates have a bias.
        batch_first: Whether input and output are `(B, L, …)` instead of `(L, B, …)`; states are not affected.
        dropout: Probability of dropping g(c), one mask for all steps, on the output of every layer but the last.
        bidirectional: Two directions, D = 2; `output` then has `2*H` features, forward half first.
        rnn_dropout: Probability of dropping a feature of the matrix products' input, one mask for all steps
            ("variational dropout", Gal and Ghahramani, arXiv:1512.05287). The highway sees the undropped input where
            it has no matrix of its own.
        nonlinearity: g: "tanh", "identity", "relu" or "selu". Default: "tanh" in version 1, "identity" in version 2, as
            in the two papers; the others as in their authors' package `sru`.
        highway: False leaves out the highway: :math:`h_t = r_t \odot g(c_t)` (`has_skip_term` of `sru`).
        highway_bias: Initial bias of the reset gate; negative values let more of x through (arXiv:1709.02755v5,
            section 3.2).
        rescale: Multiply the highway input by :math:`\sqrt{1 + 2 e^{b}}`, b = `highway_bias`, so that h has the
            variance of x (arXiv:1709.02755v5, section 3.2).
        version: 1, the equations above (arXiv:1709.02755v1), or 2, where both gates also see
            :math:`v \odot c_{t-1}` (arXiv:1709.02755v5).
        dropout_placement: "paper" drops g(c) and leaves the highway as it is (arXiv:1709.02755v1); "highway" lets
            a dropped unit pass x through (`sru` from 2.3.3 on).
        layer_norm: "pre" normalises the input of the matrix products, "post" the output of each layer (`layer_norm` and
            `normalize_after` of `sru` 2.6; Ba et al., arXiv:1607.06450).
        projection_size: Where smaller than a layer's input and output, its matrix is the product of one of
            `projection_size` rows and one of as many columns, as in `sru`. 0: none.
        device, dtype: Of the parameters: float32, float64, float16 or bfloat16. Of 16 bits, states are kept in float32
            inside a layer.

    Inputs: `input, c_0=None, *, hx=None, lengths=None, mask_pad=None, cu_seqlens=None`
        - **input**: `(L, B, input_size)`; `(B, L, input_size)` with `batch_first`; `(L, input_size)` without a batch;
          `(total_steps, input_size)` with `cu_seqlens`; or a `PackedSequence`.
        - **c_0**: initial states, `(num_layers*D, B, H)`, `(num_layers*D, H)` without a batch. Default: zeros.
        - **hx**: what `torch.nn.GRU` calls c_0.
        - **lengths**: number of valid steps of each batch row, `(B,)`, integers on the CPU or the input's device.
        - **mask_pad**: True at padding, anywhere, of the shape of the input without its features.
        - **cu_seqlens**: for sequences that lie end to end, without padding: where each begins and, last, where all
          end, `(B + 1,)`, integers on the CPU or the input's device.

        Of a PackedSequence, and where `lengths` or `mask_pad` are on the CPU, only the valid steps are computed. On a
        GPU nothing is copied back to look at them, and the recurrence skips the padding behind `lengths`.

    Outputs: `output, c_n`
        - **output**: as the input, with `D*H` features; exactly 0 at padding.
        - **c_n**: final states, of the shape of c_0 and the parameters' dtype. Pass them as `c_0` of the next piece of
          a sequence.

    Parameters of layer i, whose matrix has K = 3 parts (candidate, forget, reset), 4 with a skip matrix:
        - **weight_l{i}**: `(D*K*H, in)`, and with a projection `(D*K*H, projection_size)`
        - **bias_l{i}**: `(D, 2, H)`, forget and reset
        - **weight_c_l{i}**: `(D, 2, H)`, version 2 only
        - **weight_proj_l{i}**: `(projection_size, in)`, with a projection only

    Raises:
        ValueError: For shapes, sizes and options that do not fit; TypeError for types. The message gives what was
            expected and what came.

    Source: arXiv:1709.02755v1 (version 1) and arXiv:1709.02755v5 (version 2).

    Example:
        >>> rnn = numsru.SRU(10, 20, num_layers=2)
        >>> output, c_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        rnn_dropout: float = 0.0,
        nonlinearity: str | None = None,
        highway: bool = True,
        highway_bias: float = 0.0,
        rescale: bool = False,
        version: int = 1,
        dropout_placement: str = "paper",
        layer_norm: str | None = None,
        projection_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, dropout, bidirectional, rnn_dropout, nonlinearity, highway,
            highway_bias, rescale, version, dropout_placement, layer_norm, projection_size, device, dtype,
        )  # fmt: skip
        check_flags(batch_first=batch_first)
        self.batch_first = batch_first

    def forward(
        self,
        input: Tensor | PackedSequence,
        c_0: Tensor | None = None,
        *,
        hx: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        mask_pad: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        c_0 = _one_of(c_0, hx, "c_0")
        if isinstance(input, PackedSequence):
            if lengths is not None or mask_pad is not None or cu_seqlens is not None:
                raise ValueError("a PackedSequence brings its own lengths: leave out lengths, mask_pad and cu_seqlens")
            return self._forward_packed_sequence(input, c_0)
        for name, a in (("mask_pad", mask_pad), ("cu_seqlens", cu_seqlens)):
            if a is not None and not isinstance(a, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(a).__name__}")
        if cu_seqlens is not None:
            self._check_input(input, (2, 2))
            if lengths is not None or mask_pad is not None:
                raise ValueError("cu_seqlens leaves no padding: expected lengths=None and mask_pad=None")
            # Checked and sent once for all layers.
            look = may_look(input, cu_seqlens)
            cu_seqlens, _ = check_cu_seqlens(cu_seqlens, len(input), input.device, look=look)
            return self._forward_layers(input, len(cu_seqlens) - 1, c_0, Padding(cu_seqlens=cu_seqlens))
        self._check_input(input, (2, 3))
        if mask_pad is not None and mask_pad.shape != input.shape[:-1]:
            raise ValueError(f"mask_pad must have shape {tuple(input.shape[:-1])}, got {tuple(mask_pad.shape)}")
        if lengths is not None and not isinstance(lengths, Tensor):
            lengths = torch.tensor(lengths, device="cpu")
            lengths = lengths if lengths.numel() else lengths.long()
        if input.dim() == 2:
            lengths = None if lengths is None else lengths.reshape(-1)
            mask_pad = None if mask_pad is None else mask_pad.unsqueeze(1)
            c_0 = self._check_state(c_0, None)
            output, c_n = self._forward_padded(input.unsqueeze(1), c_0, lengths, mask_pad)
            return output.squeeze(1), c_n.squeeze(1)
        if self.batch_first:
            mask_pad = None if mask_pad is None else mask_pad.t()
            output, c_n = self._forward_padded(input.transpose(0, 1), c_0, lengths, mask_pad)
            return output.transpose(0, 1), c_n
        return self._forward_padded(input, c_0, lengths, mask_pad)

    def _forward_padded(
        self, x: Tensor, c_0: Tensor | None, lengths: Tensor | None, mask_pad: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x is (L, B, in), mask_pad (L, B)."""
        L, B, _ = x.shape
        if lengths is None and mask_pad is None:
            return self._forward_layers(x, B, c_0, Padding())
        on_host = [a for a in (lengths, mask_pad) if a is not None and is_on_host(a)]
        device = on_host[0].device if on_host else x.device
        valid = check_padding(lengths, mask_pad, L, B, device, look=may_look(x, lengths, mask_pad))
        padding = Padding(mask_pad=valid) if lengths is None else Padding(lengths=valid)
        return compute_padded(lambda x, c, padding: self._forward_layers(x, B, c, padding), x, c_0, padding)

    def _forward_packed_sequence(self, input: PackedSequence, c_0: Tensor | None) -> tuple[PackedSequence, Tensor]:
        self._check_input(input.data, (2, 2))
        if is_exporting():
            raise ValueError("an exported program takes no PackedSequence: give it padded sequences and their lengths")
        B = int(input.batch_sizes[0])
        c_0 = self._check_state(c_0, B)
        return compute_packed(lambda x, c, padding: self._forward_layers(x, B, c, padding), input, c_0)

    def _check_state(self, c_0: Tensor | None, B: int | None) -> Tensor | None:
        """c_0 with a batch dimension. B = None: it comes without one."""
        if c_0 is None:
            return None
        if not isinstance(c_0, Tensor):
            raise TypeError(f"c_0 must be a Tensor (an SRU has one state, not LSTM's two), got {type(c_0).__name__}")
        check_dtype("c_0", c_0.dtype)
        n, H = self.num_layers * self.num_directions, self.hidden_size
        expected = (n, H) if B is None else (n, B, H)
        if c_0.shape != expected:
            raise ValueError(f"c_0 must have shape {expected}, got {tuple(c_0.shape)}")
        return c_0.unsqueeze(1) if B is None else c_0

    def _forward_layers(self, x: Tensor, B: int, c_0: Tensor | None, padding: Padding) -> tuple[Tensor, Tensor]:
        """All layers of x, (L, B, in) or (total_steps, in)."""
        c_0 = self._check_state(c_0, B)
        n, D, H = self.num_layers, self.num_directions, self.hidden_size
        plain = padding.is_absent() and self._is_plain(x, c_0)
        if plain and len(x) == D == 1 and self._has_step(x):
            c_n = x.new_zeros(n, B, H) if c_0 is None else c_0.clone()
            return self._step(x[0], c_n.unbind()).unsqueeze(0), c_n
        states: Sequence[Tensor | None] = [None] * n
        if c_0 is not None:
            states = c_0.reshape(n, D, B, H).transpose(1, 2).reshape(n, B, D * H).contiguous().unbind()
        final = []
        for i in range(n):
            x, c = self._plain_layer(i, x, states[i]) if plain else self._layer(i, x, B, states[i], padding)
            final.append(c.unsqueeze(0) if D == 1 else c.view(B, D, H).transpose(0, 1))
        return x, final[0] if n == D == 1 else torch.cat(final)


class SRUCell(_SRUBase):
    r"""One step of a one-layer SRU: `h, c = cell(x, c)`. Its parameters are those of a one-layer :class:`SRU`.

    Args:
        input_size: Features of the input.
        hidden_size: Units, H.
        bias: Whether the gates have a bias.
        rnn_dropout: Probability of dropping a feature of the matrix product's input. Every call draws a new mask.
        nonlinearity, highway, highway_bias, rescale, version: As for :class:`SRU`.
        layer_norm, projection_size, device, dtype: As for :class:`SRU`.

    Inputs: `input, c=None, *, hx=None`
        - **input**: `(B, input_size)` or `(input_size,)`.
        - **c**: the state before the step, `(B, H)` or `(H,)`. Default: zeros.
        - **hx**: what `torch.nn.GRUCell` calls c.

    Outputs: `h, c`
        - **h**, **c**: output and state after the step, `(B, H)` or `(H,)`.

    Raises:
        ValueError: For shapes, sizes and options that do not fit; TypeError for types.

    Source: As for :class:`SRU`.

    Example:
        >>> cell, c = numsru.SRUCell(10, 20), None
        >>> for x in torch.randn(5, 3, 10):
        ...     h, c = cell(x, c)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        rnn_dropout: float = 0.0,
        nonlinearity: str | None = None,
        highway: bool = True,
        highway_bias: float = 0.0,
        rescale: bool = False,
        version: int = 1,
        layer_norm: str | None = None,
        projection_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, 1, bias, 0.0, False, rnn_dropout, nonlinearity, highway, highway_bias, rescale,
            version, "paper", layer_norm, projection_size, device, dtype,
        )  # fmt: skip

    def forward(
        self, input: Tensor, c: Tensor | None = None, *, hx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        c = _one_of(c, hx, "c")
        self._check_input(input, (1, 2))
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if c is not None:
            if not isinstance(c, Tensor):
                raise TypeError(f"c must be a Tensor (an SRU has one state, not LSTM's two), got {type(c).__name__}")
            check_dtype("c", c.dtype)
            expected = (x.shape[0], self.hidden_size) if batched else (self.hidden_size,)
            if c.shape != expected:
                raise ValueError(f"c must have shape {expected}, got {tuple(c.shape)}")
            c = c if batched else c.unsqueeze(0)
        if not self._is_plain(x, c):
            h, c_n = self._layer(0, x.unsqueeze(0), x.shape[0], c, Padding())
            h = h[0]
        elif self._has_step(x):
            c_n = x.new_zeros(len(x), self.hidden_size) if c is None else c.clone()
            h = self._step(x, (c_n,))
        else:
            h, c_n = self._plain_layer(0, x.unsqueeze(0), c)
            h = h[0]
        return (h, c_n) if batched else (h[0], c_n[0])
