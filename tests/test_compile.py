"""`torch.compile` and the operators that it sees: one graph for all lengths, the eager outputs and gradients."""

import shutil

import pytest
import torch
from cases import Case, assert_agrees, run_and_grads
from torch._dynamo.testing import CompileCounterWithBackend

import numsru
from numsru import SRU, SRUCell, compat, operators, sru_recurrence
from numsru.recurrence import LENGTHS, MASK, NO_PADDING, PACKED, TANH

F64 = torch.float64

# From inside torch: its compilers import what they deprecate.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("DeprecationWarning", "FutureWarning")]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()


def compiled(function):
    """`function` as one graph for all sizes, and what counts how often that was compiled."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=True), counter


RECURRENCES = [
    Case(D=D, version=version, highway=highway, nonlinearity="selu", mask_c=mask_c, padding=padding, scale_x=1.3)
    for D, version, highway, mask_c, padding in (
        (1, 1, "input", False, "none"),
        (2, 2, "input", True, "none"),
        (2, 1, "projected", True, "lengths"),
        (1, 2, "none", False, "mask"),
        (2, 2, "projected", False, "packed"),
    )
] + [Case(dtype=torch.float32, H=33, c_0=False), Case(placement="highway", mask_c=True, padding="lengths")]


@pytest.mark.parametrize("case", RECURRENCES, ids=str)
def test_compiled_recurrence_has_the_bits_of_eager(case):
    (function, counter), compilations = compiled(sru_recurrence), []
    for L, B in ((7, 6), (20, 9)):  # no B = K, which a compiler would take for one size
        inputs, grads = case._replace(L=L, B=B).make_inputs()
        expected = run_and_grads(sru_recurrence, inputs, grads)
        assert_agrees(run_and_grads(function, inputs, grads), expected, 0)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[1] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_compiled_recurrence_of_16_bits_has_the_bits_of_eager(dtype):
    inputs, grads = Case(dtype=torch.float32, D=2).make_inputs()
    for name in ("u", "x"):
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    expected = run_and_grads(sru_recurrence, inputs, grads)
    assert_agrees(run_and_grads(compiled(sru_recurrence)[0], inputs, grads), expected, 0)


MODULES = {
    "one layer": {},
    "equal sizes": {"hidden_size": 6, "num_layers": 2},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "version 2": {"version": 2, "num_layers": 2, "bidirectional": True},
    "no highway": {"highway": False, "bias": False},
    "rescale": {"rescale": True, "highway_bias": -1.0, "hidden_size": 6},
    "pre norm": {"layer_norm": "pre", "num_layers": 2},
    "post norm": {"layer_norm": "post", "num_layers": 2},
    "projection": {"projection_size": 2, "num_layers": 2},
    "relu": {"nonlinearity": "relu"},
}
PADDINGS = {
    "full": lambda L, B: {},
    "lengths": lambda L, B: {"lengths": torch.arange(B) * L // (B - 1)},
    "mask_pad": lambda L, B: {"mask_pad": torch.arange(L * B).view(L, B) % 3 == 0},
}


def make(name, **changes):
    torch.manual_seed(0)
    return SRU(**({"input_size": 6, "hidden_size": 4, "dtype": F64} | MODULES[name] | changes))


def outputs_and_gradients(module, call, inputs, grads):
    """output, c_n and the gradients of the inputs and parameters, by name."""
    output, c_n = call()
    tensors = inputs | dict(module.named_parameters())
    values = torch.autograd.grad((output, c_n), list(tensors.values()), grads)
    return {"output": output, "c_n": c_n} | {f"grad of {n}": g for n, g in zip(tensors, values, strict=True)}


@pytest.mark.parametrize(
    ("name", "padding"),
    [(name, "lengths") for name in MODULES] + [("bidirectional", "full"), ("version 2", "mask_pad")],
)
def test_compiled_training_matches_eager(name, padding):
    rnn = make(name)
    (function, counter), compilations = compiled(rnn), []
    for L, B in ((7, 3), (20, 5)):
        x = torch.randn(L, B, 6, dtype=F64, requires_grad=True)
        c_0 = torch.randn(rnn.num_layers * rnn.num_directions, B, rnn.hidden_size, dtype=F64, requires_grad=True)
        given, inputs = PADDINGS[padding](L, B), {"x": x, "c_0": c_0}
        grads = [torch.randn(L, B, rnn.num_directions * rnn.hidden_size, dtype=F64), torch.randn_like(c_0)]
        # Eager code computes valid steps alone, as the compiled graph cannot: products differ by rounding.
        torch.testing.assert_close(
            outputs_and_gradients(rnn, lambda: function(x, c_0, **given), inputs, grads),  # noqa: B023
            outputs_and_gradients(rnn, lambda: rnn(x, c_0, **given), inputs, grads),  # noqa: B023
            rtol=1e-12,
            atol=1e-12,
        )
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[1] > 0


@pytest.mark.parametrize(
    ("name", "padding"), [("bidirectional", "full"), ("version 2", "lengths"), ("post norm", "mask_pad")]
)
def test_compiled_inference_matches_eager(name, padding):
    rnn = make(name).eval()
    (function, counter), compilations = compiled(rnn), []
    with torch.no_grad():
        for L, B in ((7, 3), (20, 5)):
            x, given = torch.randn(L, B, 6, dtype=F64), PADDINGS[padding](L, B)
            torch.testing.assert_close(function(x, **given), rnn(x, **given), rtol=1e-12, atol=1e-12)
            compilations.append(counter.frame_count)
    assert compilations[0] == compilations[1] > 0


@pytest.mark.parametrize("rnn_dropout", [0.0, 0.5])
def test_sequences_end_to_end_compile(rnn_dropout):
    rnn, x = make("bidirectional", rnn_dropout=rnn_dropout), torch.randn(11, 6, dtype=F64)
    if rnn_dropout:
        output, _ = compiled(rnn)[0](x, cu_seqlens=torch.tensor([0, 4, 4, 11]))
        assert output.isfinite().all()
        rnn.eval()
    function, cu_seqlens = compiled(rnn)[0], torch.tensor([0, 4, 4, 11])
    torch.testing.assert_close(function(x, cu_seqlens=cu_seqlens), rnn(x, cu_seqlens=cu_seqlens), rtol=0, atol=0)


FORMS = {
    "batch_first": (SRU(6, 4, batch_first=True), torch.randn(3, 7, 6), {}),
    "unbatched": (SRU(6, 4), torch.randn(7, 6), {"lengths": 5}),
    "lengths in a list": (SRU(6, 4), torch.randn(7, 3, 6), {"lengths": [7, 0, 3]}),
    "one step": (SRU(6, 4), torch.randn(1, 3, 6), {}),
    "cell": (SRUCell(6, 4), torch.randn(3, 6), {"c": torch.randn(3, 4)}),
    "cell unbatched": (SRUCell(6, 4), torch.randn(6), {}),
    "compat": (compat.SRU(6, 3, 2, bidirectional=True, rescale=True, layer_norm=True), torch.randn(7, 3, 6), {}),
    "compat mask": (compat.SRU(6, 6, rescale=True), torch.randn(7, 3, 6), {"mask_pad": torch.rand(7, 3) < 0.3}),
    "compat version 1": (compat.SRU(6, 4, v1=True, projection_size=2), torch.randn(7, 3, 6), {}),
    "compat custom_m": (compat.SRU(6, 6, 1, custom_m=torch.nn.Linear(6, 18)), torch.randn(7, 3, 6), {}),
    "compat cell": (compat.SRUCell(6, 4), torch.randn(3, 6), {}),
    "SRU++": (compat.SRUpp(6, 4, 4, 2), torch.randn(7, 3, 6), {}),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_call_compiles_into_one_graph(name):
    module, x, given = FORMS[name]
    function = compiled(module)[0]
    torch.testing.assert_close(function(x, **given)[:2], module(x, **given)[:2])
    with torch.no_grad():
        torch.testing.assert_close(function(x, **given)[:2], module(x, **given)[:2])


def dropout_rnn(**options):
    """h is 0 where a unit is dropped, in the first layer or in the input, and nowhere else."""
    rnn = SRU(64, 64, highway=False, nonlinearity="identity", **options)
    with torch.no_grad():
        for i in range(rnn.num_layers):
            getattr(rnn, f"weight_l{i}").zero_()[:64] = torch.eye(64)
    return rnn


@pytest.mark.parametrize(
    "options", [{"rnn_dropout": 0.4}, {"dropout": 0.4, "num_layers": 2}], ids=lambda o: next(iter(o))
)
def test_compiled_dropout_is_shared_over_time(options):
    output, _ = compiled(dropout_rnn(**options))[0](torch.ones(5, 100, 64))
    dropped = output == 0
    assert (dropped == dropped[0]).all()
    assert dropped[0].double().mean().item() == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bidirectional", torch.bfloat16),
        ("equal sizes", torch.float16),
        ("version 2", torch.bfloat16),
        ("pre norm", torch.float16),
    ],
    ids=str,
)
def test_compiled_autocast_matches_eager(name, dtype):
    rnn, x = make(name, dtype=torch.float32), torch.randn(7, 3, 6)
    c_0 = torch.zeros(rnn.num_layers * rnn.num_directions, 3, rnn.hidden_size)
    function = compiled(rnn)[0]
    with torch.autocast("cpu", dtype):
        received, expected = function(x, c_0), rnn(x, c_0)
    assert (received[0].dtype, received[1].dtype) == (dtype, torch.float32)
    torch.testing.assert_close(received, expected, rtol=0, atol=0)
    grads = [torch.randn_like(a) for a in received]
    received, expected = (torch.autograd.grad(a, list(rnn.parameters()), grads) for a in (received, expected))
    torch.testing.assert_close(received, expected, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # asked by dynamo
def test_a_packed_sequence_compiles_with_graph_breaks():
    rnn, x = SRU(6, 4, 2), torch.randn(7, 3, 6)

    def model(x, lengths):
        output, _ = rnn(torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
        return output.data  # older releases of torch cannot compile their pad_packed_sequence

    lengths = torch.tensor([4, 7, 1])
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x, lengths), model(x, lengths))


def test_a_compiled_call_checks_the_values_of_lengths():
    function = compiled(SRU(6, 4))[0]
    function(torch.randn(7, 3, 6), lengths=torch.tensor([7, 0, 1]))
    with pytest.raises(ValueError, match="between 0 and L = 7, got 1 to 8"):
        function(torch.randn(7, 3, 6), lengths=torch.tensor([7, 8, 1]))


def test_a_compiled_call_checks_the_values_of_cu_seqlens():
    function = compiled(SRU(6, 4))[0]
    with pytest.raises(ValueError, match="must rise from 0 to total_steps = 7"):
        function(torch.randn(7, 6), cu_seqlens=torch.tensor([0, 5, 3, 7]))


def test_the_backend_may_be_chosen_around_a_compiled_call_as_well_as_inside():
    rnn, x = make("version 2"), torch.randn(5, 2, 6, dtype=F64)
    function = compiled(rnn)[0]
    seen = []

    def inside(x):
        with numsru.use_backend("reference"):
            return rnn(x)

    def backend(graph, _):
        seen.append(str(graph.graph))
        return graph

    expected = function(x)
    with numsru.use_backend("reference"):
        torch.testing.assert_close(function(x), expected)
        torch.compile(rnn, backend=backend, fullgraph=True)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(inside, backend=backend, fullgraph=True)(x), expected)
    torch.compile(rnn, backend=backend, fullgraph=True)(x)
    assert ["numsru" in graph for graph in seen] == [False, False, True]


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler for inductor")
@pytest.mark.parametrize("name", ["bidirectional", "version 2"])
def test_inductor_matches_eager(name):
    rnn = make(name)
    function = torch.compile(rnn, fullgraph=True, dynamic=True)
    for L, B in ((7, 3), (20, 5)):
        x = torch.randn(L, B, 6, dtype=F64, requires_grad=True)
        lengths, grad = torch.arange(B) * L // (B - 1), torch.randn(L, B, 2 * rnn.hidden_size, dtype=F64)
        received, expected = function(x, lengths=lengths), rnn(x, lengths=lengths)
        torch.testing.assert_close(received, expected, rtol=1e-12, atol=1e-12)
        inputs = [x, *rnn.parameters()]
        received, expected = (torch.autograd.grad(a[0], inputs, grad) for a in (received, expected))
        torch.testing.assert_close(received, expected, rtol=1e-12, atol=1e-12)


# Every row of the kept states is written: an operator's test compares all that it returns, and some is not looked at.
OPERATORS = [
    Case(dtype=torch.float32),
    Case(D=2, version=2, mask_c=True, padding="lengths"),
    Case(D=2, highway="projected", padding="packed", B=1),
    Case(highway="none", padding="mask", c_0=False),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", OPERATORS, ids=str)
def test_operators_pass_opcheck(case, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs, grads = case.make_inputs()
    if case.padding == "lengths":
        inputs["lengths"] = torch.tensor([7, 3, 1])
    for given in (inputs, grads):
        for name, a in given.items():
            if isinstance(a, torch.Tensor):
                given[name] = a.detach().to(device).requires_grad_(a.requires_grad)
    valid = next((inputs[name] for name in ("lengths", "mask_pad", "cu_seqlens") if name in inputs), None)
    padding = {"none": NO_PADDING, "lengths": LENGTHS, "mask": MASK, "packed": PACKED}[case.padding]
    options = (case.scale_x, TANH, 0, padding)
    names = ("u", "x", "bias", "c_0", "weight_c", "mask_c")
    args = (*(inputs.get(name) for name in names), valid, *options, True)
    torch.library.opcheck(torch.ops.numsru.recurrence.default, args)
    saved = torch.ops.numsru.recurrence(*args)[2]
    tensors = (inputs["u"], inputs["x"], inputs["bias"], inputs["weight_c"], inputs.get("mask_c"), valid, saved)
    args = (*grads.values(), *(None if a is None else a.detach() for a in tensors), *options)
    torch.library.opcheck(torch.ops.numsru.recurrence_backward.default, args)


def test_gradients_through_an_operator_that_kept_nothing_are_refused():
    inputs, _ = Case().make_inputs()
    names = ("u", "x", "bias", "c_0", "weight_c", "mask_c", "valid")
    h, _, _ = torch.ops.numsru.recurrence(*map(inputs.get, names), 1.0, TANH, 0, NO_PADDING, False)
    with pytest.raises(RuntimeError, match="save_c=True"):
        h.sum().backward()


def test_operators_have_no_kernels_for_other_devices(monkeypatch):
    u, bias = torch.empty(2, 2, 1, 3, 4), torch.empty(1, 2, 4)
    args = (u, None, bias, None, None, None, None, 1.0, TANH, 0, NO_PADDING, False)
    h, c_n, _ = torch.ops.numsru.recurrence(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    assert (h.shape, c_n.shape) == ((2, 2, 4), (2, 4))  # the meta device knows shapes alone
    monkeypatch.setattr(operators, "kernels_for", lambda device_type: None)  # as for an Apple GPU
    with pytest.raises(NotImplementedError, match="numsru has no kernels for cpu"):
        torch.ops.numsru.recurrence(*args)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bias": torch.zeros(1, 2, 4)},
        {"bias": torch.zeros(1, 2, 8, dtype=torch.float64)},
        {"x": torch.zeros(4, 3, 4)},
        {"c_0": torch.zeros(3, 4)},
        {"weight_c": torch.zeros(1, 2, 4)},
        {"mask_c": torch.zeros(2, 8)},
        {"u": torch.zeros(4, 3, 1, 2, 8)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_operators_check_what_they_read(wrong):
    given = {
        "u": torch.zeros(4, 3, 1, 3, 8), "x": torch.zeros(4, 3, 8), "bias": torch.zeros(1, 2, 8), "c_0": None,
        "weight_c": None, "mask_c": None, "valid": None,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(wrong))} must "):
        torch.ops.numsru.recurrence(*(given | wrong).values(), 1.0, 1, 0, 0, True)
    h, c_n, saved = torch.ops.numsru.recurrence(*given.values(), 1.0, 1, 0, 0, True)
    rest = given["u"], given["x"], given["bias"], None, None, None
    for grads in ((h[:2], c_n), (h, c_n[:2])):
        with pytest.raises(ValueError, match="must have shape"):
            torch.ops.numsru.recurrence_backward(*grads, *rest, saved, 1.0, 1, 0, 0)
    with pytest.raises(ValueError, match="saved must have shape"):
        torch.ops.numsru.recurrence_backward(h, c_n, *rest, saved[:1], 1.0, 1, 0, 0)


def test_operators_check_the_values_of_lengths():
    u, bias, lengths = torch.zeros(4, 3, 1, 3, 8), torch.zeros(1, 2, 8), torch.tensor([4, 0, 5])
    with pytest.raises(ValueError, match="between 0 and L = 4, got 0 to 5"):
        torch.ops.numsru.recurrence(u, None, bias, None, None, None, lengths, 1.0, TANH, 0, LENGTHS, True)
    h, c_n, saved = torch.ops.numsru.recurrence(u, None, bias, None, None, None, None, 1.0, TANH, 0, NO_PADDING, True)
    with pytest.raises(ValueError, match="between 0 and L = 4, got 0 to 5"):
        torch.ops.numsru.recurrence_backward(h, c_n, u, None, bias, None, None, lengths, saved, 1.0, TANH, 0, LENGTHS)


def test_a_transform_inside_of_a_graph_is_refused():
    rnn = SRU(4, 4)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def gradient(x):
        return torch.func.grad(lambda x: rnn(x)[0].sum())(x)

    message = r"torch\.func cannot transform numsru's operators"
    with pytest.raises(Exception, match="raised exception" if torch.__version__.startswith("2.8.") else message):
        gradient(torch.randn(5, 3, 4))
