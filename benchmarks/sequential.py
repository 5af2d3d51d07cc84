"""The recurrence as a plain fused kernel: one step after the other, one column after the other on a CPU, one thread a
column on a GPU. Nothing is prefetched, vectorised by hand or recomputed; every state is kept for backward.

It is what the authors' package does on a GPU, and the yardstick for what numsru's kernels add. Version 1 with tanh and
K = 3, float32, one direction.
"""

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

ONE = np.float32(1)


def forward_step(candidate, forget, reset, x, c):
    """h and the next c, of one column; forget and reset have their bias."""
    f = ONE / (ONE + math.exp(-forget))
    r = ONE / (ONE + math.exp(-reset))
    c = f * c + (ONE - f) * candidate
    return r * math.tanh(c) + (ONE - r) * x, c


def backward_step(candidate, forget, reset, x, c_prev, c, grad_h, grad_c):
    """Gradients of candidate, forget, reset, x and c_prev. grad_c comes from the steps after this one."""
    f = ONE / (ONE + math.exp(-forget))
    r = ONE / (ONE + math.exp(-reset))
    g = math.tanh(c)
    grad_c = grad_c + grad_h * r * (ONE - g * g)
    grad_forget = grad_c * (c_prev - candidate) * f * (ONE - f)
    grad_reset = grad_h * (g - x) * r * (ONE - r)
    return grad_c * (ONE - f), grad_forget, grad_reset, grad_h * (ONE - r), grad_c * f


_forward_step, _backward_step = njit(error_model="numpy")(forward_step), njit(error_model="numpy")(backward_step)


@njit(error_model="numpy")
def _forward_cpu(u, x, bias, h, c):
    """u: (L, B, 3, H). x, h, c: (L, B, H); c[t] is the state after step t. bias: (2, H)."""
    L, B, H = x.shape
    for t in range(L):
        for b in range(B):
            for j in range(H):
                c_prev = c[t - 1, b, j] if t > 0 else np.float32(0)
                h[t, b, j], c[t, b, j] = _forward_step(
                    u[t, b, 0, j], u[t, b, 1, j] + bias[0, j], u[t, b, 2, j] + bias[1, j], x[t, b, j], c_prev
                )


@njit(error_model="numpy")
def _backward_cpu(u, x, bias, c, grad_h, grad_u, grad_x, grad_c, grad_bias):
    """grad_c: (B, H), zeros. grad_bias: (B, 2, H), zeros: one sum over time for each row."""
    L, B, H = x.shape
    for t in range(L - 1, -1, -1):
        for b in range(B):
            for j in range(H):
                c_prev = c[t - 1, b, j] if t > 0 else np.float32(0)
                candidate, forget, reset, grad_x[t, b, j], grad_c[b, j] = _backward_step(
                    u[t, b, 0, j], u[t, b, 1, j] + bias[0, j], u[t, b, 2, j] + bias[1, j],
                    x[t, b, j], c_prev, c[t, b, j], grad_h[t, b, j], grad_c[b, j],
                )  # fmt: skip
                grad_u[t, b, 0, j], grad_u[t, b, 1, j], grad_u[t, b, 2, j] = candidate, forget, reset
                grad_bias[b, 0, j] += forget
                grad_bias[b, 1, j] += reset


def _launch(kernel: str, columns: int, arrays: list[Tensor]) -> None:
    """Run a kernel on the device that the arrays are on."""
    if arrays[0].dtype != torch.float32:
        raise TypeError(f"the sequential kernel computes in float32, got {arrays[0].dtype}")
    if arrays[0].is_cuda:
        from . import sequential_cuda  # imported late: numba.cuda is of no use to those without a GPU

        sequential_cuda.launch(kernel, columns, arrays)
    else:
        {"forward": _forward_cpu, "backward": _backward_cpu}[kernel](*(a.numpy() for a in arrays))


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, x, bias):
        u, x, bias = u.detach().contiguous(), x.detach().contiguous(), bias.detach().contiguous()
        h, c = torch.empty_like(x), torch.empty_like(x)
        _launch("forward", x[0].numel(), [u, x, bias, h, c])
        ctx.save_for_backward(u, x, bias, c)
        return h

    @staticmethod
    def backward(ctx, grad_h):
        u, x, bias, c = ctx.saved_tensors
        grad_u, grad_x = torch.empty_like(u), torch.empty_like(x)
        grad_c, grad_bias = torch.zeros_like(x[0]), u.new_zeros(len(x[0]), 2, x.shape[2])
        _launch("backward", x[0].numel(), [u, x, bias, c, grad_h.contiguous(), grad_u, grad_x, grad_c, grad_bias])
        return grad_u, grad_x, grad_bias.sum(0)


def sru_recurrence(u: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """h, shape `(L, B, H)`, of u, `(L, B, 1, 3, H)`, x, `(L, B, H)`, and bias, `(1, 2, H)`. Differentiable once."""
    return _Recurrence.apply(u.squeeze(2), x, bias[0])
