"""The CUDA kernels against the float64 reference: simulated, emulated, or on a device."""

import json
from pathlib import Path

import pytest
import torch
from cases import (
    TOLERANCE,
    TOLERANCE_OF_16_BITS,
    Case,
    assert_16_bits_match_reference,
    assert_agrees,
    assert_matches_reference,
    padding_of,
    run_and_grads,
    to_float64,
)
from cuda_without_gpu import emulate, simulate, why_not

from numsru import autograd, cuda_kernels, cuda_launch, recurrence, reference, sru_recurrence
from numsru.cuda_kernels import STORAGE, Tile
from numsru.recurrence import Options

SIMULATOR, EMULATOR, DEVICE = "simulator", "emulator", pytest.param("device", marks=pytest.mark.gpu)


def _on_device(**inputs):
    outputs = sru_recurrence(**{n: a.cuda() if isinstance(a, torch.Tensor) else a for n, a in inputs.items()})
    return tuple(a.cpu() for a in outputs)


@pytest.fixture
def run(request, monkeypatch):
    """`sru_recurrence` on CPU tensors, computed by the CUDA kernels."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    if request.param == "device":
        return _on_device
    monkeypatch.setattr(autograd, "_kernels", lambda device_type: cuda_kernels)
    monkeypatch.setattr(cuda_launch, "launch", simulate if request.param == SIMULATOR else emulate)
    return sru_recurrence


def on(*where):
    return pytest.mark.parametrize("run", where, indirect=True)


def tiled(cases):
    ids = ["x".join(map(str, tile)) + f"-{case}" for tile, case in cases]
    return pytest.mark.parametrize(("tile", "case"), cases, ids=ids)


@pytest.fixture
def set_tile(monkeypatch):
    def set_tile(tile):
        monkeypatch.setattr(cuda_kernels, "choose_tile", lambda *_: tile)

    return set_tile


@pytest.fixture(autouse=True)
def _plan_anew():
    """Plans are kept; these tests change what they are made of."""
    cuda_kernels._plan.cache_clear()
    yield
    cuda_kernels._plan.cache_clear()


# Options that occur in several tests, so that the emulator compiles them once.
LENGTHS = (Tile(4, 2, 2), Case(L=9, D=2, padding="lengths", mask_c=True, scale_x=1.3))
MASK = (Tile(3, 4, 3), Case(L=30, D=2, H=3, padding="mask", highway="projected", nonlinearity="selu", scale_x=0.7))
PACKED = (Tile(4, 2, 2), Case(L=9, B=4, D=2, padding="packed", mask_c=True, highway="projected"))
VERSION_2 = (
    Tile(4, 1, 2),
    Case(version=2, D=2, padding="lengths", mask_c=True, highway="projected", nonlinearity="tanh"),
)

SMALL = [
    LENGTHS,
    MASK,
    PACKED,
    VERSION_2,
    (Tile(4, 1, 2), Case()),
    (Tile(4, 1, 1), Case(L=3, highway="none", c_0=False)),
    (Tile(4, 2, 2), Case(L=8, H=4, B=1, c_0=False)),
    (Tile(4, 2, 2), Case(L=0, D=2)),
    (Tile(4, 2, 2), Case(B=0)),
    (Tile(4, 2, 2), Case(L=1, B=1, H=1)),
    (Tile(4, 4, 1), Case(L=13, H=1, nonlinearity="relu", mask_c=True)),
    (Tile(4, 2, 3), Case(L=13, D=2, padding="mask", scale_x=0.7, dtype=torch.float32)),
    (Tile(4, 2, 2), Case(nonlinearity="identity", mask_c=True, placement="highway", scale_x=0.6, padding="mask")),
    (Tile(4, 2, 2), Case(L=10, D=2, highway="none", nonlinearity="relu", mask_c=True, placement="highway")),
    (Tile(4, 1, 2), Case(D=2, padding="lengths", highway="projected", mask_c=True, placement="highway")),
    (Tile(7, 1, 2), Case(L=5, B=5, padding="packed", scale_x=1.3, dtype=torch.float32)),
    (Tile(4, 2, 2), Case(L=0, padding="packed")),
    (Tile(4, 2, 2), Case(L=0, padding="lengths")),
    (Tile(4, 2, 2), Case(B=0, padding="packed")),
    (Tile(4, 1, 2), Case(version=2, nonlinearity="identity")),
    (Tile(4, 1, 2), Case(version=2, B=4, D=2, padding="packed", scale_x=1.2, c_0=False)),
    (Tile(4, 1, 3), Case(version=2, D=2, padding="mask", highway="none", nonlinearity="relu", mask_c=True)),
    (Tile(4, 1, 2), Case(version=2, mask_c=True, placement="highway", scale_x=1.2, c_0=False, nonlinearity="selu")),
    (Tile(4, 1, 2), Case(version=2, L=0, D=2)),
    (Tile(4, 1, 4), Case(version=2, L=1, B=1, H=1, dtype=torch.float32)),
]


@on(SIMULATOR, DEVICE)
@tiled(SMALL)
def test_small_tiles_match_the_float64_reference(run, set_tile, tile, case):
    set_tile(tile)
    assert_matches_reference(run, case)


@on(EMULATOR)
@tiled([LENGTHS, MASK, PACKED, VERSION_2])
def test_odd_widths_match_the_float64_reference(run, set_tile, tile, case):
    set_tile(tile)
    assert_matches_reference(run, case)


CHUNKED = [
    (1, Case(L=1, B=1, H=1)),
    (1, Case(L=0, D=2)),
    (1, Case(B=0)),
    (1, Case(L=20, H=45)),
    (1, Case(L=17, D=2, H=33, padding="lengths", highway="projected", mask_c=True, dtype=torch.float32)),
    (2, Case(L=9, H=1, highway="none", nonlinearity="relu", c_0=False)),
    (2, Case(L=40, nonlinearity="identity", padding="mask", mask_c=True, placement="highway", scale_x=0.6)),
    (4, Case(L=32, B=1, H=32, nonlinearity="selu", highway="projected", dtype=torch.float32)),
    (4, Case(L=70, D=2, highway="none", nonlinearity="relu", padding="packed", mask_c=True, placement="highway")),
    (8, Case(L=150, D=2, padding="mask", mask_c=True, scale_x=1.3)),
    (8, Case(L=300, B=2, H=19, padding="lengths", dtype=torch.float32)),
    (1, Case(version=2, L=20, H=45, nonlinearity="identity")),
    (1, Case(version=2, L=0, D=2, nonlinearity="identity")),
    (1, Case(version=2, L=11, D=2, padding="mask", highway="none", nonlinearity="relu", mask_c=True)),
    (
        1,
        Case(
            version=2, L=23, D=2, padding="packed", mask_c=True, placement="highway", scale_x=1.2, c_0=False,
            nonlinearity="selu", dtype=torch.float32,
        ),
    ),
]  # fmt: skip


@on(EMULATOR, DEVICE)
@pytest.mark.parametrize(("chunks", "case"), CHUNKED, ids=lambda value: str(value))
def test_chosen_tiles_match_the_float64_reference(run, monkeypatch, chunks, case):
    columns = case.B * case.D * case.H
    monkeypatch.setattr(cuda_kernels, "_WANTED_COLUMNS", chunks * max(1, columns))  # as if so many columns filled a GPU
    options, storage = Options(version=case.version), STORAGE[case.dtype]
    tile = cuda_kernels.choose_tile(False, options, storage, case.L, columns, lanes=1)
    assert tile.chunks == chunks
    assert_matches_reference(run, case)


@on(SIMULATOR, EMULATOR, DEVICE)
@pytest.mark.parametrize("dtype", TOLERANCE_OF_16_BITS, ids=["bfloat16", "float16"])
@tiled(
    [
        (Tile(4, 2, 2), Case(L=9, D=2, padding="lengths", mask_c=True, scale_x=1.3)),
        (Tile(4, 2, 2, lanes=2), Case(L=9, H=6, D=2, padding="mask", highway="projected", nonlinearity="selu")),
        (Tile(4, 1, 2), Case(L=9, version=2, padding="packed", nonlinearity="tanh")),
    ]
)
def test_16_bits_match_the_float64_reference_of_the_same_inputs(run, set_tile, tile, case, dtype):
    set_tile(tile)
    assert_16_bits_match_reference(run, case, dtype)


@on(EMULATOR, DEVICE)
@pytest.mark.parametrize("dtype", TOLERANCE_OF_16_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "case", [Case(L=40, H=64), Case(L=40, H=33), Case(L=40, H=32, version=2, D=2, padding="lengths")], ids=str
)
def test_16_bits_in_chosen_tiles_match_the_float64_reference(run, case, dtype):
    assert_16_bits_match_reference(run, case, dtype)


@on(SIMULATOR, EMULATOR, DEVICE)
@tiled(
    [
        (Tile(4, 2, 2, lanes=2), Case(L=11, H=6, dtype=torch.float32)),
        (
            Tile(4, 2, 3, lanes=2),
            Case(L=11, H=4, D=2, padding="lengths", highway="projected", mask_c=True, dtype=torch.float32),
        ),
    ]
)
def test_pairs_match_the_float64_reference(run, set_tile, tile, case):
    set_tile(tile)
    assert_matches_reference(run, case)


@on(SIMULATOR, EMULATOR, DEVICE)
@pytest.mark.parametrize(
    ("forward", "backward", "case"),
    [
        (Tile(4, 4, 4, 1, 4), Tile(8, 1, 4), Case(L=39, D=2, padding="lengths", mask_c=True)),
        (Tile(4, 4, 4, 1, 2), Tile(4, 4, 2), Case(L=39, padding="packed", highway="projected")),
        (Tile(4, 2, 4, 2, 2), Tile(4, 4, 1, 2), Case(L=21, H=6, padding="mask", dtype=torch.float32)),
    ],
    ids=["four", "two", "two of pairs"],
)
def test_forward_keeps_several_states_of_a_tile(run, monkeypatch, forward, backward, case):
    monkeypatch.setattr(cuda_kernels, "choose_tile", lambda is_backward, *_: backward if is_backward else forward)
    assert_matches_reference(run, case)


@on(DEVICE)
@pytest.mark.parametrize(("dtype", "H"), [(torch.float32, 4096), (torch.bfloat16, 8192)], ids=["float32", "bfloat16"])
def test_tiles_of_long_sequences_match_the_float64_reference(run, dtype, H):
    case = Case(L=8192, B=1, H=H, c_0=False, dtype=torch.float32)
    if dtype == torch.float32:
        assert_matches_reference(run, case)
    else:
        assert_16_bits_match_reference(run, case, dtype)


@on(SIMULATOR, EMULATOR, DEVICE)
@pytest.mark.parametrize(
    ("case", "spans"),
    [
        (Case(L=41, B=2), 2),
        (Case(L=41, B=2, D=2, padding="lengths", mask_c=True, scale_x=1.2), 3),
        (Case(L=41, B=2, D=2, padding="lengths", mask_c=True, scale_x=1.2), 20),
        (Case(L=41, B=2, D=2, padding="mask", highway="projected", nonlinearity="selu", c_0=False), 3),
        (Case(L=40, B=1, H=6, highway="none", nonlinearity="identity", dtype=torch.float32), 20),
    ],
    ids=str,
)
def test_time_in_spans_matches_the_float64_reference(run, set_tile, monkeypatch, case, spans):
    set_tile(Tile(4, 2, 2))
    monkeypatch.setattr(cuda_kernels, "_SPLIT_STEPS", 1)
    monkeypatch.setattr(cuda_kernels, "_MOST_SPANS", spans)
    columns = case.B * case.D * case.H
    chosen = cuda_kernels._choose_spans(False, Options(), STORAGE[case.dtype], Tile(4, 2, 2), case.L, columns)[0]
    assert 1 < chosen <= spans
    assert_matches_reference(run, case)


@pytest.mark.parametrize(
    ("options", "dtype", "L", "columns", "split"),
    [
        (Options(), torch.float32, 1024, 512, True),
        (Options(), torch.bfloat16, 1024, 1024, True),
        (Options(), torch.float32, 1023, 512, False),
        (Options(), torch.float32, 1024, 513, False),
        (Options(), torch.bfloat16, 1024, 1025, False),
        (Options(padding=recurrence.PACKED), torch.float32, 1024, 64, False),
        (Options(version=2), torch.float32, 1024, 64, False),
    ],
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_time_is_split_for_few_columns_and_many_steps(backward, options, dtype, L, columns, split):
    tile = cuda_kernels.choose_tile(backward, options, STORAGE[dtype], L, columns, 1)
    spans, tiles = cuda_kernels._choose_spans(backward, options, STORAGE[dtype], tile, L, columns)
    assert (spans > 1) == split
    assert spans * tiles * tile.chunks * tile.steps >= L


@on(SIMULATOR, EMULATOR, DEVICE)
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
@tiled([LENGTHS, MASK, VERSION_2, (Tile(4, 1, 2), Case(version=2, D=2, padding="mask"))])
def test_padding_may_hold_anything(run, set_tile, tile, case, junk):
    set_tile(tile)
    inputs, grads = case.make_inputs()
    expected = run_and_grads(reference.sru_recurrence, to_float64(inputs), to_float64(grads))
    padding = padding_of(inputs)
    for a in (inputs["u"], inputs["x"], grads["grad_h"]):
        if a is not None:
            a.data[padding] = junk
    assert_agrees(run_and_grads(run, inputs, grads), expected, TOLERANCE[case.dtype])


@on(SIMULATOR, DEVICE)
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
@tiled([LENGTHS, MASK, VERSION_2, (Tile(4, 1, 2), Case(version=2, D=2, padding="mask"))])
def test_gradients_of_padding_are_zero_whatever_comes_from_behind(run, set_tile, tile, case, junk):
    set_tile(tile)
    inputs, grads = case.make_inputs()
    grads["grad_c_n"].fill_(junk)
    results = run_and_grads(run, inputs, grads)
    padding = padding_of(inputs)
    assert padding.any()
    for name in ("grad_u", "grad_x"):
        assert name not in results or not results[name][padding].any(), name


@on(SIMULATOR, EMULATOR, DEVICE)
@tiled([LENGTHS, PACKED, VERSION_2])
def test_nothing_of_an_empty_sequence_reaches_the_parameters(run, set_tile, tile, case):
    """As where a loss divides by its length, 0. The second sequence of every case is empty."""
    set_tile(tile)
    inputs, grads = case.make_inputs()
    grads["grad_c_n"][1] = float("nan")
    expected = run_and_grads(reference.sru_recurrence, inputs, grads)
    assert expected["grad_bias"].isfinite().all()
    received = run_and_grads(run, inputs, grads)
    assert received["grad_c_0"][1].isnan().all()
    for results in (expected, received):
        results["grad_c_0"][1] = 0
    assert_agrees(received, expected, TOLERANCE[case.dtype])


@on(SIMULATOR, DEVICE)
@pytest.mark.parametrize("padding", ["none", "packed"])
def test_layer_without_gradients_matches_its_parts(run, set_tile, padding):
    set_tile(Tile(4, 2, 2))
    case = Case(B=2, D=2, H=3, padding=padding)
    inputs, _ = case.make_inputs()
    x, bias, c_0 = (inputs[name].detach() for name in ("x", "bias", "c_0"))
    weight = torch.randn(case.D * 3 * case.H, x.shape[-1], dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    device = "cuda" if run is _on_device else "cpu"
    with torch.no_grad():
        layer = autograd.sru_layer(
            *(a.to(device) for a in (x, weight, x, bias, c_0)), directions=case.D, parts=3,
            cu_seqlens=inputs["cu_seqlens"].to(device) if padding == "packed" else None,
        )  # fmt: skip
    u = (x @ weight.t()).view(*x.shape[:-1], case.D, 3, case.H)
    expected = reference.sru_recurrence(u, x, bias, c_0, cu_seqlens=inputs.get("cu_seqlens"))
    torch.testing.assert_close(tuple(a.cpu() for a in layer), expected, rtol=1e-12, atol=1e-12)


@on(SIMULATOR, EMULATOR, DEVICE)
@tiled([LENGTHS])
def test_results_repeat_their_bits(run, set_tile, tile, case):
    set_tile(tile)
    first, second = (run_and_grads(run, *case.make_inputs()) for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@on(SIMULATOR, EMULATOR, DEVICE)
@tiled([LENGTHS, VERSION_2])
def test_outputs_are_the_same_without_gradients(run, set_tile, tile, case):
    set_tile(tile)
    inputs, _ = case.make_inputs()
    with_gradients = run(**inputs)
    with torch.no_grad():
        torch.testing.assert_close(run(**inputs), with_gradients, rtol=0, atol=0)


@on(SIMULATOR, EMULATOR, DEVICE)
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("pieces", [(1, 5, 3), (4, 0, 5)], ids=str)
@pytest.mark.parametrize(
    ("tile", "case"),
    [(Tile(4, 2, 2), Case(L=9, c_0=False)), (Tile(4, 1, 2), Case(L=9, version=2, c_0=False))],
    ids=["1", "2"],
)
def test_a_sequence_in_pieces_is_the_whole_to_rounding(run, set_tile, tile, case, pieces, dtype, rounding):
    set_tile(tile)
    inputs, _ = case._replace(dtype=dtype).make_inputs()
    with torch.no_grad():
        whole = run(**inputs)
        parts, c = [], None
        for u, x in zip(inputs["u"].split(pieces), inputs["x"].split(pieces), strict=True):
            part, c = run(**(inputs | {"u": u, "x": x, "c_0": c}))
            parts.append(part)
    for received, expected in zip((torch.cat(parts), c), whole, strict=True):
        assert (received - expected).abs().max() <= rounding * expected.abs().max()


def _gradients_of_sums(function, inputs):
    h, c_n = function(**inputs)
    return torch.autograd.grad(h.sum() + c_n.sum(), [inputs["u"], inputs["x"], inputs["bias"], inputs["c_0"]])


@on(SIMULATOR, EMULATOR, DEVICE)
@tiled([LENGTHS])
def test_gradients_of_outputs_need_not_be_contiguous(run, set_tile, tile, case):
    set_tile(tile)
    inputs, _ = case.make_inputs()
    expected = _gradients_of_sums(reference.sru_recurrence, inputs)
    torch.testing.assert_close(_gradients_of_sums(run, inputs), expected, rtol=1e-12, atol=1e-12)


@on(SIMULATOR, EMULATOR, DEVICE)
@tiled([LENGTHS])
def test_unchecked_lengths_are_clamped(run, set_tile, monkeypatch, tile, case):
    set_tile(tile)
    inputs, grads = case.make_inputs()
    inputs["lengths"] = torch.tensor([0, 5, case.L])
    expected = run_and_grads(reference.sru_recurrence, inputs, grads)
    monkeypatch.setattr(autograd, "check_padding", lambda lengths, *_, **__: lengths)  # refuses these on a CPU
    inputs["lengths"] = torch.tensor([-3, 5, case.L + 4])
    assert_agrees(run_and_grads(run, inputs, grads), expected, TOLERANCE[case.dtype])


@on(SIMULATOR, EMULATOR, DEVICE)
@pytest.mark.parametrize(
    ("given", "clamped"),
    [((-5, 0, 30), (0, 0, 9)), ((9, 0, 9), (0, 0, 9)), ((0, 20, 9), (0, 9, 9))],
    ids=["outside", "falling", "rising_too_far"],
)
@tiled([(PACKED[0], PACKED[1]._replace(B=2))])
def test_unchecked_cu_seqlens_are_clamped(run, set_tile, monkeypatch, tile, case, given, clamped):
    set_tile(tile)
    inputs, grads = case.make_inputs()
    inputs["cu_seqlens"] = torch.tensor(clamped)
    expected = run_and_grads(reference.sru_recurrence, inputs, grads)
    monkeypatch.setattr(autograd, "check_cu_seqlens", lambda cu_seqlens, *_, **__: (cu_seqlens, case.L))
    inputs["cu_seqlens"] = torch.tensor(given)
    assert_agrees(run_and_grads(run, inputs, grads), expected, TOLERANCE[case.dtype])


@on(SIMULATOR, EMULATOR, DEVICE)
@tiled([(PACKED[0], PACKED[1]._replace(B=2)), (Tile(4, 1, 2), Case(version=2, B=2, padding="packed"))])
def test_steps_behind_the_last_unchecked_sequence_are_padding(run, set_tile, monkeypatch, tile, case):
    set_tile(tile)
    inputs, grads = case.make_inputs()
    assert len(inputs["u"]) == case.L
    of_steps = ("u", "x") if inputs["x"] is not None else ("u",)
    short = inputs | {n: inputs[n].detach()[:-2].requires_grad_() for n in of_steps}
    short["cu_seqlens"] = torch.tensor([0, 4, case.L - 2])
    expected = run_and_grads(reference.sru_recurrence, short, grads | {"grad_h": grads["grad_h"][:-2]})
    for name in ("h", *(f"grad_{n}" for n in of_steps)):
        expected[name] = torch.cat([expected[name], torch.zeros_like(expected[name][:2])])
    monkeypatch.setattr(autograd, "check_cu_seqlens", lambda cu_seqlens, *_, **__: (cu_seqlens, case.L))
    inputs["cu_seqlens"] = short["cu_seqlens"]
    assert_agrees(run_and_grads(run, inputs, grads), expected, TOLERANCE[case.dtype])


float32, bfloat16 = torch.float32, torch.bfloat16
TILES = Path(__file__).parent.parent / "benchmarks/results/tiles_nvidia-h200.json"


@pytest.mark.parametrize(
    ("L", "columns", "dtype", "lanes", "forward", "backward"),
    [
        (1000, 10**6, float32, 2, Tile(128, 1, 8, 2), Tile(64, 2, 4, 2)),
        (1000, 2**15, float32, 2, Tile(64, 2, 8, 2, 2), Tile(64, 2, 4, 2)),
        (1000, 2**14, float32, 2, Tile(32, 4, 8, 2, 2), Tile(32, 4, 4, 2)),
        (1000, 2**14, float32, 1, Tile(32, 4, 8, 1, 2), Tile(32, 4, 4)),
        (1000, 2**13, float32, 2, Tile(16, 8, 8, 2, 2), Tile(16, 8, 4, 2)),
        (1000, 2**12, float32, 2, Tile(16, 16, 4, 2), Tile(8, 16, 4, 2)),
        (1000, 3000, float32, 2, Tile(8, 16, 8, 2, 2), Tile(8, 16, 4, 2)),
        (1000, 2**11, float32, 2, Tile(8, 16, 8, 2, 2), Tile(8, 16, 4, 2)),
        (1000, 2**10, float32, 1, Tile(8, 16, 8), Tile(8, 16, 8)),
        (1000, 2**11, bfloat16, 2, Tile(8, 16, 8, 2), Tile(8, 16, 8, 2)),
        (1000, 100, float32, 1, Tile(8, 16, 8), Tile(8, 16, 8)),
        (2000, 100, float32, 1, Tile(16, 8, 8), Tile(16, 8, 8)),
        (2000, 100, bfloat16, 2, Tile(16, 8, 8, 2), Tile(16, 8, 8, 2)),
        (1000, 2**15, bfloat16, 2, Tile(128, 2, 8, 2), Tile(64, 2, 8, 2)),
        (8192, 2**12, float32, 2, Tile(16, 16, 4, 2, 2), Tile(16, 8, 4, 2)),
        (8192, 2**12, float32, 1, Tile(8, 16, 8, 1, 4), Tile(16, 8, 4)),
        (8192, 2**13, bfloat16, 2, Tile(32, 8, 8, 2, 2), Tile(32, 8, 4, 2)),
        (1000, 2**14, bfloat16, 2, Tile(64, 4, 8, 2), Tile(32, 4, 8, 2)),
        (1000, 2**13, bfloat16, 2, Tile(32, 8, 8, 2), Tile(16, 8, 8, 2)),
        (1000, 2**12, bfloat16, 2, Tile(16, 16, 8, 2, 2), Tile(16, 8, 8, 2)),
        (1000, 2**12, bfloat16, 1, Tile(8, 16, 8, 1, 2), Tile(16, 8, 8)),
        (0, 2**14, float32, 2, Tile(64, 1, 8, 2), Tile(64, 2, 4, 2)),
        (8, 2**14, float32, 2, Tile(64, 1, 8, 2), Tile(64, 2, 4, 2)),
        (9, 2**14, float32, 2, Tile(64, 2, 8, 2), Tile(32, 4, 4, 2)),
        (32, 2**12, float32, 2, Tile(16, 4, 8, 2), Tile(16, 8, 4, 2)),
    ],
)
def test_few_columns_get_many_chunks(L, columns, dtype, lanes, forward, backward):
    chosen = [cuda_kernels.choose_tile(b, Options(), STORAGE[dtype], L, columns, lanes) for b in (False, True)]
    assert chosen == [forward, backward]


@pytest.mark.parametrize(("columns", "width"), [(100, 32), (10**6, 128)])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_version_2_has_one_chunk(backward, columns, width):
    chosen = cuda_kernels.choose_tile(backward, Options(version=2), STORAGE[float32], 1000, columns, 1)
    assert chosen == Tile(width, 1, 8)


def test_many_steps_end_to_end_are_no_long_sequence():
    packed = Options(padding=recurrence.PACKED)
    short, long = (cuda_kernels.choose_tile(True, packed, STORAGE[float32], L, 2**12, 2) for L in (1000, 2**13))
    assert short == long != cuda_kernels.choose_tile(True, Options(), STORAGE[float32], 2**13, 2**12, 2)


def test_tiles_are_those_that_were_measured():
    measured, chosen = {}, {}
    for entry in json.loads(TILES.read_text(encoding="utf-8"))["entries"]:
        if entry["chosen"] is None:  # it was not among the tiles that were timed
            continue
        L, B, d = map(int, entry["point"].split("x"))
        backward, storage, options = entry["pass"] == "backward", STORAGE[getattr(torch, entry["dtype"])], Options()
        expected = tuple(entry["chosen"][name] for name in ("columns", "chunks", "steps", "lanes", "spans"))
        tile = cuda_kernels.choose_tile(backward, options, storage, L, B * d, expected[3])
        spans, span_tiles = cuda_kernels._choose_spans(backward, options, storage, tile, L, B * d)
        assert (spans - 1) * span_tiles * tile.chunks * tile.steps < L <= spans * span_tiles * tile.chunks * tile.steps
        key = entry["point"], entry["dtype"], entry["pass"]
        measured[key], chosen[key] = expected, (tile.columns, tile.chunks, tile.steps, tile.lanes, spans)
    assert len(measured) > 100
    assert chosen == measured


@pytest.mark.parametrize(
    ("passes", "version", "dtype", "tile", "capability", "blocks"),
    [
        ("forward", 1, float32, Tile(16, 16, 4, 2), (9, 0), 2),
        ("forward", 1, float32, Tile(8, 16, 8), (8, 0), 4),
        ("forward", 2, float32, Tile(128, 1, 8), (12, 0), 4),
        ("forward", 1, torch.float64, Tile(8, 16, 8), (9, 0), 2),
        ("forward", 1, float32, Tile(8, 16, 8), (7, 5), 2),
        ("backward", 1, float32, Tile(16, 8, 8), (9, 0), 3),
        ("backward", 1, float32, Tile(16, 8, 4), (9, 0), 4),
        ("backward", 1, float32, Tile(16, 8, 4), (10, 0), 2),
        ("backward", 1, float32, Tile(16, 8, 4, 2), (9, 0), 2),
        ("backward", 1, float32, Tile(32, 8, 4, 2), (9, 0), 1),
        ("backward", 1, float32, Tile(32, 8, 4, 2), (10, 0), 1),
        ("backward", 1, bfloat16, Tile(32, 8, 4, 2), (9, 0), 2),
        ("backward", 1, bfloat16, Tile(16, 8, 8, 2), (9, 0), 2),
        ("backward", 2, bfloat16, Tile(128, 1, 8), (9, 0), 2),
    ],
)
def test_registers_suffice_for_so_many_blocks(passes, version, dtype, tile, capability, blocks):
    kernel = cuda_kernels.backward_kernel if passes == "backward" else cuda_kernels.forward_kernel
    bounds = cuda_kernels.launch_bounds(kernel, Options(version=version), STORAGE[dtype], tile, capability)
    assert bounds == (tile.columns * tile.chunks, blocks)


@on(SIMULATOR)
def test_every_array_decides_how_many_numbers_are_loaded_at_once(run, set_tile, monkeypatch):
    set_tile(Tile(4, 1, 2))
    asked = []
    monkeypatch.setattr(cuda_kernels, "_count_lanes", lambda *arguments: asked.append(arguments) or 1)
    case = Case(version=2, B=3, D=2, mask_c=True)
    run_and_grads(run, *case.make_inputs())
    assert [arguments[1:3] for arguments in asked] == [(30, 5)] * 2  # forward and backward
    # u, x, bias, weight_c, mask_c, and c_0 or the states, grad_h and grad_c_n
    assert [sum(a is not None for a in arguments[3:]) for arguments in asked] == [6, 8]


@pytest.mark.parametrize(
    ("options", "dtype", "columns", "H", "offset", "lanes"),
    [
        (Options(), float32, 1026, 342, 0, 2),
        (Options(), float32, 1024, 512, 0, 1),  # few columns
        (Options(), float32, 1026, 171, 0, 1),  # odd
        (Options(), float32, 1026, 342, 1, 1),  # an array that does not begin at a multiple of 8 bytes
        (Options(), float32, 1026, 342, 2, 2),
        (Options(version=2), float32, 1026, 342, 0, 1),
        (Options(), torch.float64, 1026, 342, 0, 1),
        (Options(), bfloat16, 4, 2, 0, 2),
        (Options(), bfloat16, 4, 2, 2, 1),
        (Options(), bfloat16, 4, 2, 4, 2),
    ],
)
def test_two_numbers_are_loaded_at_once_where_they_can_be(options, dtype, columns, H, offset, lanes):
    aligned = torch.empty(8, dtype=dtype)
    assert aligned.data_ptr() % 8 == 0
    other = torch.empty(8, dtype=dtype)[offset:]
    assert cuda_kernels._count_lanes(options, columns, H, aligned, None, other) == lanes
    assert cuda_kernels._count_lanes(options, columns, H, other) == lanes


@pytest.mark.parametrize("padding", [recurrence.NO_PADDING, recurrence.PACKED], ids=["full", "packed"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("L", [0, 1, 7, 8, 9, 100, 1023, 1024, 5000, 9000])
def test_backward_finds_the_states_that_forward_keeps(L, dtype, version, padding):
    options = Options(version=version, padding=padding)
    for columns in (1, 33, 1000, 1025, 2**12, 2**13, 3 * 2**12, 2**14, 10**5, 10**7):
        tiles = [
            cuda_kernels.choose_tile(backward, options, STORAGE[dtype], L, columns, lanes)
            for backward in (False, True) for lanes in (1, 2)[: 1 if version == 2 or dtype == torch.float64 else 2]
        ]  # fmt: skip
        (distance,) = {tile.chunks * tile.steps // tile.states for tile in tiles}
        assert distance >= recurrence.STEPS_PER_STATE
        for tile in tiles:
            assert tile.chunks % tile.states == 0
            assert tile.chunks * tile.steps == distance * tile.states


@pytest.mark.parametrize(("steps", "B", "what"), [(2**31, 1, "steps"), (1, 2**30, "numbers of u in a step")])
def test_too_large_arrays_are_refused(steps, B, what):
    with pytest.raises(ValueError, match=rf"at most 2\^31 - 1 {what}"):
        cuda_kernels._plan(cuda_kernels.forward_kernel, Options(), float32, steps, B, 1, 1, 1)


def test_packed_rows_may_hold_as_many_steps_as_fit():
    """A step of u is one row's where sequences lie end to end, however many there are."""
    packed = Options(padding=recurrence.PACKED)
    cuda_kernels._plan(cuda_kernels.forward_kernel, packed, float32, 1, 2**30, 1, 1, 1)
    cuda_kernels._plan(cuda_kernels.forward_kernel, packed, float32, 0, 0, 1, 1, 1)
    with pytest.raises(ValueError, match=r"at most 2\^31 - 1 numbers of u in a step"):
        cuda_kernels._plan(cuda_kernels.forward_kernel, packed, float32, 1, 1, 1, 2**30, 1)


@pytest.mark.parametrize(
    ("backward", "L", "H", "blocks", "kernels"),
    [
        (False, 100, 8192, (512, 1), 1),
        (True, 100, 8192, (512, 1), 1),
        (False, 5000, 100, (7, 40), 2),
        (True, 5000, 100, (7, 27), 2),
    ],
)
def test_a_pass_is_launched_with_its_own_tile(backward, L, H, blocks, kernels):
    make_kernel = cuda_kernels.backward_kernel if backward else cuda_kernels.forward_kernel
    options, storage = Options(save_c=True), STORAGE[float32]
    plan = cuda_kernels._plan(make_kernel, options, float32, L, 1, 1, H, 1)
    assert plan.tile == cuda_kernels.choose_tile(backward, options, storage, L, H, 1)
    assert (plan.spans, plan.span_tiles) == cuda_kernels._choose_spans(backward, options, storage, plan.tile, L, H)
    assert (plan.blocks, plan.block, len(plan.kernels)) == (blocks, (plan.tile.columns, plan.tile.chunks), kernels)
    expected = cuda_kernels.signatures(options, storage, plan.tile)[backward]
    assert {kernel.signature for kernel in plan.kernels} == {expected}
