"""`numsru.SRU` and `numsru.SRUCell`: shapes, layers, directions, padding, dropout, parameters, errors."""

import copy
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import numsru
from numsru import SRU, SRUCell, autograd, cpu_kernels, nn, products, reference
from numsru import padding as padding_module

F64 = torch.float64

MODULES = {
    "one layer": {},
    "layers": {"num_layers": 3},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "equal sizes": {"hidden_size": 6, "num_layers": 2},
    "equal sizes bidirectional": {"hidden_size": 3, "num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
    "no highway": {"highway": False, "num_layers": 2},
    "highway bias": {"highway_bias": -2.0},
    "rescale": {"rescale": True, "highway_bias": -1.0, "num_layers": 2},
    "rescale equal sizes": {"rescale": True, "highway_bias": -1.0, "hidden_size": 6},
    "relu": {"nonlinearity": "relu"},
    "selu": {"nonlinearity": "selu"},
    "identity": {"nonlinearity": "identity"},
    "version 2": {"version": 2, "num_layers": 2, "bidirectional": True},
    "pre norm": {"layer_norm": "pre", "num_layers": 2},
    "post norm": {"layer_norm": "post", "num_layers": 2},
    "projection": {"projection_size": 2, "num_layers": 2},
}


def make(name, **changes):
    torch.manual_seed(0)
    options = {"input_size": 6, "hidden_size": 4, "dtype": F64} | MODULES[name] | changes
    rnn = SRU(**options)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return rnn


def by_hand(rnn, x, c_0=None, mask_pad=None):
    """The module's forward in plain torch, from its documentation alone. x is (L, B, in)."""
    L, B, _ = x.shape
    D, H = 2 if rnn.bidirectional else 1, rnn.hidden_size
    scale = math.sqrt(1 + 2 * math.exp(rnn.highway_bias)) if rnn.rescale else 1.0
    states = []
    for i in range(rnn.num_layers):
        p = {n.removesuffix(f"_l{i}"): a for n, a in rnn.named_parameters() if n.endswith(f"_l{i}")}
        norm = getattr(rnn, f"layer_norm_l{i}", None)
        v = norm(x) if rnn.layer_norm == "pre" else x
        weight = p["weight"] @ p["weight_proj"] if "weight_proj" in p else p["weight"]
        K = weight.shape[0] // (D * H)
        c = None if c_0 is None else torch.cat(list(c_0[i * D : (i + 1) * D]), dim=1)
        h, c = reference.sru_recurrence(
            (v @ weight.T).view(L, B, D, K, H),
            x if K == 3 and rnn.highway else None,
            p.get("bias"),
            c,
            weight_c=p.get("weight_c"),
            mask_pad=mask_pad,
            scale_x=scale,
            nonlinearity=rnn.nonlinearity,
        )
        x = norm(h) if rnn.layer_norm == "post" else h
        if mask_pad is not None:
            x = x.masked_fill(mask_pad[..., None], 0)
        states += c.split(H, dim=1)
    return x, torch.stack(states)


@pytest.mark.parametrize("padded", ["full", "host", "device"])
@pytest.mark.parametrize("name", MODULES)
def test_module_matches_the_reference_with_all_gradients(monkeypatch, name, padded):
    monkeypatch.setattr(numsru.padding, "is_on_host", lambda a: padded == "host")
    rnn = make(name)
    x = torch.randn(7, 3, 6, dtype=F64, requires_grad=True)
    D = 2 if rnn.bidirectional else 1
    c_0 = torch.randn(rnn.num_layers * D, 3, rnn.hidden_size, dtype=F64, requires_grad=True)
    mask_pad = None if padded == "full" else torch.rand(7, 3) < 0.3
    inputs = [x, c_0, *rnn.parameters()]
    grads = [torch.randn(7, 3, D * rnn.hidden_size, dtype=F64), torch.randn_like(c_0)]
    received = rnn(x, c_0, mask_pad=mask_pad)
    expected = by_hand(rnn, x, c_0, mask_pad)
    torch.testing.assert_close(received, expected)
    names = ["x", "c_0", *(n for n, _ in rnn.named_parameters())]
    received = dict(zip(names, torch.autograd.grad(received, inputs, grads), strict=True))
    expected = dict(zip(names, torch.autograd.grad(expected, inputs, grads), strict=True))
    torch.testing.assert_close(received, expected)


@pytest.mark.parametrize("B", [0, 1, 3])
@pytest.mark.parametrize("L", [0, 1, 5])
@pytest.mark.parametrize("name", ["layers", "bidirectional"])
def test_shapes_are_those_of_gru(name, L, B):
    # torch.nn.GRU refuses L = 0.
    output, h_n = torch.nn.GRU(6, 4, **MODULES[name])(torch.zeros(max(L, 1), B, 6))
    expected = output[:L].shape, h_n.shape
    assert tuple(a.shape for a in make(name)(torch.randn(L, B, 6, dtype=F64))) == expected


@pytest.mark.parametrize("layers", [1, 2])
def test_results_are_contiguous_as_those_of_gru(layers):
    for a in SRU(6, 4, layers, bidirectional=True)(torch.randn(5, 3, 6)):
        assert a.is_contiguous()


def test_empty_sequence_returns_the_initial_state():
    c_0 = torch.randn(4, 3, 4, dtype=F64)
    output, c_n = make("bidirectional")(torch.zeros(0, 3, 6, dtype=F64), c_0)
    assert output.shape == (0, 3, 8)
    torch.testing.assert_close(c_n, c_0, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["layers", "bidirectional"])
def test_batch_first_is_the_transpose(name):
    x, c_0 = (
        torch.randn(7, 3, 6, dtype=F64),
        torch.randn(len(make(name)(torch.zeros(1, 3, 6, dtype=F64))[1]), 3, 4, dtype=F64),
    )
    mask_pad = torch.rand(7, 3) < 0.3
    output, c_n = make(name)(x, c_0, mask_pad=mask_pad)
    transposed, c_n_transposed = make(name, batch_first=True)(x.transpose(0, 1), c_0, mask_pad=mask_pad.t())
    torch.testing.assert_close(transposed.transpose(0, 1), output, rtol=0, atol=0)
    torch.testing.assert_close(c_n_transposed, c_n, rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "padding", [{}, {"lengths": 5}, {"mask_pad": torch.arange(7) % 3 == 1}], ids=["full", "lengths", "mask"]
)
def test_unbatched_input_is_a_batch_of_one(padding, batch_first):
    rnn = make("bidirectional", batch_first=batch_first)
    x, c_0 = torch.randn(7, 6, dtype=F64), torch.randn(4, 4, dtype=F64)
    dim = 0 if batch_first else 1
    batched = {"lengths": [5]} if "lengths" in padding else {n: m.unsqueeze(dim) for n, m in padding.items()}
    output, c_n = rnn(x, c_0, **padding)
    expected, c_expected = rnn(x.unsqueeze(dim), c_0.unsqueeze(1), **batched)
    torch.testing.assert_close(output, expected.squeeze(dim), rtol=0, atol=0)
    torch.testing.assert_close(c_n, c_expected.squeeze(1), rtol=0, atol=0)


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("name", ["layers", "bidirectional"])
def test_packed_sequence_matches_lengths(name, enforce_sorted):
    rnn = make(name)
    lengths = torch.tensor([7, 4, 1]) if enforce_sorted else torch.tensor([4, 1, 7])
    x, c_0 = torch.randn(7, 3, 6, dtype=F64), torch.randn(3 if name == "layers" else 4, 3, 4, dtype=F64)
    packed, c_n = rnn(pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted), c_0)
    assert isinstance(packed, PackedSequence)
    output, unpacked_lengths = pad_packed_sequence(packed)
    torch.testing.assert_close(unpacked_lengths, lengths)
    expected = rnn(x, c_0, lengths=lengths)
    torch.testing.assert_close((output, c_n), expected, rtol=0, atol=0)


