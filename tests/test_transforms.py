"""Derivatives besides one backward pass: `torch.func`, forward mode, higher orders, and `numsru.use_backend`."""

import threading

import pytest
import torch
from cases import Case, assert_agrees, run_and_grads
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing._internal.two_tensor import TwoTensor

import numsru
from numsru import SRU, SRUCell, autograd, compat, nn, reference, sru_recurrence

F64 = torch.float64
# From torch's own imports.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(params=[1, 2], ids=["version1", "version2"])
def rnn(request):
    torch.manual_seed(0)
    return SRU(6, 4, 2, bidirectional=True, version=request.param, dtype=F64)


def loss_of(rnn):
    return lambda parameters, x, **given: functional_call(rnn, parameters, (x,), given)[0].square().sum()


def with_reference(function, *args):
    with numsru.use_backend("reference"):
        return function(*args)


def test_grad_of_a_functional_call_is_that_of_backward(rnn):
    parameters, x = dict(rnn.named_parameters()), torch.randn(5, 3, 6, dtype=F64)
    received = grad(loss_of(rnn))(parameters, x)
    rnn(x)[0].square().sum().backward()
    torch.testing.assert_close(received, {name: p.grad for name, p in parameters.items()})


@pytest.mark.parametrize("n", [1, 3])
def test_vmap_gives_the_gradients_of_each_sequence(rnn, n):
    parameters, x = dict(rnn.named_parameters()), torch.randn(5, n, 6, dtype=F64)
    received = vmap(grad(loss_of(rnn)), in_dims=(None, 1))(parameters, x)
    alone = [grad(loss_of(rnn))(parameters, x[:, b]) for b in range(n)]
    torch.testing.assert_close(received, {name: torch.stack([g[name] for g in alone]) for name in parameters})


def test_grad_through_vmap_is_that_of_a_batch(rnn):
    parameters, x, loss = dict(rnn.named_parameters()), torch.randn(5, 3, 6, dtype=F64), loss_of(rnn)
    received = grad(lambda parameters: vmap(lambda x: loss(parameters, x), in_dims=1)(x).sum())(parameters)
    torch.testing.assert_close(received, grad(loss)(parameters, x))


def test_vmap_over_lengths_is_a_batch(rnn):
    x, lengths = torch.randn(5, 3, 6, dtype=F64), torch.tensor([5, 2, 0])
    received = vmap(lambda x, n: rnn(x, lengths=n)[0], in_dims=(1, 0), out_dims=1)(x, lengths)
    torch.testing.assert_close(received, rnn(x, lengths=lengths)[0])


def test_vmap_over_lengths_checks_them(rnn):
    with pytest.raises(ValueError, match="between 0 and L = 5, got 6 to 6"):
        vmap(lambda x, n: rnn(x, lengths=n)[0], in_dims=(1, 0))(torch.randn(5, 2, 6, dtype=F64), torch.tensor([5, 6]))


