"""`numsru.compat`: recorded runs of the authors' package, its arguments, its checkpoints, SRU++, conversions."""

import copy
import math
import pickle
import subprocess
import sys

import official
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import numsru
from numsru import compat
from numsru.compat import SRU, SRUCell, SRUpp

F64 = torch.float64


def randomize(module, seed=0):
    """Random parameters everywhere, so that none has an effect that the tests cannot see."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64) / 2)
    return module.double()


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def outputs_and_gradients(module, *inputs, **named):
    """Outputs and all gradients of a weighted sum of them, by name."""
    return gradients_of(module, lambda *inputs: module(*inputs, **named), *inputs)


def gradients_of(module, function, *inputs):
    """The same of a function that calls `module`."""
    inputs = [a.detach().clone().requires_grad_(a.is_floating_point()) if a is not None else None for a in inputs]
    module.zero_grad()
    h, c = function(*inputs)[:2]
    ((h * normal(*h.shape, seed=5)).sum() + (c * normal(*c.shape, seed=6)).sum()).backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    grads |= {f"input {i}": a.grad for i, a in enumerate(inputs) if a is not None and a.grad is not None}
    return {"h": h.detach(), "c": c.detach()} | {name: g.clone() for name, g in grads.items()}


def assert_same(received, expected, **tolerance):
    torch.testing.assert_close(received, expected, **({"rtol": 1e-11, "atol": 1e-11} | tolerance))


@pytest.mark.parametrize("name", official.NAMES + official.NAMES_3)
def test_recorded_run_is_reproduced(name):
    record = official.load(name, torch.float32)
    rnn = (SRUpp if "proj_size" in record.options else SRU)(**record.options)
    rnn.load_state_dict(official.parameters(record), strict=True)
    x = record.inputs["x"].requires_grad_()
    c0 = record.inputs["c0"].requires_grad_() if "c0" in record.inputs else None
    h, c_n = rnn(x, c0, record.inputs.get("mask_pad"))[:2]
    torch.autograd.backward([h, c_n], [record.inputs["grad_h"], record.inputs["grad_c_n"]])
    received = {"h": h, "c_n": c_n, "grad_x": x.grad} | ({} if c0 is None else {"grad_c0": c0.grad})
    grads = {n: p.grad for n, p in rnn.named_parameters() if p.grad is not None}
    if name.startswith("v3_sru_"):
        grads = compat.convert_state_dict(grads, to="sru-3", bidirectional=rnn.bidirectional)
    official.assert_matches_recording(received | {f"grad/{n}": g for n, g in grads.items()}, record)


@pytest.mark.parametrize("name", [n for n in official.NAMES + official.NAMES_3 if n not in (
    "v3_srupp", "v2_input_to_hidden_first")])  # fmt: skip
def test_converted_module_reproduces_recorded_run(name):
    record = official.load(name)
    rnn, bidirectional = numsru_twin(record.options), record.options.get("bidirectional", False)
    converted = compat.convert_state_dict(
        official.parameters(record), to="numsru", bidirectional=bidirectional, rescale=rnn.rescale,
        highway_bias=rnn.highway_bias,
    )  # fmt: skip
    rnn.load_state_dict(converted, strict=True)

    x, n, D, H = record.inputs["x"].requires_grad_(), rnn.num_layers, rnn.num_directions, rnn.hidden_size
    c0 = record.inputs["c0"].requires_grad_() if "c0" in record.inputs else None
    split = None if c0 is None else c0.unflatten(2, (D, H)).transpose(1, 2).flatten(0, 1)
    h, c_n = rnn(x, split, mask_pad=record.inputs.get("mask_pad"))
    if not record.options.get("nn_rnn_compatible_return"):
        c_n = c_n.unflatten(0, (n, D)).transpose(1, 2).flatten(2)
    torch.autograd.backward([h, c_n], [record.inputs["grad_h"], record.inputs["grad_c_n"]])

    grads = compat.convert_state_dict(
        {key: p.grad for key, p in rnn.named_parameters()}, to="sru-3" if name in official.NAMES_3 else "sru-2"
    )
    received = {"h": h, "c_n": c_n, "grad_x": x.grad} | ({} if c0 is None else {"grad_c0": c0.grad})
    official.assert_matches_recording(received | {f"grad/{key}": g for key, g in grads.items()}, record)


def numsru_twin(options):
    """The `numsru.SRU` that computes what `sru.SRU(**options)` does."""
    norm = {(True, False): "pre", (True, True): "post"}
    return numsru.SRU(
        options["input_size"],
        options["hidden_size"],
        options["num_layers"],
        bidirectional=options.get("bidirectional", False),
        nonlinearity="tanh" if options.get("use_tanh") else "identity",
        highway=options.get("has_skip_term", True),
        highway_bias=options.get("highway_bias", 0.0),
        rescale=options.get("rescale", False),
        version=1 if options.get("v1") else 2,
        dropout_placement="highway",
        layer_norm=norm.get((options.get("layer_norm", False), options.get("normalize_after", False))),
        projection_size=options.get("projection_size", 0),
        dtype=F64,
    )


def test_checkpoint_of_2_3_5_gives_its_recorded_output():
    data = official.load_regression()
    rnn = SRU(5, 7, num_layers=2, bidirectional=True)
    rnn.load_state_dict({k.removeprefix("state/"): a for k, a in data.items() if k.startswith("state/")}, strict=True)
    h, c = rnn(data["inputs"])
    torch.testing.assert_close(h, data["h"], rtol=0, atol=1e-6)
    torch.testing.assert_close(c, data["c"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*official.NAMES, "v3_srupp"])
def test_state_dict_is_that_of_the_official_package(name):
    record = official.load(name, torch.float32)
    rnn = (SRUpp if "proj_size" in record.options else SRU)(**record.options)
    received = [(key, tuple(a.shape), a.dtype) for key, a in rnn.state_dict().items()]
    assert received == [(key, tuple(a.shape), a.dtype) for key, a in official.parameters(record).items()]


@pytest.mark.parametrize("name", official.NAMES)
def test_trained_parameters_are_those_of_the_official_package(name):
    record = official.load(name)
    trained = {f"grad/{key}" for key, p in SRU(**record.options).named_parameters() if p.requires_grad}
    assert trained == {key for key in record.results if key.startswith("grad/")}


DOWNSTREAM = {
    "RTFS-Net": (SRU, {"input_size": 512, "hidden_size": 32, "num_layers": 4, "bidirectional": True}),
    "WaveCRN": (SRU, {
        "input_size": 256, "hidden_size": 256, "num_layers": 6, "dropout": 0.0, "rnn_dropout": 0.1, "layer_norm": True,
        "rescale": False, "bidirectional": True,
    }),
    "DSMBind": (SRUpp, (35, 16, 16), {"num_layers": 2, "dropout": 0.1, "bidirectional": True}),
    "flop": (SRU, (12, 8, 2), {
        "dropout": 0.1, "highway_bias": -3.0, "layer_norm": True, "rescale": True,
        "custom_m": [nn.Linear(12, 32), nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 24))],
    }),
    "flambe": (SRU, (12, 8), {
        "num_layers": 2, "dropout": 0.1, "bidirectional": True, "layer_norm": True, "rescale": True,
        "highway_bias": -1.0,
    }),
    "flambe cell": (SRUCell, (12, 16, 0.1, 0.2), {"bidirectional": False, "has_skip_term": False}),
    "pytorch-kaldi": (SRU, (13, 11), {
        "num_layers": 3, "dropout": 0.1, "rnn_dropout": 0.1, "bidirectional": True, "n_proj": 6, "use_tanh": True,
        "use_selu": False, "use_relu": False, "weight_norm": False, "layer_norm": True, "is_input_normalized": True,
        "highway_bias": -1.0, "rescale": True,
    }),
    "OpenNMT-py": (SRU, (12, 12), {
        "num_layers": 2, "dropout": 0.1, "rnn_dropout": 0.1, "use_tanh": 1, "use_relu": 0, "bidirectional": False,
    }),
    "speech recognition": (SRU, (12, 8, 3), {
        "rescale": True, "layer_norm": True, "bidirectional": True, "nn_rnn_compatible_return": True,
        "rnn_dropout": 0.1, "use_tanh": True, "proj_input_to_hidden_first": True, "amp_recurrence_fp16": True,
    }),
    "emoji classifier": (SRU, (12, 8), {"use_relu": True, "rnn_dropout": 0.5}),
    "SRU++ by keyword": (SRUpp, {
        "input_size": 12, "hidden_size": 8, "proj_size": 4, "num_layers": 4, "num_heads": 2, "attn_dropout": 0.1,
        "layer_norm": True, "normalize_after": True, "highway_bias": -1.0, "attention_every_n_layers": 2,
        "rescale": True, "nn_rnn_compatible_return": True, "proj_input_to_hidden_first": True, "weight_c_init": 0.5,
    }),
}  # fmt: skip


def build_downstream(name):
    cls, *arguments = DOWNSTREAM[name]
    positional, named = ((), arguments[0]) if len(arguments) == 1 else arguments
    return cls(*positional, **copy.deepcopy(named))


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_downstream_model_trains(name):
    rnn = build_downstream(name)
    x = torch.randn(5, 3, rnn.input_size, requires_grad=True)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 4 + [0]])
    h, c = rnn(x, mask_pad=~mask.T.bool())[:2]
    assert h.shape == (5, 3, rnn.output_size)
    (h.sum() + c.sum()).backward()
    grads = {key: p.grad for key, p in rnn.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_downstream_model_takes_its_state_back(name):
    rnn = build_downstream(name).eval()
    x = torch.randn(4, 3, rnn.input_size)
    c = rnn(x)[1]
    again = rnn(x, c0=c)[1]
    assert again.shape == c.shape
    assert not torch.allclose(again, c)


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_downstream_model_round_trips_its_state_dict(name):
    rnn, other = build_downstream(name).eval(), build_downstream(name).eval()
    other.load_state_dict(rnn.state_dict(), strict=True)
    x = torch.randn(4, 2, rnn.input_size)
    assert torch.equal(rnn(x)[0], other(x)[0])


@pytest.mark.parametrize("name", DOWNSTREAM)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda rnn: pickle.loads(pickle.dumps(rnn))], ids=["copy", "pickle"])
def test_copy_of_a_module_computes_the_same(name, copied):
    rnn = build_downstream(name).eval()
    x = torch.randn(4, 2, rnn.input_size)
    assert torch.equal(copied(rnn)(x)[0], rnn(x)[0])


def test_positional_arguments_stand_where_the_official_package_has_them():
    rnn = SRU(12, 8, 3, 0.1, 0.2, True, 5, True, True, -1.0, False, True, True, True, None, True, True, True, 0.5)
    cell = rnn.rnn_lst[1]
    assert (rnn.num_layers, rnn.dropout, rnn.nn_rnn_compatible_return) == (3, 0.1, True)
    assert (cell.rnn_dropout, cell.bidirectional, cell.projection_size) == (0.2, True, 5)
    assert (cell.activation, cell.highway_bias, cell.has_skip_term, cell.rescale) == ("tanh", -1.0, False, True)
    assert (cell.v1, cell.amp_recurrence_fp16, cell.normalize_after, cell.weight_c_init) == (True, True, True, 0.5)
    assert cell.layer_norm is not None
    assert rnn.input_to_hidden is not None


def test_positional_arguments_of_the_cell_stand_where_the_official_package_has_them():
    cell = SRUCell(12, 8, 0.1, 0.2, True, 5, True, -1.0, False, True, False, True, None, True, True, 0.5)
    assert (cell.dropout, cell.rnn_dropout, cell.bidirectional, cell.projection_size) == (0.1, 0.2, True, 5)
    assert (cell.activation, cell.highway_bias, cell.has_skip_term, cell.rescale) == ("tanh", -1.0, False, False)
    assert (cell.v1, cell.amp_recurrence_fp16, cell.normalize_after, cell.weight_c_init) == (True, True, True, 0.5)
    assert cell.layer_norm is not None


def test_attributes_are_those_of_the_official_package():
    rnn = SRU(12, 8, 3, 0.1, 0.2, True, 5, True, True, has_skip_term=False)
    assert (rnn.rnn_dropout, rnn.projection_size, rnn.use_layer_norm, rnn.has_skip_term) == (0.2, 5, True, False)
    assert (rnn.output_size, rnn.num_directions, rnn.input_to_hidden) == (16, 2, None)
    assert [rnn[i] for i in range(3)] == list(rnn.rnn_lst)
    cell = rnn[0]
    assert (cell.output_size, cell.num_matrices, cell.projection_size) == (16, 3, 5)
    assert cell.weight_proj.shape == (12, 5)
    assert (cell.custom_m, cell.transform_module) == (None, None)
    assert rnn.make_backward_compatible() is None


def test_attributes_of_srupp_are_those_of_the_official_package():
    rnn = SRUpp(12, 8, 4, 2, 0.1, 0.2, 2, layer_norm=True)
    assert (rnn.proj_size, rnn.num_heads, rnn.use_layer_norm) == (4, 2, True)
    assert rnn[1] is rnn.rnn_lst[1]
    module = rnn[0].transform_module
    assert (module.in_features, module.out_features, module.proj_features) == (12, 32, 4)
    assert (module.num_heads, module.dropout.p, module.attn_dropout) == (2, 0.1, 0.2)
    assert (module.rezero_init_alpha, module.normalize_after) == (0.0, True)
    product = compat.SRUppProjectedLinear(12, 32, 4, 0.1)
    assert (product.in_features, product.out_features, product.proj_features) == (12, 32, 4)


@pytest.mark.parametrize(
    ("options", "activation", "kind"),
    [({}, "none", 0), ({"use_tanh": 1}, "tanh", 1), ({"use_relu": 1}, "relu", 2), ({"use_selu": 1}, "selu", 3)],
)
def test_activation_has_the_name_of_the_official_package(options, activation, kind):
    cell = SRUCell(5, 4, **options)
    assert (cell.activation, cell.activation_type) == (activation, kind)


def test_what_a_cell_does_not_have_is_none():
    cell = SRUCell(5, 4, n_proj=4)
    assert (cell.projection_size, cell.weight_proj) == (0, None)
    custom = nn.Linear(5, 16)
    cell = SRUCell(5, 4, custom_m=custom)
    assert (cell.weight, cell.weight_proj, cell.custom_m) == (None, None, custom)


@pytest.mark.parametrize("n_proj", [0, 3])
def test_product_is_that_of_the_official_package(n_proj):
    cell, x = randomize(SRUCell(5, 4, n_proj=n_proj)), normal(3, 2, 5)
    weight = cell.weight if n_proj == 0 else cell.weight_proj @ cell.weight
    assert_same(cell.compute_U(x), x.view(6, 5) @ weight)
    assert_same(cell.compute_U(x[0]), x[0] @ weight)


MODELS = {
    "equal sizes": {"input_size": 6, "hidden_size": 6},
    "skip matrix": {"input_size": 5, "hidden_size": 6, "num_layers": 3},
    "bidirectional": {"input_size": 5, "hidden_size": 4, "bidirectional": True},
    "projection": {"input_size": 8, "hidden_size": 7, "projection_size": 3},
    "layer norm": {"input_size": 5, "hidden_size": 4, "layer_norm": True, "bidirectional": True},
    "no skip": {"input_size": 5, "hidden_size": 4, "has_skip_term": False},
    "rescale": {"input_size": 5, "hidden_size": 4, "rescale": True, "highway_bias": -1.0},
    "v1": {"input_size": 5, "hidden_size": 4, "v1": True},
}


def as_3(state_dict):
    """The layout of 3.0-dev, by hand."""
    result = {}
    for key, a in state_dict.items():
        layer, name = key.rsplit(".", 1) if "layer_norm" not in key else (key, "")
        projects = f"{layer}.weight_proj" in state_dict
        names = {"weight": "transform_module.1.weight" if projects else "transform_module.weight"}
        names["weight_proj"] = "transform_module.0.weight"
        result[f"{layer}.{names[name]}" if name in names else key] = a.t() if name in names else a
    return result


@pytest.mark.parametrize("model", MODELS)
def test_checkpoint_of_3_0_loads(model):
    rnn, loaded = randomize(SRU(**MODELS[model])), SRU(**MODELS[model]).double()
    checkpoint = as_3(rnn.state_dict())
    assert "rnn_lst.0.weight" not in checkpoint
    loaded.load_state_dict(checkpoint, strict=True)
    x = normal(4, 2, rnn.input_size)
    assert torch.equal(loaded(x)[0], rnn(x)[0])


@pytest.mark.parametrize("v1", [True, False])
def test_checkpoint_of_2017_loads(v1):
    """Its two tensors for each layer are all of version 1."""
    source = randomize(SRU(5, 4, bidirectional=True, v1=True, use_tanh=True))
    checkpoint = {key: a for key, a in source.state_dict().items() if key.endswith((".weight", ".bias"))}
    assert len(checkpoint) == 4
    loaded = randomize(SRU(5, 4, bidirectional=True, v1=v1, use_tanh=True, rescale=True), seed=1)
    loaded.load_state_dict(checkpoint, strict=True)
    x = normal(4, 2, 5)
    assert_same(loaded(x)[0], source(x)[0])


def test_checkpoint_of_2_0_holds_scale_x_as_a_parameter():
    source = randomize(SRU(6, 6, rescale=True, highway_bias=-1.0))
    checkpoint = {key: nn.Parameter(a, requires_grad=False) for key, a in source.state_dict().items()}
    loaded = SRU(6, 6, rescale=True).double()
    loaded.load_state_dict(checkpoint, strict=True)
    assert "rnn_lst.0.scale_x" not in dict(loaded.named_parameters())
    x = normal(4, 2, 6)
    assert torch.equal(loaded(x)[0], source(x)[0])


def test_checkpoint_of_a_single_cell_loads():
    source, loaded = randomize(SRUCell(5, 4)), SRUCell(5, 4).double()
    loaded.load_state_dict({"transform_module.weight": source.weight.t()} | {
        key: a for key, a in source.state_dict().items() if key != "weight"
    }, strict=True)  # fmt: skip
    assert torch.equal(loaded(normal(4, 2, 5))[0], source(normal(4, 2, 5))[0])


def test_loading_leaves_the_checkpoint_as_it_was():
    checkpoint = as_3(SRU(5, 4).state_dict())
    before = dict(checkpoint)
    SRU(5, 4).load_state_dict(checkpoint)
    assert checkpoint.keys() == before.keys()


@pytest.mark.parametrize("saved", ["custom_m", "transform_module"])
@pytest.mark.parametrize("loads", ["custom_m", "transform_module"])
def test_custom_module_loads_under_either_name(saved, loads):
    source = randomize(SRU(5, 4, 1, **{saved: nn.Linear(5, 16)}))
    loaded = SRU(5, 4, 1, **{loads: nn.Linear(5, 16)}).double()
    assert f"rnn_lst.0.{saved}.weight" in source.state_dict()
    loaded.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(loaded(normal(4, 2, 5))[0], source(normal(4, 2, 5))[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("rnn_lst.0.weight"), 'Missing key.*"rnn_lst.0.weight"'),
        (lambda d: d.pop("rnn_lst.1.weight_c"), 'Missing key.*"rnn_lst.1.weight_c"'),
        (lambda d: d.pop("rnn_lst.1.scale_x"), 'Missing key.*"rnn_lst.1.scale_x"'),
        (lambda d: d.update({"rnn_lst.0.gain": torch.ones(1)}), 'Unexpected key.*"rnn_lst.0.gain"'),
    ],
    ids=["no weight", "no weight_c", "no scale_x", "unknown key"],
)
def test_damaged_checkpoint_is_refused(change, message):
    checkpoint = dict(SRU(5, 4).state_dict())
    change(checkpoint)
    with pytest.raises(RuntimeError, match=message):
        SRU(5, 4).load_state_dict(checkpoint)


@pytest.mark.parametrize("v1", [True, False])
def test_a_checkpoint_of_1_x_fills_a_module_of_the_meta_device(v1):
    given, x = randomize(SRU(5, 4, v1=True)), normal(3, 2, 5)
    with torch.device("meta"):
        rnn = SRU(5, 4, v1=v1)
    assert all(p.is_meta for p in rnn.parameters())
    rnn.load_state_dict(compat.convert_state_dict(given.state_dict(), to="sru-1"), assign=True)
    assert_same(rnn(x), given(x))


def test_recurrent_weights_are_refused_by_version_1():
    with pytest.raises(RuntimeError, match=r"rnn_lst.0.weight_c is not 0, as it must be with v1=True"):
        SRU(5, 4, v1=True).load_state_dict(SRU(5, 4).state_dict())


def test_scale_x_of_a_checkpoint_is_left_out_without_rescale():
    rnn = randomize(SRUCell(6, 6, rescale=False))
    x = normal(4, 2, 6)
    expected = rnn(x)[0]
    rnn.load_state_dict(rnn.state_dict() | {"scale_x": torch.tensor([3.0])})
    assert torch.equal(rnn(x)[0], expected)


def test_scale_x_of_a_checkpoint_is_used():
    rnn = randomize(SRUCell(6, 6, rescale=True))
    x = normal(4, 2, 6)
    rnn.load_state_dict(rnn.state_dict() | {"scale_x": torch.tensor([3.0])})
    expected = randomize(SRUCell(6, 6, rescale=True, highway_bias=math.log((3.0**2 - 1) / 2)))
    assert_same(rnn(x)[0], expected(x)[0])


@pytest.mark.parametrize("model", MODELS)
def test_one_step_takes_input_without_time(model):
    rnn = randomize(SRU(**MODELS[model]))
    x, c0 = normal(3, rnn.input_size), normal(rnn.num_layers, 3, rnn.output_size, seed=2)
    h, c = rnn(x, c0)
    h_long, c_long = rnn(x.unsqueeze(0), c0)
    assert torch.equal(h, h_long[0])
    assert torch.equal(c, c_long)


def test_one_step_of_a_cell_takes_a_mask():
    cell = randomize(SRUCell(5, 4))
    x, c0 = normal(3, 5), normal(3, 4, seed=2)
    h, c = cell(x, c0, torch.tensor([0, 1, 0]))
    assert torch.equal(c[1], c0[1])
    assert not h[1].any()
    assert torch.equal(h[0], cell(x, c0)[0][0])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64, torch.float16], ids=str
)
def test_mask_of_any_dtype_marks_padding(dtype):
    rnn = randomize(SRU(5, 4, bidirectional=True))
    mask, x = torch.tensor([[0, 0], [1, 0], [0, 0], [0, 1]], dtype=torch.bool), normal(4, 2, 5)
    h, c = rnn(x, mask_pad=mask.to(dtype) if dtype == torch.bool else mask.to(dtype) * 3)
    expected_h, expected_c = rnn(x[[0, 2, 3], :1])
    assert_same(h[[0, 2, 3], :1], expected_h)
    assert_same(c[:, :1], expected_c)
    assert not h[mask].any()


@pytest.mark.parametrize("mask_is_on", ["host", "device"])
@pytest.mark.parametrize("normalize_after", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("project_first", [False, True], ids=["", "projected first"])
@pytest.mark.parametrize("make", [
    lambda **n: SRU(5, 4, bidirectional=True, layer_norm=True, **n),
    lambda **n: SRUpp(5, 4, 4, bidirectional=True, layer_norm=True, **n),
], ids=["SRU", "SRUpp"])  # fmt: skip
def test_what_padding_holds_changes_nothing(monkeypatch, make, project_first, normalize_after, mask_is_on):
    monkeypatch.setattr(numsru.padding, "is_on_host", lambda a: mask_is_on == "host")
    rnn = randomize(make(normalize_after=normalize_after, proj_input_to_hidden_first=project_first))
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 1]]).bool()
    x = normal(3, 4, 5)
    clean = outputs_and_gradients(rnn, x.masked_fill(mask.unsqueeze(2), 0), mask_pad=mask)
    dirty = outputs_and_gradients(rnn, x.masked_fill(mask.unsqueeze(2), torch.nan), mask_pad=mask)
    assert_same(dirty, clean, equal_nan=False)
    assert not clean["h"][mask].any()


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("make", [
    lambda: SRU(5, 4, bidirectional=True), lambda: SRUpp(5, 4, 4, bidirectional=True)
], ids=["SRU", "SRUpp"])  # fmt: skip
def test_packed_sequence_comes_back_packed(make, enforce_sorted):
    rnn = randomize(make())
    lengths = [4, 4, 2, 1] if enforce_sorted else [2, 4, 1, 4]
    x, c0 = normal(4, 4, 5), normal(2, 4, 8, seed=2)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    output, c = rnn(packed, c0)[:2]
    mask = torch.arange(4).unsqueeze(1) >= torch.tensor(lengths)
    h, expected_c = rnn(x, c0, mask)[:2]
    assert_same(c, expected_c)
    assert_same(pad_packed_sequence(output)[0], h)
    assert output.sorted_indices is packed.sorted_indices
    assert_same(output.data, pack_padded_sequence(h, lengths, enforce_sorted=enforce_sorted).data)


@pytest.fixture
def computed_steps(monkeypatch):
    """The number of steps of each call of the recurrence, of all batch rows together."""
    seen = []

    def spy(u, *args, **named):
        seen.append(u.shape[:-3].numel())
        return numsru.sru_recurrence(u, *args, **named)

    monkeypatch.setattr(numsru.compat_cell, "sru_recurrence", spy)
    return seen


PADDED = {
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True, "rescale": True, "highway_bias": -1.0},
    "dropout": {"dropout": 0.5, "rnn_dropout": 0.5, "bidirectional": True},
    "pre norm": {"layer_norm": True, "bidirectional": True, "rnn_dropout": 0.5},
    "post norm": {"layer_norm": True, "normalize_after": True, "bidirectional": True},
    "projection": {"projection_size": 3, "use_tanh": True},
    "projected first": {"proj_input_to_hidden_first": True, "nn_rnn_compatible_return": True, "bidirectional": True},
    "no skip": {"has_skip_term": False, "v1": True},
}
MASKS = {
    "behind": [[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 1, 1]],
    "anywhere": [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 0, 0]],
    "a row": [[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]],
    "all": [[1] * 4] * 4,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("options", PADDED.values(), ids=list(PADDED))
def test_valid_steps_alone_give_what_the_whole_batch_gives(monkeypatch, computed_steps, options, mask):
    rnn, mask = randomize(SRU(8, 6, **options)), torch.tensor(mask)
    arguments = normal(4, 4, 8), normal(rnn.num_layers, 4, rnn.output_size, seed=2)
    torch.manual_seed(0)
    received = outputs_and_gradients(rnn, *arguments, mask_pad=mask)
    assert computed_steps == [int((mask == 0).sum())] * rnn.num_layers
    monkeypatch.setattr(numsru.padding, "is_on_host", lambda a: False)
    torch.manual_seed(0)
    expected = outputs_and_gradients(rnn, *arguments, mask_pad=mask)
    assert computed_steps[rnn.num_layers :] == [16] * rnn.num_layers
    assert received.keys() >= {name for name, p in rnn.named_parameters() if p.requires_grad} | {"input 0", "input 1"}
    assert_same(received, expected)


@pytest.mark.parametrize("options", PADDED.values(), ids=list(PADDED))
def test_packed_sequence_is_computed_without_padding(computed_steps, options):
    rnn = randomize(SRU(8, 6, **options))
    x, c0 = normal(4, 3, 8), normal(rnn.num_layers, 3, rnn.output_size, seed=2)
    lengths = torch.tensor([4, 3, 1])

    def packed(x, c0):
        output, c = rnn(pack_padded_sequence(x, lengths), c0)
        return pad_packed_sequence(output)[0], c

    torch.manual_seed(0)
    received = gradients_of(rnn, packed, x, c0)
    assert computed_steps == [8] * rnn.num_layers
    torch.manual_seed(0)
    expected = gradients_of(rnn, lambda x, c0: rnn(x, c0, torch.arange(4)[:, None] >= lengths), x, c0)
    assert_same(received, expected)


def test_cell_computes_valid_steps_alone(computed_steps):
    cell = randomize(SRUCell(5, 4))
    x, mask = normal(4, 2, 5), torch.tensor([[0, 0], [1, 0], [1, 0], [0, 0]])
    h, c = cell(x, mask_pad=mask)
    assert computed_steps == [6]
    expected_h, expected_c = cell(x[[0, 3], :1])
    assert_same(h[[0, 3], :1], expected_h)
    assert_same(c[:1], expected_c)
    assert not h[1:3, 0].any()


def test_mask_without_padding_is_as_none():
    rnn, x = randomize(SRU(5, 4)), normal(4, 2, 5)
    assert torch.equal(rnn(x, mask_pad=torch.zeros(4, 2))[0], rnn(x)[0])


@pytest.mark.parametrize("packed", [False, True], ids=["mask", "packed"])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hook_on_a_cell_sees_the_whole_batch(register, packed, computed_steps):
    rnn, x = randomize(SRU(5, 4)), normal(4, 2, 5).requires_grad_()
    mask = torch.tensor([[0, 0], [0, 0], [0, 0], [0, 1]])
    expected = rnn(x, mask_pad=mask)
    seen = []
    getattr(rnn[1], register)(lambda module, *values: seen.extend(v[0].shape for v in values))
    h, c = rnn(pack_padded_sequence(x, [4, 3]), None) if packed else rnn(x, mask_pad=mask)
    h = pad_packed_sequence(h)[0] if packed else h
    assert_same((h, c), expected)
    h.sum().backward()
    assert set(seen) == {(4, 2, 4)}
    assert computed_steps == [7] * 4  # the cells leave the padding out themselves


@pytest.mark.parametrize("packed", [False, True], ids=["mask", "packed"])
def test_custom_module_of_one_layer_gets_the_whole_batch(packed):
    seen = []
    custom = lambda_module(lambda v: seen.append(v.shape) or v.repeat(1, 1, 3))
    rnn, x = SRU(4, 4, custom_m=[nn.Linear(4, 12), custom]), torch.zeros(4, 2, 4)
    rnn(pack_padded_sequence(x, [4, 2])) if packed else rnn(x, mask_pad=torch.eye(4, 2))
    assert seen == [(4, 2, 4)]


def a_hooked_stack():
    rnn = SRU(5, 4)
    rnn[0].register_forward_hook(lambda *args: None)
    return rnn


ON_DEVICE = {
    "SRU": lambda: SRU(5, 4, bidirectional=True, proj_input_to_hidden_first=True, rescale=True, rnn_dropout=0.1),
    "hooked": a_hooked_stack,
    "custom_m": lambda: SRU(5, 4, custom_m=[nn.Linear(5, 16), nn.Linear(4, 12)]),
    "SRUpp": lambda: SRUpp(5, 4, 4, proj_input_to_hidden_first=True),
}


@pytest.mark.parametrize(
    ("name", "mask_device"), [*((name, "meta") for name in ON_DEVICE), ("custom_m", "cpu"), ("SRUpp", "cpu")]
)
def test_values_on_a_device_are_not_waited_for(name, mask_device):
    """Tensors on "meta" have no values: to look at one is an error."""
    rnn = ON_DEVICE[name]().to("meta")
    h, c = rnn(torch.zeros(4, 2, 5, device="meta"), mask_pad=torch.eye(4, 2, device=mask_device))[:2]
    assert (h.shape, h.device.type) == ((4, 2, rnn.output_size), "meta")
    assert c.shape == (2, 2, rnn.output_size)


@pytest.mark.parametrize("name", ["SRU", "hooked"])
def test_mask_on_the_host_spares_a_device_the_padding(monkeypatch, name):
    rnn, seen = ON_DEVICE[name]().to("meta"), []

    def recurrence(u, *args, cu_seqlens, **options):
        seen.append((len(u), u.device.type, cu_seqlens))
        return u.new_empty(6, rnn.output_size), u.new_empty(2, rnn.output_size)

    monkeypatch.setattr(numsru.compat_cell, "sru_recurrence", recurrence)
    h, _ = rnn(torch.zeros(4, 2, 5, device="meta"), mask_pad=torch.eye(4, 2))
    assert h.shape == (4, 2, rnn.output_size)
    assert [s[:2] for s in seen] == [(6, "meta")] * 2
    assert [s[2].device.type for s in seen] == ["meta"] * 2
    # Sent to the device once, unless every layer does it for itself.
    assert (seen[0][2] is seen[1][2]) == (name == "SRU")


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"rnn_dropout": 0.5, "dropout": 0.5}],
                         ids=["default", "layer norm", "dropout"])  # fmt: skip
def test_cell_takes_sequences_end_to_end(options):
    cell = randomize(SRUCell(5, 4, bidirectional=True, **options))
    x, c0, mask = normal(4, 2, 5), normal(2, 8, seed=2), torch.tensor([[0, 0], [0, 0], [1, 0], [1, 0]])

    def end_to_end(x, c0):
        h, c = cell(torch.cat([x[:2, 0], x[:, 1]]), c0, cu_seqlens=torch.tensor([0, 2, 6]))
        return torch.stack([torch.cat([h[:2], torch.zeros(2, 8)]), h[2:]], 1), c

    torch.manual_seed(0)
    received = gradients_of(cell, end_to_end, x, c0)
    torch.manual_seed(0)
    assert_same(received, gradients_of(cell, lambda x, c0: cell(x, c0, mask), x, c0))


@pytest.mark.parametrize(
    ("cell", "x", "named", "message"),
    [
        (SRUCell(5, 4), torch.zeros(3, 2, 5), {}, "input must have two dimensions"),
        (SRUCell(5, 4), torch.zeros(3, 5), {"mask_pad": torch.zeros(3)}, "without a mask_pad"),
        (SRUCell(5, 4, custom_m=nn.Linear(5, 16)), torch.zeros(3, 5), {}, "without .* a custom_m"),
        (SRUCell(5, 4), torch.zeros(4, 5), {}, "cu_seqlens must rise from 0 to total_steps = 4"),
    ],
    ids=["dimensions", "mask", "custom", "steps"],
)
def test_wrong_use_of_sequences_end_to_end_is_refused(cell, x, named, message):
    with pytest.raises(ValueError, match=message):
        cell(x, cu_seqlens=torch.tensor([0, 1, 3]), **named)


@pytest.mark.parametrize("options", [{}, {"n_proj": 3}, {"bidirectional": True}], ids=["plain", "projection", "both"])
def test_few_rows_give_what_many_give(monkeypatch, options):
    """For few rows U is put into the recurrence's order, for many the weight."""
    cell = randomize(SRUCell(6, 8, **options))
    x, c0 = normal(1, 7, 6), normal(7, cell.output_size, seed=2)
    expected = gradients_of(cell, cell, x, c0)
    monkeypatch.delattr(numsru.compat_cell, "gate_major")
    with pytest.raises(NameError):
        cell(x, c0)

    def row_by_row(x, c0):
        results = [cell(x[:, i : i + 1], c0[i : i + 1]) for i in range(7)]
        return torch.cat([h for h, _ in results], 1), torch.cat([c for _, c in results])

    assert_same(gradients_of(cell, row_by_row, x, c0), expected)


