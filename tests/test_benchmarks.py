"""The benchmarks run, tiny, and write what they say; their helpers count and divide right."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PUBLISHED = sorted(set(RESULTS.glob("*.json")) - set(RESULTS.glob("tiles_*")))  # those have another origin
# To compile a loop takes longer than everything else.
NO_COMPILE = {"speed": ["--compile", "none"], "figure": [], "ablation": []}
sys.path.insert(0, str(ROOT))

import numsru  # noqa: E402
from benchmarks import ablation, cli, contestants, figure, machine, points, report, sequential, speed, timing  # noqa: E402
from benchmarks.contestants import MismatchError, loop, scan, sequential_layer  # noqa: E402
from benchmarks.points import Point, square  # noqa: E402
from benchmarks.timing import Settings  # noqa: E402
from numsru import reference  # noqa: E402

CPU = Settings(torch.device("cpu"), "float32", seconds=0.01, small=True)
PNG = b"\x89PNG\r\n\x1a\n"
OF_EVERY_POINT = {"numsru.SRU", "nn.LSTM", "nn.GRU", "Conv1d k=2", "Conv1d k=3", "F.linear"}
ON_A_GPU = {f"{name}, graphed" for name in ("numsru.SRU", "nn.LSTM", "F.linear")}
OF_ONE_LAYER = {"torch loop", "compiled loop", "compiled scan"}

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def run(command: str, device: str, out: Path, *options: str) -> tuple[dict, set[str]]:
    """What a tiny run writes: its JSON, and the names of all files."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert cli.main([command, "--device", device, "--small", "--out", str(out), *options]) == 0
    names = {path.name for path in out.iterdir()}
    (json_name,) = (name for name in names if name.endswith(".json"))
    for name in names:
        if name.endswith(".png"):
            assert (out / name).read_bytes().startswith(PNG)
    return json.loads((out / json_name).read_text(encoding="utf-8")), names


def assert_complete(entry: dict, names: set[str], base: str) -> None:
    """Every contestant has finite times; those of the base are the unit of the ratios."""
    assert entry["unavailable"] == {}
    assert set(entry["times"]) == set(entry["ratios"]) == names
    for times in entry["times"].values():
        assert 0 < times["low"] <= times["median"] <= times["high"] < math.inf
        assert times["samples"] == timing.ROUNDS[0]
    assert entry["ratios"][base] == 1
    assert all(0 < ratio < math.inf for ratio in entry["ratios"].values())


def assert_describes_its_machine(result: dict, device: str) -> None:
    assert result["machine"]["processor"]
    assert result["machine"]["cores"] >= 1
    assert ("gpu" in result["machine"]) == (device == "cuda")
    assert torch.__version__.startswith(result["versions"]["torch"])  # which may name a build behind it
    assert result["versions"]["numsru"] == numsru.__version__
    assert result["settings"]["threads"]["torch"] == torch.get_num_threads()
    assert result["settings"] | {"device": device, "dtype": "float32", "small": True} == result["settings"]