def test_packed_output_has_the_layout_of_gru():
    x = pack_padded_sequence(torch.randn(7, 3, 6), torch.tensor([4, 7, 1]), enforce_sorted=False)
    received, expected = SRU(6, 4)(x)[0], torch.nn.GRU(6, 4)(x)[0]
    assert received.data.shape == expected.data.shape
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        torch.testing.assert_close(getattr(received, field), getattr(expected, field))


@pytest.mark.parametrize(
    "lengths",
    [*(torch.tensor([7, 0, 3], dtype=dtype) for dtype in (torch.int64, torch.int32, torch.uint64)), [7, 0, 3]],
)
def test_lengths_equal_a_mask(lengths):
    rnn, x = make("bidirectional"), torch.randn(7, 3, 6, dtype=F64)
    mask_pad = torch.arange(7)[:, None] >= torch.tensor([7, 0, 3])
    torch.testing.assert_close(rnn(x, lengths=lengths), rnn(x, mask_pad=mask_pad), rtol=0, atol=0)


@pytest.fixture(params=["host", "device"])
def where_padding_is(request, monkeypatch):
    """Padding that is known on the host, or that takes the way of a device: kept, masked, skipped by the kernels."""
    monkeypatch.setattr(numsru.padding, "is_on_host", lambda a: request.param == "host")


@pytest.mark.usefixtures("where_padding_is")
@pytest.mark.parametrize("name", ["layers", "bidirectional", "post norm", "pre norm"])
def test_nan_in_padding_reaches_neither_outputs_nor_gradients(name):
    rnn, x = make(name), torch.randn(7, 3, 6, dtype=F64)
    lengths = torch.tensor([7, 4, 0])
    x[torch.arange(7)[:, None] >= lengths] = float("nan")
    output, c_n = rnn(x.requires_grad_(), lengths=lengths)
    (output.square().sum() + c_n.sum()).backward()
    assert not output[4:, 1].any()
    for a in (output, c_n, x.grad, *(p.grad for p in rnn.parameters())):
        assert a.isfinite().all()


@pytest.mark.parametrize("name", MODULES)
def test_sequences_end_to_end_match_padded_ones(name):
    rnn, sizes = make(name), [4, 0, 7]
    x = torch.randn(7, 3, 6, dtype=F64)
    D = 2 if rnn.bidirectional else 1
    c_0 = torch.randn(rnn.num_layers * D, 3, rnn.hidden_size, dtype=F64)
    together = torch.cat([x[:n, b] for b, n in enumerate(sizes)])
    output, c_n = rnn(together, c_0, cu_seqlens=torch.tensor([0, 4, 4, 11]))
    expected, c_expected = by_hand(rnn, x, c_0, torch.arange(7)[:, None] >= torch.tensor(sizes))
    torch.testing.assert_close(output, torch.cat([expected[:n, b] for b, n in enumerate(sizes)]))
    torch.testing.assert_close(c_n, c_expected)