EMPTY = {
    "SRU": lambda: SRU(4, 4, bidirectional=True),
    "SRUpp": lambda: SRUpp(4, 4, 4, bidirectional=True),
    "step weights": lambda: SRU(4, 4, custom_m=[Products(4, 12, torch.ones(8)), Products(4, 12, torch.ones(8))]),
}


@pytest.mark.parametrize(("L", "B"), [(0, 2), (3, 0)], ids=["no steps", "no rows"])
@pytest.mark.parametrize("make", EMPTY.values(), ids=list(EMPTY))
def test_empty_input_gives_empty_output(make, L, B):
    rnn = make().double()
    c0 = normal(2, B, rnn.output_size)
    h, c = rnn(torch.zeros(L, B, 4, dtype=F64), c0)[:2]
    assert h.shape == (L, B, rnn.output_size)
    assert torch.equal(c, c0)


def test_states_come_in_the_layout_of_torch():
    rnn = randomize(SRU(5, 4, 3, bidirectional=True))
    twin = randomize(SRU(5, 4, 3, bidirectional=True, nn_rnn_compatible_return=True))
    x = normal(4, 2, 5)
    c = twin(x)[1]
    expected = rnn(x)[1].unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1)
    assert torch.equal(c, expected)
    assert_same(twin(x, c)[0], rnn(x, rnn(x)[1])[0])
    assert_same(twin(x, rnn(x)[1])[0], rnn(x, rnn(x)[1])[0])