@devices
def test_speed_measures_every_contestant_at_every_point(device, tmp_path):
    result, names = run("speed", device, tmp_path)
    stem = machine.short_name(result["machine"])
    assert names == {f"{stem}{end}" for end in (".json", ".md", "_ceiling.png", "_ratios.png")}
    assert_describes_its_machine(result, device)
    assert all(c["bytes_per_second"] > 0 for c in result["ceilings"]["copy"])
    routes = {"F.linear", "conv 1x1"} if device == "cpu" else {"F.linear"}
    assert set(result["ceilings"]["product_flops_per_second"]) == routes

    layers = {(e["point"], e["pass"]): e for e in result["layers"]}
    assert set(layers) == {(p.name, name) for p in points.SMALL for name in ("forward", "forward+backward")}
    for (point, _), entry in layers.items():
        expected = OF_EVERY_POINT | routes | (ON_A_GPU if device == "cuda" else set())
        if point == points.SMALL[0].name:
            expected |= OF_ONE_LAYER
            if device == "cuda":
                expected |= {"sequential kernel", "sequential kernel, graphed"}
        assert_complete(entry, expected, "numsru.SRU")
        assert set(entry["errors"]) == set(entry["first_call"]) >= {"numsru.SRU"}
        assert all(error < 1e-4 for error in entry["errors"].values())
        assert entry["product_fraction"] > 0

    recurrence = {(e["point"], e["pass"]): e for e in result["recurrence"]}
    assert set(recurrence) == {(p.name, name) for p in points.SMALL for name in ("forward", "backward")}
    for (point, direction), entry in recurrence.items():
        one_layer = {"sequential kernel"} if point == points.SMALL[0].name else set()
        assert_complete(entry, {"numsru", "copy"} | one_layer, "copy")
        assert entry["bytes"] == points.recurrence_bytes(points.parse(point), 4, direction)
        times = entry["times"]["numsru"]
        assert times["bytes_per_second"] == pytest.approx(entry["bytes"] / times["median"])
        ceiling = result["ceilings"]["copy_bytes_per_second"]
        assert times["fraction_of_ceiling"] == pytest.approx(times["bytes_per_second"] / ceiling)

    assert [(e["B"], e["d"]) for e in result["streaming"]] == points.SMALL_STREAMING
    for entry in result["streaming"]:
        assert_complete(entry, {"numsru.SRUCell", "nn.LSTMCell", "nn.GRUCell", "F.linear"}, "numsru.SRUCell")

    page = (tmp_path / f"{stem}.md").read_text(encoding="utf-8")
    assert all(f"| {point.name} " in page for point in points.SMALL)
    assert "Could not run" not in page


@devices
def test_figure_has_stacks_of_every_depth(device, tmp_path):
    result, names = run("figure", device, tmp_path)
    assert {Path(name).suffix for name in names} == {".json", ".md", ".png"}
    assert_describes_its_machine(result, device)
    assert [e["pass"] for e in result["entries"]] == ["forward", "forward+backward"]
    for entry in result["entries"]:
        expected = {"LSTM", "Conv1d k=3", "Conv1d k=2", "SRU, 1 layer", "SRU, 2 layers", "SRU, 4 layers"}
        assert_complete(entry, expected, "SRU, 1 layer")


@devices
def test_ablation_has_every_step(device, tmp_path):
    result, names = run("ablation", device, tmp_path)
    assert {Path(name).suffix for name in names} == {".json", ".md", ".png"}
    assert_describes_its_machine(result, device)
    assert [e["pass"] for e in result["entries"]] == ["forward", "forward+backward"]
    for entry in result["entries"]:
        assert_complete(entry, {c.name for c in ablation.steps(points.SMALL[0], CPU)}, "numsru.SRU")


def page_for(command: str, folder: Path) -> Path:
    page = folder / "page" / "why.md"
    page.parent.mkdir()
    page.write_text(
        f"before\n<!-- measured by {command} -->\nold\n<!-- end of {command} -->\nafter\n", encoding="utf-8"
    )
    return page


def text_between_markers(command: str, page: Path) -> str:
    """What a run has put there; the rest of the page is as it was."""
    text = page.read_text(encoding="utf-8")
    start, end = f"before\n<!-- measured by {command} -->\n", f"<!-- end of {command} -->\nafter\n"
    assert text.startswith(start)
    assert text.endswith(end)
    assert "old" not in text
    return text.removeprefix(start).removesuffix(end)


@pytest.fixture
def tiny_grid(monkeypatch):
    """The whole grid takes no longer than with --small."""
    for name, tiny in (("CPU", points.SMALL), ("FIGURE", points.SMALL[:1]), ("STREAMING", points.SMALL_STREAMING)):
        monkeypatch.setattr(points, name, tiny)
    monkeypatch.setattr(speed, "measure_ceilings", lambda settings: timing.measure_ceilings(CPU))


