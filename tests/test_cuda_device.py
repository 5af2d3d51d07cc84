"""numsru on a GPU as its users run it: graphs, streams, devices, dtypes. The kernels alone: test_cuda_kernels.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import numsru
from numsru import SRU

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

MODELS = {
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "version 2": {"version": 2, "num_layers": 2},
    "other sizes": {"hidden_size": 24, "layer_norm": "post"},
}
models = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


def make(options, dtype=torch.float32, device="cuda"):
    torch.manual_seed(0)
    rnn = SRU(16, **({"hidden_size": 16} | options))
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.normal_(std=0.3)
    return rnn.to(device, dtype)


def run(rnn, x, grad):
    """Output, final state, and the gradients of the input and of all parameters."""
    x = x.detach().requires_grad_()
    output, c_n = rnn(x)
    grads = torch.autograd.grad([output, c_n], [x, *rnn.parameters()], [grad, torch.ones_like(c_n)])
    return [output, c_n, *grads]


def inputs(rnn, dtype=torch.float32, L=19, B=3):
    width = rnn.hidden_size * rnn.num_directions
    return (torch.randn(*shape, device="cuda").to(dtype) for shape in ((L, B, 16), (L, B, width)))


@models
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)],
)
def test_layers_match_the_cpu_in_float64(options, dtype, tolerance):
    rnn = make(options, dtype)
    x, grad = inputs(rnn, dtype)
    exact = run(make(options, dtype, "cpu").double(), x.cpu().double(), grad.cpu().double())
    for a, b in zip(run(rnn, x, grad), exact, strict=True):
        assert (a.cpu().double() - b).abs().max() <= tolerance * b.abs().max()


@models
def test_results_repeat_their_bits(options):
    rnn = make(options)
    x, grad = inputs(rnn, L=300)
    first = run(rnn, x, grad)
    for _ in range(100):
        for a, b in zip(run(rnn, x, grad), first, strict=True):
            assert torch.equal(a, b)


def test_memory_stays_flat_over_steps_of_changing_shapes_and_streams():
    rnn = make({"num_layers": 2})
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()

    def train(steps):
        for i in range(steps):
            with torch.cuda.stream(streams[i % 3]):
                run(rnn, *inputs(rnn, L=1 + i % 37, B=1 + i % 5))
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = train(600)  # every shape on every stream
    assert train(10_000) == before


def capture(call):
    """A graph of a call, and what the call returned."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # torch allocates its workspaces
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    return graph, results


@models
def test_forward_replays_from_a_graph(options):
    rnn = make(options)
    static, _ = inputs(rnn)
    with torch.no_grad():
        numsru.warmup(rnn, static)
        graph, (output, c_n) = capture(lambda: rnn(static))
        for _ in range(3):
            x = torch.randn_like(static)
            static.copy_(x)
            graph.replay()
            for a, b in zip((output, c_n), rnn(x), strict=True):
                assert torch.equal(a, b)


@models
def test_training_step_replays_from_a_graph(options):
    rnn = make(options)
    static_x, static_grad = inputs(rnn)
    numsru.warmup(rnn, static_x)
    graph, captured = capture(lambda: run(rnn, static_x, static_grad))
    for _ in range(3):
        x, grad = inputs(rnn)
        static_x.copy_(x)
        static_grad.copy_(grad)
        graph.replay()
        for a, b in zip(captured, run(rnn, x, grad), strict=True):
            assert torch.equal(a, b)


@models
def test_make_graphed_callables_takes_the_module(options):
    rnn, plain = make(options), make(options)
    x, grad = inputs(rnn)
    graphed = torch.cuda.make_graphed_callables(rnn, (x.clone().requires_grad_(),))
    for _ in range(3):
        x, grad = inputs(rnn)
        found, expected = [], []
        for module, results in ((graphed, found), (plain, expected)):
            leaf = x.clone().requires_grad_()
            output, c_n = module(leaf)
            ((output * grad).sum() + c_n.sum()).backward()
            results += [output.clone(), c_n.clone(), leaf.grad, *(p.grad.clone() for p in module.parameters())]
            module.zero_grad()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_capture_of_a_kernel_that_is_not_compiled_is_refused():
    rnn = SRU(5, 7, nonlinearity="selu", highway=False, device="cuda")  # options that no other test has compiled
    x = torch.randn(4, 2, 5, device="cuda")
    torch.nn.functional.linear(x, x[0])  # torch's own workspaces
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"numsru\.warmup"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        rnn(x)
    torch.cuda.synchronize()
    assert rnn(x)[0].shape == (4, 2, 7)


