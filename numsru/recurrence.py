r"""One time step of the SRU recurrence, forward and backward, as scalar functions.

The CPU and the CUDA kernels take their equations from here and from nowhere else, so the two cannot disagree.
Everything is written for one column: one batch row, one direction, one unit. The functions are plain Python; each
backend compiles them with its own `sigmoid`, `tanh` and `exp` (`cpu_intrinsics.py`, `cuda_intrinsics.py`), and the
CUDA simulator runs them as they stand.

Version 1 (arXiv:1709.02755v1) and version 2 (arXiv:1709.02755v5), with g the nonlinearity and m the dropout mask:

    f = sigmoid(u_f + b_f [+ v_f c'])          r = sigmoid(u_r + b_r [+ v_r c'])          [...]: version 2
    c = f c' + (1 - f) u_x                     c': the state of the step before
    h = r m g(c) + (1 - r) x                   placement "paper"
    h = x + r m (g(c) - x)                     placement "highway"

Constants are written `type(f)(1)`: a bare `1.0` would turn float32 arithmetic into float64.
"""

import math
from typing import NamedTuple

# Codes for the compile-time choices below; kernels freeze them, so a branch on one costs nothing at run time.
IDENTITY, TANH, RELU, SELU, COARSE_TANH, ABSOLUTE_TANH = range(6)
NONLINEARITIES = {"identity": IDENTITY, "tanh": TANH, "relu": RELU, "selu": SELU}

PAPER, HIGHWAY = range(2)
DROPOUT_PLACEMENTS = {"paper": PAPER, "highway": HIGHWAY}

NO_SKIP, SKIP_INPUT, SKIP_PROJECTED = range(3)  # no highway; the layer's input x (K = 3); the fourth sub-matrix (K = 4)
# Every step is valid; `lengths`, (B,); `mask_pad`, (L, B); sequences end to end, `cu_seqlens`, (B + 1,).
NO_PADDING, LENGTHS, MASK, PACKED = range(4)

SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717


class Options(NamedTuple):
    """What a kernel is compiled for: the key of every cache of kernels."""

    version: int = 1
    nonlinearity: int = TANH
    placement: int = PAPER
    skip: int = SKIP_INPUT
    padding: int = NO_PADDING
    has_c_0: bool = False
    has_mask_c: bool = False
    save_c: bool = False  # keep the states that backward starts from

    @property
    def parts(self) -> int:
        """K, the number of sub-matrices in u."""
        return 4 if self.skip == SKIP_PROJECTED else 3


STEPS_PER_STATE = 8  # for backward the state of one step in so many is kept, or fewer: the fewest steps of a tile


def count_saved(padding: int, steps: int, B: int, steps_per_state: int = STEPS_PER_STATE) -> int:
    """How many rows of states there is room for: an upper bound of the tiles of all batch rows."""
    return steps // steps_per_state + B if padding == PACKED else -(-steps // steps_per_state) * B


def exp(x):
    return math.exp(x)


def tanh(x):
    return math.tanh(x)


def sigmoid(x):
    # Two branches because `math.exp` raises where the result overflows.
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    e = math.exp(x)
    return e / (1 + e)


def coarse_tanh(x):
    """tanh, for an h that is rounded to 8 bits. Not for its derivative, where errors would grow as g(c) nears 1."""
    return tanh(x)


def gate(u, bias, weight, c, version):
    """Forget or reset gate; only version 2 sees the state c of the step before."""
    if version == 2:
        return sigmoid(u + bias + weight * c)
    return sigmoid(u + bias)


def absolute_tanh(x):
    """tanh, for derivatives that are rounded to 8 bits: its error is a few 1e-7, of small results as of large ones."""
    return tanh(x)


def next_state(f, candidate, c):
    return f * c + (type(f)(1) - f) * candidate


