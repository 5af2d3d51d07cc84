"""The sequential kernel on a GPU: one thread walks through the time steps of one column (`sequential.py`)."""

import functools
from typing import Any

import numpy as np
import torch
from numba import config, cuda
from torch import Tensor

import numsru.cuda_intrinsics  # noqa: F401  (without which numba-cuda cannot compile beside NumPy 2.5)

from . import sequential

THREADS = 128
config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # a few columns are a few threads: that is what is measured

_forward_step = cuda.jit(device=True, inline="always")(sequential.forward_step)
_backward_step = cuda.jit(device=True, inline="always")(sequential.backward_step)


@cuda.jit
def forward(u, x, bias, h, c):
    """Shapes as in `sequential._forward_cpu`."""
    L, B, H = x.shape
    column = cuda.grid(1)
    if column >= B * H:
        return
    b, j = column // H, column % H
    state = np.float32(0)
    for t in range(L):
        h[t, b, j], state = _forward_step(
            u[t, b, 0, j], u[t, b, 1, j] + bias[0, j], u[t, b, 2, j] + bias[1, j], x[t, b, j], state
        )
        c[t, b, j] = state


@cuda.jit
def backward(u, x, bias, c, grad_h, grad_u, grad_x, grad_c, grad_bias):
    """Shapes as in `sequential._backward_cpu`."""
    L, B, H = x.shape
    column = cuda.grid(1)
    if column >= B * H:
        return
    b, j = column // H, column % H
    carry = grad_c[b, j]
    sum_forget, sum_reset = np.float32(0), np.float32(0)
    for t in range(L - 1, -1, -1):
        c_prev = c[t - 1, b, j] if t > 0 else np.float32(0)
        candidate, forget, reset, grad_x[t, b, j], carry = _backward_step(
            u[t, b, 0, j], u[t, b, 1, j] + bias[0, j], u[t, b, 2, j] + bias[1, j],
            x[t, b, j], c_prev, c[t, b, j], grad_h[t, b, j], carry,
        )  # fmt: skip
        grad_u[t, b, 0, j], grad_u[t, b, 1, j], grad_u[t, b, 2, j] = candidate, forget, reset
        sum_forget += forget
        sum_reset += reset
    grad_c[b, j] = carry
    grad_bias[b, 0, j] = sum_forget
    grad_bias[b, 1, j] = sum_reset


@functools.lru_cache
def _stream(device: torch.device, handle: int) -> Any:
    """The stream with a handle, which that of a device's default stream shares with all others'."""
    return cuda.external_stream(handle)


def launch(kernel: str, columns: int, arrays: list[Tensor]) -> None:
    """Launch "forward" or "backward" on torch's current stream; the arrays share their memory with torch."""
    device = arrays[0].device
    with torch.cuda.device(device):
        stream = _stream(device, torch.cuda.current_stream().cuda_stream)
        {"forward": forward, "backward": backward}[kernel][-(-columns // THREADS), THREADS, stream](
            *(cuda.as_cuda_array(a) for a in arrays)
        )
