"""The matrix products of a layer, forward and backward, by the route that is fastest on the machine.

That is torch's own product nearly everywhere. On a CPU, torch computes it in float32 by MKL, which on AMD's processors
keeps to AVX2; its convolutions go to oneDNN, which uses AVX-512 there and is about twice as fast. A convolution of
width 1 on a channels-last view is a matrix product. The choice depends on the processor and the sizes alone, so it is
the same in every run; results of the two routes differ by rounding.
"""

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_FEWEST_MULTIPLICATIONS = 500_000  # below, a convolution's preparations take longer than it saves


def product(v: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """v Wᵀ, shape `(n, m)`, of rows v, `(n, k)`, and weight, `(m, k)`. `out`: memory that may hold it, or may not."""
    if _by_convolution(v, weight):
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
    if _by_convolution(v, weight):
        grad_v, grad_weight, _ = torch.ops.aten.convolution_backward(
            _channels_last(grad), _channels_last(v), weight[:, :, None, None], None, [1, 1], [0, 0], [1, 1], False,
            [0, 0], 1, [v_needs_it, weight_needs_it, False],
        )  # fmt: skip
        if grad_v is not None:
            grad_v = _rows(grad_v) if also is None else also.add_(_rows(grad_v))
        return grad_v, None if grad_weight is None else grad_weight.view(weight.shape)
    if v_needs_it:
        grad_v = torch.mm(grad, weight) if also is None else also.addmm_(grad, weight)
    if weight_needs_it:
        grad_weight = torch.mm(grad.t(), v)
    return grad_v, grad_weight


def _by_convolution(v: Tensor, weight: Tensor) -> bool:
    return (
        v.dtype == torch.float32
        and v.is_cpu
        and _convolutions_are_faster()
        and len(v) * weight.numel() >= _FEWEST_MULTIPLICATIONS
        and torch.get_float32_matmul_precision() == "highest"  # at a lower precision, torch's own product is faster
        and bool(torch.backends.mkldnn.enabled)
    )


@functools.cache
def _convolutions_are_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch has oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        processor = platform.processor()
    return "AuthenticAMD" in processor


def _channels_last(rows: Tensor) -> Tensor:
    """(n, k) as an image of n x 1 pixels and k channels."""
    return rows[None, :, None, :].permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])
