"""Batches of sequences of different lengths: where the padding is, and how to compute valid steps alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .backend import may_look


def is_on_host(a: Tensor) -> bool:
    """Whether a's values can be looked at without waiting for a device."""
    return a.device.type == "cpu"


class Padding(NamedTuple):
    """How the sequences of a batch lie in memory: at most one of the three, as in `sru_recurrence`."""

    lengths: Tensor | None = None
    mask_pad: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def is_absent(self) -> bool:
        # Not `self == Padding()`: torch 2.11 cannot compile a comparison of tuples with tensors in them.
        return self.lengths is None and self.mask_pad is None and self.cu_seqlens is None

    def zero(self, x: Tensor) -> Tensor:
        """x, (L, B, features), with zeros at padding."""
        mask_pad = self.mask_pad
        if self.lengths is not None:
            mask_pad = torch.arange(x.shape[0], device=x.device).unsqueeze(1) >= self.lengths.to(x.device)
        return x if mask_pad is None else x.masked_fill(mask_pad.to(x.device).unsqueeze(2), 0)

    def row_of_step(self, total_steps: int) -> Tensor:
        """The batch row of each step, with cu_seqlens."""
        assert self.cu_seqlens is not None
        steps = torch.arange(total_steps, device=self.cu_seqlens.device)
        row = torch.searchsorted(self.cu_seqlens[1:].contiguous(), steps, right=True)
        return row.clamp(max=len(self.cu_seqlens) - 2)  # values on a GPU have not been checked


class ValidSteps(NamedTuple):
    """The valid steps of a batch, one row after the other."""

    # Both on the batch's device, so that they are sent there once for all layers.
    at: Tensor  # where each lies in the batch's memory, (total_steps,)
    cu_seqlens: Tensor

    @classmethod
    def of_padded(cls, valid: Tensor, device: torch.device) -> ValidSteps:
        """Of a batch (L, B, features) on `device`; `valid` is (L, B), bool, on the host."""
        return cls._of(valid, torch.arange(valid.numel(), device="cpu").view(valid.shape), device)

    @classmethod
    def of_packed(cls, packed: PackedSequence) -> ValidSteps:
        """Of a PackedSequence: it holds all first steps, then all second steps and so on, longest row first."""
        valid = torch.arange(int(packed.batch_sizes[0]), device="cpu") < packed.batch_sizes.unsqueeze(1)
        return cls._of(valid, valid.flatten().cumsum(0).view(valid.shape) - 1, packed.data.device)

    @classmethod
    def _of(cls, valid: Tensor, position: Tensor, device: torch.device) -> ValidSteps:
        at = position.t()[valid.t()].to(device, non_blocking=True)
        return cls(at, F.pad(valid.sum(0).cumsum(0), (1, 0)).to(device, non_blocking=True))

    def gather(self, x: Tensor) -> Tensor:
        """The valid steps of x, (L, B, features) or a PackedSequence's data: (total_steps, features)."""
        return x.flatten(0, -2).index_select(0, self.at)

    def scatter(self, h: Tensor, *sizes: int) -> Tensor:
        """h, (total_steps, features), where its steps lie in a batch of `sizes`, (L, B) or (total_steps,)."""
        out = h.new_zeros(math.prod(sizes), h.shape[1]).index_copy_(0, self.at, h)
        return out.view(*sizes, h.shape[1])


# Layers to be computed: from x, (L, B, features) or (total_steps, features), and c_0 to h, as x, and c_n.
Layers = Callable[[Tensor, Tensor | None, Padding], tuple[Tensor, Tensor]]


def compute_padded(layers: Layers, x: Tensor, c_0: Tensor | None, padding: Padding) -> tuple[Tensor, Tensor]:
    """`layers` of x, (L, B, features), with `lengths` or `mask_pad`; valid steps alone if these are on the host."""
    L, B, _ = x.shape
    known = next((a for a in padding if a is not None and is_on_host(a)), None) if may_look(x, *padding) else None
    if known is None:
        if padding.mask_pad is not None:
            padding = Padding(mask_pad=padding.mask_pad.to(x.device))
        # Whatever the padding holds must not reach the gradients of the weights, not even as 0 * NaN.
        return layers(padding.zero(x), c_0, padding)
    valid = ~known if padding.lengths is None else torch.arange(L, device="cpu").unsqueeze(1) < known
    if valid.all():
        return layers(x, c_0, Padding())
    steps = ValidSteps.of_padded(valid, x.device)
    h, c_n = layers(steps.gather(x), c_0, Padding(cu_seqlens=steps.cu_seqlens))
    return steps.scatter(h, L, B), c_n


def compute_packed(layers: Layers, input: PackedSequence, c_0: Tensor | None) -> tuple[PackedSequence, Tensor]:
    """`layers` of a PackedSequence. States are (layers, B, features), in the order of the rows before packing."""
    steps = ValidSteps.of_packed(input)
    if c_0 is not None:
        c_0 = _in_order(c_0, input.sorted_indices)
    h, c_n = layers(steps.gather(input.data), c_0, Padding(cu_seqlens=steps.cu_seqlens))
    output = input._replace(data=steps.scatter(h, len(h)))
    return output, _in_order(c_n, input.unsorted_indices)


def _in_order(c: Tensor, rows: Tensor | None) -> Tensor:
    return c if rows is None else c.index_select(1, rows)
