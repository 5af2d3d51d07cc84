"""`numsru.warmup`: what it compiles, and that it leaves everything else as it was."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import numsru
from numsru import cpu_kernels


class Model(nn.Module):
    """Everything that a run could change: statistics, dropout, gradients."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.rnn = numsru.SRU(6, 4, 2, dropout=0.5)
        self.fixed = nn.Dropout(0.5).eval()

    def forward(self, x, lengths=None):
        x = self.norm(x.flatten(0, 1)).view(x.shape)
        return {"output": self.fixed(self.rnn(x, lengths=lengths)[0])}


@pytest.fixture
def compiled(monkeypatch):
    """The kernels compiled from here on."""
    kernels, compile_kernel = [], cpu_kernels._compile
    monkeypatch.setattr(cpu_kernels, "_compile", lambda *args: kernels.append(args) or compile_kernel(*args))
    for factory in (cpu_kernels._forward_kernel, cpu_kernels._backward_kernel):
        factory.cache_clear()
    return kernels


def run(model, *args):
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            model(*args)
        model(*args)["output"].sum().backward()


@pytest.mark.parametrize("lengths", [None, [5, 2, 1]], ids=["none", "lengths"])
def test_nothing_is_compiled_after_it(compiled, lengths):
    model, x = Model(), torch.randn(5, 3, 6)
    numsru.warmup(model, x, lengths)
    assert compiled
    compiled.clear()
    run(model, x, lengths)
    assert not compiled


def test_default_covers_plain_layers(compiled):
    numsru.warmup()
    compiled.clear()
    for version in (1, 2):
        rnn = numsru.SRU(6, 6, version=version)
        for lengths in (None, [5, 1]):
            rnn(torch.randn(5, 2, 6), lengths=lengths)[0].sum().backward()
    assert not compiled


def test_everything_is_left_as_it_was():
    model, x = Model(), torch.randn(5, 3, 6, requires_grad=True)
    model.rnn.weight_l0.grad = torch.ones_like(model.rnn.weight_l0)
    before = {name: a.clone() for name, a in model.state_dict().items()}
    random = torch.random.get_rng_state()
    numsru.warmup(model, x)
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert (model.rnn.weight_l0.grad == 1).all()
    assert x.grad is None
    assert all(p.grad is None for n, p in model.named_parameters() if n != "rnn.weight_l0")


def test_packed_sequences_may_be_passed():
    numsru.warmup(numsru.SRU(6, 4), pack_sequence([torch.randn(3, 6), torch.randn(1, 6)]))


def test_nothing_is_compiled_after_it_in_inference_mode(compiled):
    rnn = numsru.SRU(6, 4)
    with torch.inference_mode():
        x = torch.randn(5, 3, 6)
        numsru.warmup(rnn, x)
        assert compiled
        compiled.clear()
        rnn(x)
        with torch.enable_grad():  # which has no effect there
            assert not rnn(x)[0].requires_grad
    numsru.warmup(rnn, x)
    assert not compiled


def test_arguments_need_a_module():
    with pytest.raises(TypeError, match="expected a module"):
        numsru.warmup(None, torch.randn(5, 3, 6))


def test_backward_to_the_input_is_compiled_where_all_parameters_are_frozen(compiled):
    rnn, x = numsru.SRU(6, 4).requires_grad_(False), torch.randn(5, 3, 6, requires_grad=True)
    numsru.warmup(rnn, x)
    compiled.clear()
    rnn(x)[0].sum().backward()
    assert not compiled
