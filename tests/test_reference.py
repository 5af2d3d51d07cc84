"""The reference against numbers worked out by hand, the recorded official package, and its own mathematical laws."""

import math
from functools import cache
from typing import Any, NamedTuple

import cases
import pytest
import torch
from official import NAMES, load, run_official
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from numsru.reference import sru_recurrence

LOG3 = math.log(3)  # sigmoid(log 3) = 3/4, sigmoid(0) = 1/2, sigmoid(-log 3) = 1/4
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def steps(*values: tuple[float, ...]) -> Tensor:
    """u of one column, from (candidate, f, r[, skip]) of each step, f and r being the gates themselves."""
    rows = [[candidate, math.log(f / (1 - f)), math.log(r / (1 - r)), *skip] for candidate, f, r, *skip in values]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), 1, 1, -1, 1)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)


def per_gate(forget: float, reset: float) -> Tensor:
    return torch.tensor([[[forget], [reset]]], dtype=torch.float64)


def state(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def assert_result(result: tuple[Tensor, Tensor], h: list[float], c_n: float) -> None:
    torch.testing.assert_close(result[0], column(*h))
    torch.testing.assert_close(result[1], state(c_n))


# c = 1/2 * 0 + 1/2 * 4 = 2, then 3/4 * 2 + 1/4 * 8 = 7/2
U = steps((4, 1 / 2, 3 / 4), (8, 3 / 4, 1 / 2))
X = column(8, -1)


def test_two_steps_by_hand() -> None:
    h = [3 / 4 * 2 + 1 / 4 * 8, 1 / 2 * 7 / 2 + 1 / 2 * -1]
    assert_result(sru_recurrence(U, X, nonlinearity="identity"), h, 7 / 2)


@pytest.mark.parametrize(
    ("nonlinearity", "g"),
    [
        ("identity", (-2, 3 / 2)),
        ("tanh", (math.tanh(-2), math.tanh(3 / 2))),
        ("relu", (0, 3 / 2)),
        ("selu", (SELU_SCALE * SELU_ALPHA * (math.exp(-2) - 1), SELU_SCALE * 3 / 2)),
    ],
)
def test_nonlinearity_by_hand(nonlinearity: str, g: tuple[float, float]) -> None:
    u = steps((-4, 1 / 2, 3 / 4), (12, 3 / 4, 1 / 2))  # c = -2, then 3/4 * -2 + 1/4 * 12 = 3/2
    h = [3 / 4 * g[0] + 1 / 4 * 8, 1 / 2 * g[1] + 1 / 2 * -1]
    assert_result(sru_recurrence(u, X, nonlinearity=nonlinearity), h, 3 / 2)


@pytest.mark.parametrize(
    ("weight_c", "nonlinearity"), [(None, "tanh"), (per_gate(0.5, -0.5), "identity")], ids=["version1", "version2"]
)
def test_default_nonlinearity(weight_c: Tensor | None, nonlinearity: str) -> None:
    expected = sru_recurrence(U, X, weight_c=weight_c, nonlinearity=nonlinearity)
    torch.testing.assert_close(sru_recurrence(U, X, weight_c=weight_c), expected, rtol=0, atol=0)


def test_recurrent_weights_by_hand() -> None:
    # Gates are 1/2 as long as the state is 0. With c = 2, f = sigmoid(log 3) = 3/4, r = sigmoid(-log 3) = 1/4.
    u, weight_c = steps((4, 1 / 2, 1 / 2), (8, 1 / 2, 1 / 2)), per_gate(LOG3 / 2, -LOG3 / 2)
    h = [1 / 2 * 2 + 1 / 2 * 8, 1 / 4 * 7 / 2 + 3 / 4 * -1]
    assert_result(sru_recurrence(u, X, weight_c=weight_c), h, 3 / 4 * 2 + 1 / 4 * 8)


def test_bias_by_hand() -> None:
    # f = 3/4, r = 1/4: c = 1/4 * 4 = 1, then 3/4 * 1 + 1/4 * 8 = 11/4
    u = steps((4, 1 / 2, 1 / 2), (8, 1 / 2, 1 / 2))
    h = [1 / 4 * 1 + 3 / 4 * 8, 1 / 4 * 11 / 4 + 3 / 4 * -1]
    assert_result(sru_recurrence(u, X, per_gate(LOG3, -LOG3), nonlinearity="identity"), h, 11 / 4)


def test_initial_state_by_hand() -> None:
    # c = 1/2 * 6 + 1/2 * 4 = 5, then 3/4 * 5 + 1/4 * 8 = 23/4
    h = [3 / 4 * 5 + 1 / 4 * 8, 1 / 2 * 23 / 4 + 1 / 2 * -1]
    assert_result(sru_recurrence(U, X, c_0=state(6), nonlinearity="identity"), h, 23 / 4)


def test_scale_x_by_hand() -> None:
    h = [3 / 4 * 2 + 1 / 4 * 3 * 8, 1 / 2 * 7 / 2 + 1 / 2 * 3 * -1]
    assert_result(sru_recurrence(U, X, scale_x=3.0, nonlinearity="identity"), h, 7 / 2)


@pytest.mark.parametrize("scale_x", [1.0, 3.0])
def test_projected_highway_by_hand(scale_x: float) -> None:
    u = steps((4, 1 / 2, 3 / 4, 8), (8, 3 / 4, 1 / 2, -1))
    h = [3 / 4 * 2 + 1 / 4 * 8, 1 / 2 * 7 / 2 + 1 / 2 * -1]
    assert_result(sru_recurrence(u, scale_x=scale_x, nonlinearity="identity"), h, 7 / 2)


@pytest.mark.parametrize("dropout_placement", ["paper", "highway"])
def test_no_highway_by_hand(dropout_placement: str) -> None:
    result = sru_recurrence(U, mask_c=state(2), nonlinearity="identity", dropout_placement=dropout_placement)
    assert_result(result, [3 / 4 * 2 * 2, 1 / 2 * 2 * 7 / 2], 7 / 2)


@pytest.mark.parametrize(
    ("dropout_placement", "mask", "h"),
    [
        ("paper", 2, [3 / 4 * 2 * 2 + 1 / 4 * 8, 1 / 2 * 2 * 7 / 2 + 1 / 2 * -1]),
        ("paper", 0, [1 / 4 * 8, 1 / 2 * -1]),
        ("highway", 2, [8 + 3 / 4 * 2 * (2 - 8), -1 + 1 / 2 * 2 * (7 / 2 + 1)]),
        ("highway", 0, [8, -1]),
    ],
    ids=["paper-kept", "paper-dropped", "highway-kept", "highway-dropped"],
)
def test_dropout_by_hand(dropout_placement: str, mask: float, h: list[float]) -> None:
    result = sru_recurrence(U, X, mask_c=state(mask), nonlinearity="identity", dropout_placement=dropout_placement)
    assert_result(result, h, 7 / 2)


def test_two_directions_by_hand() -> None:
    u = torch.cat([U, steps((4, 1 / 2, 3 / 4), (8, 1 / 2, 1 / 2))], dim=2)
    x = torch.cat([X, column(16, 2)], dim=2)
    # Direction 1 starts at the last step: c = 1/2 * 8 = 4, then 1/2 * 4 + 1/2 * 4 = 4
    backward = [3 / 4 * 4 + 1 / 4 * 16, 1 / 2 * 4 + 1 / 2 * 2]
    h, c_n = sru_recurrence(u, x, nonlinearity="identity")
    torch.testing.assert_close(h[:, :, 1:], column(*backward))
    torch.testing.assert_close(c_n, state(7 / 2, 4))
    torch.testing.assert_close(h[:, :, :1], sru_recurrence(U, X, nonlinearity="identity")[0])


def test_direction_1_ends_at_the_first_step() -> None:
    u = torch.cat([U, steps((4, 3 / 4, 3 / 4), (8, 1 / 2, 1 / 2))], dim=2)
    # c = 1/2 * 2 + 1/2 * 8 = 5, then 3/4 * 5 + 1/4 * 4 = 19/4; direction 0: 1/2 * 6 + 1/2 * 4 = 5, then 23/4
    _, c_n = sru_recurrence(u, c_0=state(6, 2))
    torch.testing.assert_close(c_n, state(23 / 4, 19 / 4))


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("pad", [(0, 0, 1), (0, 1, 0), (1, 0, 0)], ids=["right", "inner", "left"])
def test_padded_step_is_skipped(pad: tuple[int, ...], direction: int) -> None:
    u, x = torch.full((3, 1, 2, 3, 1), 5.0).double(), torch.full((3, 1, 2), 5.0).double()
    mask_pad = torch.tensor(pad, dtype=torch.bool).view(3, 1)
    time = torch.arange(3)[~mask_pad.view(3)]
    in_order = time if direction == 0 else time.flip(0)
    u[in_order, :, direction], x[in_order, :, direction] = U[:, :, 0], X[:, :, 0]

    h, c_n = sru_recurrence(u, x, mask_pad=mask_pad, nonlinearity="identity")
    expected = torch.zeros(3, 1).double()
    expected[in_order, 0] = torch.tensor([3 / 4 * 2 + 1 / 4 * 8, 1 / 2 * 7 / 2 + 1 / 2 * -1]).double()
    torch.testing.assert_close(h[:, :, direction], expected)
    assert c_n[0, direction].item() == pytest.approx(7 / 2)


def test_lengths_by_hand() -> None:
    u, x = U.repeat(1, 3, 1, 1, 1), X.repeat(1, 3, 1)
    h, c_n = sru_recurrence(u, x, c_0=column(6, 0, 0)[:, 0], lengths=torch.tensor([0, 1, 2]), nonlinearity="identity")
    expected = [[0, 3 / 4 * 2 + 1 / 4 * 8, 3 / 4 * 2 + 1 / 4 * 8], [0, 0, 1 / 2 * 7 / 2 + 1 / 2 * -1]]
    torch.testing.assert_close(h[:, :, 0], torch.tensor(expected).double())
    torch.testing.assert_close(c_n, column(6, 2, 7 / 2)[:, 0])


@cache
def official_results(name: str) -> dict[str, Tensor]:
    return run_official(load(name), sru_recurrence)


def test_all_recordings_are_there() -> None:
    assert len(NAMES) == 12


@pytest.mark.parametrize("name", NAMES)
def test_every_recorded_result_is_computed(name: str) -> None:
    assert official_results(name).keys() == load(name).results.keys()


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in NAMES for key in load(name).results])
def test_official_package_agrees(name: str, key: str) -> None:
    expected = load(name).results[key]
    error = (official_results(name)[key] - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, key) for name in NAMES if name.startswith("v1_") for key in load(name).inputs if key.endswith("weight_c")],
)
def test_official_version_1_has_no_recurrent_weights(name: str, key: str) -> None:
    assert not load(name).inputs[key].any()