def test_state_carries_a_sequence_on():
    rnn = randomize(SRU(5, 4, 3))
    x = normal(9, 2, 5)
    first, c = rnn(x[:4])
    second, c = rnn(x[4:], c)
    h, c_whole = rnn(x)
    assert_same(torch.cat([first, second]), h)
    assert_same(c, c_whole)


class Products(nn.Module):
    """The matrix product of a cell, by itself, with V if given."""

    def __init__(self, in_size, out_size, V=None):
        super().__init__()
        self.weight, self.V = nn.Parameter(torch.randn(in_size, out_size)), V

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, x):
        U = x @ self.weight
        return U if self.V is None else (U, self.V.expand(*x.shape[:2], -1))


def custom_twin(cell, name="custom_m", V=None, **options):
    """A cell with the parameters of another one, whose product is a module's."""
    custom = Products(*cell.weight.shape, V).double()
    twin = SRUCell(cell.input_size, cell.hidden_size, **{name: custom}, **options).double()
    twin.load_state_dict({key.replace("weight", f"{name}.weight") if key == "weight" else key: a
                          for key, a in cell.state_dict().items()})  # fmt: skip
    return twin


CELLS = {
    "skip input": {"input_size": 8, "hidden_size": 8, "highway_bias": -1.0},
    "skip matrix bidirectional": {"input_size": 5, "hidden_size": 4, "bidirectional": True, "use_tanh": True},
    "skip input bidirectional": {"input_size": 8, "hidden_size": 4, "bidirectional": True, "use_relu": True},
    "no skip": {"input_size": 5, "hidden_size": 4, "has_skip_term": False, "use_selu": True},
    "dropout": {"input_size": 5, "hidden_size": 4, "dropout": 0.5, "rnn_dropout": 0.2},
    "layer norm": {"input_size": 5, "hidden_size": 4, "layer_norm": True},
}