@pytest.mark.parametrize("given", ["lengths", "mask_pad", "packed"])
def test_only_valid_steps_are_computed_where_padding_is_known_on_the_host(monkeypatch, given):
    rows = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda v, w: rows.append(v.shape[:-1].numel()) or linear(v, w))
    x, lengths = torch.randn(7, 3, 6, dtype=F64), torch.tensor([7, 1, 2])
    mask_pad = torch.arange(7)[:, None] >= lengths
    if given == "packed":
        make("layers")(pack_padded_sequence(x, lengths, enforce_sorted=False))
    else:
        make("layers")(x, **{given: {"lengths": lengths, "mask_pad": mask_pad}[given]})
    assert rows == [10, 10, 10]


def test_input_dropout_of_sequences_end_to_end_is_shared_over_time():
    rnn = make("identity", rnn_dropout=0.5, highway=False)
    with torch.no_grad():
        rnn.weight_l0.copy_(torch.randn_like(rnn.weight_l0))
    step = torch.randn(2, 1, 6, dtype=F64)
    x = step.expand(2, 5, 6)[[0, 1]].reshape(10, 6)
    torch.manual_seed(5)
    together, _ = rnn(x, cu_seqlens=torch.tensor([0, 5, 10]))
    torch.manual_seed(5)
    padded, _ = rnn(step.expand(2, 5, 6).transpose(0, 1))
    torch.testing.assert_close(together.view(2, 5, -1).transpose(0, 1), padded)


def test_rows_of_a_batch_do_not_see_each_other():
    rnn, x = make("bidirectional"), torch.randn(7, 3, 6, dtype=F64)
    output, c_n = rnn(x)
    alone, c_alone = rnn(x[:, 1:2])
    torch.testing.assert_close(alone, output[:, 1:2])
    torch.testing.assert_close(c_alone, c_n[:, 1:2])


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_carrying_the_state_continues_the_sequence(cut):
    rnn, x = make("layers"), torch.randn(7, 3, 6, dtype=F64)
    output, c_n = rnn(x)
    first, c = rnn(x[:cut])
    second, c = rnn(x[cut:], c)
    torch.testing.assert_close(torch.cat([first, second]), output, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(c, c_n, rtol=1e-14, atol=1e-14)


def test_cell_takes_the_parameters_of_a_layer():
    rnn = make("one layer")
    cell = SRUCell(6, 4, dtype=F64)
    cell.load_state_dict(rnn.state_dict())
    x = torch.randn(5, 3, 6, dtype=F64)
    output, c_n = rnn(x)
    c = None
    for t in range(5):
        h, c = cell(x[t], c)
        torch.testing.assert_close(h, output[t])
    torch.testing.assert_close(c, c_n[0])


def test_cell_takes_an_input_without_a_batch():
    cell, x, c = SRUCell(6, 4), torch.randn(3, 6), torch.randn(3, 4)
    h, c_n = cell(x, c)
    torch.testing.assert_close(cell(x[1], c[1]), (h[1], c_n[1]))


def dropout_share(values):
    """The share of zeros, after checking that a unit's mask is the same at every step."""
    dropped = values == 0
    assert (dropped == dropped[0]).all()
    return dropped[0].double().mean()


def test_state_dropout_spares_the_highway_at_the_paper_placement():
    # A reset gate wide open: h = m g(c) in layer 0, which the second layer, without a highway, cannot restore.
    rnn = SRU(64, 64, num_layers=2, dropout=0.3)
    with torch.no_grad():
        rnn.bias_l0[:, 1] = 50
    seen = []
    layer = rnn._layer
    rnn._layer = lambda *args: seen.append(layer(*args)) or seen[-1]
    x = torch.randn(5, 100, 64)
    rnn(x)
    assert dropout_share(seen[0][0]) == pytest.approx(0.3, abs=0.03)
    assert not (seen[0][1] == 0).any()  # the state itself is never dropped
    assert not (seen[1][0] == 0).any()  # the last layer is not dropped
    with torch.no_grad():
        rnn.bias_l0[:, 1] = -50
    seen.clear()
    rnn(x)
    torch.testing.assert_close(seen[0][0], x)


def test_dropped_units_pass_the_highway_input_at_the_highway_placement():
    rnn = SRU(64, 64, num_layers=2, dropout=0.3, dropout_placement="highway")
    with torch.no_grad():
        rnn.bias_l0[:, 1] = 50
    seen = []
    layer = rnn._layer
    rnn._layer = lambda *args: seen.append(layer(*args)) or seen[-1]
    x = torch.randn(5, 100, 64)
    rnn(x)
    assert dropout_share(seen[0][0] - x) == pytest.approx(0.3, abs=0.03)


def test_input_dropout_is_shared_over_time(monkeypatch):
    rnn = SRU(64, 64, rnn_dropout=0.4)
    multiplied = []
    monkeypatch.setattr(autograd, "product", lambda v, w: multiplied.append(v) or v @ w.t())
    rnn(torch.ones(5, 100, 64))
    (v,) = multiplied
    assert dropout_share(v.view(5, 100, 64)) == pytest.approx(0.4, abs=0.03)
    assert v.max() == pytest.approx(1 / 0.6)


@pytest.mark.parametrize("option", ["dropout", "rnn_dropout"])
def test_dropout_is_off_in_eval_mode(option):
    rnn = make("layers", **{option: 0.5})
    x = torch.randn(7, 3, 6, dtype=F64)
    torch.testing.assert_close(rnn.eval()(x), make("layers")(x), rtol=0, atol=0)
    assert not torch.equal(rnn.train()(x)[0], rnn(x)[0])


def test_gradcheck_with_input_dropout():
    rnn = make("equal sizes", rnn_dropout=0.5, dropout=0.5)

    def run(x, *parameters):
        torch.manual_seed(3)
        return torch.func.functional_call(rnn, dict(zip(names, parameters, strict=True)), x)

    names = [n for n, _ in rnn.named_parameters()]
    x = torch.randn(3, 2, 6, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *rnn.parameters()))


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_round_trip(name):
    rnn, other = make(name), make(name)
    other.reset_parameters()
    other.load_state_dict(rnn.state_dict())
    x = torch.randn(7, 3, 6, dtype=F64)
    torch.testing.assert_close(other(x), rnn(x), rtol=0, atol=0)


