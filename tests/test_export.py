"""Exported programs, also in ONNX: standard operators alone, any length and batch, the results of the module."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.export import Dim, export

import numsru
from numsru import SRU, SRUCell, compat

pytestmark = [  # from inside torch
    *(pytest.mark.filterwarnings(f"ignore::{name}") for name in ("DeprecationWarning", "FutureWarning")),
    pytest.mark.filterwarnings("ignore:.*treespec.*"),
]
D = Dim.DYNAMIC


class Classifier(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 6)
        self.rnn = SRU(6, 4, 2, bidirectional=True, **options)
        self.linear = torch.nn.Linear(8, 3)

    def forward(self, tokens, lengths):
        output, _ = self.rnn(self.embedding(tokens), lengths=lengths)
        return self.linear(output.amax(0))


class Masked(torch.nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, mask_pad):
        return self.rnn(x, mask_pad=mask_pad)


def tokens(L, B):
    return torch.randint(20, (L, B)), torch.randint(0, L + 1, (B,))


def plain(L, B):
    return (torch.randn(L, B, 6),)


def masked(L, B):
    return torch.randn(L, B, 6), torch.rand(L, B) < 0.3


FULL = ((D, D, None),)
MODELS = {
    "classifier": (lambda: Classifier(dropout=0.3, rnn_dropout=0.3), tokens, ((D, D), (D,))),
    "one layer": (lambda: SRU(6, 4), plain, FULL),
    "version 2": (lambda: SRU(6, 4, 2, bidirectional=True, version=2), plain, FULL),
    "normalised": (lambda: SRU(6, 4, 2, projection_size=2, layer_norm="post", rescale=True), plain, FULL),
    "equal sizes": (lambda: SRU(6, 6, nonlinearity="selu"), plain, FULL),
    "no highway": (lambda: SRU(6, 4, highway=False, bias=False, nonlinearity="relu"), plain, FULL),
    "batch_first": (lambda: SRU(6, 4, batch_first=True), lambda L, B: (torch.randn(B, L, 6),), FULL),
    "states": (
        lambda: SRU(6, 4, 2), lambda L, B: (torch.randn(L, B, 6), torch.randn(2, B, 4)), (*FULL, (None, D, None)),
    ),
    "mask_pad": (lambda: Masked(SRU(6, 4, bidirectional=True)), masked, (*FULL, (D, D))),
    "cell": (lambda: SRUCell(6, 4), lambda L, B: (torch.randn(B, 6), torch.randn(B, 4)), ((D, None), (D, None))),
    "compat": (lambda: compat.SRU(6, 4, 2, bidirectional=True, rescale=True, layer_norm=True), plain, FULL),
    "compat mask": (lambda: Masked(compat.SRU(6, 4, bidirectional=True)), masked, (*FULL, (D, D))),
}  # fmt: skip


def make(name):
    """A model in evaluation mode, a function that makes its arguments, those of the export, and what varies."""
    torch.manual_seed(0)
    model, arguments, shapes = MODELS[name]
    return model().eval(), arguments, arguments(7, 3), shapes


@pytest.mark.parametrize("name", MODELS)
def test_exported_program_has_the_results_of_the_module(name):
    model, arguments, example, shapes = make(name)
    program = export(model, example, dynamic_shapes=shapes)
    assert "numsru" not in str(program.graph)
    for L, B in ((7, 3), (20, 5), (2, 2)):
        given = arguments(L, B)
        torch.testing.assert_close(program.module()(*given), model(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["classifier", "version 2", "states", "mask_pad", "compat"])
def test_onnx_runtime_has_the_results_of_the_module(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
    model, arguments, example, shapes = make(name)
    program = torch.onnx.export(model, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for L, B in ((7, 3), (20, 5), (1, 2), (3, 1)):
        given = arguments(L, B)
        with torch.no_grad():
            expected = model(*given)
        named = {value.name: a.numpy() for value, a in zip(session.get_inputs(), given, strict=True)}
        received = tuple(map(torch.from_numpy, session.run(None, named)))
        expected = expected if isinstance(expected, tuple) else (expected,)
        torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-5)


def test_exported_program_runs_where_numsru_is_missing(tmp_path):
    model, arguments, example, shapes = make("classifier")
    torch.export.save(export(model, example, dynamic_shapes=shapes), tmp_path / "model.pt2")
    given = arguments(11, 4)
    torch.save({"given": given, "expected": model(*given).detach()}, tmp_path / "values.pt")
    code = f"""
        import sys
        sys.modules["numsru"] = None  # importing it is an error
        import torch
        values = torch.load({str(tmp_path / "values.pt")!r}, weights_only=True)
        received = torch.export.load({str(tmp_path / "model.pt2")!r}).module()(*values["given"])
        torch.testing.assert_close(received, values["expected"], rtol=1e-5, atol=1e-5)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)


def test_export_of_sequences_end_to_end_is_refused():
    with pytest.raises(ValueError, match="exported program takes no cu_seqlens: pad the sequences"):
        export(SRU(6, 4), (torch.randn(7, 6),), {"cu_seqlens": torch.tensor([0, 3, 7])})
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 6), torch.randn(3, 6)])
    with pytest.raises(ValueError, match="exported program takes no PackedSequence: give it padded sequences"):
        export(SRU(6, 4), (packed,))


def test_fx_traces_around_an_sru():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.linear = SRU(6, 4), torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(self.rnn(x)[0])

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, SRU) or super().is_leaf_module(module, name)

    model, x = Model(), torch.randn(5, 3, 6)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)


def test_strict_export_does_not_leave_a_program_that_needs_numsru():
    model, _, example, shapes = make("one layer")
    try:
        program = export(model, example, dynamic_shapes=shapes, strict=True)
    except Exception:  # of torch, which up to 2.13 cannot export such a loop strictly
        return
    assert "numsru" not in str(program.graph)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("module", [SRU(6, 4), SRUCell(6, 4), compat.SRU(6, 4)], ids=lambda m: type(m).__module__)
def test_torchscript_is_refused_with_what_to_use_instead(module):
    example = torch.randn(3, 6) if isinstance(module, SRUCell) else torch.randn(5, 3, 6)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script: use torch\.compile, torch\.export\.export"):
        torch.jit.script(module)
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode), pytest.raises(RuntimeError, match=r"torch\.jit\.trace .*torch\.export"):
            torch.jit.trace(module, example)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the length is fixed
def test_a_trace_with_the_reference_keeps_the_length():
    rnn, x = SRU(6, 4, 2), torch.randn(5, 3, 6)
    with numsru.use_backend("reference"):
        traced = torch.jit.trace(rnn, x)
    x = torch.randn_like(x)
    torch.testing.assert_close(traced(x), rnn(x))
