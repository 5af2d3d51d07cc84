"""SRU++ (arXiv:2102.12459), as `sru` 3.0-dev has it, on numsru's recurrence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .compat_cell import SRUCell, as_bool
from .compat_sru import Stack
from .nn import check_probabilities, check_sizes


class SRUppProjectedLinear(nn.Module):
    r"""The product of an SRU++ layer without attention: :math:`U = W_2\, \mathrm{dropout}(\mathrm{LN}(W_1 x))`.

    Args:
        in_features, out_features: Of x and of U.
        proj_features: Rows of :math:`W_1`.
        dropout: Of the vectors before the last product.
        layer_norm: Whether there is a LayerNorm.

    Inputs: `input, mask_pad=None, attn_mask=None, memory=None, memory_mask_pad=None`
        - **input**: `(L, B, in_features)`.
        - **mask_pad**, **attn_mask**, **memory**, **memory_mask_pad**: as for :class:`SRUppAttention`; ignored.

    Outputs: `U`, `(L, B, out_features)`.

    Raises:
        RuntimeError: By torch, for another number of features.

    Source: Tao Lei, "When Attention Meets Fast Recurrence", arXiv:2102.12459, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        proj_features: int,
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.proj_features = in_features, out_features, proj_features
        self.dropout = nn.Dropout(dropout)
        self.linear1 = nn.Linear(in_features, proj_features, bias=False)
        self.linear2 = nn.Linear(proj_features, out_features, bias=False)
        self.layer_norm = nn.LayerNorm(proj_features) if layer_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset_products(self.linear1, self.linear2, dropout=self.dropout.p)

    def forward(
        self,
        input: Tensor,
        mask_pad: Tensor | None = None,
        attn_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask_pad: Tensor | None = None,
    ) -> Tensor:
        y = self.linear1(input)
        if self.layer_norm is not None:
            y = self.layer_norm(y)
        return self.linear2(self.dropout(y))  # type: ignore[no-any-return]


