"""The command line: `python -m benchmarks [speed | figure | ablation]`."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import numsru

from . import ablation, figure, machine, points, report, speed
from .contestants import MismatchError
from .timing import Settings

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all went well, 1 if numsru's results are wrong, 2 if it cannot be done as asked."""
    arguments = _parser().parse_args(argv)
    try:
        chosen = [points.parse(name) for name in arguments.points if name != "all"]
        compiled = [points.parse(name) for name in arguments.compile if name != "none"]
        if arguments.page is not None:
            report.around(arguments.page, arguments.command)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no CUDA device", file=sys.stderr)
        return 2
    settings = Settings(device, arguments.dtype, arguments.seconds, arguments.small)
    if refusal := _refusal(settings):
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    try:
        with _precision(settings):
            {"speed": _speed, "figure": _figure, "ablation": _ablation}[arguments.command](
                arguments, settings, chosen, compiled
            )
    except MismatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Times of numsru beside other layers.")
    parser.add_argument(
        "command", nargs="?", default="speed", choices=("speed", "figure", "ablation"),
        help="speed: every contestant on a grid of shapes (default); figure: the two panels of the original "
        "comparison; ablation: why it is fast, one change at a time",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "tf32", "bfloat16"))
    parser.add_argument(
        "--points", nargs="+", default=["all"], metavar="LxBxd",
        help="steps x batch x units, for example 128x32x256; also 100x500x512-h32-bi-4l. Default: the device's grid",
    )  # fmt: skip
    parser.add_argument(
        "--compile", nargs="+", default=[p.name for p in points.COMPILED], metavar="LxBxd",
        help="points at which torch.compile is measured too, or none. Default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=2.0, help="for each comparison. Default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results. Default: %(default)s")
    parser.add_argument("--page", type=Path, help="a Markdown page to put the tables into")
    parser.add_argument("--small", action="store_true", help="tiny shapes, few samples: to see that everything runs")
    return parser


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


def _speed(arguments: Any, settings: Settings, chosen: list[points.Point], compiled: list[points.Point]) -> None:
    grid, streaming = (points.CUDA if settings.device.type == "cuda" else points.CPU), points.STREAMING
    if settings.small:
        grid, streaming, compiled = points.SMALL, points.SMALL_STREAMING, points.SMALL[:1]
    result = _start(settings)
    stem = _stem("", result)

    def save(result: dict[str, Any]) -> None:
        report.write_json(arguments.out / f"{stem}.json", result)

    backend = "aot_eager" if settings.small else "inductor"  # the C++ compiler takes longer than everything else
    speed.run(result, settings, chosen or grid, streaming, compiled, backend, save)
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


def _figure(arguments: Any, settings: Settings, chosen: list[points.Point], _: list[points.Point]) -> None:
    result = _start(settings)
    figure.run(result, settings, chosen or (points.SMALL[:1] if settings.small else points.FIGURE))
    text = figure.tables(result)
    print(f"\n{text}")
    path = arguments.out / _stem("figure_", result)
    report.write_json(path.with_suffix(".json"), result)
    report.write_text(path.with_suffix(".md"), _page("Time per mini-batch", result, text))
    report.write_plot(path.with_suffix(".png"), report.plot_bars(result))
    if arguments.page is not None:
        report.replace_on_page(arguments.page, "figure", f"{report.provenance(result)}\n{text}")


def _ablation(arguments: Any, settings: Settings, chosen: list[points.Point], _: list[points.Point]) -> None:
    result = _start(settings)
    ablation.run(result, settings, chosen or (points.SMALL[:1] if settings.small else points.FIGURE))
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