class Case(NamedTuple):
    version: int = 2
    directions: int = 2
    skip: str = "input"
    padding: str = "none"
    mask_c: bool = False
    nonlinearity: str | None = None
    dropout_placement: str = "paper"

    def __str__(self) -> str:
        words = [f"v{self.version}", f"D{self.directions}", self.skip, self.padding]
        return "-".join(words + ["dropout"] * self.mask_c + [self.nonlinearity or "default", self.dropout_placement])


DIRECTION_CASES = [Case(v, d, s) for v in (1, 2) for d in (1, 2) for s in ("input", "projected", "no_highway")]
PADDING_CASES = [
    Case(v, skip=s, padding=p) for v in (1, 2) for s in ("input", "projected") for p in ("lengths", "mask_pad")
]
OUTPUT_CASES = [
    Case(v, 1, s, mask_c=True, nonlinearity=g, dropout_placement=p)
    for v, s in ((1, "input"), (2, "projected"), (2, "no_highway"))
    for g in ("identity", "tanh", "relu", "selu")
    for p in ("paper", "highway")
]
CASES = DIRECTION_CASES + PADDING_CASES + OUTPUT_CASES


def make_inputs(
    case: Case, length: int = 3, batch: int = 2, units: int = 1
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Floating arguments, which may be differentiated, apart from the others."""
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    d, k = case.directions, 4 if case.skip == "projected" else 3
    sign = torch.tensor([1.0, -1.0]).repeat(batch)[:batch].view(-1, 1)
    # Every state of a row has its row's sign, so that finite differences stay clear of the kinks of relu and selu.
    u = random(length, batch, d, k, units)
    u[:, :, :, 0] = (u[:, :, :, 0].abs() + 0.5) * sign.view(-1, 1, 1)
    tensors = {"u": u, "bias": random(d, 2, units), "c_0": (random(batch, d * units).abs() + 0.5) * sign}
    if case.skip == "input":
        tensors["x"] = random(length, batch, d * units)
    if case.version == 2:
        tensors["weight_c"] = random(d, 2, units)
    if case.mask_c:
        tensors["mask_c"] = random(batch, d * units)

    options: dict[str, Any] = {"nonlinearity": case.nonlinearity, "dropout_placement": case.dropout_placement}
    if case.skip == "input":
        options["scale_x"] = 1.5
    if case.padding == "lengths":
        options["lengths"] = torch.arange(batch) + length - batch
    if case.padding == "mask_pad":
        options["mask_pad"] = (torch.arange(length).view(-1, 1) + torch.arange(batch)) % 3 == 1
    return tensors, options


def padding_of(options: dict[str, Any], length: int) -> Tensor:
    if "mask_pad" in options:
        return options["mask_pad"]
    return torch.arange(length).view(-1, 1) >= options["lengths"]


def run_and_grads(tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    h, c_n = sru_recurrence(**leaves, **options)
    generator = torch.Generator().manual_seed(0)
    loss = sum((t * torch.randn(t.shape, dtype=t.dtype, generator=generator)).sum() for t in (h, c_n))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"h": h.detach(), "c_n": c_n.detach()} | {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}


def as_function(case: Case) -> tuple[Any, list[Tensor]]:
    tensors, options = make_inputs(case)
    names = list(tensors)
    leaves = [t.requires_grad_() for t in tensors.values()]
    return lambda *args: sru_recurrence(**dict(zip(names, args, strict=True)), **options), leaves


@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_derivatives(case: Case) -> None:
    assert gradcheck(*as_function(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_derivatives(case: Case) -> None:
    assert gradgradcheck(*as_function(case))


@pytest.mark.parametrize("name", ["u", "x", "bias", "c_0", "weight_c", "mask_c"])
def test_gradient_of_one_argument_alone(name: str) -> None:
    tensors, options = make_inputs(Case(mask_c=True))
    every = run_and_grads(tensors, options)[f"grad_{name}"]
    fixed = {other: tensor for other, tensor in tensors.items() if other != name}
    alone = run_and_grads({name: tensors[name]}, options | fixed)[f"grad_{name}"]
    torch.testing.assert_close(alone, every, rtol=0, atol=0)


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("case", PADDING_CASES, ids=str)
def test_content_of_padding_changes_nothing(case: Case, fill: float) -> None:
    tensors, options = make_inputs(case, length=7, batch=3, units=2)
    pad = padding_of(options, 7)
    filled = {name: t.clone() for name, t in tensors.items()}
    for name in filled.keys() & {"u", "x"}:
        filled[name][pad] = fill
    torch.testing.assert_close(run_and_grads(filled, options), run_and_grads(tensors, options), rtol=0, atol=0)


@pytest.mark.parametrize("fill", [1.0, math.nan], ids=str)
@pytest.mark.parametrize("name", ["u", "x"])
@pytest.mark.parametrize("padding", ["lengths", "mask_pad"])
@pytest.mark.parametrize("version", [1, 2])
def test_gradient_of_padding_is_exactly_zero(version: int, padding: str, name: str, fill: float) -> None:
    tensors, options = make_inputs(Case(version, padding=padding), length=7, batch=3, units=2)
    pad = padding_of(options, 7)
    tensors[name][pad] = fill
    grad = run_and_grads(tensors, options)[f"grad_{name}"]
    assert not grad[pad].any()
    assert grad[~pad].all()


def test_output_of_padding_is_exactly_zero() -> None:
    tensors, options = make_inputs(Case(padding="mask_pad"), length=7, batch=3, units=2)
    h, _ = sru_recurrence(**tensors, **options)
    assert not h[options["mask_pad"]].any()
    assert h[~options["mask_pad"]].all()


@pytest.mark.parametrize("version", [1, 2])
def test_lengths_equal_their_mask(version: int) -> None:
    tensors, options = make_inputs(Case(version, padding="lengths"), length=6, batch=3, units=2)
    as_mask = {name: o for name, o in options.items() if name != "lengths"} | {"mask_pad": padding_of(options, 6)}
    torch.testing.assert_close(run_and_grads(tensors, as_mask), run_and_grads(tensors, options), rtol=0, atol=0)


@pytest.mark.parametrize("cut", range(6))
@pytest.mark.parametrize("padding", ["none", "mask_pad"])
@pytest.mark.parametrize("version", [1, 2])
def test_cut_sequence_carries_on(version: int, padding: str, cut: int) -> None:
    tensors, options = make_inputs(Case(version, 1, padding=padding), length=5, units=2)
    along_time = {name: t for name, t in (tensors | options).items() if name in ("u", "x", "mask_pad")}
    whole = tensors | options
    h, c_n = sru_recurrence(**whole)
    h_1, c_cut = sru_recurrence(**whole | {name: t[:cut] for name, t in along_time.items()})
    h_2, c_end = sru_recurrence(**whole | {name: t[cut:] for name, t in along_time.items()} | {"c_0": c_cut})
    torch.testing.assert_close((torch.cat([h_1, h_2]), c_end), (h, c_n))


@pytest.mark.parametrize("padding", ["none", "mask_pad"])
@pytest.mark.parametrize("skip", ["input", "projected"])
@pytest.mark.parametrize("version", [1, 2])
def test_direction_1_is_direction_0_of_the_reversed_sequence(version: int, skip: str, padding: str) -> None:
    tensors, options = make_inputs(Case(version, 2, skip, padding, mask_c=True), length=6, units=2)
    h, c_n = sru_recurrence(**tensors, **options)

    flipped = {name: t[1:] for name, t in tensors.items() if name in ("bias", "weight_c")}
    flipped |= {name: t[:, 2:] for name, t in tensors.items() if name in ("c_0", "mask_c")}
    flipped |= {name: t[:, :, 2:].flip(0) for name, t in tensors.items() if name == "x"}
    flipped |= {name: t.flip(0) for name, t in options.items() if name == "mask_pad"}
    h_flipped, c_flipped = sru_recurrence(**options | flipped | {"u": tensors["u"][:, :, 1:].flip(0)})
    torch.testing.assert_close((h_flipped.flip(0), c_flipped), (h[:, :, 2:], c_n[:, 2:]))


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("padding", ["none", "lengths", "mask_pad"])
def test_row_does_not_see_the_others(padding: str, row: int) -> None:
    tensors, options = make_inputs(Case(padding=padding, mask_c=True), length=6, batch=3, units=2)
    h, c_n = sru_recurrence(**tensors, **options)
    alone = {name: t[row : row + 1] for name, t in (tensors | options).items() if name in ("c_0", "mask_c", "lengths")}
    alone |= {name: t[:, row : row + 1] for name, t in (tensors | options).items() if name in ("u", "x", "mask_pad")}
    h_row, c_row = sru_recurrence(**tensors | options | alone)
    torch.testing.assert_close((h_row, c_row), (h[:, row : row + 1], c_n[row : row + 1]))


@pytest.mark.parametrize(
    "case",
    [
        cases.Case(B=4, D=2, padding="packed", mask_c=True, scale_x=1.3),
        cases.Case(B=4, D=2, padding="packed", version=2, highway="projected", placement="highway", mask_c=True),
        cases.Case(B=3, padding="packed", highway="none", c_0=False),
        cases.Case(B=0, padding="packed"),
        cases.Case(L=0, padding="packed"),
    ],
    ids=str,
)
def test_sequences_end_to_end_are_each_computed_alone(case: cases.Case) -> None:
    def one_by_one(u: Tensor, cu_seqlens: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        results = [(u.new_zeros(0, case.D * case.H), u.new_zeros(0, case.D * case.H))]
        for b in range(case.B):
            steps = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
            own = {"u": u[steps].unsqueeze(1)}
            for name, a in others.items():
                if name == "x" and a is not None:
                    a = a[steps].unsqueeze(1)
                elif name in ("c_0", "mask_c") and a is not None:
                    a = a[b : b + 1]
                own[name] = a
            h, c_n = sru_recurrence(**own)
            results.append((h.squeeze(1), c_n))
        h, c_n = (torch.cat(parts) for parts in zip(*results, strict=True))
        return h, c_n

    inputs, grads = case.make_inputs()
    expected = cases.run_and_grads(one_by_one, inputs, grads)
    cases.assert_agrees(cases.run_and_grads(sru_recurrence, inputs, grads), expected, 1e-12)


@pytest.mark.parametrize("skip", ["input", "projected", "no_highway"])
@pytest.mark.parametrize("padding", ["none", "lengths", "mask_pad"])
@pytest.mark.parametrize(("length", "batch"), [(0, 2), (3, 0), (0, 0)], ids=["L0", "B0", "L0-B0"])
def test_empty_sizes(length: int, batch: int, padding: str, skip: str) -> None:
    tensors, options = make_inputs(Case(skip=skip, padding=padding), length, batch, units=2)
    result = run_and_grads(tensors, options)
    assert result["h"].shape == (length, batch, 4)
    assert result["c_n"].shape == (batch, 4)
    assert all(result[f"grad_{name}"].shape == t.shape for name, t in tensors.items())


def test_empty_sequence_returns_initial_state() -> None:
    tensors, options = make_inputs(Case(), length=0, units=2)
    _, c_n = sru_recurrence(**tensors, **options)
    torch.testing.assert_close(c_n, tensors["c_0"], rtol=0, atol=0)


@pytest.mark.parametrize("padding", ["none", "mask_pad"])
def test_arguments_are_left_untouched(padding: str) -> None:
    tensors, options = make_inputs(Case(padding=padding, mask_c=True), units=2)
    before = {name: t.clone() for name, t in tensors.items()}
    run = sru_recurrence(**tensors, **options)
    assert all(t.isfinite().all() for t in run)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_have_the_dtype_of_the_arguments(dtype: torch.dtype) -> None:
    tensors, options = make_inputs(Case(padding="mask_pad", mask_c=True), units=2)
    h, c_n = sru_recurrence(**{name: t.to(dtype) for name, t in tensors.items()}, **options)
    assert (h.dtype, c_n.dtype) == (dtype, dtype)
