"""The CPU kernels against the float64 reference; threads; accuracy of the float32 functions; vectorisation."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import (
    TOLERANCE_OF_16_BITS,
    Case,
    assert_16_bits_match_reference,
    assert_matches_reference,
    padding_of,
    run_and_grads,
)
from cpu_without_compiler import Memory, without_compiler  # noqa: F401  (a fixture)
from numba import cfunc, njit

from numsru import cpu_kernels, recurrence, sru_recurrence
from numsru.cpu_kernels import Launch
from numsru.recurrence import Options

CASES = [
    Case(),
    Case(L=1, H=1),
    Case(L=0),
    Case(B=0),
    Case(c_0=False),
    Case(L=63, B=2, H=33),
    Case(nonlinearity="identity"),
    Case(nonlinearity="relu"),
    Case(nonlinearity="selu"),
    Case(highway="none"),
    Case(highway="projected"),
    Case(scale_x=1.7),
    Case(D=2, L=0),
    Case(D=2, H=1),
    Case(D=2, highway="projected", nonlinearity="selu", scale_x=0.7),
    Case(D=2, highway="none", mask_c=True),
    Case(mask_c=True),
    Case(mask_c=True, placement="highway", scale_x=0.6),
    Case(mask_c=True, placement="highway", highway="projected"),
    Case(padding="lengths"),
    Case(padding="mask"),
    Case(padding="packed"),
    Case(L=0, padding="packed"),
    Case(B=0, padding="packed"),
    Case(D=2, B=5, padding="packed", mask_c=True, highway="projected"),
    Case(D=2, B=4, padding="packed", version=2, scale_x=1.2, c_0=False),
    Case(D=2, padding="lengths", mask_c=True, scale_x=1.2),
    Case(D=2, padding="mask", highway="projected"),
    Case(version=2, nonlinearity="identity"),
    Case(version=2, D=2, padding="lengths", highway="projected"),
    Case(version=2, D=2, padding="mask", highway="none", mask_c=True),
    Case(version=2, mask_c=True, placement="highway", scale_x=1.3, c_0=False),
    Case(L=63, B=2, H=33, dtype=torch.float32),
    Case(L=200, H=70, D=2, padding="lengths", mask_c=True, dtype=torch.float32),
    Case(L=31, H=19, version=2, highway="projected", nonlinearity="selu", dtype=torch.float32),
    Case(L=31, H=19, D=2, nonlinearity="relu", padding="mask", dtype=torch.float32),
    Case(L=19, H=16),
    Case(L=17, H=37, D=2, padding="lengths", mask_c=True, highway="projected"),
    Case(L=17, H=35, D=2, padding="mask", version=2),
    Case(L=25, H=18, D=2, B=4, padding="packed", version=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_the_float64_reference(case):
    assert_matches_reference(sru_recurrence, case)


SHORT = [case for case in CASES if case.L < 100]


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_kernels_as_plain_python_match_the_float64_reference(case):
    assert_matches_reference(sru_recurrence, case)


OF_16_BITS = [
    Case(L=19, H=33),
    Case(L=19, H=5, D=2, padding="lengths", mask_c=True, scale_x=1.2),
    Case(L=19, H=20, D=2, padding="mask", highway="projected", nonlinearity="selu"),
    Case(L=19, H=20, padding="packed", version=2, nonlinearity="tanh"),
    Case(L=9, H=16, highway="none", nonlinearity="relu", c_0=False),
]


@pytest.mark.parametrize("dtype", TOLERANCE_OF_16_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", OF_16_BITS, ids=str)
def test_16_bits_match_the_float64_reference_of_the_same_inputs(case, dtype):
    assert_16_bits_match_reference(sru_recurrence, case, dtype)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("dtype", TOLERANCE_OF_16_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", OF_16_BITS, ids=str)
def test_16_bits_as_plain_python_match_the_float64_reference(case, dtype):
    assert_16_bits_match_reference(sru_recurrence, case, dtype)


def _touch_plain_memory(*accesses):
    """Store to an array of four float32 numbers: tuples of task, index, scope and dtype, one after the other."""
    memory = Memory()
    array = memory.remember(torch.zeros(4))

    def run():
        memory.thread.words = 0
        for task, index, scope, dtype in accesses:
            memory.thread.task = task
            memory.store(array.data_ptr(), index, 1, dtype, scope)

    memory.launch(run)
    return array.tolist()


def test_plain_python_passes_tasks_that_share_nothing():
    assert _touch_plain_memory((0, 0, 1, np.float32), (0, 0, 1, np.float32), (1, 3, 2, np.float32)) == [1, 0, 0, 1]


@pytest.mark.parametrize("access", [(0, 4, 1, np.float32), (0, -1, 1, np.float32), (0, 2, 1, np.float64)])
def test_plain_python_refuses_what_is_outside_of_arrays(access):
    with pytest.raises(IndexError, match="no array has an element"):
        _touch_plain_memory(access)


@pytest.mark.parametrize("other", [(1, 2, 1, np.float32), (0, 2, 2, np.float32)], ids=["task", "scope"])
def test_plain_python_refuses_what_two_tasks_or_scopes_share(other):
    with pytest.raises(AssertionError, match="several tasks or under several scopes"):
        _touch_plain_memory((0, 2, 1, np.float32), other)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("case", [case for case in SHORT if case.padding in ("lengths", "mask")], ids=str)
def test_gradients_of_padding_as_plain_python_are_zero_whatever_comes_from_behind(case):
    inputs, grads = case.make_inputs()
    grads["grad_c_n"].fill_(float("nan"))
    results = run_and_grads(sru_recurrence, inputs, grads)
    padding = padding_of(inputs)
    assert padding.any()
    for name in ("grad_u", "grad_x"):
        assert name not in results or not results[name][padding].any(), name


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize(
    "case", [case for case in SHORT if case.padding in ("lengths", "packed") and case.B > 1], ids=str
)
def test_nothing_of_an_empty_sequence_as_plain_python_reaches_the_parameters(case):
    inputs, grads = case.make_inputs()
    grads["grad_c_n"][1] = float("nan")  # the second sequence of every case is empty
    results = run_and_grads(sru_recurrence, inputs, grads)
    assert all(results[name].isfinite().all() for name in ("grad_bias", "grad_weight_c") if name in results)


def _with_threads(monkeypatch, threads, case):
    monkeypatch.setattr(cpu_kernels, "_ELEMENTS_PER_THREAD", 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return run_and_grads(sru_recurrence, *case.make_inputs())
    finally:
        torch.set_num_threads(before)


THREADED = [
    Case(L=9, B=5, H=200, dtype=torch.float32),
    Case(L=9, B=1, H=700, dtype=torch.float32),
    Case(L=9, B=1, D=2, H=131, version=2, padding="lengths", dtype=torch.float32),
]


@pytest.mark.parametrize("case", THREADED, ids=str)
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_results_have_the_same_bits_for_any_number_of_threads(monkeypatch, case, threads):
    one, many = _with_threads(monkeypatch, 1, case), _with_threads(monkeypatch, threads, case)
    torch.testing.assert_close(many, one, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("threads", "launch", "padding", "expected"),
    [
        (1, Launch(0, 99, 99, 32, 1, 512, 0, 1), recurrence.NO_PADDING, (1, 1, 32, 512)),
        (2, Launch(0, 8, 8, 8, 1, 512, 0, 1), recurrence.NO_PADDING, (2, 2, 4, 512)),
        (2, Launch(0, 8, 8, 8, 1, 511, 0, 1), recurrence.NO_PADDING, (1, 1, 8, 511)),  # a little too small
        (4, Launch(92, 100, 100, 8, 2, 256, 0, 2), recurrence.NO_PADDING, (2, 2, 8, 256)),
        (4, Launch(92, 100, 100, 9, 2, 512, 1, 1), recurrence.NO_PADDING, (2, 2, 5, 512)),
        (4, Launch(0, 64, 50, 32, 1, 512, 0, 1), recurrence.PACKED, (2, 2, 16, 512)),
        (4, Launch(0, 64, 50, 32, 1, 512, 0, 1), recurrence.LENGTHS, (4, 4, 8, 512)),
        (7, Launch(0, 999, 999, 9, 1, 100, 0, 1), recurrence.NO_PADDING, (7, 5, 2, 100)),
        (7, Launch(0, 999, 999, 3, 1, 100, 0, 1), recurrence.NO_PADDING, (7, 6, 1, 64)),
        (4, Launch(0, 999, 999, 1, 1, 512, 0, 1), recurrence.NO_PADDING, (4, 4, 1, 128)),
    ],
)
def test_work_is_shared_out(threads, launch, padding, expected):
    assert cpu_kernels._tasks(launch, padding, threads) == expected


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize(
    "case",
    [
        Case(L=9, B=4, H=3, D=2, padding="mask", version=2),
        Case(L=9, B=4, H=3, D=2, padding="packed", mask_c=True),
        Case(L=9, B=1, H=40, version=2, highway="projected"),
        Case(L=9, B=2, H=40, padding="lengths", mask_c=True),
        Case(L=9, B=2, H=40, padding="packed", version=2),
        Case(L=9, B=2, H=40, padding="mask", highway="projected"),
    ],
    ids=str,
)
def test_tasks_as_plain_python_share_nothing(monkeypatch, case, threads):
    one, many = _with_threads(monkeypatch, 1, case), _with_threads(monkeypatch, threads, case)
    torch.testing.assert_close(many, one, rtol=0, atol=0)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("padding", ["none", "lengths", "mask", "packed"])
@pytest.mark.parametrize("bytes_of_u", [1, 3000, 20_000])
def test_inference_in_pieces_as_plain_python_matches_the_whole(monkeypatch, padding, bytes_of_u):
    case = Case(L=13, B=4, D=2, padding=padding)
    inputs, _ = case.make_inputs()
    x, bias, c_0 = (inputs[name].detach() for name in ("x", "bias", "c_0"))
    kind, valid = {
        "none": (recurrence.NO_PADDING, None),
        "lengths": (recurrence.LENGTHS, inputs.get("lengths")),
        "mask": (recurrence.MASK, inputs.get("mask_pad")),
        "packed": (recurrence.PACKED, inputs.get("cu_seqlens")),
    }[padding]
    weight = torch.randn(case.D * 3 * case.H, x.shape[-1], dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    options = Options(padding=kind, has_c_0=True)
    u = (x @ weight.t()).view(*x.shape[:-1], case.D, 3, case.H)
    h, c_n, _ = cpu_kernels.forward(options, u, x, bias, None, c_0, None, valid, 1.3, case.L, case.B)
    monkeypatch.setattr(cpu_kernels, "_BYTES_AT_A_TIME", bytes_of_u)
    received = cpu_kernels.layer_forward(
        options, x, weight, x, bias, None, c_0, None, valid, 1.3, case.L, case.B, case.D
    )
    torch.testing.assert_close(received, (h, c_n), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(cpu_kernels._start_team is None, reason="torch was built without OpenMP")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_kernels_run_on_as_many_of_torchs_threads_as_torch_has(monkeypatch, threads):
    start, teams = cpu_kernels._start_team, []
    monkeypatch.setattr(cpu_kernels, "_start_team", lambda *args: teams.append(args[2]) or start(*args))
    _with_threads(monkeypatch, threads, THREADED[0])
    assert teams == ([] if threads == 1 else [threads] * 2)  # forward and backward


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_python_threads_serve_where_torch_has_no_openmp(monkeypatch, case):
    one = _with_threads(monkeypatch, 1, case)
    monkeypatch.setattr(cpu_kernels, "_start_team", None)
    torch.testing.assert_close(_with_threads(monkeypatch, 3, case), one, rtol=0, atol=0)


def _evaluate(function, x):
    @njit(error_model="numpy", fastmath={"contract"})
    def run(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    y = np.empty_like(x)
    run(x, y)
    return y


@pytest.mark.parametrize(
    ("function", "exact"),
    [(recurrence.sigmoid, lambda x: 1 / (1 + np.exp(-x))), (recurrence.tanh, np.tanh)],
    ids=["sigmoid", "tanh"],
)
def test_float32_function_is_accurate_to_3e_7(function, exact):
    x = np.concatenate([np.linspace(-30, 30, 1_000_001), np.linspace(-1e-3, 1e-3, 1001)]).astype(np.float32)
    assert np.abs(_evaluate(function, x) - exact(x.astype(np.float64))).max() <= 3e-7


def test_float32_tanh_is_accurate_relative_to_small_values():
    x = np.geomspace(1e-30, 1, 100_000).astype(np.float32)
    exact = np.tanh(x.astype(np.float64))
    assert (np.abs(_evaluate(recurrence.tanh, x) - exact) / exact).max() <= 1e-6


def test_float32_selu_is_accurate_relative_to_small_values():
    x = -np.geomspace(1e-30, 1, 100_000).astype(np.float32)
    exact = recurrence.SELU_SCALE * recurrence.SELU_ALPHA * np.expm1(x.astype(np.float64))

    def selu(x):
        return recurrence.activate(x, recurrence.SELU)

    received = _evaluate(njit(selu), x)
    assert (np.abs(received - exact) / np.abs(exact)).max() <= 1e-6


def test_float32_exp_is_accurate_to_3_units_in_the_last_place():
    x = np.linspace(-87, 87, 1_000_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(_evaluate(recurrence.exp, x) - exact) / exact).max() <= 3 * 2.0**-24 * 2


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_sigmoid_has_its_limits(real):
    x = np.array([-np.inf, -1e4, 1e4, np.inf, np.nan], real)
    np.testing.assert_allclose(_evaluate(recurrence.sigmoid, x), [0, 0, 1, 1, np.nan], atol=1e-37)


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_tanh_has_its_limits(real):
    x = np.array([-np.inf, -1e4, 1e4, np.inf, np.nan], real)
    np.testing.assert_allclose(_evaluate(recurrence.tanh, x), [-1, -1, 1, 1, np.nan], atol=3e-7)


LIBRARY_CALL = re.compile(r"\b(expf?|tanhf?)\b")


def _assembly(monkeypatch, kernel, options, storage):
    """Of a kernel compiled here: one that is loaded from disk does not show it."""
    compiled = []

    def keep(*args, cache=False, **kwargs):
        return lambda function: compiled.append(cfunc(*args, **kwargs)(function)) or compiled[0]

    monkeypatch.setattr(cpu_kernels, "cfunc", keep)
    kernel.__wrapped__(options, storage)
    return compiled[0]._library.get_asm_str()


KERNELS = pytest.mark.parametrize(
    "kernel", [cpu_kernels._forward_kernel, cpu_kernels._backward_kernel], ids=["forward", "backward"]
)


@pytest.mark.parametrize("version", [1, 2])
@KERNELS
def test_float32_kernel_divides_vectors(monkeypatch, kernel, version):
    assembly = _assembly(monkeypatch, kernel, Options(version=version, save_c=True), np.float32)
    if not re.search(r"[xyz]mm\d|\bv\d+\.4s", assembly):
        pytest.skip("neither x86 nor ARM assembly")
    assert re.search(r"\bv?divps\b|\bfdiv\s+v\d+\.4s", assembly)
    assert not LIBRARY_CALL.search(assembly)


def test_library_calls_are_seen_in_assembly(monkeypatch):
    assembly = _assembly(monkeypatch, cpu_kernels._forward_kernel, Options(save_c=True), np.float64)
    assert LIBRARY_CALL.search(assembly)


ON_DISK = """
import sys, numba
numba.config.CACHE_DIR = sys.argv[1]
import torch, numsru
rnn = numsru.SRU(4, 4)
output, _ = rnn(torch.ones(2, 1, 4))
output.sum().backward()
print(sum(p.grad.sum().item() for p in rnn.parameters()) != 0)
"""


def _run_with_cache(folder):
    command = [sys.executable, "-c", ON_DISK, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def test_compiled_kernels_are_kept_on_disk(tmp_path):
    assert _run_with_cache(tmp_path) == "True"
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert len(kept) == 2  # forward and backward
    assert _run_with_cache(tmp_path) == "True"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} == kept


def test_cache_folder_need_not_be_writable(tmp_path):
    (tmp_path / "file").touch()
    assert _run_with_cache(tmp_path / "file") == "True"