def test_deepcopy_is_independent():
    rnn = make("bidirectional")
    twin = copy.deepcopy(rnn)
    with torch.no_grad():
        twin.weight_l0.zero_()
    assert rnn.weight_l0.any()


def test_parameter_shapes_are_as_documented():
    rnn = SRU(10, 8, 2, bidirectional=True, version=2, projection_size=3)
    assert {n: tuple(p.shape) for n, p in rnn.named_parameters()} == {
        "weight_proj_l0": (3, 10), "weight_l0": (2 * 4 * 8, 3), "bias_l0": (2, 2, 8), "weight_c_l0": (2, 2, 8),
        "weight_proj_l1": (3, 16), "weight_l1": (2 * 3 * 8, 3), "bias_l1": (2, 2, 8), "weight_c_l1": (2, 2, 8),
    }  # fmt: skip


def test_product_keeps_the_variance_at_initialisation():
    torch.manual_seed(0)
    weight = SRU(300, 200).weight_l0
    assert weight.abs().max() <= math.sqrt(3 / 300)
    assert weight.var().item() * 300 == pytest.approx(1, rel=0.02)


def test_highway_bias_is_on_the_reset_gate_alone():
    bias = SRU(3, 4, bidirectional=True, highway_bias=-2.5).bias_l0
    assert (bias[:, 0] == 0).all()
    assert (bias[:, 1] == -2.5).all()


def test_version_2_initialisation_divides_gate_weights_by_root_2():
    torch.manual_seed(0)
    weight = SRU(300, 200, version=2).weight_l0.view(4, 200, 300)
    variances = [part.var().item() * 300 for part in weight]
    assert variances == pytest.approx([1, 0.5, 0.5, 1], rel=0.03)


def test_rescale_multiplies_the_skip_matrix_once():
    torch.manual_seed(0)
    weight = SRU(300, 200, rescale=True, highway_bias=-1.0).weight_l0.view(4, 200, 300)
    assert weight[3].var().item() * 300 == pytest.approx(1 + 2 * math.exp(-1), rel=0.03)


def test_repr_names_what_differs_from_the_defaults():
    rnn = SRU(3, 4, 2, batch_first=True, dropout=0.1, bidirectional=True, highway_bias=-1, version=2)
    assert repr(rnn) == (
        "SRU(3, 4, num_layers=2, batch_first=True, dropout=0.1, bidirectional=True, highway_bias=-1.0, version=2)"
    )
    assert repr(SRUCell(3, 4)) == "SRUCell(3, 4)"


def test_parameters_follow_the_dtype_or_device_asked_for():
    assert SRU(3, 4, dtype=F64).weight_l0.dtype == F64
    assert SRU(3, 4, device="meta").weight_l0.device.type == "meta"


SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@SIXTEEN
@pytest.mark.parametrize("name", ["layers", "equal sizes", "bidirectional", "version 2", "pre norm", "post norm"])
def test_autocast_stores_16_bits(name, dtype):
    rnn, x = make(name, dtype=torch.float32), torch.randn(5, 2, 6)
    rnn.train()
    with torch.autocast("cpu", dtype):
        output, c_n = rnn(x)
    assert (output.dtype, c_n.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(output.float(), rnn(x)[0], rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in rnn.parameters())


def test_autocast_leaves_float64_alone():
    rnn, x = make("layers"), torch.randn(5, 2, 6, dtype=F64)
    with torch.autocast("cpu", torch.bfloat16):
        output = rnn(x)[0]
    torch.testing.assert_close(output, rnn(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize(("x", "parameters"), [(F64, torch.float32), (torch.float32, F64)], ids=str)
def test_autocast_does_not_mix_with_float64(x, parameters):
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=f"input must be {parameters} as the parameters are, got {x}"),
    ):
        SRU(6, 4).to(parameters)(torch.zeros(7, 3, 6, dtype=x))


def test_autocast_accepts_what_other_layers_give_in_16_bits():
    rnn, x = SRU(6, 6, 2), torch.randn(5, 2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output, c_n = rnn(x.bfloat16(), torch.zeros(2, 2, 6, dtype=torch.bfloat16))
    assert (output.dtype, c_n.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(output.float(), rnn(x)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("layers", torch.bfloat16),
        ("equal sizes", torch.float16),
        ("version 2", torch.bfloat16),
        ("pre norm", torch.float16),
        ("projection", torch.bfloat16),
    ],
    ids=str,
)
def test_parameters_may_have_16_bits(name, dtype):
    rnn = make(name, dtype=dtype)
    exact = make(name)
    exact.load_state_dict(rnn.state_dict())
    x, lengths = torch.randn(9, 3, 6).to(dtype), torch.tensor([9, 4, 0])
    output, c_n = rnn(x, lengths=lengths)
    assert (output.dtype, c_n.dtype) == (dtype, dtype)
    expected, expected_c = exact(x.double(), lengths=lengths)
    torch.testing.assert_close((output.double(), c_n.double()), (expected, expected_c), rtol=0.03, atol=0.03)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected.backward(grad.double())
    for (parameter, p), q in zip(rnn.named_parameters(), exact.parameters(), strict=True):
        error = (p.grad.double() - q.grad).abs().max() / q.grad.abs().max()
        assert error <= 0.05, f"{parameter}: {error}"
    with torch.no_grad():
        torch.testing.assert_close(rnn(x, lengths=lengths), (output, c_n), rtol=0, atol=0)


@pytest.mark.parametrize("padding", ["lengths", "packed"])
def test_default_device_does_not_matter(padding):
    rnn, x = make("layers"), torch.randn(7, 3, 6, dtype=F64)
    expected, _ = rnn(x, lengths=[7, 4, 1])
    packed = pack_padded_sequence(x, [7, 4, 1])
    with torch.device("meta"):
        received = rnn(packed)[0].data if padding == "packed" else rnn(x, lengths=[7, 4, 1])[0]
    assert received.device == expected.device


CONSTRUCTOR_ERRORS = {
    "hidden_size": ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
    "input_size": ({"input_size": 2.5}, TypeError, "input_size must be an int, got float"),
    "num_layers": ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
    "dropout in the place of bias": ({"bias": 0.2}, TypeError, "bias must be a bool, got 0.2"),
    "dropout": ({"dropout": 1.5}, ValueError, r"dropout must be a probability in \[0, 1\), got 1.5"),
    "rnn_dropout": ({"rnn_dropout": -0.1}, ValueError, "rnn_dropout must be a probability"),
    "version": ({"version": 3}, ValueError, "version must be 1 or 2, got 3"),
    "nonlinearity": ({"nonlinearity": "gelu"}, ValueError, "nonlinearity must be one of .*, got 'gelu'"),
    "placement": ({"dropout_placement": "x"}, ValueError, "dropout_placement must be one of .*, got 'x'"),
    "layer_norm": ({"layer_norm": True}, ValueError, "layer_norm must be one of None, 'pre', 'post', got True"),
    "projection_size": ({"projection_size": -1}, ValueError, "projection_size must be at least 0, got -1"),
    "size of a projection": ({"projection_size": 2.0}, TypeError, "projection_size must be an int, got float"),
    "dropout in a string": ({"dropout": "0.1"}, TypeError, "dropout must be a number, got str"),
    "dtype": ({"dtype": torch.complex64}, TypeError, "dtype must be float32, float64, float16 or bfloat16, got .*64"),
}


@pytest.mark.parametrize("name", CONSTRUCTOR_ERRORS)
def test_constructor_error_says_what_was_expected(name):
    options, error, message = CONSTRUCTOR_ERRORS[name]
    with pytest.raises(error, match=message):
        SRU(**({"input_size": 6, "hidden_size": 4} | options))


X = torch.zeros(7, 3, 6)
FORWARD_ERRORS = {
    "a list": (([1.0],), {}, TypeError, "input must be a Tensor, got list"),
    "4 dimensions": ((torch.zeros(1, 7, 3, 6),), {}, ValueError, "input must have 2 or 3 dimensions"),
    "features": ((torch.zeros(7, 3, 5),), {}, ValueError, r"input_size = 6 features .*\(7, 3, 5\)"),
    "dtype": ((X.double(),), {}, TypeError, "input must be torch.float32 as the parameters are, got torch.float64"),
    "integers": ((X.long(),), {}, TypeError, "input must be float32, float64, float16 or bfloat16, got torch.int64"),
    "complex c_0": ((X, torch.zeros(2, 3, 4) * 1j), {}, TypeError, "c_0 must be float32, .*, got torch.complex64"),
    "c_0 of integers": ((X, torch.zeros(2, 3, 4).long()), {}, TypeError, "c_0 must be float32, .*, got torch.int64"),
    "c_0 in float64": ((X, torch.zeros(2, 3, 4).double()), {}, TypeError, "c_0 must be torch.float32 as the input is"),
    "device": ((X.to("meta"),), {}, ValueError, "input must be on cpu as the parameters are, got meta"),
    "c_0": ((X, torch.zeros(1, 3, 4)), {}, ValueError, r"c_0 must have shape \(2, 3, 4\), got \(1, 3, 4\)"),
    "LSTM's state": ((X, (X, X)), {}, TypeError, "not LSTM's two"),
    "lengths": ((X,), {"lengths": [7, 8, 1]}, ValueError, "between 0 and L = 7"),
    "a length beyond int64": (
        (X,),
        {"lengths": torch.tensor([7, 1, 2**63], dtype=torch.uint64)},
        ValueError,
        "between 0 and L = 7",
    ),
    "too many lengths": ((X,), {"lengths": [7, 1]}, ValueError, r"lengths must have shape \(3,\)"),
    "mask_pad": ((X,), {"mask_pad": torch.zeros(3, 7, dtype=torch.bool)}, ValueError, r"\(7, 3\), got \(3, 7\)"),
    "mask_pad in a list": ((X,), {"mask_pad": [[True]]}, TypeError, "mask_pad must be a Tensor, got list"),
    "lengths without a batch": ((X[0],), {"lengths": [3, 3]}, ValueError, r"shape \(1,\), got \(2,\)"),
    "cu_seqlens in a list": ((X[0],), {"cu_seqlens": [0, 3]}, TypeError, "cu_seqlens must be a Tensor, got list"),
    "empty cu_seqlens": ((X[0],), {"cu_seqlens": torch.tensor([])}, ValueError, r"shape \(B \+ 1,\), got \(0,\)"),
    "cu_seqlens too short": ((X[0],), {"cu_seqlens": torch.tensor([0, 2])}, ValueError, "total_steps = 3"),
    "both": ((X,), {"lengths": [1, 1, 1], "mask_pad": torch.zeros(7, 3, dtype=torch.bool)}, ValueError, "at most one"),
    "packed lengths": ((pack_padded_sequence(X, [7, 7, 7]),), {"lengths": [7, 7, 7]}, ValueError, "brings its own"),
    "cu_seqlens of a batch": ((X,), {"cu_seqlens": torch.tensor([0, 7])}, ValueError, "input must have 2 dimensions"),
    "cu_seqlens with lengths": (
        (X[0],),
        {"cu_seqlens": torch.tensor([0, 3]), "lengths": [3]},
        ValueError,
        "no padding",
    ),
    "packed features": ((pack_padded_sequence(X[..., 1:], [7, 7, 7]),), {}, ValueError, "input_size = 6"),
}


@pytest.mark.parametrize("name", FORWARD_ERRORS)
def test_forward_error_says_what_was_expected(name):
    args, kwargs, error, message = FORWARD_ERRORS[name]
    with pytest.raises(error, match=message):
        SRU(6, 4, num_layers=2)(*args, **kwargs)


def test_wrong_mask_is_described_in_the_callers_layout():
    with pytest.raises(ValueError, match=r"mask_pad must have shape \(3, 7\), got \(7, 3\)"):
        SRU(6, 4, batch_first=True)(X.transpose(0, 1), mask_pad=torch.zeros(7, 3, dtype=torch.bool))


def test_bad_cu_seqlens_are_refused_with_input_dropout():
    with pytest.raises(ValueError, match="from 0 to total_steps = 10"):
        SRU(6, 4, rnn_dropout=0.5)(torch.randn(10, 6), cu_seqlens=torch.tensor([0, 4, 7]))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.zeros(7, 3, 6),), ValueError, "input must have 1 or 2 dimensions"),
        ((torch.zeros(3, 6), torch.zeros(2, 4)), ValueError, r"c must have shape \(3, 4\), got \(2, 4\)"),
        ((torch.zeros(3, 6), [1.0]), TypeError, "c must be a Tensor .*, got list"),
        ((torch.zeros(3, 6), torch.zeros(3, 4) * 1j), TypeError, "c must be float32, .*, got torch.complex64"),
    ],
)
def test_cell_error_says_what_was_expected(args, error, message):
    with pytest.raises(error, match=message):
        SRUCell(6, 4)(*args)