def test_vmap_over_models():
    models = [SRU(6, 4, dtype=F64) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(models)
    x = torch.randn(5, 2, 6, dtype=F64)
    received = vmap(lambda parameters: functional_call(models[0], parameters, (x,))[0])(stacked)
    torch.testing.assert_close(received, torch.stack([model(x)[0] for model in models]))


@pytest.mark.parametrize("case", [Case(D=2), Case(version=2, highway="projected", c_0=False)], ids=str)
def test_vmap_of_the_recurrence_without_gradients(case):
    inputs, _ = case.make_inputs()
    u = torch.randn(2, *inputs["u"].shape, dtype=F64)
    with torch.no_grad():
        h, c_n = vmap(lambda u: sru_recurrence(**inputs | {"u": u}))(u)
        expected = [sru_recurrence(**inputs | {"u": a}) for a in u]
    torch.testing.assert_close(list(zip(h, c_n, strict=True)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_vmap_of_one_step(grad_mode):
    cell, x = SRUCell(6, 4, dtype=F64), torch.randn(3, 6, dtype=F64)
    with torch.set_grad_enabled(grad_mode):
        torch.testing.assert_close(vmap(cell)(x), cell(x))


def test_forward_mode_is_the_derivative_in_a_direction(rnn):
    x, direction, grad_h = (torch.randn(5, 3, 6, dtype=F64), torch.randn(5, 3, 6, dtype=F64), None)
    output, tangent = jvp(lambda x: rnn(x)[0], (x,), (direction,))
    torch.testing.assert_close(output, rnn(x)[0])
    grad_h = torch.randn_like(output)
    (grad_x,) = torch.autograd.grad(rnn(x.requires_grad_())[0], x, grad_h)
    torch.testing.assert_close((tangent * grad_h).sum(), (grad_x * direction).sum())


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_dual_numbers_give_the_derivative_in_a_direction(grad_mode):
    inputs, grads = Case(padding="lengths").make_inputs()
    expected = run_and_grads(sru_recurrence, inputs, grads)["grad_u"]
    direction = torch.randn_like(expected)
    with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
        u = forward_ad.make_dual(inputs["u"].detach(), direction)
        h, c_n = (forward_ad.unpack_dual(a).tangent for a in sru_recurrence(**inputs | {"u": u}))
    received = (h * grads["grad_h"]).sum() + (c_n * grads["grad_c_n"]).sum()
    torch.testing.assert_close(received, (expected * direction).sum())


def test_a_hessian_is_computed_in_forward_over_reverse_mode(rnn):
    x, parameters, loss = torch.randn(2, 1, 6, dtype=F64), dict(rnn.named_parameters()), loss_of(rnn)
    received = hessian(lambda x: loss(parameters, x))(x)
    twice = with_reference(torch.autograd.functional.hessian, lambda x: loss(parameters, x), x)
    torch.testing.assert_close(received, twice)


def test_grad_of_grad_names_the_backend_that_can_do_it(rnn):
    x, parameters, loss = torch.randn(2, 1, 6, dtype=F64), dict(rnn.named_parameters()), loss_of(rnn)

    def second(x):
        return grad(lambda x: grad(lambda x: loss(parameters, x))(x).square().sum())(x)

    with pytest.raises(RuntimeError, match=r"numsru\.use_backend\('reference'\)"):
        second(x)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(with_reference(loss, parameters, leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(with_reference(second, x), expected)


@pytest.mark.parametrize("case", [Case(D=2), Case(version=2, padding="packed", mask_c=True)], ids=str)
def test_reference_backend_is_differentiable_twice(case):
    inputs, _ = case.make_inputs()
    trained = {name: a for name, a in inputs.items() if getattr(a, "requires_grad", False)}

    def function(*values):
        return sru_recurrence(**inputs | dict(zip(trained, values, strict=True)))

    assert with_reference(lambda: torch.autograd.gradgradcheck(function, tuple(trained.values())))


@pytest.mark.parametrize("padding", ["none", "lengths", "mask", "packed"])
def test_reference_backend_computes_what_kernels_do(padding):
    inputs, grads = Case(D=2, padding=padding, mask_c=True).make_inputs()
    expected = run_and_grads(sru_recurrence, inputs, grads)
    assert_agrees(with_reference(run_and_grads, sru_recurrence, inputs, grads), expected, 1e-12)


def test_reference_backend_serves_every_recurrence(monkeypatch):
    calls, original = [], reference.sru_recurrence
    monkeypatch.setattr(reference, "sru_recurrence", lambda *a, **kw: calls.append(1) or original(*a, **kw))
    rnn, cell, x = SRU(6, 4, 3), SRUCell(6, 4), torch.randn(1, 2, 6)

    @numsru.use_backend("reference")
    def run():
        with torch.no_grad():  # where one step takes a short path
            return rnn(x), cell(x[0]), compat.SRU(6, 4, 2)(x)

    expected = rnn(x), cell(x[0])
    assert not calls
    torch.testing.assert_close(run()[:2], expected)
    assert len(calls) == 3 + 1 + 2
    rnn(x)
    assert len(calls) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_reference_backend_keeps_states_of_16_bits_in_float32(dtype):
    inputs, _ = Case(dtype=torch.float32).make_inputs()
    inputs |= {name: inputs[name].detach().to(dtype) for name in ("u", "x")}
    received, expected = with_reference(lambda: sru_recurrence(**inputs)), sru_recurrence(**inputs)
    assert (received[0].dtype, received[1].dtype) == (dtype, torch.float32)
    torch.testing.assert_close(received, expected, rtol=0.01, atol=0.01)


def test_backend_is_chosen_for_one_thread_until_the_end_of_the_block():
    seen = []

    def look():
        seen.append(numsru.backend.uses_reference())

    with numsru.use_backend("reference"):
        look()
        with numsru.use_backend("auto"):
            look()
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    look()
    assert seen == [True, False, True, False, False]


def test_an_error_inside_the_block_ends_the_choice():
    with pytest.raises(TypeError), numsru.use_backend("reference"):
        sru_recurrence(None)
    assert not numsru.backend.uses_reference()


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="name must be one of 'auto', 'reference', got 'cuda'"):
        numsru.use_backend("cuda").__enter__()


@pytest.mark.parametrize("padding", ["none", "lengths", "mask_pad", "cu_seqlens"])
def test_a_device_without_kernels_goes_to_the_reference(monkeypatch, rnn, padding):
    x = torch.randn(7, 3, 6, dtype=F64) if padding != "cu_seqlens" else torch.randn(7, 6, dtype=F64)
    given = {
        "none": {},
        "lengths": {"lengths": torch.tensor([7, 0, 3])},
        "mask_pad": {"mask_pad": torch.arange(21).view(7, 3) % 4 == 0},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 3, 3, 7])},
    }[padding]
    output, _ = expected = rnn(x, **given)
    grad_h = torch.randn_like(output)
    expected_grads = torch.autograd.grad(output, list(rnn.parameters()), grad_h)
    monkeypatch.setattr(autograd, "_kernels", lambda device_type: None)
    monkeypatch.setattr(nn, "takes_shortcuts", lambda *a: False)  # only CPUs and CUDA devices have any
    received = rnn(x, **given)
    torch.testing.assert_close(received, expected)
    received_grads = torch.autograd.grad(received[0], list(rnn.parameters()), grad_h)
    torch.testing.assert_close(received_grads, expected_grads)


@pytest.mark.parametrize("padding", ["none", "lengths", "lengths on the host", "mask_pad", "packed", "cu_seqlens"])
def test_the_meta_device_knows_all_shapes(padding):
    rnn = SRU(6, 4, 2, bidirectional=True, layer_norm="post", projection_size=2, device="meta")
    x, lengths = torch.empty(7, 3, 6, device="meta"), torch.tensor([7, 3, 1])
    args, named, output_shape = {
        "none": ((x,), {}, (7, 3, 8)),
        "lengths": ((x,), {"lengths": lengths.to("meta")}, (7, 3, 8)),
        "lengths on the host": ((x,), {"lengths": lengths}, (7, 3, 8)),
        "mask_pad": ((x,), {"mask_pad": torch.empty(7, 3, dtype=torch.bool, device="meta")}, (7, 3, 8)),
        "packed": ((pack_padded_sequence(torch.empty(7, 3, 6), lengths).to("meta"),), {}, (11, 8)),
        "cu_seqlens": ((x[:, 0],), {"cu_seqlens": torch.tensor([0, 2, 2, 7])}, (7, 8)),
    }[padding]
    output, c_n = rnn(*args, **named)
    output = output.data if padding == "packed" else output
    assert (output.shape, c_n.shape) == (output_shape, (4, 3, 4))
    grads = torch.autograd.grad(output.sum(), list(rnn.parameters()))
    assert [g.shape for g in grads] == [p.shape for p in rnn.parameters()]


def test_the_meta_device_knows_the_shapes_of_a_transform():
    rnn = SRU(6, 4, device="meta")
    received = grad(loss_of(rnn))(dict(rnn.named_parameters()), torch.empty(5, 3, 6, device="meta"))
    assert {name: g.shape for name, g in received.items()} == {name: p.shape for name, p in rnn.named_parameters()}


def two_of(a):
    """A subclass of Tensor without memory of its own, that computes everything twice."""
    return TwoTensor(a, a.clone())


@pytest.mark.parametrize("name", ["weight_l0", "bias_l0"])
def test_parameters_may_be_of_a_subclass_of_tensor(name):
    rnn, x = SRU(6, 4), torch.randn(5, 3, 6)
    (expected,) = torch.autograd.grad(rnn(x)[0].square().sum(), getattr(rnn, name))
    setattr(rnn, name, torch.nn.Parameter(two_of(getattr(rnn, name).detach())))
    rnn(x)[0].square().sum().backward()
    received = getattr(rnn, name).grad
    assert type(received) is TwoTensor
    torch.testing.assert_close(received.a, expected)
    torch.testing.assert_close(received.b, expected)


@pytest.mark.parametrize("name", ["x", "bias", "c_0", "weight_c", "mask_c"])
def test_arguments_may_be_of_a_subclass_of_tensor(name):
    args = {"u": torch.randn(5, 3, 1, 3, 4), "x": torch.randn(5, 3, 4), "bias": torch.randn(1, 2, 4)}
    args |= {"c_0": torch.randn(3, 4), "weight_c": torch.randn(1, 2, 4), "mask_c": torch.rand(3, 4)}
    expected, _ = sru_recurrence(**args)
    received, _ = sru_recurrence(**args | {name: two_of(args[name])})
    assert type(received) is TwoTensor
    torch.testing.assert_close(received.a, expected, rtol=0, atol=0)


def test_a_state_without_values_is_refused():
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        SRU(6, 4)(torch.randn(5, 3, 6), FakeTensorMode().from_tensor(torch.zeros(1, 3, 4)))


class Named(torch.Tensor):
    """A subclass with memory of its own."""


def test_gradients_may_be_of_a_subclass_with_memory(rnn):
    x, inputs = torch.randn(5, 3, 6, dtype=F64), list(rnn.parameters())
    output, _ = rnn(x)
    grad_h = torch.randn_like(output)
    expected = torch.autograd.grad(output, inputs, grad_h, retain_graph=True)
    received = torch.autograd.grad(output, inputs, grad_h.as_subclass(Named))
    torch.testing.assert_close([g.as_subclass(torch.Tensor) for g in received], list(expected), rtol=0, atol=0)


def test_gradients_that_kernels_cannot_read_are_refused(rnn):
    x = torch.randn(5, 3, 6, dtype=F64)
    output, _ = rnn(x)
    with pytest.raises(TypeError, match="gradients must be plain tensors as the outputs are, got TwoTensor"):
        output.backward(two_of(torch.ones_like(output)))

    def jacobian():
        return torch.autograd.functional.jacobian(lambda x: rnn(x)[0], x, vectorize=True)

    with pytest.raises(RuntimeError, match=r"no batched gradients .*: use torch.func.jacrev, .*'reference'"):
        jacobian()
    torch.testing.assert_close(with_reference(jacobian), torch.func.jacrev(lambda x: rnn(x)[0])(x))


def test_fake_tensors_know_all_shapes(rnn):
    with FakeTensorMode(allow_non_fake_inputs=True):
        output, c_n = rnn(torch.empty(7, 3, 6, dtype=F64), lengths=torch.empty(3, dtype=torch.int64))
    assert (output.shape, c_n.shape) == ((7, 3, 8), (4, 3, 4))


def test_a_dispatch_mode_sees_the_recurrence(rnn):
    x = torch.randn(7, 3, 6, dtype=F64)
    graph = make_fx(lambda x: rnn(x)[0])(x)
    assert graph.code.count("torch.ops.numsru.recurrence.default") == 2
    x = torch.randn_like(x)
    torch.testing.assert_close(graph(x), rnn(x)[0])
