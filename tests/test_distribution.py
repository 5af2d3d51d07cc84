"""What torch does to modules: data parallel training, checkpointing, copies, files, processes, parametrizations."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from numsru import SRU, SRUCell, compat

PROCESSES = 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = SRU(6, 4, 2, bidirectional=True)
        self.linear = nn.Linear(8, 3)

    def forward(self, x, lengths):
        output, c_n = self.rnn(x, lengths=lengths)
        return self.linear(output).square().mean((0, 2)) + c_n.square().mean((0, 2))


def make_model():
    torch.manual_seed(0)
    return Model()


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 4, 6, generator=generator), torch.tensor([7, 3, 5, 1])


def expected_gradients():
    model = make_model()
    model(*batch()).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def train_in_parallel(rank, rendezvous, folder):
    """In each process: the gradients of its half of the batch, averaged over processes, two ways."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    x, lengths = batch()
    rows = slice(rank * 2, rank * 2 + 2)
    results = {}
    model = DistributedDataParallel(make_model())
    model(x[:, rows], lengths[rows]).mean().backward()
    results["DistributedDataParallel"] = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}

    model = make_model()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    fully_shard(model.rnn, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(x[:, rows], lengths[rows]).mean().backward()
    results["fully_shard"] = {n: p.grad.full_tensor() for n, p in model.named_parameters()}

    for bias in (True, False):
        rnn = SRU(6, 4, 2, bias=bias, highway_bias=-1.0, layer_norm="pre", device="meta")
        fully_shard(rnn, mesh=mesh)
        rnn.to_empty(device="cpu").reset_parameters()
        results[f"drawn, bias={bias}"] = {n: p.detach().full_tensor() for n, p in rnn.named_parameters()}
    if rank == 0:
        torch.save(results, f"{folder}/gradients.pt")
    dist.barrier()  # gloo aborts a process whose partner leaves while they still exchange something
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parallel_gradients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    torch.multiprocessing.spawn(train_in_parallel, (str(folder / "rendezvous"), str(folder)), nprocs=PROCESSES)
    return torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.parametrize("way", ["DistributedDataParallel", "fully_shard"])
def test_two_processes_have_the_gradients_of_one(parallel_gradients, way):
    if way == "fully_shard" and torch.__version__.startswith("2.8."):
        pytest.skip("torch 2.8 adds up what processes without a GPU should average")
    torch.testing.assert_close(parallel_gradients[way], expected_gradients(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_in_parts_are_drawn_anew(parallel_gradients, bias):
    drawn = parallel_gradients[f"drawn, bias={bias}"]
    assert drawn.keys() == dict(SRU(6, 4, 2, bias=bias, layer_norm="pre").named_parameters()).keys()
    for name, value in drawn.items():
        if name.startswith("bias"):
            assert value.tolist() == [[[0.0] * 4, [-1.0] * 4]]
        elif "norm" in name:
            assert (value == name.endswith("weight")).all()
        else:
            bound = (3 / value.shape[1]) ** 0.5
            assert 0.8 * bound < value.abs().max() <= bound


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    rnn, (x, lengths) = make_model().rnn, batch()
    x.requires_grad_()
    grad, inputs = torch.randn(7, 4, 8), [x, *rnn.parameters()]
    for a in inputs:
        a.grad = None
    output = checkpoint(lambda x: rnn(x, lengths=lengths)[0], x, use_reentrant=use_reentrant)
    output.backward(grad)
    expected = torch.autograd.grad(rnn(x, lengths=lengths)[0], inputs, grad)
    torch.testing.assert_close([a.grad for a in inputs], [*expected], rtol=0, atol=0)


def test_checkpointing_draws_the_same_dropout_again():
    rnn, x = SRU(6, 6, 3, dropout=0.5, rnn_dropout=0.5), torch.randn(7, 4, 6, requires_grad=True)
    torch.manual_seed(3)
    (received,) = torch.autograd.grad(checkpoint(lambda x: rnn(x)[0].sum(), x, use_reentrant=False), x)
    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(rnn(x)[0].sum(), x)
    torch.testing.assert_close(received, expected, rtol=0, atol=0)


MODULES = {
    "SRU": lambda: SRU(6, 4, 2, bidirectional=True, version=2, layer_norm="pre", projection_size=2),
    "SRUCell": lambda: SRUCell(6, 4),
    "compat": lambda: compat.SRU(6, 4, 2),
    "SRU++": lambda: compat.SRUpp(6, 4, 4, 2),
}


def example(module):
    return torch.randn(3, 6) if isinstance(module, SRUCell) else torch.randn(5, 3, 6)


def via_pickle(module):
    return pickle.loads(pickle.dumps(module))


def via_whole_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def via_state_dict(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module)
    other.reset_parameters()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("way", [copy.deepcopy, via_pickle, via_whole_file, via_state_dict], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_computes_the_same(name, way):
    module = MODULES[name]()
    x = example(module)
    module(x)[0].sum().backward()
    other = way(module)
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(other(x)[0], module(x)[0])


def double_bias(rnn):
    with torch.no_grad():
        rnn.bias_l0.fill_(2.0)


def test_shared_memory_is_seen_by_another_process():
    rnn = SRU(6, 4).share_memory()
    assert all(p.is_shared() for p in rnn.parameters())
    x, before = torch.randn(5, 3, 6), rnn.bias_l0.clone()
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=double_bias, args=(rnn,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not before.any()
    assert (rnn.bias_l0 == 2).all()
    assert rnn(x)[0].isfinite().all()


class Symmetric(nn.Module):
    def forward(self, a):
        return a - a.flip(0)


PARAMETRIZATIONS = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "own": lambda rnn, name: nn.utils.parametrize.register_parametrization(rnn, name, Symmetric()),
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrizations_act_on_the_weight(name):
    torch.manual_seed(0)
    rnn, x, plain = SRU(6, 4, 2), torch.randn(5, 3, 6), SRU(6, 4, 2)
    PARAMETRIZATIONS[name](rnn, "weight_l1")
    rnn.eval()  # spectral norm changes its estimate in each call in training
    plain.load_state_dict({n: getattr(rnn, n) for n in plain.state_dict()})
    torch.testing.assert_close(rnn(x), plain(x))
    rnn(x)[0].sum().backward()
    inner = [p for n, p in rnn.named_parameters() if "parametrizations" in n]
    assert inner
    assert all(p.grad.abs().sum() > 0 for p in inner)
    step = x[:1]
    with torch.no_grad():
        torch.testing.assert_close(rnn(step), plain(step))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dynamic_quantization_leaves_the_sru_as_it_is():
    if torch.backends.quantized.engine == "none":
        pytest.skip("this build of torch has no quantized engine")
    model = make_model()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, SRU}, dtype=torch.qint8)
    assert type(quantized.rnn) is SRU
    assert not isinstance(quantized.linear, nn.Linear)
    x, _ = batch()
    torch.testing.assert_close(quantized.rnn(x), model.rnn(x), rtol=0, atol=0)
    torch.testing.assert_close(quantized.linear(model.rnn(x)[0]), model.linear(model.rnn(x)[0]), rtol=0.1, atol=0.1)


def test_an_lstm_state_is_refused():
    x, state = torch.randn(5, 3, 6), torch.zeros(1, 3, 4)
    with pytest.raises(TypeError, match=r"c_0 must be a Tensor \(an SRU has one state, not LSTM's two\), got tuple"):
        SRU(6, 4)(x, (state, state))
    with pytest.raises(TypeError, match=r"c must be a Tensor \(an SRU has one state, not LSTM's two\), got tuple"):
        SRUCell(6, 4)(x[0], (state[0], state[0]))
    with pytest.raises(TypeError, match=r"c0 must be a Tensor \(an SRU has one state, not LSTM's two\), got tuple"):
        compat.SRU(6, 4, 1)(x, (state, state))