def test_work_follows_the_current_stream():
    rnn = make({})
    x, grad = inputs(rnn, L=2000)
    expected = run(rnn, x, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # a launch on another stream would run before x is there
        late = torch.zeros_like(x).copy_(x)
        found = run(rnn, late, grad)
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_tensors_on_another_device_than_the_current_one():
    rnn = make({})
    x, grad = inputs(rnn)
    expected = run(rnn, x, grad)
    found = run(rnn.to("cuda:1"), x.to("cuda:1"), grad.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_products_their_dtype(dtype):
    rnn = make({"num_layers": 2})
    x, _ = inputs(rnn)
    with torch.autocast("cuda", dtype):
        output, c_n = rnn(x)
    assert (output.dtype, c_n.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(output.float(), rnn(x)[0], rtol=0.1, atol=0.1)


def test_lengths_on_the_host_and_on_the_device_agree():
    rnn = make({"num_layers": 2, "bidirectional": True})
    x, _ = inputs(rnn)
    lengths = torch.tensor([19, 1, 7])
    for a, b in zip(rnn(x, lengths=lengths), rnn(x, lengths=lengths.cuda()), strict=True):
        torch.testing.assert_close(a, b)


def test_few_long_sequences_match_the_cpu():
    rnn = make({})
    x, grad = inputs(rnn, L=5000, B=1)  # time is shared out between blocks
    exact = run(make({}, device="cpu").double(), x.cpu().double(), grad.cpu().double())
    for a, b in zip(run(rnn, x, grad), exact, strict=True):
        assert (a.cpu().double() - b).abs().max() <= 1e-4 * b.abs().max()


@models
@pytest.mark.filterwarnings("default")  # from inside torch: its compilers import what they deprecate
def test_a_compiled_module_matches_eager(options):
    pytest.importorskip("triton", reason="torch.compile makes kernels for a GPU by Triton")
    rnn = make(options)
    compiled = torch.compile(rnn, fullgraph=True, dynamic=True)
    for L, B in ((19, 3), (40, 5)):
        x, grad = inputs(rnn, L=L, B=B)
        for a, b in zip(run(compiled, x, grad), run(rnn, x, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for a, b in zip(compiled(x), rnn(x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


ON_DISK = """
import torch, numsru
from numba.cuda import dispatcher

compiled, compile_kernel = [], dispatcher._Kernel.__init__

def count(self, *args, **options):
    compiled.append(self)
    compile_kernel(self, *args, **options)

dispatcher._Kernel.__init__ = count
torch.manual_seed(0)
shapes = (9, 3, 1, 3, 8), (9, 3, 8), (1, 2, 8)
u, x, bias = (torch.randn(*shape, device="cuda", requires_grad=True) for shape in shapes)
h, c_n = numsru.sru_recurrence(u, x, bias)
grads = torch.autograd.grad(h.sum() + c_n.sum(), (u, x, bias))
print(len(compiled), [a.double().sum().item() for a in (h, c_n, *grads)])
"""


def test_next_process_runs_the_kernels_that_were_kept_on_disk(tmp_path):
    command, environment = [sys.executable, "-c", ON_DISK], os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    printed = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split(maxsplit=1)
        for _ in range(2)
    ]
    assert [compiled for compiled, _ in printed] == ["2", "0"]
    assert printed[0][1] == printed[1][1]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer, which is part of the CUDA toolkit")
    command = [
        *("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"),
        *("--report-api-errors", "no", sys.executable, "-m", "pytest", "-q", "-m", "gpu"),
        *("-k", "chosen_tiles", "-o", "filterwarnings=default"),
        str(Path(__file__).with_name("test_cuda_kernels.py")),
    ]
    # Without torch's own allocator, which would hide what reaches beyond an array.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout
