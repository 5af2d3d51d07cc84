"""The layers that are compared. All take `(L, B, input_size)`, except convolutions, and return one tensor."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import numsru
from numsru import reference

from . import sequential
from .points import Point, recurrence_bytes
from .timing import Call, Settings, compare, copy_call, products, reason

BASE = "numsru.SRU"
GRAPHED = ", graphed"  # how the name of a contestant in CUDA graphs ends
LONG = 1024  # steps beyond which what takes seconds is not measured
PIECE = 64  # steps that the reference computes at a time
PASSES = ("forward", "forward+backward")

# Largest error of an output or gradient, relative to the largest magnitude of the float64 reference's. Units in the
# last place of what the products round to: 24, 11 and 8 bits.
TOLERANCE = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2}


class Contestant(NamedTuple):
    """`run` is what is timed, on inputs of shape `shape`. `is_sru`: it computes what numsru.SRU does."""

    name: str
    run: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    parameters: list[nn.Parameter]
    shape: tuple[int, ...]
    is_sru: bool = False


def contestants(
    point: Point, settings: Settings, training: bool, *, compiled: bool = False, backend: str = "inductor"
) -> list[Contestant]:
    """numsru.SRU and everything it is compared with at a point.

    Args:
        training: Whether the contestants are to be run forward and backward (CUDA graphs differ).
        compiled: Whether `torch.compile` of the loop and of a scan are among them.
        backend: Of `torch.compile`.
    """
    base, rnn = sru(point, settings)
    found = [base, recurrent("nn.LSTM", nn.LSTM, point, settings)]
    if point.L <= LONG:
        found.append(recurrent("nn.GRU", nn.GRU, point, settings))
    found += [convolution(k, point, settings) for k in (2, 3)]
    found += [product(route, rnn, point, settings) for route in products(settings.device)]
    if is_square(point):
        forms: dict[str, Callable[..., Tensor]] = {}
        if point.L <= LONG:  # a step is several launches: hopeless beyond
            forms["torch loop"] = loop
        if compiled:
            torch.compiler.reset()
            for name, form in (("compiled loop", loop), ("compiled scan", scan)):
                forms[name] = torch.compile(form, dynamic=False, backend=backend)
        if settings.device.type == "cuda":
            forms["sequential kernel"] = sequential_layer
        found += [of_sru(name, form, rnn, base) for name, form in forms.items()]
    if settings.device.type == "cuda":
        again = [c for c in found if c.name in (BASE, "F.linear", "sequential kernel")]
        again += [c for c in found if c.name == "nn.LSTM" and point.L <= LONG]
        found += [graphed(c, settings, training) for c in again]
    return found


def is_square(point: Point) -> bool:
    """Whether the forms below, of one layer and direction that reads as many numbers as it writes, compute it."""
    return point.num_layers == 1 and not point.bidirectional and point.input_size == point.hidden_size


def sru(point: Point, settings: Settings) -> tuple[Contestant, numsru.SRU]:
    rnn = numsru.SRU(
        point.input_size, point.hidden_size, point.num_layers, bidirectional=point.bidirectional,
        device=settings.device, dtype=settings.torch_dtype,
    )  # fmt: skip
    with torch.no_grad():
        for i in range(point.num_layers):
            getattr(rnn, f"bias_l{i}").normal_()  # zeros would hide a bias that is not read
    return Contestant(BASE, lambda x: rnn(x)[0], list(rnn.parameters()), point.input_shape, is_sru=True), rnn


def recurrent(name: str, module: type[nn.LSTM | nn.GRU], point: Point, settings: Settings) -> Contestant:
    rnn = module(
        point.input_size, point.hidden_size, point.num_layers, bidirectional=point.bidirectional,
        device=settings.device, dtype=settings.torch_dtype,
    )  # fmt: skip
    return Contestant(name, lambda x: rnn(x)[0], list(rnn.parameters()), point.input_shape)


def convolution(k: int, point: Point, settings: Settings) -> Contestant:
    """As many layers of Conv1d, each with L outputs: the first reads k - 1 steps more, the others pad."""
    layers = nn.Sequential()
    for i, n in enumerate(point.input_sizes):
        if i > 0:
            layers.append(nn.ConstantPad1d((k - 1, 0), 0.0))
        layers.append(nn.Conv1d(n, point.output_size, k, device=settings.device, dtype=settings.torch_dtype))
    shape = (point.B, point.input_size, point.L + k - 1)
    return Contestant(f"Conv1d k={k}", layers, list(layers.parameters()), shape)


def product(route: str, rnn: numsru.SRU, point: Point, settings: Settings) -> Contestant:
    """numsru.SRU's matrix products alone; those of further layers read a constant in place of an output."""
    multiply = products(settings.device)[route]
    parameters = [getattr(rnn, f"weight_l{i}") for i in range(point.num_layers)]
    if point.num_layers == 1:
        return Contestant(route, lambda x: multiply(x, parameters[0]), parameters, point.input_shape)
    constant = nn.Parameter(settings.randn(point.L, point.B, point.output_size))

    def run(x: Tensor) -> tuple[Tensor, ...]:
        first, *others = parameters[: point.num_layers]
        return multiply(x, first), *(multiply(constant, weight) for weight in others)

    return Contestant(route, run, [*parameters, constant], point.input_shape)


