"""`sru.SRU` of 2.6.0 on numsru's recurrence."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .compat_cell import SRUCell, as_bool, check_input, check_one_name, check_state, repr_of
from .nn import check_probabilities, check_sizes
from .padding import Padding, compute_packed, compute_padded


class Stack(nn.Module):
    """What SRU and SRU++ share: the layers one after the other, and the form of input, states and results."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        dropout: float,
        bidirectional: bool,
        layer_norm: bool,
        nn_rnn_compatible_return: bool,
        proj_input_to_hidden_first: bool,
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        check_probabilities(dropout=dropout)
        self.dropout, self.bidirectional = float(dropout), bool(bidirectional)
        self.num_directions = 2 if bidirectional else 1
        self.output_size = self.num_directions * hidden_size
        self.use_layer_norm = bool(layer_norm)
        self.nn_rnn_compatible_return = bool(nn_rnn_compatible_return)
        self.input_to_hidden = None
        if proj_input_to_hidden_first and input_size != self.output_size:
            self.input_to_hidden = nn.Linear(input_size, self.output_size, bias=False)
        self.rnn_lst = nn.ModuleList()

    def _in_size(self, i: int) -> int:
        return self.input_size if i == 0 and self.input_to_hidden is None else self.output_size

    def _dropout(self, i: int) -> float:
        return self.dropout if i < self.num_layers - 1 else 0.0

    def reset_parameters(self) -> None:
        """Draw new parameters for all layers. A `custom_m` is left as it is."""
        if self.input_to_hidden is not None:
            self.input_to_hidden.reset_parameters()
        for cell in self.rnn_lst:
            cell.reset_parameters()  # type: ignore[operator]

    def set_bias(self, bias_val: float = 0.0) -> None:
        """Set the bias of every reset gate, as in `sru` 1.x."""
        for cell in self.rnn_lst:
            cell.set_bias(bias_val)  # type: ignore[operator]

    def __getitem__(self, n: int) -> nn.Module:
        """The cell of layer n."""
        return self.rnn_lst[n]

    def _run(
        self,
        input: Tensor | PackedSequence,
        c0: Tensor | None,
        mask_pad: Tensor | None,
        extra: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[Any, Tensor, list[Tensor]]:
        """Output, final states, and the input of every layer. `extra`: further arguments of each layer."""
        inputs: list[Tensor] = []

        def layers(x: Tensor, c0: Tensor | None, padding: Padding) -> tuple[Tensor, Tensor]:
            return self._layers(x, c0, padding, extra, inputs)

        if isinstance(input, PackedSequence):
            if mask_pad is not None:
                raise ValueError("a PackedSequence brings its own lengths: expected mask_pad=None")
            check_input(input.data, self.input_size)
            if self._takes_valid_steps:
                output, c_n = compute_packed(layers, input, self._checked_states(c0, int(input.batch_sizes[0])))
                return output, self._returned_states(c_n), inputs
            x, lengths = pad_packed_sequence(input)
            mask_pad = torch.arange(len(x), device="cpu").unsqueeze(1) >= lengths
            h, c_n, inputs = self._run(x, c0, mask_pad, extra)
            if input.sorted_indices is not None:
                h, lengths = h.index_select(1, input.sorted_indices), lengths[input.sorted_indices.cpu()]
            return input._replace(data=pack_padded_sequence(h, lengths).data), c_n, inputs

        check_input(input, self.input_size)
        x = input if input.dim() == 3 else input.unsqueeze(0)
        L, B, _ = x.shape
        c0, padding = self._checked_states(c0, B), Padding(mask_pad=as_bool(mask_pad, L, B))
        h, c_n = compute_padded(layers, x, c0, padding) if self._takes_valid_steps else layers(x, c0, padding)
        return h if input.dim() == 3 else h.squeeze(0), self._returned_states(c_n), inputs

    @property
    def _takes_valid_steps(self) -> bool:
        """Whether layers may be given valid steps alone. A hook is to see what it sees in `sru`: (L, B, features)."""
        return all(
            type(cell) is SRUCell
            and cell._custom is None
            and not (cell._forward_hooks or cell._forward_pre_hooks or cell._backward_hooks or cell._backward_pre_hooks)
            for cell in self.rnn_lst
        )

    def _layers(
        self,
        x: Tensor,
        c0: Tensor | None,
        padding: Padding,
        extra: Sequence[dict[str, Any]] | None,
        inputs: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Output and final states, (num_layers, B, D*H), of x; the input of each layer is added to `inputs`."""
        if self.input_to_hidden is not None:
            x = self.input_to_hidden(padding.zero(x))
        final = []
        for i, cell in enumerate(self.rnn_lst):
            inputs.append(x)
            named = {} if extra is None else extra[i]
            if padding.cu_seqlens is not None:
                named = named | {"cu_seqlens": padding.cu_seqlens}
            x, c = cell(x, None if c0 is None else c0[i], padding.mask_pad, **named)
            final.append(c)
        return x, torch.stack(final)

    def _checked_states(self, c0: Tensor | None, B: int) -> Tensor | None:
        """c0 as (num_layers, B, D*H). What `nn_rnn_compatible_return` returns is taken as well."""
        if c0 is None:
            return None
        n, D, H = self.num_layers, self.num_directions, self.hidden_size
        if self.nn_rnn_compatible_return and isinstance(c0, Tensor) and c0.shape == (n * D, B, H):
            c0 = c0.reshape(n, D, B, H).transpose(1, 2).reshape(n, B, D * H)
        check_state(c0, (n, B, D * H))
        return c0

    def _returned_states(self, c_n: Tensor) -> Tensor:
        if not self.nn_rnn_compatible_return:
            return c_n
        n, D, H, B = self.num_layers, self.num_directions, self.hidden_size, c_n.shape[1]
        return c_n.view(n, B, D, H).transpose(1, 2).reshape(n * D, B, H)

    def extra_repr(self) -> str:
        return repr_of(
            self, "input_size", "hidden_size", num_layers=2, dropout=0.0, bidirectional=False,
            nn_rnn_compatible_return=False,
        )  # fmt: skip


class SRU(Stack):
    r"""Multi-layer SRU, in the place of `sru.SRU` of 2.6.0: same arguments in the same order, results and state dict.

    Args:
        input_size: Features of the input.
        hidden_size: Units of each direction, H.
        num_layers: Layers, each reading the output of the one before.
        dropout: As for :class:`SRUCell`, in all layers but the last.
        projection_size: As `n_proj` of :class:`SRUCell`; a list has one for each layer.
        nn_rnn_compatible_return: Return the states as `(num_layers*D, B, H)`, as `torch.nn.GRU` does.
        custom_m: One module for each layer, or one of which every layer gets a copy with new parameters.
        proj_input_to_hidden_first: A matrix takes the input to the size of the output, where they differ.
        rnn_dropout, bidirectional, use_tanh, layer_norm, highway_bias, has_skip_term, rescale, v1: As for
            :class:`SRUCell`, in each layer.
        amp_recurrence_fp16, normalize_after, weight_c_init: As for :class:`SRUCell`.
        n_proj, transform_module: Other releases' names of `projection_size` and `custom_m`.
        use_relu, use_selu, is_input_normalized, weight_norm: As for :class:`SRUCell`.

    Inputs: `input, c0=None, mask_pad=None`
        - **input**: `(L, B, input_size)`, `(B, input_size)` for one step, or a `PackedSequence`.
        - **c0**: initial states, `(num_layers, B, D*H)`. Default: zeros.
        - **mask_pad**: not 0 at padding, `(L, B)`, any dtype, on the CPU or the input's device.

        Of a PackedSequence, and where `mask_pad` is on the CPU, only valid steps are computed, without a `custom_m`.

    Outputs: `h, c`
        - **h**: as the input, with `D*H` features; 0 at padding.
        - **c**: final states, `(num_layers, B, D*H)`.

    `load_state_dict` also takes checkpoints of 1.x and 3.0-dev.

    Raises:
        ValueError: For shapes, sizes and options that do not fit; TypeError for types.

    Source: arXiv:1709.02755v5; dropout as in `sru` 2.3.3 and later.

    Example:
        >>> rnn = SRU(128, 256, num_layers=2, bidirectional=True)
        >>> h, c = rnn(torch.randn(35, 32, 128))
        >>> h.shape, c.shape
        (torch.Size([35, 32, 512]), torch.Size([2, 32, 512]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        dropout: float = 0.0,
        rnn_dropout: float = 0.0,
        bidirectional: bool = False,
        projection_size: int | Sequence[int] = 0,
        use_tanh: bool = False,
        layer_norm: bool = False,
        highway_bias: float = 0.0,
        has_skip_term: bool = True,
        rescale: bool = False,
        v1: bool = False,
        nn_rnn_compatible_return: bool = False,
        custom_m: nn.Module | Sequence[nn.Module] | nn.ModuleList | None = None,
        proj_input_to_hidden_first: bool = False,
        amp_recurrence_fp16: bool = False,
        normalize_after: bool = False,
        weight_c_init: float | None = None,
        *,
        n_proj: int = 0,
        transform_module: nn.Module | Sequence[nn.Module] | nn.ModuleList | None = None,
        use_relu: bool = False,
        use_selu: bool = False,
        is_input_normalized: bool = False,
        weight_norm: bool = False,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, dropout, bidirectional, layer_norm, nn_rnn_compatible_return,
            proj_input_to_hidden_first,
        )  # fmt: skip
        self.rnn_dropout, self.has_skip_term = float(rnn_dropout), bool(has_skip_term)
        self.projection_size = n_proj or projection_size
        check_one_name(custom_m, transform_module)
        custom_name = "custom_m" if transform_module is None else "transform_module"
        customs = _for_each_layer(custom_name, custom_m if transform_module is None else transform_module, num_layers)
        projections = _for_each_layer("projection_size", projection_size, num_layers)
        for i in range(num_layers):
            named: dict[str, Any] = {custom_name: customs[i]}
            self.rnn_lst.append(
                SRUCell(
                    self._in_size(i), hidden_size, self._dropout(i), rnn_dropout, bidirectional, n_proj, use_tanh,
                    highway_bias, has_skip_term, layer_norm, rescale, v1, amp_recurrence_fp16=amp_recurrence_fp16,
                    normalize_after=normalize_after, weight_c_init=weight_c_init, projection_size=projections[i],
                    use_relu=use_relu, use_selu=use_selu, is_input_normalized=is_input_normalized,
                    weight_norm=weight_norm, **named,
                )
            )  # fmt: skip

    def forward(
        self, input: Tensor | PackedSequence, c0: Tensor | None = None, mask_pad: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        h, c_n, _ = self._run(input, c0, mask_pad)
        return h, c_n

    def make_backward_compatible(self) -> None:
        """Does nothing: no module here was made by an older release. For code written for `sru` 2.x."""


def _for_each_layer(name: str, value: Any, num_layers: int) -> list[Any]:
    """`value` as a list of one for each layer; of a single module, copies, which the cells give new parameters."""
    if isinstance(value, (list, tuple, nn.ModuleList)):
        if len(value) != num_layers:
            raise ValueError(f"{name} must have one item for each of the {num_layers} layers, got {len(value)}")
        return list(value)
    if not isinstance(value, nn.Module):
        return [value] * num_layers
    return [copy.deepcopy(value) for _ in range(num_layers)]
