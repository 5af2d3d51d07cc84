"""The routes of the matrix products: which one is taken, and that both compute the same."""

import types

import pytest
import torch

import numsru
from numsru import products

NEVER, ALWAYS = products._Thresholds(), products._Thresholds(1, 1)
ROUTES = {"torch": NEVER, "convolution": ALWAYS, "mixed": products._Thresholds(rows=1)}
# What is computed by convolutions, in this order: the product, the gradients of v and of the weight.
CONVOLUTIONS = {"torch": [], "convolution": ["u", "v", "weight"], "mixed": ["u", "v"]}


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """Each route, on any processor and of any size: which one, and what was computed by convolutions."""
    monkeypatch.setattr(products, "_thresholds", lambda: ROUTES[request.param])
    calls, forward, backward = [], products.product_by_convolution, products._gradient_by_convolution

    def record_backward(*args, of_v):
        calls.append("v" if of_v else "weight")
        return backward(*args, of_v=of_v)

    monkeypatch.setattr(products, "product_by_convolution", lambda *args: calls.append("u") or forward(*args))
    monkeypatch.setattr(products, "_gradient_by_convolution", record_backward)
    return request.param, calls


@pytest.mark.parametrize("size", [(37, 16, 24), (1, 5, 3), (64, 1, 1)], ids=str)
@pytest.mark.parametrize("has_also", [True, False])
def test_products_and_gradients_match_float64(route, size, has_also):
    n, k, m = size
    v, weight, grad, also = torch.randn(n, k), torch.randn(m, k), torch.randn(n, m), torch.randn(n, k)
    exact = [a.double() for a in (v, weight, grad, also)]
    assert_close(products.product(v, weight), exact[0] @ exact[1].t())
    grad_v, grad_weight = products.product_gradients(grad, v, weight, also if has_also else None, True, True)
    assert_close(grad_v, exact[2] @ exact[1] + (exact[3] if has_also else 0))
    assert_close(grad_weight, exact[2].t() @ exact[0])
    name, calls = route
    assert calls == CONVOLUTIONS[name]


def assert_close(a, exact):
    assert a.is_contiguous()
    torch.testing.assert_close(a.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize(("v_needs_it", "weight_needs_it"), [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed_are_computed(route, v_needs_it, weight_needs_it):
    v, weight, grad = torch.randn(9, 4), torch.randn(6, 4), torch.randn(9, 6)
    grads = products.product_gradients(grad, v, weight, None, v_needs_it, weight_needs_it)
    assert [a is not None for a in grads] == [v_needs_it, weight_needs_it]
    name, calls = route
    needed = {"v": v_needs_it, "weight": weight_needs_it, "u": False}
    assert calls == [what for what in CONVOLUTIONS[name] if needed[what]]


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"rnn_dropout": 0.5}, {"version": 2}], ids=str)
def test_layers_are_the_same_by_all_routes(monkeypatch, options):
    torch.manual_seed(0)
    rnn, x = numsru.SRU(12, 12, 2, **options), torch.randn(9, 5, 12, requires_grad=True)
    found = []
    for thresholds in ROUTES.values():
        monkeypatch.setattr(products, "_thresholds", lambda chosen=thresholds: chosen)
        torch.manual_seed(1)
        output, c_n = rnn(x)
        grads = torch.autograd.grad(
            [output, c_n], [x, *rnn.parameters()], [torch.ones_like(output), torch.ones_like(c_n)]
        )
        with torch.no_grad():
            found.append([output, c_n, *grads, *rnn.eval()(x)])
        rnn.train()
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


AMD = "vendor_id : AuthenticAMD\ncpu family : {}\nmodel : 17\n"
ZEN_4, ZEN_5 = products._Thresholds(rows=200_000_000), products._Thresholds(500_000, 500_000)


def expected(thresholds):
    return thresholds if torch.backends.mkldnn.is_available() else NEVER


@pytest.mark.parametrize(
    ("processor", "capability", "thresholds"),
    [
        (AMD.format(26), "AVX512", ZEN_5),
        (AMD.format(25), "AVX512", ZEN_4),
        (AMD.format(25), "AVX2", NEVER),
        ("vendor_id : AuthenticAMD", "AVX512", NEVER),
        ("vendor_id : GenuineIntel\ncpu family : 26\n", "AVX512", NEVER),
    ],
)
def test_route_depends_on_the_processor(monkeypatch, processor, capability, thresholds):
    monkeypatch.setattr(products.Path, "read_text", lambda *args, **kwargs: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products._thresholds.__wrapped__() == expected(thresholds)


@pytest.mark.parametrize(("family", "thresholds"), [(25, ZEN_4), (26, ZEN_5)])
def test_processor_is_asked_for_where_there_is_no_cpuinfo(monkeypatch, family, thresholds):
    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(products.Path, "read_text", missing)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    name = f"AMD64 Family {family} Model 97 Stepping 2, AuthenticAMD"
    monkeypatch.setattr(products.platform, "processor", lambda: name)
    assert products._thresholds.__wrapped__() == expected(thresholds)


def test_torchs_product_is_taken_where_it_is_as_fast(monkeypatch):
    v, weight = torch.randn(1000, 50), torch.randn(10, 50)
    assert products._by_convolution(v, weight, 500_000)
    assert not products._by_convolution(v, weight, 500_001)
    assert not products._by_convolution(v.double(), weight.double(), 1)
    assert not products._by_convolution(v.bfloat16(), weight.bfloat16(), 1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert not products._by_convolution(v, weight, 1)
    finally:
        torch.set_float32_matmul_precision(before)
    monkeypatch.setattr(torch.backends, "mkldnn", types.SimpleNamespace(enabled=False))
    assert not products._by_convolution(v, weight, 1)