def of_sru(name: str, form: Callable[..., Tensor], rnn: numsru.SRU, base: Contestant) -> Contestant:
    """A one-layer SRU written as a function of input, weight and bias, with numsru.SRU's parameters."""
    weight, bias = rnn.weight_l0, rnn.bias_l0
    return Contestant(name, lambda x: form(x, weight, bias), base.parameters, base.shape, is_sru=True)


def _gates(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Candidate, forget and reset gate of all steps."""
    candidate, forget, reset = F.linear(x, weight).chunk(3, dim=-1)
    return candidate, torch.sigmoid(forget + bias[0, 0]), torch.sigmoid(reset + bias[0, 1])


def loop(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A one-layer SRU in torch, with as little as possible in the loop over time: one operation a step."""
    candidate, f, r = _gates(x, weight, bias)
    c, states = torch.zeros_like(x[0]), []
    for v_t, f_t in zip((candidate - f * candidate).unbind(), f.unbind(), strict=True):
        c = torch.addcmul(v_t, f_t, c)  # lerp(candidate_t, c, f_t), compiled by torch 2.13, has wrong gradients
        states.append(c)
    return torch.lerp(x, torch.tanh(torch.stack(states)), r)


def scan(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A one-layer SRU in torch without a loop over time."""
    candidate, f, r = _gates(x, weight, bias)
    return torch.lerp(x, torch.tanh(_scan(f, candidate - f * candidate)), r)


def _scan(f: Tensor, v: Tensor) -> Tensor:
    """c_t = f_t c_{t-1} + v_t for all t, with c = 0 before the first: pairs of steps joined, then the steps between."""
    L = len(v)
    if L == 1:
        return v
    even_f, odd_f, even_v, odd_v = f[0::2], f[1::2], v[0::2], v[1::2]
    pairs = len(odd_v)
    odd = _scan(even_f[:pairs] * odd_f, odd_f * even_v[:pairs] + odd_v)
    before = torch.cat([torch.zeros_like(v[:1]), odd[: len(even_v) - 1]])
    even = even_f * before + even_v
    both = torch.stack([even[:pairs], odd], dim=1).flatten(0, 1)
    return torch.cat([both, even[pairs:]]) if L % 2 else both


def sequential_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A one-layer SRU with the plain fused kernel of `sequential.py`."""
    return sequential.sru_recurrence(F.linear(x, weight).view(*x.shape[:2], 1, 3, -1), x, bias)


class _AsModule(nn.Module):
    """A contestant as `torch.cuda.make_graphed_callables` wants it: with its parameters."""

    def __init__(self, contestant: Contestant) -> None:
        super().__init__()
        self.weights = nn.ParameterList(contestant.parameters)
        self.run = contestant.run

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.run(x)


def graphed(contestant: Contestant, settings: Settings, training: bool) -> Contestant:
    """The contestant captured in CUDA graphs at its first call; copying the input into the graph is timed with it."""
    captured: list[Callable[[Tensor], Any]] = []

    def run(x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if not captured:
            sample = settings.randn(*contestant.shape).requires_grad_(training)
            make = torch.cuda.make_graphed_callables if training else _capture_forward
            captured.append(make(_AsModule(contestant), (sample,)))
        return captured[0](x)

    return contestant._replace(name=contestant.name + GRAPHED, run=run)


def _capture_forward(module: nn.Module, inputs: tuple[Tensor]) -> Callable[[Tensor], Any]:
    (static,) = inputs
    outputs = []
    replay = capture(lambda: [lambda: outputs.append(module(static))])

    def run(x: Tensor) -> Any:
        static.copy_(x)
        replay()
        return outputs[-1]

    return run


def capture(prepare: Callable[[], list[Call]]) -> Call:
    """The prepared calls in one CUDA graph.

    They are prepared and run once before on the capturing stream: kernels are compiled then, and autograd runs backward
    on the stream that forward ran on.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = prepare()
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return functools.partial(_replay, graph, calls)


def _replay(graph: torch.cuda.CUDAGraph, calls: list[Call]) -> None:
    """`calls` own the memory that the graph reads: as long as it can be replayed, nobody else may get it."""
    graph.replay()


def timed(contestant: Contestant, settings: Settings, training: bool) -> Call:
    """One call of the contestant, forward, or forward and backward to its input and parameters."""
    size = math.prod(contestant.shape) * settings.element_size
    inputs = [settings.randn(*contestant.shape).requires_grad_(training) for _ in range(settings.copies(size))]
    turn, run = itertools.cycle(inputs), contestant.run
    if not training:

        def forward() -> None:
            with torch.no_grad():
                run(next(turn))

        return forward

    grads: list[Tensor] = []

    def forward_and_backward() -> None:
        x = next(turn)
        y = run(x)
        outputs = y if isinstance(y, tuple) else (y,)
        if not grads:
            grads.extend(map(torch.randn_like, outputs))
        torch.autograd.grad(outputs, [x, *contestant.parameters], grads)

    return forward_and_backward


class MismatchError(Exception):
    """A contestant does not compute what the reference does."""


def check(
    found: list[Contestant], point: Point, settings: Settings, training: bool, base: str = BASE
) -> dict[str, dict[str, float]]:
    """Compare the contestants that are SRUs with `numsru.reference` in float64: the output, in training every gradient.

    Returns:
        "errors", the largest of each contestant, relative to the largest magnitude in the reference's array,
        "first_call", the seconds that its first call took, compilation included, and "unavailable", the reason why
        another contestant than the base cannot run or is wrong.

    Raises:
        MismatchError: If the base is wrong. The message names array and error.
    """
    found = [c for c in found if c.is_sru]
    (parameters,) = (c.parameters for c in found if c.name == base)
    x = settings.randn(*point.input_shape).requires_grad_(training)
    inputs = [x, *parameters] if training else []
    names = ["output", "gradient of the input"][: 1 + training]
    names += [f"gradient of parameter {i}" for i in range(len(inputs) - 1)]
    errors, first_call, unavailable = {}, {}, {}
    with torch.set_grad_enabled(training):
        exact = [a.detach().double().requires_grad_(training) for a in (x, *parameters)]
        expected = _reference(point, exact[0], exact[1:])
        grad = torch.randn_like(expected)
        wanted = [expected, *(torch.autograd.grad(expected, exact, grad) if training else [])]
        for contestant in found:
            begin = time.perf_counter()
            try:
                got = _outputs(contestant, x, inputs, grad)
            except Exception as error:  # as in `compare`
                if contestant.name == base:
                    raise
                unavailable[contestant.name] = reason(error)
                continue
            if settings.device.type == "cuda":
                torch.cuda.synchronize()
            first_call[contestant.name] = time.perf_counter() - begin
            by_name = {n: _error(a, b) for n, a, b in zip(names, got, wanted, strict=True)}
            worst = max(by_name, key=by_name.__getitem__)
            errors[contestant.name] = by_name[worst]
            if not by_name[worst] <= TOLERANCE[settings.dtype]:
                error = MismatchError(
                    f"{contestant.name} at {point.name}, {settings.dtype}: relative error {by_name[worst]:.2g} of the "
                    f"{worst}, expected at most {TOLERANCE[settings.dtype]:.2g}"
                )
                if contestant.name == base:
                    raise error
                unavailable[contestant.name] = reason(error)
    return {"errors": errors, "first_call": first_call, "unavailable": unavailable}


def _outputs(contestant: Contestant, x: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of the inputs, if there are any.

    No node of autograd outlives the call: nodes of parameters belong to the stream that was current when they were
    made, and a CUDA graph in which another contestant is captured on another stream could not contain them.
    """
    y = contestant.run(x)
    return [y.detach(), *(torch.autograd.grad(y, inputs, grad.to(y.dtype)) if inputs else [])]


def _error(a: Tensor, exact: Tensor) -> float:
    error = float((a.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max())
    return math.inf if math.isnan(error) else error


def _reference(point: Point, x: Tensor, parameters: list[Tensor]) -> Tensor:
    """numsru.SRU in plain torch; parameters are weight and bias of each layer in turn."""
    D, H = point.num_directions, point.hidden_size
    if point.L > LONG and is_square(
        point
    ):  # thousands of steps one after the other take too long; `scan` is tested against the reference
        (weight, bias) = parameters
        return scan(x, weight, bias)
    for weight, bias in zip(parameters[0::2], parameters[1::2], strict=True):
        u = F.linear(x, weight).view(point.L, point.B, D, -1, H)
        # In pieces where it can be: the time that the gradient of u[t] takes grows with the length of u.
        steps = point.L if D == 2 else PIECE
        c, pieces = None, []
        for u_piece, x_piece in zip(u.split(steps), x.split(steps), strict=True):
            h, c = reference.sru_recurrence(u_piece, x_piece if u.shape[3] == 3 else None, bias, c)
            pieces.append(h)
        x = torch.cat(pieces)
    return x


def recurrence_calls(
    point: Point, settings: Settings, direction: str, copies: int
) -> dict[str, Callable[[], list[Call]]]:
    """What prepares the recurrence of the last layer alone, "forward" or "backward", on each of several inputs.

    numsru's kernel; the plain fused one, where it can; a copy that moves as many bytes as the recurrence has to.
    """
    L, B, D, H = point.L, point.B, point.num_directions, point.hidden_size
    K = 3 if point.input_sizes[-1] == point.output_size else 4

    def prepare(form: Callable[..., Tensor]) -> list[Call]:
        calls: list[Call] = []
        for _ in range(copies):
            arrays = [settings.randn(L, B, D, K, H), settings.randn(L, B, D * H) if K == 3 else None]
            arrays.append(torch.randn(D, 2, H, device=settings.device))  # of the dtype that is computed in
            calls.append(_forward_call(form, arrays) if direction == "forward" else _backward_call(form, arrays))
        return calls

    forms: dict[str, Callable[..., Tensor]] = {"numsru": lambda *arrays: numsru.sru_recurrence(*arrays)[0]}
    if (K, D) == (3, 1):
        forms["sequential kernel"] = sequential.sru_recurrence
    found = {name: lambda form=form: prepare(form) for name, form in forms.items()}
    size = recurrence_bytes(point, settings.element_size, direction)
    return found | {"copy": lambda: [copy_call(size, settings) for _ in range(copies)]}


def _forward_call(form: Callable[..., Tensor], arrays: list[Tensor | None]) -> Call:
    def call() -> None:
        with torch.no_grad():
            form(*arrays)

    return call


def _backward_call(form: Callable[..., Tensor], arrays: list[Tensor | None]) -> Call:
    inputs = [a.requires_grad_() for a in arrays if a is not None]
    h = form(*arrays)
    grad = torch.randn_like(h)
    return lambda: torch.autograd.grad(h, inputs, grad, retain_graph=True)


def host_calls(settings: Settings) -> tuple[dict[str, Call], dict[str, Call]]:
    """Calls on so little that a GPU waits for the host, without and with gradients.

    A product, numsru's layer, recurrence and launch.
    """
    from numsru import cuda_launch  # imported late: numba.cuda is of no use to those without a GPU

    L, B, d = 4, 2, 64
    point = Point(L, B, d, d)
    base, rnn = sru(point, settings)
    x, weight = settings.randn(L, B, d), rnn.weight_l0
    u, bias = settings.randn(L, B, 1, 3, d), torch.zeros(1, 2, d, device=settings.device)
    leaf, grad = settings.randn(L, B, d).requires_grad_(), settings.randn(L, B, d)
    launches: list[tuple[Any, ...]] = []
    with mock.patch.object(cuda_launch, "launch", lambda *arguments: launches.append(arguments)), torch.no_grad():
        numsru.sru_recurrence(u, x, bias)

    def step() -> None:
        torch.autograd.grad(base.run(leaf), [leaf, *base.parameters], grad)

    without_gradients = {
        "F.linear": lambda: F.linear(x, weight),
        BASE: lambda: base.run(x),
        "numsru.sru_recurrence": lambda: numsru.sru_recurrence(u, x, bias),
        "launch of a kernel": lambda: cuda_launch.launch(*launches[0]),
    }
    return without_gradients, {f"{BASE}, forward with gradients": lambda: base.run(leaf), f"{BASE}, {PASSES[1]}": step}


def streaming_calls(B: int, d: int, settings: Settings) -> dict[str, Call]:
    """One step of a cell on B rows and d units, its state carried on; and one F.linear of the size of an SRU's."""
    kwargs: dict[str, Any] = {"device": settings.device, "dtype": settings.torch_dtype}
    x, weight = settings.randn(B, d), settings.randn(3 * d, d)
    sru_cell, gru_cell, lstm_cell = (cell(d, d, **kwargs) for cell in (numsru.SRUCell, nn.GRUCell, nn.LSTMCell))
    state = {"c": settings.randn(B, d), "h": settings.randn(B, d), "hc": (settings.randn(B, d), settings.randn(B, d))}

    def step_sru() -> None:
        _, state["c"] = sru_cell(x, state["c"])

    def step_gru() -> None:
        state["h"] = gru_cell(x, state["h"])

    def step_lstm() -> None:
        state["hc"] = lstm_cell(x, state["hc"])

    return {
        "numsru.SRUCell": step_sru,
        "nn.LSTMCell": step_lstm,
        "nn.GRUCell": step_gru,
        "F.linear": lambda: F.linear(x, weight),
    }


def measure(
    found: list[Contestant], point: Point, settings: Settings, training: bool, base: str = BASE
) -> dict[str, Any]:
    """Check the contestants at a point, then time them: one entry of a result."""
    checked = check(found, point, settings, training, base)
    unavailable = checked.pop("unavailable")
    with torch.set_grad_enabled(training):
        calls = {c.name: timed(c, settings, training) for c in found if c.name not in unavailable}
        timings = compare(calls, settings, base)
    timings["unavailable"] |= unavailable
    return {"point": point.name, "pass": PASSES[training]} | checked | timings