@pytest.mark.usefixtures("tiny_grid")
@pytest.mark.parametrize("command", ["speed", "figure", "ablation"])
def test_tables_of_the_grid_are_put_on_a_page(command, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "RESULTS", tmp_path / "results")
    page = page_for(command, tmp_path)
    assert cli.main([command, *NO_COMPILE[command], "--device", "cpu", "--seconds", "0.01", "--page", str(page)]) == 0
    text = text_between_markers(command, page)
    assert f" {points.SMALL[0].name}" in text
    assert "- 0.01 seconds for each comparison; each time is the median of at least " in text
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ".md", ".png"}
    if command == "ablation":
        assert page.with_suffix(".png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("options", [["--small"], ["--points", "2x3x4"]], ids=["small", "points"])
@pytest.mark.parametrize("command", ["speed", "figure", "ablation"])
def test_page_is_refused_without_the_whole_grid(command, options, tmp_path, capsys):
    page = page_for(command, tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--device", "cpu", *options, "--out", str(tmp_path / "out"), "--page", str(page)])
    assert ended.value.code == 2
    assert "error: --page is for the whole grid: it cannot" in capsys.readouterr().err.splitlines()[-1]
    assert "\nold\n" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "options",
    [
        ["--small", "--compile", "none"],
        ["figure", "--small"],
        ["ablation", "--points", "2x3x4", "--seconds", "0.01"],
    ],
    ids=["speed", "figure", "ablation"],
)
def test_published_results_are_not_replaced_without_the_whole_grid(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.main([*options, "--device", "cpu"]) == 0
    assert not cli.RESULTS.exists()
    (folder,) = tmp_path.glob("numsru-benchmarks-*")  # torch.compile may leave a folder of its own
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".png"}
    assert capsys.readouterr().out.endswith(f"\nResults are in {folder}\n")


@pytest.mark.parametrize(
    ("command", "name"),
    [("figure", "5x2x8-2l"), ("ablation", "5x2x8-2l"), ("ablation", "5x2x8-bi"), ("ablation", "8x2x8-h4-bi")],
)
def test_points_that_a_command_cannot_do_are_refused(command, name, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([command, "--device", "cpu", "--small", "--points", "2x3x4", name, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {command} takes points of one layer")
    assert line.endswith(f"got {name!r}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "name"), [("speed", "9x9x9"), ("speed", points.SMALL[1].name), ("figure", points.SMALL[0].name)]
)
def test_compiled_points_that_would_not_be_measured_are_refused(command, name, tmp_path, capsys):
    assert cli.main([command, "--device", "cpu", "--small", "--compile", name, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --compile takes points that speed measures")
    assert line.endswith(f"got {name!r}")


@pytest.mark.parametrize(("name", "compiled"), [("none", []), ("2x3x5", ["2x3x5"])])
def test_points_to_compile_are_those_asked_for(name, compiled, tmp_path, monkeypatch):
    asked = []

    def measure(result, settings, measured, streaming, compiled, backend, save):
        asked.extend(point.name for point in compiled)
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "run", measure)
    options = ["--points", "2x3x4", "2x3x5", "--compile", name, "--out", str(tmp_path)]
    assert cli.main(["--device", "cpu", *options]) == 130
    assert asked == compiled


def test_pages_of_the_repository_have_their_markers():
    for page, command in (
        ("docs/why_it_is_fast.md", "ablation"),
        ("benchmarks/README.md", "speed"),
        ("benchmarks/README.md", "figure"),
    ):
        assert all(report.around(ROOT / page, command))


@pytest.mark.parametrize("command", ["speed", "figure", "ablation"])
def test_points_on_the_command_line_replace_the_grid(command, tmp_path):
    result, _ = run(command, "cpu", tmp_path, "--points", "2x3x4", *NO_COMPILE[command])
    assert not any("compiled loop" in e["times"] for e in result.get("layers", []))
    assert {e["point"] for e in result.get("layers", result.get("entries"))} == {"2x3x4"}


@pytest.mark.parametrize(
    "path", [path for path in PUBLISHED if path.stem.startswith(("cpu", "cuda"))], ids=lambda p: p.stem
)
def test_times_are_plotted_where_several_lengths_share_a_size(path):
    figure = report.plot_times(json.loads(path.read_text(encoding="utf-8")))
    assert (figure is None) == path.stem.startswith("cpu")


def test_command_of_the_documentation_runs_from_the_root(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "figure", "--device", "cpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("figure_cpu_*.json")
    assert json.loads(path.read_text(encoding="utf-8"))["settings"]["threads"]["OMP_PROC_BIND"] == "true"


@pytest.mark.parametrize("name", ["12", "1x2", "0x3x4", "axbxc", "2x3x4-h0", "128x32x256 "])
def test_malformed_point_is_refused(name, capsys):
    assert cli.main(["--points", name]) == 2
    assert repr(name) in capsys.readouterr().err


def test_wrong_numsru_ends_the_run_before_anything_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(numsru, "SRU", WrongSRU)
    monkeypatch.setattr(contestants, "compare", lambda *arguments: pytest.fail("timed"))
    assert cli.main(["ablation", "--device", "cpu", "--small", "--out", str(tmp_path)]) == 1
    assert "relative error" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_dtype_that_numsru_refuses_ends_the_run(tmp_path, capsys, monkeypatch):
    def refuse(*arguments):
        raise TypeError("not in this dtype")

    monkeypatch.setattr(numsru.SRUCell, "forward", refuse)
    assert cli.main(["figure", "--device", "cpu", "--small", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: not in this dtype\n"


def test_unknown_device_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--device", "foo"])
    assert ended.value.code == 2
    assert "argument --device: invalid choice: 'foo'" in capsys.readouterr().err.splitlines()[-1]


def test_folder_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figure, "run", lambda *arguments: pytest.fail("measured"))
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below", Path("/proc/foo"), Path("/proc")):
        assert cli.main(["figure", "--device", "cpu", "--small", "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --out must be a folder that can be written, got {str(out)!r}: ")


def test_interrupted_run_says_so_in_one_line(tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "run", interrupt)
    assert cli.main(["figure", "--device", "cpu", "--small", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == f"interrupted; what was written before is in {tmp_path}\n"


INTERRUPTED = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, *rest):
        if name == "benchmarks.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
runpy.run_module("benchmarks", run_name="__main__")
"""


def test_interrupted_import_says_so_in_one_line():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


class WrongSRU(numsru.SRU):
    def forward(self, *arguments, **options):
        output, c_n = super().forward(*arguments, **options)
        return output * 1.001, c_n


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_wrong_contestant_is_reported_in_place_of_its_time(training):
    base, rnn = contestants.sru(square(3, 2, 4), CPU)
    wrong = contestants.of_sru("wrong", lambda x, weight, bias: 2 * loop(x, weight, bias), rnn, base)
    entry = contestants.measure([base, wrong], square(3, 2, 4), CPU, training)
    assert set(entry["times"]) == {"numsru.SRU"}
    assert entry["unavailable"]["wrong"].startswith("MismatchError: wrong at 3x2x4")


def test_gradient_that_is_wrong_is_named():
    base, rnn = contestants.sru(square(3, 2, 4), CPU)

    def run(x):
        return rnn(x)[0] + (rnn.bias_l0 - rnn.bias_l0.detach()).sum()  # the right output, another gradient

    with pytest.raises(MismatchError, match="of the gradient of parameter 1,"):
        contestants.check([base._replace(run=run)], square(3, 2, 4), CPU, training=True)


def test_contestant_that_cannot_run_is_reported_with_its_reason():
    def refuse():
        raise TypeError("no such dtype\nmore")

    result = timing.compare({"base": lambda: None, "other": refuse}, CPU, "base")
    assert result["unavailable"] == {"other": "TypeError: no such dtype"}
    assert set(result["times"]) == {"base"}
    with pytest.raises(TypeError, match="no such dtype"):
        timing.compare({"base": refuse}, CPU, "base")


def test_page_says_who_could_not_run(tmp_path):
    """The sequential kernel computes in float32 alone."""
    run("ablation", "cpu", tmp_path, "--dtype", "bfloat16")
    (page,) = tmp_path.glob("*.md")
    assert "\nCould not run:\n\n- one fused kernel, sequential: TypeError: " in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "name"), [(figure, "LSTM"), (ablation, ablation.RECURRENT), (ablation, "gates of all steps at once")]
)
def test_tables_do_without_who_could_not_run_once(command, name):
    result = {}
    command.run(result, CPU, points.SMALL[:1])
    assert "Could not run" not in command.tables(result)
    entry = result["entries"][0]
    del entry["times"][name], entry["ratios"][name]
    entry["unavailable"][name] = "OutOfMemoryError: too large"
    assert command.tables(result).endswith(f"\nCould not run:\n\n- {name}: OutOfMemoryError: too large\n")


def test_page_says_how_long_and_how_often_was_measured(tmp_path):
    result, _ = run("speed", "cpu", tmp_path, "--points", "2x3x4", "--compile", "none")
    (page,) = tmp_path.glob("*.md")
    assert "- a trial (--small); each time is the median of at least " in page.read_text(encoding="utf-8")
    result["settings"] |= {"small": False, "seconds": 0.08}
    for part, fewest in (("layers", 2), ("recurrence", 1), ("streaming", 0)):
        next(iter(result[part][-1]["times"].values()))["samples"] = fewest
        assert report.provenance(result).endswith(
            f"- 0.08 seconds for each comparison; each time is the median of at least {fewest} samples\n"
        )


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_pages_are_those_of_their_results(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    command = {"figure": figure, "ablation": ablation}.get(path.stem.partition("_")[0], speed)
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    results = f"{report.provenance(result)}\n{command.tables(result)}"
    assert page.partition("\n\n")[2] == results


@pytest.mark.parametrize(
    ("page", "command", "name", "tables"),
    [
        ("benchmarks/README.md", "speed", "cpu_intel-xeon", speed.layer_tables),
        ("benchmarks/README.md", "figure", "figure_cpu_intel-xeon", figure.tables),
        ("docs/why_it_is_fast.md", "ablation", "ablation_cpu_intel-xeon", ablation.tables),
    ],
    ids=lambda value: value if value in ("speed", "figure", "ablation") else "",
)
def test_pages_hold_the_published_results(page, command, name, tables):
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    before, after = report.around(ROOT / page, command)
    assert (ROOT / page).read_text(encoding="utf-8") == f"{before}{report.provenance(result)}\n{tables(result)}{after}"


@pytest.mark.parametrize("form", [loop, scan, sequential_layer, ablation.product_per_step, ablation.one_product])
@pytest.mark.parametrize("L", [1, 2, 7, 12])
def test_form_of_the_sru_matches_reference(form, L):
    point = square(L, 3, 5)
    base, rnn = contestants.sru(point, CPU)
    checked = contestants.check([base, contestants.of_sru("form", form, rnn, base)], point, CPU, training=True)
    assert checked["unavailable"] == {}
    assert checked["errors"]["form"] < 2e-6


def test_recurrent_form_without_recurrent_weights_is_an_sru():
    rnn = numsru.SRU(4, 4)
    x = torch.randn(6, 2, 4)
    weight, bias = rnn.weight_l0, rnn.bias_l0
    recurrent = ablation.recurrent_form(x, weight, bias, torch.zeros(8, 4))
    torch.testing.assert_close(recurrent, loop(x, weight, bias))
    assert not torch.allclose(recurrent, ablation.recurrent_form(x, weight, bias, torch.ones(8, 4)))


def test_product_by_convolution_is_the_linear_product():
    x, weight = torch.randn(5, 3, 4), torch.randn(6, 4)
    torch.testing.assert_close(timing.conv_product(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_recurrence_is_run_on_inputs_of_the_last_layer(direction):
    for point in points.SMALL:
        prepared = contestants.recurrence_calls(point, CPU, direction, copies=2)
        for prepare in prepared.values():
            first, second = prepare()
            first(), second(), first()  # backward keeps its graph


def test_sequential_kernel_refuses_other_dtypes():
    u, x, bias = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((2, 1, 1, 3, 4), (2, 1, 4), (1, 2, 4)))
    with pytest.raises(TypeError, match="computes in float32"):
        sequential.sru_recurrence(u, x, bias)


SIMULATED = """
import numpy as np
from benchmarks import sequential, sequential_cuda
L, B, H = 5, 3, 4
rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
u, x, bias, grad_h = normal(L, B, 3, H), normal(L, B, H), normal(2, H), normal(L, B, H)
results = []
for forward, backward in (
    (sequential._forward_cpu, sequential._backward_cpu),
    (sequential_cuda.forward[2, 8], sequential_cuda.backward[2, 8]),
):
    h, c, grad_u, grad_x = (np.full_like(a, np.nan) for a in (x, x, u, x))
    grad_c, grad_bias = np.zeros_like(x[0]), np.zeros((B, 2, H), np.float32)
    forward(u, x, bias, h, c)
    backward(u, x, bias, c, grad_h, grad_u, grad_x, grad_c, grad_bias)
    results.append((h, c, grad_u, grad_x, grad_c, grad_bias))
for a, b in zip(*results, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
print("agree")
"""


def run_numba_cuda(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "DynamicLibNotFoundError" in done.stderr:
        pytest.skip(f"numba.cuda cannot be imported: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sequential_cuda_kernel_agrees_with_the_cpus_in_the_simulator():
    assert run_numba_cuda(SIMULATED, NUMBA_ENABLE_CUDASIM="1") == "agree\n"


COMPILED = """
from numba import cuda, float32, void
from benchmarks import sequential_cuda
one, two, three, four = (float32[(slice(None),) * (n - 1) + (slice(None, None, 1),)] for n in (1, 2, 3, 4))
for kernel, signature in (
    (sequential_cuda.forward, void(four, three, two, three, three)),
    (sequential_cuda.backward, void(four, three, two, three, three, four, three, two, three)),
):
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=(9, 0))
    print(".f64" in ptx, ".local" in ptx)
"""


def test_sequential_cuda_kernel_compiles_to_float32_alone():
    assert run_numba_cuda(COMPILED) == "False False\n" * 2


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_bytes_are_those_of_the_arrays_that_are_read_and_written(direction):
    for point in (square(7, 3, 5), Point(7, 3, 10, 5, bidirectional=True), Point(7, 3, 6, 5)):
        u, x, h = _arrays(point)
        moved = [u, h] + ([] if x is None else [x])
        if direction == "backward":
            moved.extend(torch.autograd.grad(h, [u] + ([] if x is None else [x]), torch.ones_like(h)))
        assert points.recurrence_bytes(point, 8, direction) == sum(a.nbytes for a in moved)


def _arrays(point):
    """u, x and h of a layer; x is None with K = 4."""
    D, H = point.num_directions, point.hidden_size
    K = 3 if point.input_size == point.output_size else 4
    u = torch.randn(point.L, point.B, D, K, H, dtype=torch.float64, requires_grad=True)
    x = torch.randn(point.L, point.B, D * H, dtype=torch.float64, requires_grad=True) if K == 3 else None
    return u, x, reference.sru_recurrence(u, x)[0]


@pytest.mark.parametrize("point", [*points.SMALL, points.CUDA[-1]], ids=lambda point: point.name)
def test_operations_are_those_of_numsrus_weights(point):
    rnn = contestants.sru(point, CPU)[1]
    elements = sum(getattr(rnn, f"weight_l{i}").numel() for i in range(point.num_layers))
    assert points.product_flops(point, training=False) == 2 * elements * point.L * point.B
    assert points.product_flops(point, training=True) == 6 * elements * point.L * point.B


@pytest.mark.parametrize("point", [*points.CPU, *points.CUDA, *points.SMALL], ids=lambda point: point.name)
def test_name_of_a_point_is_parsed(point):
    assert points.parse(point.name) == point


def test_grids_have_no_point_twice():
    assert len(set(points.CPU)) == len(points.CPU) == 6
    assert len(set(points.CUDA)) == len(points.CUDA) == 20 + 16 + 1


def test_ratio_compares_within_each_round():
    assert timing.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == 3


def test_summary_has_median_with_quartiles():
    assert timing.summary([5.0, 1.0, 4.0, 2.0, 3.0]) == {"median": 3, "low": 2, "high": 4, "samples": 5}


def test_every_round_runs_every_contestant():
    order = []
    samples = timing.alternate({name: lambda name=name: order.append(name) for name in "abc"}, CPU)
    assert {name: len(s) for name, s in samples.items()} == dict.fromkeys("abc", timing.ROUNDS[0])
    rounds = [order[i : i + 3] for i in range(3, len(order), 3)]  # the first three estimate
    assert len(rounds) == timing.ROUNDS[0]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(map(tuple, rounds))) > 1


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cpu_intel-xeon-platinum-8481c"),
        ("Intel(R) Xeon(R) Processor", "cpu_intel-xeon"),
        ("AMD EPYC 9B45 64-Core Processor", "cpu_amd-epyc-9b45"),
        ("Apple M3", "cpu_apple-m3"),
    ],
)
def test_short_name_of_a_processor(name, short):
    assert machine.short_name({"processor": name}) == short


def test_short_name_of_a_gpu_is_its_own():
    assert machine.short_name({"processor": "any", "gpu": {"name": "NVIDIA H100 80GB HBM3"}}) == (
        "cuda_nvidia-h100-80gb-hbm3"
    )


@pytest.mark.parametrize(("value", "text"), [(0.012345, "0.0123"), (1.5, "1.5"), (999.6, "1000"), (12345.6, "12346")])
def test_numbers_have_three_digits(value, text):
    assert report.number(value) == text


def test_table_is_aligned_markdown():
    assert report.table(["point", "ms"], [["a", "1.25"], ["longer name", "3"]]) == (
        "| point       |   ms |\n| ----------- | ---: |\n| a           | 1.25 |\n| longer name |    3 |\n"
    )


def test_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "result.json"
    report.write_text(path, "old")

    def fail(part):
        part.write_text("half", encoding="utf-8")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        report.write(path, fail)
    assert path.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("text", ["", "<!-- measured by figure -->\n", "<!-- end of figure -->"])
def test_page_without_markers_is_refused_before_anything_is_measured(text, tmp_path, capsys):
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text(text, encoding="utf-8")
    assert cli.main(["figure", "--device", "cpu", "--out", str(out), "--page", str(page)]) == 2
    assert "'<!-- end of figure -->'" in capsys.readouterr().err
    assert not out.exists()


def test_precision_is_set_back(tmp_path):
    before = torch.get_float32_matmul_precision()
    assert cli.main(["figure", "--device", "cpu", "--dtype", "tf32", "--small", "--out", str(tmp_path)]) == 0
    assert torch.get_float32_matmul_precision() == before
    assert any(path.name.endswith("_tf32.json") for path in tmp_path.iterdir())


def test_reference_in_pieces_is_the_whole(monkeypatch):
    base, _ = contestants.sru(square(8, 2, 3), CPU)
    monkeypatch.setattr(contestants, "PIECE", 3)
    checked = contestants.check([base], square(8, 2, 3), CPU, training=True)
    assert checked["errors"]["numsru.SRU"] < 2e-6
