"""`sru_recurrence` as a differentiable operation: gradcheck, which gradients, what it leaves alone, its errors."""

import numpy as np
import pytest
import torch
from cases import Case, assert_agrees, run_and_grads
from official import NAMES, load, run_official

import numsru
from numsru import autograd, cpu_kernels, sru_recurrence

# Odd sizes; every value of an option with every value of each other, but for nonlinearities with paddings.
GRADCHECK = [
    Case(
        L=4, B=2, D=D, H=3, highway=highway, nonlinearity=nonlinearity, padding=padding, mask_c=mask_c,
        version=version, placement=placement, scale_x=1.4,
    )
    for D in (1, 2)
    for highway, nonlinearity, padding, mask_c, version, placement in (
        ("input", "tanh", "none", False, 2, "paper"),
        ("input", "identity", "lengths", True, 2, "highway"),
        ("input", "relu", "mask", True, 2, "paper"),
        ("input", "selu", "packed", True, 1, "paper"),
        ("projected", "tanh", "lengths", True, 1, "paper"),
        ("projected", "identity", "mask", False, 2, "paper"),
        ("projected", "relu", "packed", False, 2, "highway"),
        ("projected", "selu", "none", False, 1, "highway"),
        ("none", "tanh", "mask", True, 1, "highway"),
        ("none", "identity", "packed", False, 1, "highway"),
        ("none", "relu", "none", True, 1, "highway"),
        ("none", "selu", "lengths", False, 2, "paper"),
    )
]  # fmt: skip


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradcheck(case):
    inputs, _ = case.make_inputs(seed=1)
    trained = {name: a for name, a in inputs.items() if getattr(a, "requires_grad", False)}
    constant = {name: a for name, a in inputs.items() if name not in trained}

    def function(*values):
        return sru_recurrence(**dict(zip(trained, values, strict=True)), **constant)

    assert torch.autograd.gradcheck(function, tuple(trained.values()))


@pytest.mark.parametrize("name", NAMES)
def test_kernels_match_the_recorded_official_package(name):
    record = load(name)
    received = run_official(record, sru_recurrence)
    assert_agrees(received, {key: a.double() for key, a in record.results.items()}, 1e-5)


@pytest.mark.parametrize("name", ["u", "x", "bias", "c_0", "weight_c"])
def test_gradient_of_one_input_alone(name):
    inputs, grads = Case(version=2, D=2).make_inputs()
    expected = run_and_grads(sru_recurrence, inputs, grads)
    for other in ("u", "x", "bias", "c_0", "weight_c"):
        inputs[other] = inputs[other].detach().requires_grad_(other == name)
    received = run_and_grads(sru_recurrence, inputs, grads)
    assert_agrees(received, {key: expected[key] for key in ("h", "c_n", f"grad_{name}")}, 0)


@pytest.mark.parametrize("output", [0, 1], ids=["h", "c_n"])
def test_gradient_through_one_output_alone(output):
    inputs, grads = Case(D=2).make_inputs()
    zeros = {key: g if key == ("grad_h", "grad_c_n")[output] else torch.zeros_like(g) for key, g in grads.items()}
    expected = run_and_grads(sru_recurrence, inputs, zeros)["grad_u"]
    gradient = list(grads.values())[output]
    received = torch.autograd.grad(sru_recurrence(**inputs)[output], inputs["u"], gradient)[0]
    torch.testing.assert_close(received, expected, rtol=0, atol=0)


def test_backward_twice_gives_the_same_gradients():
    inputs, grads = Case(D=2, padding="lengths").make_inputs()
    outputs = sru_recurrence(**inputs)
    first, second = (
        torch.autograd.grad(outputs, [inputs["u"], inputs["x"]], list(grads.values()), retain_graph=True)
        for _ in range(2)
    )
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_inputs_are_left_as_they_were():
    inputs, grads = Case(version=2, D=2, mask_c=True, padding="mask").make_inputs()
    before = {name: a.detach().clone() for name, a in (inputs | grads).items() if isinstance(a, torch.Tensor)}
    run_and_grads(sru_recurrence, inputs, grads)
    for name, a in before.items():
        torch.testing.assert_close((inputs | grads)[name].detach(), a, rtol=0, atol=0)


def test_strided_inputs_give_the_same_result():
    inputs, grads = Case(D=2).make_inputs()
    expected = run_and_grads(sru_recurrence, inputs, grads)
    for name in ("u", "x", "bias", "c_0"):
        wide = inputs[name].detach().repeat_interleave(2, dim=-1)
        inputs[name] = wide[..., ::2].requires_grad_()
    grads = {name: g.detach().repeat_interleave(2, dim=-1)[..., ::2] for name, g in grads.items()}
    assert_agrees(run_and_grads(sru_recurrence, inputs, grads), expected, 0)