def activate(c, nonlinearity):
    """g(c). The comparisons are chosen so that NaN stays NaN."""
    if nonlinearity == TANH:
        return tanh(c)
    if nonlinearity == COARSE_TANH:
        return coarse_tanh(c)
    if nonlinearity == ABSOLUTE_TANH:
        return absolute_tanh(c)
    if nonlinearity == RELU and c < type(c)(0):
        return type(c)(0)
    if nonlinearity == SELU:
        if c > type(c)(0):
            return type(c)(SELU_SCALE) * c
        # exp(c) - 1 without losing the digits of a small c; -|c| so that the branch not taken cannot overflow.
        return type(c)(SELU_SCALE * SELU_ALPHA) * tanh(c / type(c)(2)) * (exp(-abs(c)) + type(c)(1))
    return c


def activate_grad(c, g, nonlinearity):
    """g'(c), where g = activate(c)."""
    if nonlinearity == IDENTITY:
        return type(c)(1)
    if nonlinearity == RELU:
        return type(c)(0) if c <= type(c)(0) else type(c)(1)
    if nonlinearity == SELU:
        if c > type(c)(0):
            return type(c)(SELU_SCALE)
        return g + type(c)(SELU_SCALE * SELU_ALPHA)
    return type(c)(1) - g * g  # tanh of every kind


def output(c, r, skip, mask, nonlinearity, placement):
    """h. Without a highway, skip = 0."""
    g = activate(c, nonlinearity)
    if placement == PAPER:
        return r * (mask * g) + (type(r)(1) - r) * skip
    return skip + (g - skip) * mask * r


def output_grads(grad_h, c, r, skip, mask, nonlinearity, placement):
    """Gradients of u_r, of skip and of c, the last through this step's h alone."""
    one = type(r)(1)
    g = activate(c, nonlinearity)
    if placement == PAPER:
        grad_skip = grad_h * (one - r)
        grad_reset = grad_skip * r * (mask * g - skip)
    else:
        grad_skip = grad_h * (one - r * mask)
        grad_reset = grad_h * (one - r) * r * ((g - skip) * mask)
    return grad_reset, grad_skip, grad_h * mask * r * activate_grad(c, g, nonlinearity)


def forget_slope(c_prev, f, candidate):
    """The derivative of c in u_f, (c' - candidate) f (1 - f), but for the factor 1 - f."""
    return (c_prev - candidate) * f


def state_grads(grad_c, grad_reset, slope, f, weight_f, weight_r, version):
    """Gradients of u_x, u_f and c', from the whole of dL/dc and, in version 2, the gradient of u_r."""
    grad_candidate = grad_c * (type(f)(1) - f)
    grad_forget = grad_candidate * slope
    grad_c_prev = grad_c * f
    if version == 2:
        grad_c_prev = grad_c_prev + grad_forget * weight_f + grad_reset * weight_r
    return grad_candidate, grad_forget, grad_c_prev


def backward_step(
    grad_h, grad_c, c, c_prev, f, r, candidate, skip, mask, weight_f, weight_r, version, nonlinearity, placement
):
    """Gradients of one step, from dL/dh and the dL/dc that comes from the steps after it.

    Returns the gradients of u_x, u_f, u_r, skip and c'. The sums over time of the second and third are those of the
    bias; times c', of the recurrent weights.
    """
    grad_reset, grad_skip, grad_c_through_h = output_grads(grad_h, c, r, skip, mask, nonlinearity, placement)
    grad_candidate, grad_forget, grad_c_prev = state_grads(
        grad_c + grad_c_through_h, grad_reset, forget_slope(c_prev, f, candidate), f, weight_f, weight_r, version
    )
    return grad_candidate, grad_forget, grad_reset, grad_skip, grad_c_prev


# What a backend has to compile besides `exp`, `tanh` and `sigmoid`.
COMPOSED = (
    gate, coarse_tanh, absolute_tanh, next_state, activate, activate_grad, output, output_grads, forget_slope,
    state_grads, backward_step,
)  # fmt: skip