def renamed(results):
    return {key.removeprefix("custom_m.").removeprefix("transform_module."): a for key, a in results.items()}


@pytest.mark.parametrize("name", ["custom_m", "transform_module"])
@pytest.mark.parametrize("options", CELLS.values(), ids=list(CELLS))
def test_custom_product_takes_the_place_of_the_own(options, name):
    cell = randomize(SRUCell(**options))
    named = {key: value for key, value in options.items() if key not in ("input_size", "hidden_size")}
    twin = custom_twin(cell, name, **named)
    arguments = normal(4, 3, cell.input_size), normal(3, cell.output_size, seed=2), torch.eye(4, 3).bool()
    torch.manual_seed(0)
    expected = outputs_and_gradients(cell, *arguments)
    torch.manual_seed(0)
    received = outputs_and_gradients(twin, *arguments)
    assert_same(renamed(received), expected)


@pytest.mark.parametrize("masked", [False, True], ids=["no padding", "padding"])
@pytest.mark.parametrize("options", CELLS.values(), ids=list(CELLS))
def test_constant_step_weights_act_as_weight_c(options, masked):
    cell = randomize(SRUCell(**options))
    D, H = cell.num_directions, cell.hidden_size
    named = {key: value for key, value in options.items() if key not in ("input_size", "hidden_size")}
    V = normal(D * H * 2, seed=3)
    twin = custom_twin(cell, V=V, **named)
    with torch.no_grad():
        # V and what is added to it are viewed (D, H, 2); weight_c of a cell without V, (2, D, H).
        cell.weight_c.copy_((twin.weight_c + V).view(D, H, 2).permute(2, 0, 1).flatten())
    mask = torch.tensor([[0, 1, 0], [0, 1, 1], [1, 1, 0], [0, 1, 0]]) if masked else None
    arguments = normal(4, 3, cell.input_size), normal(3, D * H, seed=2), mask
    torch.manual_seed(0)
    expected = outputs_and_gradients(cell, *arguments)
    torch.manual_seed(0)
    received = renamed(outputs_and_gradients(twin, *arguments))
    received["weight_c"] = received["weight_c"].view(D, H, 2).permute(2, 0, 1).flatten()
    assert_same(received, expected)


