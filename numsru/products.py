"""The matrix products of a layer, forward and backward, by the route that is fastest on the machine.

That is torch's own product nearly everywhere. On a CPU, torch computes it in float32 by MKL, which on AMD's processors
keeps to AVX2; its convolutions go to oneDNN, which uses AVX-512 there. A convolution of width 1 on a channels-last view
is a matrix product. The choice depends on the processor and the sizes alone, so it is the same in every run; results of
the two routes differ by rounding.
"""

import functools
import math
import platform
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Thresholds(NamedTuple):
    """From how many multiplications on convolutions are the faster route."""

    rows: float = math.inf  # of the products that give rows: u, and the gradient of v
    weight: float = math.inf  # of the product that gives the gradient of the weight


_NEVER = _Thresholds()


def product(v: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """v Wᵀ, shape `(n, m)`, of rows v, `(n, k)`, and weight, `(m, k)`. `out`: memory that may hold it, or may not."""
    if _by_convolution(v, weight, _thresholds().rows):
        return product_by_convolution(v, weight)
    return F.linear(v, weight) if out is None else torch.mm(v, weight.t(), out=out)


def product_by_convolution(v: Tensor, weight: Tensor) -> Tensor:
    """:func:`product` by a convolution, on any processor."""
    return _rows(F.conv2d(_channels_last(v), weight[:, :, None, None]))


def product_gradients(
    grad: Tensor, v: Tensor, weight: Tensor, also: Tensor | None, v_needs_it: bool, weight_needs_it: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of v and weight from that of their product, `(n, m)`.

    Args:
        also: What else the gradient of v consists of, `(n, k)`. It is overwritten.
    """
    grad_v = grad_weight = None
    if v_needs_it:
        if _by_convolution(v, weight, _thresholds().rows):
            grad_v = _gradient_by_convolution(grad, v, weight, of_v=True)
            grad_v = grad_v if also is None else also.add_(grad_v)
        else:
            grad_v = torch.mm(grad, weight) if also is None else also.addmm_(grad, weight)
    if weight_needs_it:
        if _by_convolution(v, weight, _thresholds().weight):
            grad_weight = _gradient_by_convolution(grad, v, weight, of_v=False)
        else:
            grad_weight = torch.mm(grad.t(), v)
    return grad_v, grad_weight


def _gradient_by_convolution(grad: Tensor, v: Tensor, weight: Tensor, of_v: bool) -> Tensor:
    """The gradient of v, or else that of the weight."""
    grad_v, grad_weight, _ = torch.ops.aten.convolution_backward(
        _channels_last(grad), _channels_last(v), weight[:, :, None, None], None, [1, 1], [0, 0], [1, 1], False,
        [0, 0], 1, [of_v, not of_v, False],
    )  # fmt: skip
    return _rows(grad_v) if of_v else grad_weight.view(weight.shape)


def _by_convolution(v: Tensor, weight: Tensor, threshold: float) -> bool:
    return (
        threshold < math.inf  # asked first: on most machines it is the last question
        and v.dtype == torch.float32
        and v.is_cpu
        and len(v) * weight.numel() >= threshold
        and torch.get_float32_matmul_precision() == "highest"  # at a lower precision, torch's own product is faster
        and bool(torch.backends.mkldnn.enabled)
    )


@functools.cache
def _thresholds() -> _Thresholds:
    """Those of this processor: finite on AMD's with AVX-512, where torch has oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return _NEVER
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return _NEVER
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        processor = platform.processor()
    family = re.search(r"family\D*(\d+)", processor, re.IGNORECASE)
    if "AuthenticAMD" not in processor or family is None:
        return _NEVER
    if int(family[1]) <= 25:
        # Zen 4 computes 512 bits in two halves. Large products gain up to 1.3 times the rate; small ones lose more by
        # the convolution's preparations, and gradients of weights take longer by it, the largest 1.3 times as long.
        return _Thresholds(rows=200_000_000)
    return _Thresholds(500_000, 500_000)  # Zen 5: about twice the rate, but for the smallest


def _channels_last(rows: Tensor) -> Tensor:
    """(n, k) as an image of n x 1 pixels and k channels."""
    return rows[None, :, None, :].permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])
