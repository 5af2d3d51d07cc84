"""The scalar equations: gradients against finite differences, limits, and NaN."""

import math
from itertools import product

import pytest
import torch

from numsru import recurrence
from numsru.recurrence import IDENTITY, RELU, SELU, TANH

OPTIONS = list(product((1, 2), recurrence.NONLINEARITIES.values(), recurrence.DROPOUT_PLACEMENTS.values()))
WEIGHT_F, WEIGHT_R, MASK = 0.7, -0.4, 1.6


def forward(values, version, nonlinearity, placement):
    """h and c of one step from (u_x, u_f, u_r, skip, c')."""
    candidate, forget, reset, skip, c_prev = values
    f = recurrence.gate(forget, 0.1, WEIGHT_F, c_prev, version)
    r = recurrence.gate(reset, -0.2, WEIGHT_R, c_prev, version)
    c = recurrence.next_state(f, candidate, c_prev)
    return recurrence.output(c, r, skip, MASK, nonlinearity, placement), c, f, r


@pytest.mark.parametrize("state", [0.8, -0.9], ids=["positive", "negative"])
@pytest.mark.parametrize(("version", "nonlinearity", "placement"), OPTIONS)
def test_backward_step_matches_finite_differences(version, nonlinearity, placement, state):
    values = [state, 0.3, -0.6, 1.1, state / 2]
    options = (version, nonlinearity, placement)
    grad_h, grad_c, eps = 1.3, -0.5, 1e-6

    def loss(at):
        h, c, _, _ = forward(at, *options)
        return grad_h * h + grad_c * c

    expected = []
    for i in range(len(values)):
        ends = [[v + (sign * eps if i == j else 0) for j, v in enumerate(values)] for sign in (1, -1)]
        expected.append((loss(ends[0]) - loss(ends[1])) / (2 * eps))
    _, c, f, r = forward(values, *options)
    received = recurrence.backward_step(
        grad_h, grad_c, c, values[4], f, r, values[0], values[3], MASK, WEIGHT_F, WEIGHT_R, *options
    )
    assert received == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("z", "expected"), [(1e4, 1.0), (-1e4, 0.0), (100.0, 1.0), (-100.0, math.exp(-100)), (0, 0.5)])
def test_sigmoid_reaches_its_limits_without_overflow(z, expected):
    assert recurrence.sigmoid(z) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("nonlinearity", [IDENTITY, TANH, RELU, SELU])
def test_nonlinearity_keeps_nan(nonlinearity):
    assert math.isnan(recurrence.activate(math.nan, nonlinearity))


@pytest.mark.parametrize(("nonlinearity", "g"), [(RELU, torch.relu), (SELU, torch.selu), (TANH, torch.tanh)])
@pytest.mark.parametrize("state", [-0.7, 0.0, 0.4])
def test_nonlinearity_is_torchs(nonlinearity, g, state):
    c = torch.tensor(state, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(g(c), c)
    received = recurrence.activate(state, nonlinearity)
    assert received == pytest.approx(g(c).item(), rel=1e-14)
    assert recurrence.activate_grad(state, received, nonlinearity) == pytest.approx(slope.item(), rel=1e-14)


@pytest.mark.parametrize("nonlinearity", [RELU, SELU])
def test_nonlinearity_does_not_overflow_far_from_zero(nonlinearity):
    assert recurrence.activate(1e4, nonlinearity) >= 1e4
    assert recurrence.activate(-1e4, nonlinearity) <= 0