def test_step_weights_differ_between_steps():
    x, V = normal(4, 1, 5), normal(4, 1, 8, seed=3)
    cell = randomize(SRUCell(5, 4))
    h, c = custom_twin(cell, V=V)(x)
    weight_c, state, steps = cell.weight_c.detach().clone(), None, []
    for t in range(4):
        with torch.no_grad():
            cell.weight_c.copy_((weight_c + V[t, 0]).view(4, 2).t().flatten())
        step, state = cell(x[t], state)
        steps.append(step)
    assert_same(h, torch.stack(steps))
    assert_same(c, state)


def test_backward_direction_takes_step_weights_from_the_end():
    options = {"bidirectional": True, "has_skip_term": False}
    cell = randomize(SRUCell(5, 4, **options))
    x, V = normal(4, 2, 5), normal(4, 2, 16, seed=3)
    forward, backward = (custom_twin(cell, V=v, **options)(a)[0] for a, v in ((x, V), (x.flip(0), V.flip(0))))
    one = SRUCell(5, 4, has_skip_term=False, custom_m=Products(5, 12, V[:, :, 8:].flip(0))).double()
    with torch.no_grad():
        one.custom_m.weight.copy_(cell.weight[:, 12:])
        one.bias.copy_(cell.bias.view(2, 2, 4)[:, 1].flatten())
        one.weight_c.copy_(cell.weight_c[8:])
    assert_same(forward[:, :, 4:], one(x.flip(0))[0].flip(0))
    assert not torch.allclose(forward, backward.flip(0))


def test_step_weights_of_nan_padding_leave_gradients_finite():
    x, mask = normal(3, 2, 5).masked_fill(torch.eye(3, 2).bool().unsqueeze(2), torch.nan), torch.eye(3, 2).bool()
    cell = SRUCell(5, 5, custom_m=lambda_module(lambda v: (v.repeat(1, 1, 3), v.repeat(1, 1, 2)))).double()
    received = outputs_and_gradients(cell, x, None, mask)
    assert all(a.isfinite().all() for a in received.values())


def lambda_module(function):
    module = nn.Module()
    module.forward = function
    return module


def test_custom_module_sees_what_the_padding_holds():
    seen = []
    cell = SRUCell(5, 5, custom_m=lambda_module(lambda v: seen.append(v) or v.repeat(1, 1, 3)))
    x = torch.ones(3, 2, 5)
    cell(x, mask_pad=torch.ones(3, 2))
    assert torch.equal(seen[0], x)


@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList])
def test_every_layer_has_its_custom_module(kind):
    modules = [nn.Linear(5, 16), nn.Linear(4, 12)]
    rnn = SRU(5, 4, custom_m=kind(modules))
    assert [cell.custom_m for cell in rnn.rnn_lst] == modules


def test_single_custom_module_is_copied_with_new_parameters():
    custom = nn.Linear(4, 12, bias=False)
    rnn = SRU(4, 4, custom_m=custom)
    weights = [cell.custom_m.weight for cell in rnn.rnn_lst] + [custom.weight]
    assert len({w.sum().item() for w in weights}) == 3


def test_custom_module_that_cannot_be_reset_is_left_as_it_is():
    custom = nn.Sequential(nn.Linear(4, 12, bias=False))
    rnn = SRU(4, 4, custom_m=custom)
    for cell in rnn.rnn_lst:
        torch.testing.assert_close(cell.custom_m[0].weight, custom[0].weight, rtol=0, atol=0)


def test_reset_of_srupp_reaches_its_attention():
    rnn = SRUpp(6, 4, 2)
    attention = rnn.rnn_lst[0].transform_module
    with torch.no_grad():
        attention.alpha.fill_(7)
        attention.linear3.weight.fill_(7)
    rnn.reset_parameters()
    assert attention.alpha.item() == 0
    assert (attention.linear3.weight != 7).all()


def test_hook_on_the_last_product_of_srupp_is_called():
    rnn, seen = SRUpp(6, 4, 2, num_layers=1), []
    rnn.rnn_lst[0].transform_module.linear3.register_forward_hook(lambda *args: seen.append(args))
    rnn(torch.randn(3, 2, 6))
    assert seen


def test_scale_x_written_in_place_is_used():
    rnn, x = SRU(4, 4, num_layers=1, rescale=True), torch.randn(3, 2, 4)
    rnn.state_dict()["rnn_lst.0.scale_x"].fill_(3)
    twin = SRU(4, 4, num_layers=1, rescale=True)
    twin.load_state_dict(rnn.state_dict())
    torch.testing.assert_close(rnn(x), twin(x), rtol=0, atol=0)


def test_partial_load_leaves_the_other_parameters():
    rnn = SRU(4, 4, num_layers=1)
    before = rnn.rnn_lst[0].weight_c.clone()
    rnn.load_state_dict({"rnn_lst.0.bias": torch.ones(8)}, strict=False)
    torch.testing.assert_close(rnn.rnn_lst[0].weight_c, before, rtol=0, atol=0)


def test_conversion_asks_for_rescale_where_the_file_has_a_factor():
    state = SRU(4, 4, rescale=True).state_dict()
    with pytest.raises(ValueError, match="pass rescale=True"):
        compat.convert_state_dict(state, to="numsru")


def test_projection_size_differs_between_layers():
    rnn = SRU(12, 10, projection_size=[4, 0])
    assert [tuple(cell.weight.shape) for cell in rnn.rnn_lst] == [(4, 40), (10, 30)]


def test_dropped_unit_passes_the_input_through():
    cell = randomize(SRUCell(40, 40, dropout=0.5, rescale=False))
    x = normal(3, 2, 40)
    torch.manual_seed(0)
    same = cell(x)[0] == x
    assert (same.all(0) == same.any(0)).all()
    assert 20 < same[0].sum() < 60


def test_last_layer_has_no_dropout():
    assert [cell.dropout for cell in SRU(5, 4, 3, dropout=0.3).rnn_lst] == [0.3, 0.3, 0.0]
    assert [cell.dropout for cell in SRUpp(5, 4, 4, 3, dropout=0.3).rnn_lst] == [0.3, 0.3, 0.0]


def test_input_dropout_is_shared_by_all_steps():
    seen = []
    custom = lambda_module(lambda v: seen.append(v) or v.repeat(1, 1, 3))
    cell = SRUCell(40, 40, rnn_dropout=0.5, custom_m=custom)
    x = torch.ones(3, 2, 40)
    cell(x)
    assert set(seen[0].unique().tolist()) == {0.0, 2.0}
    assert torch.equal(seen[0][0], seen[0][2])
    cell.eval()(x)
    assert torch.equal(seen[1], x)


def bound(a, fraction=0.97):
    """The bound of a uniform distribution, seen from a large sample."""
    return pytest.approx(float(a.abs().max()), rel=1 - fraction)


@pytest.mark.parametrize(
    ("options", "candidate", "gates", "skip"),
    [
        ({"rescale": False}, 1, math.sqrt(0.5), 1),
        ({"rescale": False, "v1": True}, 1, 1, 1),
        ({"highway_bias": -1.0, "v1": True}, 1, 1, math.sqrt(1 + 2 * math.exp(-1))),
        ({"dropout": 0.5, "rescale": False, "v1": True}, math.sqrt(0.5), 1, 1),
        ({"rnn_dropout": 0.5, "rescale": False, "v1": True}, *[math.sqrt(0.5)] * 3),
        ({"layer_norm": True, "rescale": False, "v1": True}, 0.1, 0.1, 0.1),
        ({"is_input_normalized": True, "rescale": False, "v1": True}, 0.1, 0.1, 0.1),
    ],
    ids=["version 2", "version 1", "rescale", "dropout", "input dropout", "layer norm", "normalized input"],
)
def test_initial_weights_have_the_official_scale(options, candidate, gates, skip):
    torch.manual_seed(0)
    weight = SRUCell(100, 60, **options).weight.detach().view(100, 60, 4) / math.sqrt(3 / 100)
    assert bound(weight[:, :, 0]) == candidate
    assert bound(weight[:, :, 1:3]) == gates
    assert bound(weight[:, :, 3]) == skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, math.sqrt(1.5)), ({"weight_c_init": 0.25}, 0.25), ({"v1": True}, 0.0)],
    ids=["default", "given", "version 1"],
)
def test_initial_recurrent_weights_have_the_official_scale(options, expected):
    torch.manual_seed(0)
    assert bound(SRUCell(10, 500, **options).weight_c.detach()) == expected


def test_initial_biases_let_the_highway_through():
    cell = SRUCell(10, 4, bidirectional=True, highway_bias=-3.0)
    assert cell.bias.tolist() == [0.0] * 8 + [-3.0] * 8