def test_public_names_exist():
    assert all(hasattr(numsru, name) for name in numsru.__all__)
    assert numsru.__version__


STEPPED = {name: o for name, o in MODULES.items() if not o.get("bidirectional")} | {
    "version 2 equal sizes": {"version": 2, "hidden_size": 6, "num_layers": 2}
}


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize("name", STEPPED)
def test_short_path_of_a_step_computes_what_the_long_one_does(monkeypatch, name, with_state, dtype):
    torch.manual_seed(0)
    rnn = SRU(**({"input_size": 6, "hidden_size": 37, "dtype": dtype} | STEPPED[name]))
    x = torch.randn(1, 3, 6, dtype=dtype)
    c_0 = torch.randn(rnn.num_layers, 3, rnn.hidden_size, dtype=dtype) if with_state else None
    before = None if c_0 is None else c_0.clone()
    expected = rnn(x, c_0)
    calls = _count_calls(monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(rnn(x, c_0), expected)
    assert len(calls) == (rnn.num_layers if name not in ("pre norm", "post norm", "projection") else 0)
    torch.testing.assert_close(c_0, before)


@pytest.mark.parametrize("version", [1, 2])
def test_a_step_in_two_directions_computes_what_the_long_path_does(version):
    torch.manual_seed(0)
    rnn = SRU(8, 4, 2, bidirectional=True, version=version)
    x, c_0 = torch.randn(1, 3, 8), torch.randn(4, 3, 4)
    expected = rnn(x, c_0)
    with torch.no_grad():
        torch.testing.assert_close(rnn(x, c_0), expected)


class Twice(torch.nn.Module):
    def forward(self, a):
        return 2 * a


@pytest.mark.parametrize("name", ["weight_l1", "bias_l0", "weight_c_l1"])
def test_a_step_takes_parametrized_parameters(name):
    torch.manual_seed(0)
    rnn = SRU(8, 4, 2, version=2)
    with torch.no_grad():
        rnn.bias_l0.normal_()
    torch.nn.utils.parametrize.register_parametrization(rnn, name, Twice())
    x, c_0 = torch.randn(1, 3, 8), torch.randn(2, 3, 4)
    expected = rnn(x, c_0)
    with torch.no_grad():
        torch.testing.assert_close(rnn(x, c_0), expected)


def test_a_step_takes_arguments_that_are_not_contiguous():
    torch.manual_seed(0)
    rnn = SRU(8, 8, 2)
    x, c_0 = torch.randn(8, 3).t().unsqueeze(0), torch.randn(2, 8, 3).transpose(1, 2)
    expected = rnn(x, c_0)
    with torch.no_grad():
        torch.testing.assert_close(rnn(x, c_0), expected)


def _count_calls(monkeypatch):
    calls, step = [], cpu_kernels.step
    monkeypatch.setattr(cpu_kernels, "step", lambda *args: calls.append(args) or step(*args))
    return calls


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "no_batch"])
@pytest.mark.parametrize("version", [1, 2])
def test_short_path_of_a_cell_computes_what_the_long_one_does(monkeypatch, version, batched):
    torch.manual_seed(0)
    cell = SRUCell(6, 37, version=version)
    x, c = (torch.randn(*([3] if batched else []), n) for n in (6, 37))
    expected = cell(x, c)
    calls = _count_calls(monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(cell(x, c), expected)
        torch.testing.assert_close(cell(x), cell(x, torch.zeros_like(c)), rtol=0, atol=0)
        assert len(calls) == 3
        cell(x[..., :6], c.double().float())
        with torch.autocast("cpu"):
            assert cell(x, c)[0].dtype == torch.bfloat16
    assert len(calls) == 4  # but not under autocast


# Largest error allowed, relative to the largest magnitude.
ROUNDING = {torch.float32: 1e-6, F64: 1e-14}


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("pieces", [(1,) * 40, (0, 17, 23), (1, 8, 16, 15), (39, 1)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"version": 2}, {"hidden_size": 20}, {"version": 2, "hidden_size": 20, "nonlinearity": "tanh"}],
    ids=["1", "2", "1-equal", "2-equal"],
)
def test_a_sequence_in_pieces_is_the_whole_to_rounding(options, pieces, dtype):
    torch.manual_seed(0)
    rnn = SRU(**({"input_size": 20, "hidden_size": 37, "num_layers": 3, "dtype": dtype} | options))
    x = torch.randn(sum(pieces), 3, 20, dtype=dtype)
    with torch.no_grad():
        output, c_n = rnn(x)
        parts, c = [], None
        for piece in x.split(pieces):
            part, c = rnn(piece, c)
            parts.append(part)
    for received, expected in ((torch.cat(parts), output), (c, c_n)):
        assert (received - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()


@pytest.mark.parametrize("pieces", [2, 3, 9])
@pytest.mark.parametrize("padding", ["none", "lengths", "mask_pad", "cu_seqlens"])
@pytest.mark.parametrize("name", ["one layer", "layers", "equal sizes bidirectional", "version 2", "equal sizes"])
def test_inference_in_pieces_of_the_time_is_the_whole(monkeypatch, name, padding, pieces):
    torch.manual_seed(0)
    rnn, x = make(name).train(), torch.randn(9, 3, 6, dtype=F64)
    c_0 = torch.randn(rnn.num_layers * rnn.num_directions, 3, rnn.hidden_size, dtype=F64)
    mask_pad = torch.rand(9, 3) < 0.4
    arguments = {
        "none": {},
        "lengths": {"lengths": torch.tensor([4, 9, 0])},
        "mask_pad": {"mask_pad": mask_pad},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 4, 4, 9])},
    }[padding]
    if padding == "cu_seqlens":
        x = x[:, 0]
    # As on a GPU, where nobody looks at the values: on a CPU only the valid steps would be computed.
    monkeypatch.setattr(padding_module, "is_on_host", lambda a: False)
    expected = rnn(x, c_0, **arguments)
    bytes_of_u = x[..., 0].numel() * rnn.weight_l0.shape[0] * 8
    monkeypatch.setattr(cpu_kernels, "_BYTES_AT_A_TIME", bytes_of_u // pieces)
    launches, run = [], cpu_kernels._run
    monkeypatch.setattr(cpu_kernels, "_run", lambda *args: launches.append(args) or run(*args))
    with torch.no_grad():
        received = rnn(x, c_0, **arguments)
    assert len(launches) >= pieces * rnn.num_layers * rnn.num_directions // 2
    torch.testing.assert_close(received, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("route", ["torch", "convolution"])
def test_inference_never_holds_the_products_of_all_steps(monkeypatch, route):
    rnn, x = SRU(64, 64), torch.randn(512, 4, 64)
    monkeypatch.setattr(cpu_kernels, "_BYTES_AT_A_TIME", 1 << 16)
    thresholds = products._Thresholds(1) if route == "convolution" else products._Thresholds()
    monkeypatch.setattr(products, "_thresholds", lambda: thresholds)
    made, product = [], cpu_kernels.product

    def record(*args, **kwargs):
        earlier = [u for u in (made_u() for made_u in made) if u is not None]
        assert len({u.data_ptr() for u in earlier}) <= 1  # the piece before, where the next takes its memory
        u = product(*args, **kwargs)
        assert u.nbytes < (1 << 16) + u[:4].nbytes  # rounded up to a step
        made.append(weakref.ref(u))
        return u

    monkeypatch.setattr(cpu_kernels, "product", record)
    with torch.no_grad():
        rnn(x)
    assert len(made) == 24


PLAIN = {
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "one unit": {"hidden_size": 1, "bidirectional": True},
    "version 2": {"version": 2, "num_layers": 2, "rescale": True, "highway_bias": -1.0},
    "no bias": {"bias": False, "nonlinearity": "selu"},
    "no highway": {"highway": False, "nonlinearity": "relu"},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16, "num_layers": 2},
    "dropout": {"dropout": 0.5, "num_layers": 2},
    "layer norm": {"layer_norm": "post"},
}


def _outputs_and_gradients(rnn, x, c_0):
    torch.manual_seed(1)  # of dropout
    x, c_0 = x.detach().requires_grad_(), None if c_0 is None else c_0.detach().requires_grad_()
    output, c_n = rnn(x, c_0)
    leaves = [a for a in (x, c_0, *rnn.parameters()) if a is not None and a.requires_grad]
    loss = output.float().square().sum() + c_n.float().sum() + sum(a.float().sum() * 0 for a in leaves)
    with torch.no_grad():
        again = rnn(x, c_0)
    return output.detach(), c_n.detach(), *torch.autograd.grad(loss, leaves), *again


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("shape", [(7, 3), (1, 3), (0, 2), (5, 0)], ids=str)
@pytest.mark.parametrize("state", ["none", "given", "other"])
def test_plain_layers_compute_what_all_do(monkeypatch, options, shape, state):
    torch.manual_seed(0)
    rnn = SRU(3, **({"hidden_size": 5} | options)).train(shape[0] > 1)
    x = torch.randn(*shape, 3).to(rnn.weight_l0.dtype)
    n, B, H = rnn.num_layers * rnn.num_directions, shape[1], rnn.hidden_size
    c_0 = None if state == "none" else torch.randn(n, B, H).to(x.dtype)
    if state == "other":  # of another layout, and with 16 bits of the dtype that states are kept in
        c_0 = c_0.to(autograd.state_dtype(c_0.dtype)).transpose(0, 2).contiguous().transpose(0, 2)
    received = _outputs_and_gradients(rnn, x, c_0)
    monkeypatch.setattr(nn, "takes_shortcuts", lambda *a: False)
    expected = _outputs_and_gradients(rnn, x, c_0)
    for a, b in zip(received, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_plain_layers_are_those_of_default_modules():
    x, c_0 = torch.randn(4, 2, 3), torch.randn(2, 2, 5)
    for options in ({}, {"version": 2}, {"bias": False}):
        assert SRU(3, 5, 2, **options)._is_plain(x, c_0)
    for options in ({"layer_norm": "pre"}, {"projection_size": 2}, {"dropout": 0.5}):
        assert not SRU(3, 5, 2, **options)._is_plain(x, c_0)


@pytest.mark.parametrize(
    "change",
    [
        lambda rnn: torch.nn.utils.spectral_norm(rnn, "weight_l0"),
        lambda rnn: prune.l1_unstructured(rnn, "weight_l0", 0.3),
        lambda rnn: prune.l1_unstructured(rnn, "weight_c_l0", 0.3),
        lambda rnn: torch.nn.utils.parametrizations.weight_norm(rnn, "weight_l0"),
    ],
    ids=["spectral_norm", "prune weight", "prune weight_c", "weight_norm"],
)
def test_computed_parameters_are_used(change):
    rnn = SRU(6, 6, version=2).eval()
    change(rnn)
    x = torch.randn(4, 2, 6)
    output, _ = rnn(x)
    weight = rnn.weight_l0
    expected, _ = reference.sru_recurrence(
        (x @ weight.T).view(4, 2, 1, 3, 6), x, rnn.bias_l0, weight_c=rnn.weight_c_l0, nonlinearity="identity"
    )
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", ["weight_l0", "bias_l0", "weight_c_l0"])
def test_parameters_of_another_shape_are_refused(name):
    rnn = SRU(4, 4, version=2)
    setattr(
        rnn,
        name,
        torch.nn.Parameter(getattr(rnn, name)[:, :2].clone() if name == "weight_l0" else torch.zeros(1, 2, 2)),
    )
    for grad in (True, False):
        for L in (1, 3):
            with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError), match="shape"):
                rnn(torch.randn(L, 2, 4))


def test_a_negative_view_of_a_parameter_is_read_with_its_sign():
    rnn, x = SRU(4, 4), torch.randn(3, 2, 4)
    bias = torch.randn(1, 2, 4)
    with torch.no_grad():
        received = torch.func.functional_call(rnn, {"bias_l0": torch._neg_view(bias)}, (x,))
        expected = torch.func.functional_call(rnn, {"bias_l0": -bias}, (x,))
    torch.testing.assert_close(received, expected, rtol=0, atol=0)
