"""Threads and processes of a user's program: many at once, forked, spawned, interrupted."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from cases import Case, run_and_grads
from torch.utils.data import DataLoader, Dataset

from numsru import SRU, sru_recurrence


def in_threads(count, work):
    """Run `work(i)` in as many threads, all at once. What one of them raises is raised here."""
    barrier, errors = threading.Barrier(count), []

    def run(i):
        try:
            barrier.wait()
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_eight_threads_at_once_get_the_bits_of_one():
    case = Case(L=300, B=8, H=40, D=2, padding="lengths", dtype=torch.float32)  # enough for a team of threads each
    alone = [run_and_grads(sru_recurrence, *case.make_inputs(seed)) for seed in range(8)]
    found = [None] * 8

    def work(i):
        for _ in range(5):
            found[i] = run_and_grads(sru_recurrence, *case.make_inputs(i))

    in_threads(8, work)
    for received, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(received, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("two_threads")
def test_one_module_serves_many_threads():
    rnn = SRU(16, 32, num_layers=2)
    inputs = [torch.randn(100, 4, 16) for _ in range(8)]
    expected = [rnn(x) for x in inputs]

    def work(i):
        for _ in range(10):
            torch.testing.assert_close(rnn(inputs[i]), expected[i], rtol=0, atol=0)

    in_threads(8, work)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_threads_run_than_torch_was_told(threads):
    code = f"""
import os, torch, numsru
torch.set_num_threads({threads})
rnn, x = numsru.SRU(64, 64), torch.randn(200, 16, 64, requires_grad=True)
torch.mm(torch.randn(512, 512), torch.randn(512, 512))  # torch starts its own
before = len(os.listdir("/proc/self/task"))
numsru.sru_recurrence(torch.randn(200, 16, 1, 3, 64), torch.randn(200, 16, 64))
rnn(x)[0].sum().backward()
print(len(os.listdir("/proc/self/task")) - before)
"""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 1  # the thread in which autograd runs backward


class Read(Dataset):
    """Sequences read by a module in the worker."""

    def __init__(self, used_before):
        torch.manual_seed(0)
        self.rnn, self.x = SRU(8, 16, num_layers=2), torch.randn(6, 50, 4, 8)
        if used_before:
            self.expected()

    def expected(self):
        with torch.no_grad():
            return torch.stack([self.rnn(x)[0] for x in self.x])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.rnn(self.x[i])[0]


@pytest.mark.parametrize("used_before", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_data_loader_run_modules(method, used_before):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    read = Read(used_before)
    loader = DataLoader(read, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120)
    torch.testing.assert_close(torch.stack(list(loader)), read.expected(), rtol=0, atol=0)


def test_an_error_in_backward_leaves_everything_usable():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("no gradient today")

    rnn, x = SRU(5, 7, num_layers=2), torch.randn(9, 3, 5)
    leaf = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="no gradient today"):
        rnn(Fails.apply(leaf))[0].sum().backward()
    rnn.zero_grad()
    received, expected = [], []
    for grads in (received, expected):
        leaf = x.clone().requires_grad_()
        rnn(leaf)[0].sum().backward()
        grads += [leaf.grad, *(p.grad.clone() for p in rnn.parameters())]
        rnn.zero_grad()
    torch.testing.assert_close(received, expected, rtol=0, atol=0)


START = """
import sys, torch, numsru
options = {"nonlinearity": "selu", "highway": False}
print("ready", flush=True)
rnn = numsru.SRU(24, 24, **options)
while True:
    x = torch.randn(2000, 8, 24, requires_grad=True)
    rnn(x)[0].sum().backward()
    print("step", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("steps", [0, 3], ids=["compiling", "computing"])
def test_ctrl_c_ends_the_program(tmp_path, steps):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}  # so that it has to compile
    process = subprocess.Popen(
        # A process started in the background ignores the signal, and hands that on.
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)" + START],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    for _ in range(steps):
        assert process.stdout.readline() == "step\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in error
    # What was interrupted has left nothing behind that a later process would stumble over.
    again = """
import torch
from numsru import SRU
rnn = SRU(24, 24, nonlinearity="selu", highway=False)
print(rnn(torch.ones(3, 2, 24))[0].shape)
"""
    result = subprocess.run([sys.executable, "-c", again], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "torch.Size([3, 2, 24])\n"


def test_processes_that_compile_at_once_agree(tmp_path):
    code = """
import torch, numsru
torch.manual_seed(0)
rnn, x = numsru.SRU(12, 12, nonlinearity="relu"), torch.randn(9, 2, 12, requires_grad=True)
output, _ = rnn(x)
(grad,) = torch.autograd.grad(output.sum(), x)
print(float(output.double().sum()), float(grad.double().sum()))
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len(set(results)) == 1
    assert results[0]