def test_bias_is_set_as_in_1_x():
    rnn = SRU(5, 4)
    rnn.set_bias(-2)
    assert [cell.bias.tolist() for cell in rnn.rnn_lst] == [[0.0] * 4 + [-2.0] * 4] * 2


def test_reset_parameters_draws_new_ones():
    rnn = SRU(5, 4, proj_input_to_hidden_first=True, layer_norm=True)
    before = copy.deepcopy(rnn.state_dict())
    randomize(rnn).reset_parameters()
    assert not torch.equal(rnn.input_to_hidden.weight.float(), before["input_to_hidden.weight"])
    assert rnn.rnn_lst[1].layer_norm.weight.eq(1).all()
    assert rnn.rnn_lst[0].weight.abs().max() <= math.sqrt(3 / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F64], ids=str)
@pytest.mark.parametrize("make", [lambda: SRU(5, 4), lambda: SRUpp(5, 4, 4)], ids=["SRU", "SRUpp"])
def test_results_have_the_dtype_of_the_parameters(make, dtype):
    rnn = make()
    x = torch.randn(4, 2, 5)
    expected, _ = rnn(x)[:2]
    h, c = rnn.to(dtype)(x.to(dtype))[:2]
    assert (h.dtype, c.dtype) == (dtype, dtype)
    torch.testing.assert_close(h.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_recurrence_in_float32(input_dtype):
    rnn = SRU(5, 4, amp_recurrence_fp16=True)
    with torch.autocast("cpu", torch.bfloat16):
        h, c = rnn(torch.randn(4, 2, 5).to(input_dtype))
    assert (h.dtype, c.dtype) == (torch.float32, torch.float32)


def test_repr_shows_what_is_not_the_default():
    text = repr(SRU(5, 4, 3, bidirectional=True, use_tanh=True, v1=True))
    assert "SRU(\n  5, 4, num_layers=3, bidirectional=True" in text
    assert "SRUCell(5, 4, bidirectional=True, activation='tanh', rescale=False, v1=True" in text


def test_importing_numsru_does_not_import_compat():
    code = "import sys, numsru; sys.exit(any('compat' in name for name in sys.modules if name.startswith('numsru')))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"input_size": 2.0}, TypeError, "input_size must be an int, got float"),
        ({"num_layers": True}, TypeError, "num_layers must be an int, got bool"),
        ({"dropout": 1.0}, ValueError, r"dropout must be a probability in \[0, 1\), got 1.0"),
        ({"rnn_dropout": -0.1}, ValueError, r"rnn_dropout must be a probability in \[0, 1\), got -0.1"),
        ({"weight_norm": True}, ValueError, "weight_norm=True is not supported.*Use layer_norm=True"),
        ({"use_tanh": 1, "use_selu": 1}, ValueError, "at most one of use_tanh.*got tanh and selu"),
        ({"n_proj": 2, "projection_size": 2}, ValueError, "n_proj and projection_size are two names"),
        ({"custom_m": nn.Identity(), "transform_module": nn.Identity()}, ValueError, "custom_m and transform_module"),
        ({"custom_m": [nn.Identity()]}, ValueError, "custom_m must have one item for each of the 2 layers, got 1"),
        ({"projection_size": [2] * 3}, ValueError, "projection_size must have one item for each of the 2 layers"),
        ({"projection_size": -2}, ValueError, "projection_size must be at least 0, got -2"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number, got str"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_option_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SRU(**({"input_size": 5, "hidden_size": 4} | arguments))


X = torch.zeros(3, 2, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "input must be a Tensor, got list"),
        ((torch.zeros(5),), ValueError, r"input must have shape \(L, B, 5\) or \(B, 5\), got \(5,\)"),
        ((torch.zeros(3, 2, 4),), ValueError, r"input must have shape \(L, B, 5\) or \(B, 5\), got \(3, 2, 4\)"),
        ((X, (X, X)), TypeError, "c0 must be a Tensor .*got tuple"),
        ((X, torch.zeros(4, 2, 4)), ValueError, r"c0 must have shape \(2, 2, 8\), got \(4, 2, 4\)"),
        ((X, None, [0, 0]), TypeError, "mask_pad must be a Tensor, got list"),
        ((X.double(),), TypeError, "input must be torch.float32 as the parameters are, got torch.float64"),
        ((X.long(),), TypeError, "input must be float32, float64, float16 or bfloat16, got torch.int64"),
        ((X, torch.zeros(2, 2, 8).long()), TypeError, "c0 must be float32, .*, got torch.int64"),
        ((X, None, torch.zeros(2, 3)), ValueError, r"mask_pad must have shape \(3, 2\), got \(2, 3\)"),
        ((pack_padded_sequence(X, [3, 3]), None, torch.zeros(3, 2)), ValueError, "brings its own lengths"),
    ],
    ids=[
        "list",
        "one dimension",
        "features",
        "two states",
        "states of torch",
        "mask list",
        "float64",
        "integers",
        "state of integers",
        "mask shape",
        "packed",
    ],
)
def test_wrong_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SRU(5, 4, bidirectional=True)(*arguments)


def test_state_of_a_cell_is_checked():
    with pytest.raises(TypeError, match=r"c0 must be a Tensor .*got tuple"):
        SRUCell(5, 4)(X, (X, X))
    with pytest.raises(ValueError, match=r"c0 must have shape \(2, 4\), got \(1, 2, 4\)"):
        SRUCell(5, 4)(X, torch.zeros(1, 2, 4))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda v: v, r"custom_m must return U of shape \(3, 2, 16\) for input of shape \(3, 2, 5\), got \(3, 2, 5\)"),
        (lambda v: (v.new_zeros(3, 2, 16), v), r"custom_m must return V of shape \(3, 2, 8\)"),
        (lambda v: (v.new_zeros(3, 2, 16), v.new_zeros(3, 2, 8), 0), "custom_m must return U, or U and V, got 3"),
    ],
    ids=["U", "V", "three"],
)
def test_wrong_result_of_a_custom_module_is_refused(returned, message):
    with pytest.raises(ValueError, match=message):
        SRUCell(5, 4, custom_m=lambda_module(returned))(X)


CONVERTED = {
    "equal sizes": {"input_size": 6, "hidden_size": 6},
    "skip matrix": {"input_size": 5, "hidden_size": 6, "num_layers": 3},
    "bidirectional": {"input_size": 5, "hidden_size": 4, "bidirectional": True},
    "projection": {"input_size": 8, "hidden_size": 7, "projection_size": 3},
    "pre norm": {"input_size": 5, "hidden_size": 4, "layer_norm": True, "bidirectional": True},
    "post norm": {"input_size": 5, "hidden_size": 4, "layer_norm": True, "normalize_after": True},
    "no skip": {"input_size": 5, "hidden_size": 4, "has_skip_term": False},
    "rescale": {"input_size": 5, "hidden_size": 4, "rescale": True, "highway_bias": -1.0},
    "version 1": {"input_size": 5, "hidden_size": 4, "v1": True, "bidirectional": True},
}


def convert(state_dict, options, to):
    named = {key: options[key] for key in ("bidirectional", "rescale", "highway_bias") if key in options}
    return compat.convert_state_dict(state_dict, to=to, **named)


def assert_identical(received, expected):
    assert received.keys() == expected.keys()
    assert [key for key, a in expected.items() if not torch.equal(received[key], a)] == []
    assert all(a.is_contiguous() for a in received.values())


@pytest.mark.parametrize("model", CONVERTED)
def test_conversion_to_numsru_keeps_the_function(model):
    options = {"num_layers": 2} | CONVERTED[model]
    source, twin = randomize(SRU(**options)), numsru_twin(options)
    twin.load_state_dict(convert(source.state_dict(), options, "numsru"), strict=True)
    x, mask = normal(4, 2, source.input_size), torch.tensor([[0, 1], [0, 0], [0, 0], [1, 0]]).bool()
    # A module of float64 keeps the scale_x of float32 that it was made with.
    assert_same(twin(x, mask_pad=mask)[0], source(x, mask_pad=mask)[0], atol=1e-6 if "rescale" in options else 1e-11)


FORMATS = ["numsru", "sru-1", "sru-2", "sru-3"]
ROUND_TRIPS = [
    (model, via, last)
    for model in CONVERTED
    for via in FORMATS
    for last in FORMATS
    if model == "version 1" or "sru-1" not in (via, last)
]


@pytest.mark.parametrize(("model", "via", "last"), ROUND_TRIPS)
def test_conversion_forth_and_back_changes_no_bit(model, via, last):
    options = CONVERTED[model]
    source = randomize(SRU(**options)).float().state_dict()
    start = convert(source, options, last)
    assert_identical(convert(convert(start, options, via), options, last), start)
    assert_identical(convert(start, options, "sru-2"), source)


@pytest.mark.parametrize("model", CONVERTED)
def test_conversion_to_3_0_gives_its_layout(model):
    options = CONVERTED[model]
    source = SRU(**options).state_dict()
    assert_identical(convert(source, options, "sru-3"), {key: a.contiguous() for key, a in as_3(source).items()})


def test_conversion_to_2017_keeps_two_tensors_of_each_layer():
    source = SRU(5, 4, v1=True).state_dict()
    converted = compat.convert_state_dict(source, to="sru-1")
    assert_identical(converted, {key: a for key, a in source.items() if key.endswith((".weight", ".bias"))})


def test_numsru_layout_has_each_matrix_in_rows_of_its_own():
    source = SRUCell(5, 4, bidirectional=True, rescale=False)
    converted = compat.convert_state_dict(
        {f"rnn_lst.0.{key}": a for key, a in source.state_dict().items()}, to="numsru", bidirectional=True
    )
    official_weight = source.weight.view(5, 2, 4, 4)
    weight = converted["weight_l0"].view(2, 4, 4, 5)
    assert torch.equal(weight[1, 2], official_weight[:, 1, :, 2].t())
    assert torch.equal(converted["bias_l0"][1, 0], source.bias.view(2, 2, 4)[0, 1])
    assert torch.equal(converted["weight_c_l0"][1, 0], source.weight_c.view(2, 2, 4)[0, 1])