class SRUppAttention(nn.Module):
    r"""The product of an SRU++ layer with attention.

    .. math::
        z &= W_1 x \qquad (k, v) = W_2 z \\
        y &= \mathrm{LN}(\alpha\, \mathrm{softmax}(z k^T / \sqrt{d} + \text{mask})\, v + z) \qquad
        U = W_3\, \mathrm{dropout}(y)

    in each of the heads, of size d. :math:`\alpha` is a parameter. Without `normalize_after`, the attention is that of
    :math:`\mathrm{LN}(z)`, and y is :math:`\alpha` times its result, plus z.

    Args:
        in_features, out_features: Of x and of U.
        proj_features: Of z, k and v; a multiple of `num_heads`.
        num_heads: Attention heads.
        dropout: Of the vectors before the last product.
        attn_dropout: Of the attention weights.
        rezero_init_alpha: Initial :math:`\alpha`.
        layer_norm: Whether there is a LayerNorm.
        normalize_after: Whether it is behind the attention and the sum.

    Inputs: `input, mask_pad=None, attn_mask=None, memory=None, memory_mask_pad=None`
        - **input**: `(L, B, in_features)`.
        - **mask_pad**: True at padding, to which no step attends, `(L, B)`.
        - **attn_mask**: added to the attention's logits, `(L, M + L)`; if bool, True forbids.
        - **memory**: `(M, B, in_features)`, put in front of the input for k and v.
        - **memory_mask_pad**: True at padding of the memory, `(M, B)`.

    Outputs: `U`, `(L, B, out_features)`.

    Raises:
        ValueError: If shapes disagree, or `num_heads` does not divide `proj_features`.

    Source: Tao Lei, "When Attention Meets Fast Recurrence", arXiv:2102.12459, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        proj_features: int,
        num_heads: int = 1,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        rezero_init_alpha: float = 0.0,
        layer_norm: bool = False,
        normalize_after: bool = True,
    ) -> None:
        super().__init__()
        check_probabilities(dropout=dropout, attn_dropout=attn_dropout)
        if num_heads < 1 or proj_features % num_heads:
            raise ValueError(f"num_heads must divide the projection's size {proj_features}, got {num_heads}")
        self.in_features, self.out_features, self.proj_features = in_features, out_features, proj_features
        self.num_heads, self.dropout, self.attn_dropout = num_heads, nn.Dropout(dropout), float(attn_dropout)
        self.rezero_init_alpha, self.normalize_after = float(rezero_init_alpha), bool(normalize_after)
        self.alpha = nn.Parameter(torch.empty(1))
        self.linear1 = nn.Linear(in_features, proj_features, bias=False)
        self.linear2 = nn.Linear(proj_features, 2 * proj_features, bias=False)
        self.linear3 = nn.Linear(proj_features, out_features, bias=False)
        self.layer_norm = nn.LayerNorm(proj_features) if layer_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.rezero_init_alpha)
        _reset_products(self.linear1, self.linear2, self.linear3, dropout=self.dropout.p)

    def forward(
        self,
        input: Tensor,
        mask_pad: Tensor | None = None,
        attn_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask_pad: Tensor | None = None,
    ) -> Tensor:
        L, B, _ = input.shape
        M = 0 if memory is None else memory.shape[0]
        if memory is not None:
            if memory.dim() != 3 or memory.shape[1:] != input.shape[1:]:
                raise ValueError(f"memory must have shape (M, {B}, {input.shape[2]}), got {tuple(memory.shape)}")
            if memory_mask_pad is not None:
                memory = memory.masked_fill(memory_mask_pad.unsqueeze(2), 0)
            input = torch.cat([memory, input])
        if attn_mask is not None and attn_mask.shape != (L, M + L):
            raise ValueError(f"attn_mask must have shape {(L, M + L)}, got {tuple(attn_mask.shape)}")
        padded = None
        if mask_pad is not None or (memory is not None and memory_mask_pad is not None):
            padded = torch.zeros(M + L, B, dtype=torch.bool, device=input.device)
            if memory is not None and memory_mask_pad is not None:
                padded[:M] = memory_mask_pad
            if mask_pad is not None:
                padded[M:] = mask_pad

        z = self.linear1(input)
        residual = z[M:]
        if self.layer_norm is not None and not self.normalize_after:
            z = self.layer_norm(z)
        k, v = self.linear2(z).chunk(2, dim=2)
        q, k, v = (a.unflatten(2, (self.num_heads, -1)).permute(1, 2, 0, 3) for a in (z[M:], k, v))
        attention = F.scaled_dot_product_attention(
            q, k, v, _attention_mask(attn_mask, padded, q.dtype), self.attn_dropout if self.training else 0.0
        )
        y = self.alpha * attention.permute(2, 0, 1, 3).flatten(2) + residual
        if self.layer_norm is not None and self.normalize_after:
            y = self.layer_norm(y)
        return self.linear3(self.dropout(y))  # type: ignore[no-any-return]


class SRUppCell(SRUCell):
    """One layer of SRU++, in the place of `sru.SRUppCell` of 3.0-dev.

    Args:
        transform_module: Computes U; :class:`SRUppAttention`, :class:`SRUppProjectedLinear`, or a module that takes the
            same keywords. There is no default.
        input_size, hidden_size, dropout, rnn_dropout, bidirectional, projection_size, highway_bias, layer_norm: As for
            :class:`SRUCell`.
        normalize_after, rescale, has_skip_term, use_tanh, v1, amp_recurrence_fp16, weight_c_init: As for
            :class:`SRUCell`, with the defaults of 3.0-dev.

    Inputs: `input, c0=None, mask_pad=None, attn_mask=None, memory=None, memory_mask_pad=None`
        - **input**, **c0**, **mask_pad**: as for :class:`SRUCell`.
        - **attn_mask**, **memory**, **memory_mask_pad**: as for :class:`SRUppAttention`. `layer_norm` does not
          normalise the memory.

    Outputs: `h, c`, as for :class:`SRUCell`.

    Raises:
        ValueError: For shapes, sizes and options that do not fit; TypeError for types.

    Source: Tao Lei, "When Attention Meets Fast Recurrence", arXiv:2102.12459.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        dropout: float = 0.0,
        rnn_dropout: float = 0.0,
        bidirectional: bool = False,
        projection_size: int = 0,
        highway_bias: float = 0.0,
        layer_norm: bool = False,
        normalize_after: bool = True,
        transform_module: nn.Module | None = None,
        rescale: bool = False,
        has_skip_term: bool = True,
        use_tanh: bool = False,
        v1: bool = False,
        amp_recurrence_fp16: bool = True,
        weight_c_init: float = 1.0,
    ) -> None:
        if transform_module is None:
            raise ValueError("transform_module is missing: pass a SRUppAttention or a SRUppProjectedLinear")
        super().__init__(
            input_size, hidden_size, dropout, rnn_dropout, bidirectional, projection_size, use_tanh, highway_bias,
            has_skip_term, layer_norm, rescale, v1, None, amp_recurrence_fp16, normalize_after, weight_c_init,
            transform_module=transform_module,
        )  # fmt: skip

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        attn_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask_pad: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if memory is not None and memory_mask_pad is not None:
            memory_mask_pad = as_bool(memory_mask_pad, memory.shape[0], memory.shape[1], "memory_mask_pad")
        extra = {"attn_mask": attn_mask, "memory": memory, "memory_mask_pad": memory_mask_pad}
        return self._forward_padded(input, c0, mask_pad, extra)

    @property
    def _own_product(self) -> bool:
        return type(self._custom) in (SRUppAttention, SRUppProjectedLinear)

    def _products(
        self, v: Tensor, padded: Tensor | None, extra: dict[str, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        custom: Any = self._custom
        return self._split_products(custom(v, mask_pad=padded, **extra), v)


class SRUpp(Stack):
    """Multi-layer SRU++, in the place of `sru.SRUpp` of 3.0-dev: same arguments in the same order, results, state dict.

    An SRU (version 2) whose matrix product is low-rank with attention inside (:class:`SRUppAttention`).

    Args:
        input_size, hidden_size, num_layers, bidirectional: As for :class:`SRU`.
        proj_size: Inner size of each product, that of the attention.
        dropout: As for :class:`SRU`, and of the vectors before each layer's last product.
        attn_dropout: Of the attention weights.
        num_heads: Attention heads; a divisor of `proj_size`.
        layer_norm, normalize_after: Normalise each layer's input, or its output.
        attn_layer_norm: Whether the products have a LayerNorm inside.
        attention_every_n_layers: Attention in the last of every n layers only.
        attention_last_n_layers: Attention in the last n layers only. -1: as `attention_every_n_layers` says.
        highway_bias, rescale, nn_rnn_compatible_return, proj_input_to_hidden_first, weight_c_init: As for
            :class:`SRU`.

    Inputs: `input, c0=None, mask_pad=None, attn_mask=None, memory=None, memory_mask_pad=None`
        - **input**, **c0**, **mask_pad**: as for :class:`SRU`.
        - **attn_mask**: added to the logits, `(L, M + L)`; if bool, True forbids. Without it, no mask is causal.
        - **memory**: one `(M, B, in)` for each layer, such as the `saved_inputs` of the sequence's piece before.
        - **memory_mask_pad**: not 0 at padding of the memory, `(M, B)`.

    Outputs: `h, c, {"saved_inputs": [...]}`
        - **h**, **c**: as for :class:`SRU`.
        - **saved_inputs**: the input of every layer, `(L, B, in)`, not detached.

    Raises:
        ValueError: For shapes, sizes and options that do not fit; TypeError for types.

    Source: Tao Lei, "When Attention Meets Fast Recurrence", arXiv:2102.12459.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        proj_size: int,
        num_layers: int = 2,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        num_heads: int = 1,
        bidirectional: bool = False,
        layer_norm: bool = False,
        normalize_after: bool = False,
        attn_layer_norm: bool = True,
        highway_bias: float = -2.0,
        attention_every_n_layers: int = 1,
        attention_last_n_layers: int = -1,
        rescale: bool = False,
        nn_rnn_compatible_return: bool = False,
        proj_input_to_hidden_first: bool = False,
        weight_c_init: float = 1.0,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, dropout, bidirectional, layer_norm, nn_rnn_compatible_return,
            proj_input_to_hidden_first,
        )  # fmt: skip
        check_sizes(proj_size=proj_size, attention_every_n_layers=attention_every_n_layers)
        check_sizes(at_least=-1, attention_last_n_layers=attention_last_n_layers)
        if attention_every_n_layers != 1 and attention_last_n_layers != -1:
            raise ValueError("expected one of attention_every_n_layers and attention_last_n_layers, got both")
        self.proj_size, self.num_heads = proj_size, num_heads
        if self.input_to_hidden is not None:
            nn.init.xavier_uniform_(self.input_to_hidden.weight)
        for i in range(num_layers):
            in_size = self._in_size(i)
            sizes = in_size, self.output_size * (3 if in_size == self.output_size else 4), proj_size
            if attention_last_n_layers != -1:
                attends = i >= num_layers - attention_last_n_layers
            else:
                attends = (i + 1) % attention_every_n_layers == 0
            transform: nn.Module
            if attends:
                transform = SRUppAttention(*sizes, num_heads, dropout, attn_dropout, layer_norm=attn_layer_norm)
            else:
                transform = SRUppProjectedLinear(*sizes, dropout, attn_layer_norm)
            self.rnn_lst.append(
                SRUppCell(
                    in_size, hidden_size, self._dropout(i), 0.0, bidirectional, 0, highway_bias, layer_norm,
                    normalize_after, transform, rescale, weight_c_init=weight_c_init,
                )
            )  # fmt: skip

    def reset_parameters(self) -> None:
        """Draw new parameters for all layers."""
        super().reset_parameters()
        if self.input_to_hidden is not None:
            nn.init.xavier_uniform_(self.input_to_hidden.weight)

    def forward(
        self,
        input: Tensor | PackedSequence,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        attn_mask: Tensor | None = None,
        memory: Sequence[Tensor | None] | None = None,
        memory_mask_pad: Tensor | None = None,
    ) -> tuple[Any, Tensor, dict[str, list[Tensor]]]:
        if memory is None:
            memory = [None] * self.num_layers
        if len(memory) != self.num_layers:
            raise ValueError(f"memory must have one tensor for each of the {self.num_layers} layers, got {len(memory)}")
        masks = {"attn_mask": attn_mask, "memory_mask_pad": memory_mask_pad}
        h, c_n, inputs = self._run(input, c0, mask_pad, [{"memory": m, **masks} for m in memory])
        return h, c_n, {"saved_inputs": inputs}


def _reset_products(*products: nn.Linear, dropout: float) -> None:
    for product in products:
        nn.init.xavier_uniform_(product.weight)
    with torch.no_grad():
        products[-1].weight *= math.sqrt(1 - dropout)  # keeps the variance of U, whose input grows by dropout


def _attention_mask(attn_mask: Tensor | None, padded: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one, bool (True: attend) or added to the logits, that broadcasts to `(B, heads, L, M + L)`.

    A step that may attend to nothing, which can only be padding, attends to everything: it would get NaN, and NaN
    would get into the gradients of the weights.
    """
    if attn_mask is not None:
        attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(dtype)
    if padded is None:
        return attn_mask
    keep = ~padded.t()[:, None, None]
    if attn_mask is None or attn_mask.dtype == torch.bool:
        keep = keep if attn_mask is None else keep & attn_mask
        return keep | ~keep.any(dim=3, keepdim=True)
    mask = attn_mask.masked_fill(~keep, -torch.inf)
    return mask.masked_fill(mask.isneginf().all(dim=3, keepdim=True), 0)
