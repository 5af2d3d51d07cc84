"""The command line: `python -m benchmarks [speed | figure | ablation]`."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import numsru

from . import ablation, figure, machine, points, report, speed
from .contestants import MismatchError, is_square
from .points import Point
from .timing import Settings

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 if all went well, 1 if numsru's results are wrong, 2 if it cannot be done as asked, 130 after Ctrl-C.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    whole = arguments.points == ["all"] and not arguments.small
    if arguments.page is not None and not whole:
        parser.error("--page is for the whole grid: it cannot be given with --small or --points")
    settings = Settings(torch.device(arguments.device), arguments.dtype, arguments.seconds, arguments.small)
    try:
        measured = _measured(arguments)
        compiled = _compiled(arguments, measured)
        if arguments.page is not None:
            report.around(arguments.page, arguments.command)
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch finds no CUDA device")
        if refusal := _refusal(settings):
            raise ValueError(refusal)
        arguments.out = _folder(arguments.out, whole)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    try:
        with _precision(settings):
            {"speed": _speed, "figure": _figure, "ablation": _ablation}[arguments.command](
                arguments, settings, measured, compiled
            )
    except MismatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; what was written before is in {arguments.out}", file=sys.stderr)
        return 130
    print(f"Results are in {arguments.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Times of numsru beside other layers.")
    parser.add_argument(
        "command", nargs="?", default="speed", choices=("speed", "figure", "ablation"),
        help="speed: every contestant on a grid of shapes (default); figure: the two panels of the original "
        "comparison; ablation: why it is fast, one change at a time",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"),
        help="cuda: the first GPU that CUDA_VISIBLE_DEVICES leaves. Default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32", choices=("float32", "tf32", "bfloat16"))
    parser.add_argument(
        "--points", nargs="+", default=["all"], metavar="LxBxd",
        help="steps x batch x units, for example 128x32x256; also 100x500x512-h32-bi-4l (figure: one layer; ablation: "
        "one layer and direction, input and output of one size). Default: the device's grid",
    )  # fmt: skip
    parser.add_argument(
        "--compile", nargs="+", metavar="LxBxd",
        help="those of the points at which speed measures torch.compile too, or none. Default: "
        + ", ".join(p.name for p in points.COMPILED),
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=2.0, help="for each comparison. Default: %(default)s")
    parser.add_argument(
        "--out", type=Path,
        help=f"folder for the results. Default: {RESULTS}, but with --small or --points a new temporary one",
    )  # fmt: skip
    parser.add_argument(
        "--page", type=Path, help="a Markdown page to put the tables into; not with --small or --points"
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes, few samples: to see that everything runs")
    return parser


def _measured(arguments: Any) -> list[Point]:
    """The points that were asked for, or the grid.

    Raises:
        ValueError: If a point is malformed or not one for this command.
    """
    command, chosen = arguments.command, [points.parse(name) for name in arguments.points if name != "all"]
    for point in chosen:
        if command == "figure" and point.num_layers > 1:  # its stacks have layers of their own, the others have not
            raise ValueError(f"figure takes points of one layer, got {point.name!r}")
        if command == "ablation" and not is_square(point):
            raise ValueError(
                f"ablation takes points of one layer and direction with input and output of one size, got "
                f"{point.name!r}"
            )
    if chosen:
        return chosen
    if command == "speed":
        return points.SMALL if arguments.small else points.CUDA if arguments.device == "cuda" else points.CPU
    return points.SMALL[:1] if arguments.small else points.FIGURE


def _compiled(arguments: Any, measured: list[Point]) -> list[Point]:
    """Where `torch.compile` is measured; the default is that of the grid and may name points that are not measured.

    Raises:
        ValueError: If a point that was asked for is malformed or would not be compiled.
    """
    if arguments.compile is None:
        return points.SMALL[:1] if arguments.small else points.COMPILED
    compiled = [points.parse(name) for name in arguments.compile if name != "none"]
    for point in compiled:
        if arguments.command != "speed" or point not in measured or not is_square(point):
            raise ValueError(
                f"--compile takes points that speed measures, of one layer and direction with input and output of one "
                f"size, got {point.name!r}"
            )
    return compiled


def _folder(out: Path | None, whole: bool) -> Path:
    """Where the results go, made and tried. Those of the whole grid are published, others do not replace them.

    Raises:
        ValueError: If nothing can be written there.
    """
    if out is None and not whole:
        return Path(tempfile.mkdtemp(prefix="numsru-benchmarks-"))
    out = out or RESULTS
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise ValueError(f"--out must be a folder that can be written, got {str(out)!r}: {error.strerror}") from error


def _refusal(settings: Settings) -> str:
    """Why numsru does not compute in this dtype on this device; empty if it does."""
    try:
        numsru.SRUCell(1, 1, device=settings.device, dtype=settings.torch_dtype)(settings.randn(1, 1))
    except TypeError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def _precision(settings: Settings) -> Iterator[None]:
    """TensorFloat32 in products and in cuDNN where it is asked for, and nowhere else."""
    allowed = settings.dtype == "tf32"
    before = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        if settings.device.type == "cuda":
            # benchmark: cuDNN tries its convolutions at the first call and takes the fastest.
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=allowed))
        stack.callback(torch.set_float32_matmul_precision, before)
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        yield


def _start(settings: Settings) -> dict[str, Any]:
    return {
        "machine": machine.describe(settings.device),
        "versions": machine.versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": {
            "device": settings.device.type,
            "dtype": settings.dtype,
            "seconds": settings.seconds,
            "small": settings.small,
            "threads": machine.threads(),
        },
    }


def _stem(prefix: str, result: dict[str, Any]) -> str:
    dtype = result["settings"]["dtype"]
    return prefix + machine.short_name(result["machine"]) + ("" if dtype == "float32" else f"_{dtype}")


def _page(title: str, result: dict[str, Any], tables: str) -> str:
    return f"# {title}\n\n{report.provenance(result)}\n{tables}"


def _speed(arguments: Any, settings: Settings, measured: list[Point], compiled: list[Point]) -> None:
    streaming = points.SMALL_STREAMING if settings.small else points.STREAMING
    result = _start(settings)
    stem = _stem("", result)

    def save(result: dict[str, Any]) -> None:
        report.write_json(arguments.out / f"{stem}.json", result)

    backend = "aot_eager" if settings.small else "inductor"  # the C++ compiler takes longer than everything else
    speed.run(result, settings, measured, streaming, compiled, backend, save)
    text = speed.tables(result)
    print(f"\n{text}")
    report.write_text(arguments.out / f"{stem}.md", _page("numsru beside other layers", result, text))
    report.write_plot(arguments.out / f"{stem}_ratios.png", report.plot_ratios(result))
    report.write_plot(arguments.out / f"{stem}_ceiling.png", report.plot_ceiling(result))
    times = report.plot_times(result)
    if times is not None:
        report.write_plot(arguments.out / f"{stem}_times.png", times)
    if arguments.page is not None:
        page = f"{report.provenance(result)}\n{speed.layer_tables(result)}"
        report.replace_on_page(arguments.page, "speed", page)


def _figure(arguments: Any, settings: Settings, measured: list[Point], _: list[Point]) -> None:
    result = _start(settings)
    figure.run(result, settings, measured)
    text = figure.tables(result)
    print(f"\n{text}")
    path = arguments.out / _stem("figure_", result)
    report.write_json(path.with_suffix(".json"), result)
    report.write_text(path.with_suffix(".md"), _page("Time per mini-batch", result, text))
    report.write_plot(path.with_suffix(".png"), report.plot_bars(result))
    if arguments.page is not None:
        report.replace_on_page(arguments.page, "figure", f"{report.provenance(result)}\n{text}")


def _ablation(arguments: Any, settings: Settings, measured: list[Point], _: list[Point]) -> None:
    result = _start(settings)
    ablation.run(result, settings, measured)
    text = ablation.tables(result)
    print(f"\n{text}")
    path = arguments.out / _stem("ablation_", result)
    plot = report.plot_bars(result)
    report.write_json(path.with_suffix(".json"), result)
    report.write_text(path.with_suffix(".md"), _page("Why it is fast", result, text))
    report.write_plot(path.with_suffix(".png"), plot)
    if arguments.page is not None:
        report.replace_on_page(arguments.page, "ablation", f"{report.provenance(result)}\n{text}")
        report.write_plot(arguments.page.with_suffix(".png"), plot)