def test_conversion_shares_no_memory():
    source = SRU(5, 4, layer_norm=True).state_dict()
    converted = compat.convert_state_dict(source, to="sru-2")
    assert not {a.data_ptr() for a in source.values()} & {a.data_ptr() for a in converted.values()}


def test_input_projection_converts_between_releases():
    source = SRU(5, 4, proj_input_to_hidden_first=True).state_dict()
    there = compat.convert_state_dict(source, to="sru-3")
    assert_identical(compat.convert_state_dict(there, to="sru-2"), source)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_module_without_bias_converts(version, bidirectional):
    source = numsru.SRU(5, 4, bias=False, version=version, bidirectional=bidirectional, dropout_placement="highway",
                        nonlinearity="identity", dtype=F64)  # fmt: skip
    sizes = {"hidden_size": 4, "bidirectional": bidirectional} if version == 1 else {}
    rnn = SRU(5, 4, 1, bidirectional=bidirectional).double()
    rnn.load_state_dict(compat.convert_state_dict(source.state_dict(), to="sru-2", **sizes), strict=True)
    assert_same(rnn(normal(4, 2, 5))[0], source(normal(4, 2, 5))[0])
    assert_identical(compat.convert_state_dict(source.state_dict(), to="numsru"), source.state_dict())


def test_scale_of_a_skip_matrix_is_no_obstacle():
    """It is baked into the matrix."""
    source = SRU(5, 4, 1).state_dict() | {"rnn_lst.0.scale_x": torch.tensor([0.5])}
    compat.convert_state_dict(source, to="numsru")
    compat.convert_state_dict(source, to="numsru", rescale=True, highway_bias=-1.0)


def with_scales(*scales):
    return SRU(4, 4, len(scales)).state_dict() | {
        f"rnn_lst.{i}.scale_x": torch.tensor([s]) for i, s in enumerate(scales)
    }


V1, V2, NUMSRU = SRU(5, 4, v1=True).state_dict(), SRU(5, 4).state_dict(), numsru.SRU(5, 4).state_dict()


@pytest.mark.parametrize(
    ("state_dict", "options", "message"),
    [
        (V2, {"to": "sru"}, "to must be one of 'numsru', 'sru-1', 'sru-2', 'sru-3', got 'sru'"),
        ({}, {"to": "numsru"}, "state_dict is empty"),
        (V2 | {"linear.weight": V2["rnn_lst.0.bias"]}, {"to": "numsru"}, "unknown key 'linear.weight'"),
        (NUMSRU | {"linear.weight": V2["rnn_lst.0.bias"]}, {"to": "numsru"}, "unknown key 'linear.weight'"),
        (NUMSRU | {"bias_l0.weight": V2["rnn_lst.0.bias"]}, {"to": "sru-2"}, "unknown key 'bias_l0.weight'"),
        (NUMSRU | {"layer_norm_l0": V2["rnn_lst.0.bias"]}, {"to": "sru-2"}, "unknown key 'layer_norm_l0'"),
        ({k: a for k, a in V2.items() if ".1." in k}, {"to": "numsru"}, "expected layers 0 to 0, got 1"),
        ({k: a for k, a in V2.items() if k != "rnn_lst.1.weight"}, {"to": "numsru"}, "rnn_lst.1.weight is missing"),
        ({k: a for k, a in V2.items() if k != "rnn_lst.1.bias"}, {"to": "numsru"}, "rnn_lst.1.bias is missing"),
        ({"bias_l0": torch.zeros(1, 2, 4)}, {"to": "sru-2"}, "weight_l0 is missing"),
        (SRU(6, 3).state_dict(), {"to": "numsru", "bidirectional": True}, "is bidirectional=True right?"),
        (V2 | {"rnn_lst.0.weight": torch.zeros(5, 20)}, {"to": "numsru"}, "3 or 4 sub-matrices of 4 units, got 20"),
        (numsru.SRU(5, 4, bias=False).state_dict(), {"to": "sru-2"}, "weight_l0 has no bias_l0 .*pass hidden_size"),
        (numsru.SRU(5, 4, bias=False).state_dict(), {"to": "sru-2", "hidden_size": 5}, "sub-matrices of 5 units"),
        (SRU(5, 4, custom_m=nn.Linear(5, 16)).state_dict(), {"to": "numsru"}, "rnn_lst.0.custom_m.* cannot be conv"),
        (SRUpp(5, 4, 4).state_dict(), {"to": "numsru"}, "rnn_lst.0.transform_module.alpha cannot be converted"),
        (SRU(5, 4, proj_input_to_hidden_first=True).state_dict(), {"to": "numsru"}, "numsru.SRU has no input proj"),
        (SRU(5, 4, proj_input_to_hidden_first=True).state_dict(), {"to": "sru-1"}, "package of 2017 has no input"),
        (V2, {"to": "sru-1"}, "the package of 2017 has no weight_c, which layer 0 needs"),
        (SRU(9, 9, v1=True, n_proj=2).state_dict(), {"to": "sru-1"}, "2017 has no weight_proj, which layer 0 needs"),
        (SRU(5, 4, v1=True, layer_norm=True).state_dict(), {"to": "sru-1"}, "2017 has no layer_norm.weight"),
        (SRU(4, 4, v1=True, rescale=True).state_dict(), {"to": "sru-1"}, "2017 has no scale_x, which layer 0 needs"),
        (with_scales(0.5), {"to": "numsru"}, "rnn_lst.0.scale_x is 0.5, which numsru.SRU cannot hold"),
        (with_scales(1.5, 1.25), {"to": "numsru"}, r"rnn_lst.1.scale_x is 1.25, but .*1.5"),
        (with_scales(1.5), {"to": "numsru", "rescale": False}, "scale_x is 1.5, but rescale and highway_bias yield 1"),
        (with_scales(1.5), {"to": "numsru", "rescale": True}, "rescale and highway_bias yield 1.732051"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_conversion_is_refused(state_dict, options, message):
    with pytest.raises(ValueError, match=message):
        compat.convert_state_dict(state_dict, **options)


def attention_by_hand(module, x, mask_pad=None, attn_mask=None, memory=None):
    """`SRUppAttention` from its documentation alone, one batch row and head at a time. mask_pad covers memory too."""
    L, d = x.shape[0], module.linear2.in_features // module.num_heads
    norm = (lambda a: a) if module.layer_norm is None else module.layer_norm
    before, after = (lambda a: a, norm) if module.normalize_after else (norm, lambda a: a)
    z = module.linear1(x if memory is None else torch.cat([memory, x]))
    k, v = module.linear2(before(z)).chunk(2, dim=2)
    z = z[-L:]
    q, y = before(z), torch.empty_like(z)
    for b in range(x.shape[1]):
        for head in range(module.num_heads):
            part = slice(head * d, (head + 1) * d)
            logits = q[:, b, part] @ k[:, b, part].t() / math.sqrt(d) + (0 if attn_mask is None else attn_mask)
            if mask_pad is not None:
                logits = logits.masked_fill(mask_pad[:, b], -math.inf)
            y[:, b, part] = module.alpha * logits.softmax(1) @ v[:, b, part] + z[:, b, part]
    return module.linear3(after(y))


CAUSAL = torch.full((4, 4), -math.inf).triu(1)


@pytest.mark.parametrize(
    "norm", [{}, {"layer_norm": True}, {"layer_norm": True, "normalize_after": False}],
    ids=["no norm", "norm behind", "norm in front"],
)  # fmt: skip
@pytest.mark.parametrize(
    "given",
    [(), ("mask_pad",), ("attn_mask",), ("memory",), ("mask_pad", "attn_mask"),
     ("mask_pad", "memory", "memory_mask_pad"), ("memory", "memory_mask_pad"), ("mask_pad", "memory", "attn_mask")],
    ids="-".join,
)  # fmt: skip
@pytest.mark.parametrize("num_heads", [1, 2])
def test_attention_matches_its_equations(num_heads, given, norm):
    module = randomize(compat.SRUppAttention(5, 6, 4, num_heads, **norm))
    x, memory = normal(4, 2, 5), normal(3, 2, 5, seed=2)
    arguments = {
        "mask_pad": torch.tensor([[0, 0], [0, 0], [0, 1], [0, 1]]).bool(),
        "attn_mask": torch.cat([normal(4, 3, seed=3), CAUSAL], 1) if "memory" in given else CAUSAL.double(),
        "memory": memory,
        "memory_mask_pad": torch.tensor([[1, 0], [1, 0], [0, 0]]).bool(),
    }
    arguments = {key: arguments[key] for key in given}
    M = 3 if "memory" in given else 0
    mask = torch.zeros(M + 4, 2, dtype=torch.bool)
    if "mask_pad" in given:
        mask[M:] = arguments["mask_pad"]
    if "memory_mask_pad" in given:
        mask[:3] = arguments["memory_mask_pad"]
    expected = attention_by_hand(module, x, mask, arguments.get("attn_mask"), arguments.get("memory"))
    assert_same(module(x, **arguments), expected)


@pytest.mark.parametrize("padding", [False, True], ids=["no padding", "padding"])
def test_boolean_attention_mask_forbids_where_true(padding):
    module = randomize(compat.SRUppAttention(5, 6, 4))
    x, mask = normal(4, 2, 5), torch.tensor([[0, 0], [0, 0], [0, 0], [0, 1]]).bool() if padding else None
    assert_same(module(x, mask, CAUSAL.bool()), module(x, mask, CAUSAL.double()))


@pytest.mark.parametrize("attn_mask", [None, CAUSAL.double(), CAUSAL.bool()], ids=["no mask", "float", "bool"])
def test_row_of_padding_alone_gives_finite_gradients(attn_mask):
    rnn = randomize(SRUpp(5, 4, 4, bidirectional=True))
    mask = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]]).bool()
    results = outputs_and_gradients(rnn, normal(4, 2, 5), None, mask, attn_mask=attn_mask)
    assert all(a.isfinite().all() for a in results.values())
    assert not results["h"][:, 1].any()