def test_expanded_gradient_gives_the_same_result():
    inputs, _ = Case().make_inputs()
    h, c_n = sru_recurrence(**inputs)
    (received,) = torch.autograd.grad(h.sum() + c_n.sum(), inputs["u"], retain_graph=True)
    (expected,) = torch.autograd.grad((h, c_n), inputs["u"], (torch.ones_like(h), torch.ones_like(c_n)))
    torch.testing.assert_close(received, expected, rtol=0, atol=0)


@pytest.mark.parametrize("padding", ["lengths", "mask"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("version", [1, 2])
def test_padding_contents_never_matter(version, junk, padding):
    inputs, grads = Case(version=version, D=2, padding=padding, mask_c=True).make_inputs()
    expected = run_and_grads(sru_recurrence, inputs, grads)
    L = inputs["u"].shape[0]
    padded = inputs["mask_pad"] if padding == "mask" else torch.arange(L)[:, None] >= inputs["lengths"]
    for name in ("u", "x"):
        inputs[name] = inputs[name].detach().clone()
        inputs[name][padded] = junk
        inputs[name].requires_grad_()
    grads["grad_h"][padded] = junk
    received = run_and_grads(sru_recurrence, inputs, grads)
    assert_agrees(received, expected, 0)
    assert not received["grad_u"][padded].any()
    assert not received["h"][padded].any()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, -1, 0x7FFFFFFF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("version", [1, 2])
def test_nan_stays_in_its_column(version, dtype, bits):
    inputs, _ = Case(version=version, H=9, dtype=dtype).make_inputs()
    inputs["u"] = inputs["u"].detach().clone()
    inputs["u"][2, 1, 0, 1, 4] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    h, c_n = sru_recurrence(**inputs)
    affected = torch.zeros_like(h, dtype=torch.bool)
    affected[2:, 1, 4] = True
    torch.testing.assert_close(h.isnan(), affected)
    torch.testing.assert_close(c_n.isnan(), affected[-1])


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_cutting_a_sequence_changes_nothing(cut):
    inputs, _ = Case().make_inputs()
    h, c_n = sru_recurrence(**inputs)
    u, x, bias, c = (inputs[name] for name in ("u", "x", "bias", "c_0"))
    first, c = sru_recurrence(u[:cut], x[:cut], bias, c, nonlinearity="tanh")
    second, c = sru_recurrence(u[cut:], x[cut:], bias, c, nonlinearity="tanh")
    torch.testing.assert_close(torch.cat([first, second]), h, rtol=0, atol=0)
    torch.testing.assert_close(c, c_n, rtol=0, atol=0)


def test_no_graph_is_made_without_gradients():
    inputs, _ = Case().make_inputs()
    with torch.no_grad():
        h, c_n = sru_recurrence(**inputs)
    assert not h.requires_grad
    assert not c_n.requires_grad


def test_inference_gives_the_bits_of_training():
    inputs, _ = Case(L=30, H=40, dtype=torch.float32).make_inputs()
    h, c_n = sru_recurrence(**inputs)
    with torch.inference_mode():
        torch.testing.assert_close(sru_recurrence(**inputs), (h.detach(), c_n.detach()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["u", "x", "bias", "c_0", "weight_c"])
def test_second_derivative_is_refused(name):
    inputs, _ = Case(version=2).make_inputs()
    for other in ("u", "x", "bias", "c_0", "weight_c"):
        inputs[other] = inputs[other].detach().requires_grad_(other == name)
    h, _ = sru_recurrence(**inputs)
    (grad,) = torch.autograd.grad(h.sum(), inputs[name], create_graph=True)
    with pytest.raises(RuntimeError, match=r"numsru\.use_backend\('reference'\)"):
        grad.sum().backward()


def test_negative_view_is_read_with_its_sign():
    inputs, _ = Case().make_inputs()
    x = inputs["x"].detach()
    inputs["x"] = torch.complex(torch.zeros_like(x), -x).conj().imag.contiguous()
    expected = sru_recurrence(**inputs | {"x": x})
    torch.testing.assert_close(sru_recurrence(**inputs), expected, rtol=0, atol=0)


def test_lengths_changed_after_forward_do_not_reach_backward():
    inputs, grads = Case(padding="lengths").make_inputs()
    expected = run_and_grads(sru_recurrence, inputs, grads)["grad_u"]
    values = inputs["lengths"].numpy().copy()
    h, c_n = sru_recurrence(**inputs | {"lengths": torch.from_numpy(values)})
    values[:] = 1000
    (received,) = torch.autograd.grad((h, c_n), inputs["u"], (grads["grad_h"], grads["grad_c_n"]))
    torch.testing.assert_close(received, expected, rtol=0, atol=0)


def test_the_meta_device_knows_all_shapes():
    u = torch.empty(5, 2, 1, 3, 4, device="meta")
    h, c_n = sru_recurrence(u, torch.empty(5, 2, 4, device="meta"), None)
    assert (h.shape, c_n.shape) == ((5, 2, 4), (2, 4))


BF16 = torch.bfloat16
F64 = torch.float64
FLAT = {"u": torch.zeros(7, 1, 3, 5), "x": torch.zeros(7, 5)}
ERRORS = {
    "u of 4 dimensions": ({"u": torch.zeros(7, 3, 3, 5)}, ValueError, r"\(L, B, D, K, H\).*\(7, 3, 3, 5\)"),
    "5 sub-matrices": ({"u": torch.zeros(7, 3, 1, 5, 5)}, ValueError, "K = 3 or 4"),
    "3 directions": ({"u": torch.zeros(7, 3, 3, 3, 5)}, ValueError, "D = 1 or 2"),
    "no units": ({"u": torch.zeros(7, 3, 1, 3, 0)}, ValueError, "H >= 1"),
    "8 bits": ({"u": torch.zeros(7, 3, 1, 3, 5, dtype=torch.float8_e5m2)}, TypeError, "float16 or bfloat16.*float8"),
    "complex": ({"u": torch.zeros(7, 3, 1, 3, 5, dtype=torch.complex64)}, TypeError, "float16 or bfloat16.*complex"),
    "u of 16 bits": (
        {"u": torch.zeros(7, 3, 1, 3, 5, dtype=torch.float16)}, TypeError, "x must be torch.float16.*float32"
    ),
    "bias of another 16 bits": (
        {"u": torch.zeros(7, 3, 1, 3, 5, dtype=torch.float16), "x": None, "bias": torch.zeros(1, 2, 5, dtype=BF16)},
        TypeError,
        "bias must be torch.float16 as the input is or torch.float32, got torch.bfloat16",
    ),
    "x of another shape": ({"x": torch.zeros(7, 3, 6)}, ValueError, r"x must have shape \(7, 3, 5\), got \(7, 3, 6\)"),
    "x of another dtype": ({"x": torch.zeros(7, 3, 5, dtype=F64)}, TypeError, "x must be torch.float32.*float64"),
    "x on another device": ({"x": torch.zeros(7, 3, 5, device="meta")}, ValueError, "x must be on cpu.*meta"),
    "x beside a projection": ({"u": torch.zeros(7, 3, 1, 4, 5)}, ValueError, "x must be None"),
    "bias": ({"bias": torch.zeros(1, 3, 5)}, ValueError, r"bias must have shape \(1, 2, 5\)"),
    "c_0": ({"c_0": torch.zeros(1, 3, 5)}, ValueError, r"c_0 must have shape \(3, 5\), got \(1, 3, 5\)"),
    "weight_c": ({"weight_c": torch.zeros(2, 5)}, ValueError, "weight_c must have shape"),
    "mask_c": ({"mask_c": torch.zeros(3, 6)}, ValueError, "mask_c must have shape"),
    "mask_c with a gradient": ({"mask_c": torch.zeros(3, 5, requires_grad=True)}, ValueError, "mask_c.*detach"),
    "lengths of another size": ({"lengths": torch.tensor([1, 2])}, ValueError, r"lengths must have shape \(3,\)"),
    "lengths too long": ({"lengths": torch.tensor([1, 2, 8])}, ValueError, "between 0 and L = 7, got 1 to 8"),
    "lengths below 0": ({"lengths": torch.tensor([1, -2, 7])}, ValueError, "between 0 and L = 7, got -2 to 7"),
    "fractional lengths": ({"lengths": torch.tensor([1.0, 2, 3])}, TypeError, "integers, got torch.float32"),
    "mask_pad of another shape": ({"mask_pad": torch.zeros(3, 7, dtype=torch.bool)}, ValueError, r"\(7, 3\)"),
    "mask_pad of numbers": ({"mask_pad": torch.zeros(7, 3)}, TypeError, "mask_pad must be torch.bool, got"),
    "both paddings": (
        {"lengths": torch.tensor([1, 2, 3]), "mask_pad": torch.zeros(7, 3, dtype=torch.bool)},
        ValueError, "at most one of lengths and mask_pad, got both",
    ),
    "cu_seqlens of 2 dimensions": (FLAT | {"cu_seqlens": torch.tensor([[0, 7]])}, ValueError, r"shape \(B \+ 1,\)"),
    "cu_seqlens too short": (FLAT | {"cu_seqlens": torch.tensor([0, 3])}, ValueError, "from 0 to total_steps = 7"),
    "cu_seqlens not from 0": (FLAT | {"cu_seqlens": torch.tensor([1, 7])}, ValueError, "must rise from 0"),
    "cu_seqlens falling": (FLAT | {"cu_seqlens": torch.tensor([0, 5, 3, 7])}, ValueError, "must rise from 0"),
    "fractional cu_seqlens": (FLAT | {"cu_seqlens": torch.tensor([0.0, 7])}, TypeError, "must be integers"),
    "cu_seqlens that wrap": (
        FLAT | {"cu_seqlens": torch.tensor([0, 200, 7], dtype=torch.uint8)}, ValueError, "must rise from 0",
    ),
    "cu_seqlens with a batch": ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, r"\(total_steps, D, K, H\)"),
    "cu_seqlens with lengths": (
        FLAT | {"cu_seqlens": torch.tensor([0, 7]), "lengths": torch.tensor([7])}, ValueError, "leaves no padding",
    ),
    "u of NumPy": ({"u": np.zeros((7, 3, 1, 3, 5))}, TypeError, "u must be a Tensor, got ndarray"),
    "lengths in a list": ({"lengths": [1, 2, 3]}, TypeError, "lengths must be a Tensor, got list"),
    "nonlinearity": ({"nonlinearity": "gelu"}, ValueError, "'identity', 'tanh', 'relu', 'selu', got 'gelu'"),
    "placement": ({"dropout_placement": "state"}, ValueError, "'paper', 'highway', got 'state'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error_says_what_was_expected(name):
    changed, error, message = ERRORS[name]
    arguments = {"u": torch.zeros(7, 3, 1, 3, 5), "x": torch.zeros(7, 3, 5), "bias": None} | changed
    with pytest.raises(error, match=message):
        sru_recurrence(**arguments)


def test_docstring_example_runs():
    h, c_n = numsru.sru_recurrence(torch.randn(5, 2, 1, 3, 4), torch.randn(5, 2, 4), torch.zeros(1, 2, 4))
    assert (h.shape, c_n.shape) == ((5, 2, 4), (2, 4))


def test_upstream_gradients_may_be_negative_views():
    u = torch.randn(4, 2, 1, 3, 5, requires_grad=True)
    grad_h, grad_c_n = torch.randn(4, 2, 5), torch.randn(2, 5)
    outputs = sru_recurrence(u, torch.zeros(4, 2, 5))
    expected = torch.autograd.grad(outputs, u, [-grad_h, -grad_c_n], retain_graph=True)
    found = torch.autograd.grad(outputs, u, [torch._neg_view(grad_h), torch._neg_view(grad_c_n)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", numsru.backend.BACKENDS)
def test_states_of_16_bits_are_float32_though_there_is_no_step(backend):
    with numsru.use_backend(backend):
        h, c_n = sru_recurrence(torch.zeros(0, 2, 1, 3, 5, dtype=BF16), c_0=torch.ones(2, 5, dtype=BF16))
    assert (h.dtype, c_n.dtype) == (BF16, torch.float32)


@pytest.mark.parametrize("backend", numsru.backend.BACKENDS)
@pytest.mark.parametrize(("version", "nonlinearity"), [(1, "tanh"), (2, "identity")])
def test_nonlinearity_is_by_default_that_of_the_version(version, nonlinearity, backend):
    u, weight_c = 3 * torch.randn(4, 2, 1, 3, 5), torch.randn(1, 2, 5) if version == 2 else None
    with numsru.use_backend(backend):
        expected = sru_recurrence(u, weight_c=weight_c, nonlinearity=nonlinearity)
        torch.testing.assert_close(sru_recurrence(u, weight_c=weight_c), expected, rtol=0, atol=0)


def test_states_are_kept_only_for_a_gradient(monkeypatch):
    kept, forward = [], cpu_kernels.forward
    monkeypatch.setattr(cpu_kernels, "forward", lambda options, *args: kept.append(options) or forward(options, *args))
    u = torch.randn(4, 2, 1, 3, 5)
    sru_recurrence(u)
    sru_recurrence(u, bias=torch.zeros(1, 2, 5, requires_grad=True))
    with torch.no_grad():
        sru_recurrence(u.requires_grad_())
    assert [options.save_c for options in kept] == [False, True, False]


@pytest.mark.parametrize(("cu_seqlens", "longest"), [([0], 0), ([0, 0], 0), ([0, 3], 3), ([0, 2, 7, 8], 5)])
def test_the_longest_of_sequences_end_to_end_is_known(cu_seqlens, longest):
    total_steps = cu_seqlens[-1]
    assert autograd.check_cu_seqlens(torch.tensor(cu_seqlens), total_steps, torch.device("cpu"))[1] == longest
    h, c_n = sru_recurrence(torch.zeros(total_steps, 1, 3, 5), cu_seqlens=torch.tensor(cu_seqlens))
    assert (len(h), len(c_n)) == (total_steps, len(cu_seqlens) - 1)