def layer_by_hand(cell, x, **arguments):
    """A `SRUppCell` as a `SRUCell` around `attention_by_hand`, without the memory's padding."""
    plain = SRUCell(
        cell.input_size, cell.hidden_size, bidirectional=cell.bidirectional, rescale=cell.rescale,
        layer_norm=cell.layer_norm is not None, normalize_after=cell.normalize_after, highway_bias=-2.0,
        custom_m=lambda_module(lambda v: attention_by_hand(cell.transform_module, v, **arguments)),
    ).double()  # fmt: skip
    plain.load_state_dict({key: a for key, a in cell.state_dict().items() if "transform" not in key}, strict=True)
    return plain(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True, "rescale": True}, {"layer_norm": True}, {"layer_norm": True, "normalize_after": True},
     {"attn_layer_norm": False, "num_heads": 2}],
    ids=["default", "bidirectional", "pre norm", "post norm", "no norm in attention"],
)  # fmt: skip
def test_stack_of_attention_layers_matches_its_equations(options):
    rnn = randomize(SRUpp(5, 4, 4, 3, **options))
    x = normal(4, 2, 5)
    memory = [normal(3, 2, cell.input_size, seed=2) for cell in rnn.rnn_lst]
    attn_mask = torch.cat([torch.zeros(4, 3), CAUSAL], 1).double()
    h, c, other = rnn(x, attn_mask=attn_mask, memory=memory)
    states = []
    for cell, m, saved in zip(rnn.rnn_lst, memory, other["saved_inputs"], strict=True):
        assert torch.equal(saved, x) or torch.allclose(saved, x, rtol=0, atol=1e-11)
        x, state = layer_by_hand(cell, x, attn_mask=attn_mask, memory=m)
        states.append(state)
    assert_same(h, x)
    assert_same(c, torch.stack(states))


def test_saved_inputs_carry_a_sequence_on():
    rnn = randomize(SRUpp(5, 4, 4, 3))
    x = normal(4, 2, 5)
    h, _, _ = rnn(x, attn_mask=CAUSAL.double())
    first, c, other = rnn(x[:2], attn_mask=CAUSAL[:2, :2].double())
    second = rnn(x[2:], c, attn_mask=CAUSAL[2:].double(), memory=other["saved_inputs"])[0]
    assert_same(torch.cat([first, second]), h)


def test_padding_of_the_memory_of_any_dtype_is_ignored():
    rnn = randomize(SRUpp(5, 4, 4))
    x, memory = normal(4, 2, 5), [normal(3, 2, size, seed=2) for size in (5, 4)]
    dirty = [torch.cat([m, torch.full_like(m[:1], torch.nan)]) for m in memory]
    mask = torch.tensor([[0, 0], [0, 0], [0, 0], [1, 1]])
    assert_same(rnn(x, memory=dirty, memory_mask_pad=mask)[0], rnn(x, memory=memory)[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True] * 5),
        ({"attention_every_n_layers": 2}, [False, True, False, True, False]),
        ({"attention_last_n_layers": 2}, [False, False, False, True, True]),
        ({"attention_last_n_layers": 0}, [False] * 5),
    ],
    ids=["all", "every second", "last two", "none"],
)
def test_attention_is_in_the_layers_asked_for(options, expected):
    rnn = SRUpp(5, 4, 4, 5, **options)
    assert [isinstance(cell.transform_module, compat.SRUppAttention) for cell in rnn.rnn_lst] == expected
    assert rnn(torch.randn(3, 2, 5))[0].shape == (3, 2, 4)


def test_layer_without_attention_is_a_product_of_two_matrices():
    module = randomize(compat.SRUppProjectedLinear(5, 6, 4, layer_norm=True))
    x = normal(3, 2, 5)
    assert_same(module(x), module.linear2(module.layer_norm(module.linear1(x))))


def test_arguments_of_the_attention_stand_where_the_official_package_has_them():
    module = compat.SRUppAttention(5, 6, 4, 2, 0.1, 0.2, 0.5, True, False)
    assert (module.num_heads, module.dropout.p, module.attn_dropout) == (2, 0.1, 0.2)
    assert (module.alpha.tolist(), module.layer_norm is not None, module.normalize_after) == ([0.5], True, False)
    with torch.no_grad():
        module.alpha.fill_(7)
    module.reset_parameters()
    assert module.alpha.tolist() == [0.5]


@pytest.mark.parametrize(
    ("make", "last"),
    [(lambda p: compat.SRUppAttention(60, 90, 80, dropout=p), "linear3"),
     (lambda p: compat.SRUppProjectedLinear(60, 90, 80, dropout=p), "linear2")],
    ids=["attention", "product"],
)  # fmt: skip
def test_dropout_makes_the_last_product_of_srupp_start_smaller(make, last):
    expected = math.sqrt(6 / (80 + 90))
    assert bound(getattr(make(0.0), last).weight.detach()) == expected
    assert bound(getattr(make(0.75), last).weight.detach()) == expected / 2
    assert bound(make(0.75).linear1.weight.detach()) == math.sqrt(6 / (60 + 80))


@pytest.mark.parametrize(
    ("make", "expected"),
    [(lambda: SRU(60, 70, proj_input_to_hidden_first=True), 60**-0.5),
     (lambda: SRUpp(60, 70, 4, proj_input_to_hidden_first=True), math.sqrt(6 / (60 + 70)))],
    ids=["SRU", "SRUpp"],
)  # fmt: skip
def test_input_projection_starts_as_the_official_one_does(make, expected):
    rnn = make()
    assert bound(rnn.input_to_hidden.weight.detach()) == expected
    with torch.no_grad():
        rnn.input_to_hidden.weight.fill_(7)
    rnn.reset_parameters()
    assert bound(rnn.input_to_hidden.weight.detach()) == expected


def test_srupp_starts_as_the_official_one_does():
    rnn = SRUpp(5, 300, 40, 1)
    cell, module = rnn.rnn_lst[0], rnn.rnn_lst[0].transform_module
    assert cell.bias.tolist() == [0.0] * 300 + [-2.0] * 300
    assert bound(cell.weight_c.detach()) == 1.0
    assert module.alpha.tolist() == [0.0]
    assert bound(module.linear3.weight.detach()) == math.sqrt(6 / (40 + 1200))
    assert bound(module.linear2.weight.detach()) == math.sqrt(6 / (40 + 80))


@pytest.mark.parametrize("module", [
    compat.SRUppAttention(5, 6, 40, dropout=0.5), compat.SRUppProjectedLinear(5, 6, 40, dropout=0.5)
], ids=["attention", "product"])  # fmt: skip
def test_dropout_of_srupp_is_before_the_last_product(module):
    seen = []
    last = getattr(module, "linear3", module.linear2)
    last.register_forward_pre_hook(lambda _, inputs: seen.append(*inputs))
    module.train()(torch.randn(20, 3, 5))
    module.eval()(torch.randn(20, 3, 5))
    assert 0.4 < (seen[0] == 0).float().mean() < 0.6
    assert seen[1].all()


def test_attention_weights_are_dropped_in_training():
    module = randomize(compat.SRUppAttention(5, 6, 4, attn_dropout=0.5))
    x = normal(4, 2, 5)
    assert not torch.allclose(module(x), module(x))
    module.eval()
    assert_same(module(x), attention_by_hand(module, x))


def test_cell_takes_a_module_of_the_users():
    seen = {}
    custom = lambda_module(lambda v, **named: seen.update(named) or v.repeat(1, 1, 3))
    cell, memory = compat.SRUppCell(4, 4, transform_module=custom), torch.zeros(1, 2, 4)
    cell(torch.zeros(3, 2, 4), None, torch.zeros(3, 2), memory=memory)
    assert seen["memory"] is memory
    assert seen.keys() == {"mask_pad", "attn_mask", "memory", "memory_mask_pad"}
    assert seen["mask_pad"].dtype == torch.bool


def test_cell_calls_an_attention_changed_by_the_user():
    class Doubled(compat.SRUppAttention):
        def forward(self, *args, **named):
            return 2 * super().forward(*args, **named)

    doubled = randomize(compat.SRUppCell(5, 4, transform_module=Doubled(5, 16, 4)))
    plain = randomize(compat.SRUppCell(5, 4, transform_module=compat.SRUppAttention(5, 16, 4)))
    with torch.no_grad():
        plain.transform_module.linear3.weight *= 2
    assert_same(doubled(normal(4, 2, 5))[0], plain(normal(4, 2, 5))[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SRUpp(5, 4, 4, num_heads=3), "num_heads must divide the projection's size 4, got 3"),
        (lambda: SRUpp(5, 4, 0), "proj_size must be at least 1, got 0"),
        (lambda: SRUpp(5, 4, 4, attention_every_n_layers=2, attention_last_n_layers=1), "got both"),
        (lambda: compat.SRUppCell(5, 4), "transform_module is missing: pass a SRUppAttention"),
        (lambda: SRUpp(5, 4, 4)(X, memory=[X]), "memory must have one tensor for each of the 2 layers, got 1"),
        (lambda: SRUpp(5, 4, 4, 1)(X, memory=[X[:, :, :4]]), r"memory must have shape \(M, 2, 5\), got \(3, 2, 4\)"),
        (lambda: SRUpp(5, 4, 4)(X, attn_mask=CAUSAL), r"attn_mask must have shape \(3, 3\), got \(4, 4\)"),
        (lambda: SRUpp(5, 4, 4, 1)(X, memory=[X], memory_mask_pad=torch.zeros(2, 2)), "memory_mask_pad must have"),
    ],
    ids=["heads", "projection", "both", "no module", "memory count", "memory shape", "mask shape", "memory mask"],
)
def test_wrong_use_of_srupp_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
