"""The grid: every contestant at every point, the recurrence alone, one step at a time."""

from __future__ import annotations

import collections
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch

from . import report, timing
from .contestants import BASE, PASSES, capture, contestants, host_calls, measure, recurrence_calls, streaming_calls
from .points import Point, product_flops, recurrence_bytes
from .timing import ROUNDS, Settings, compare, measure_ceilings

Save = Callable[[dict[str, Any]], None]


def run(
    result: dict[str, Any], settings: Settings, points: list[Point], streaming: list[tuple[int, int]],
    compiled: list[Point], backend: str, save: Save,
) -> None:  # fmt: skip
    """Fill in `result` and save it after every point, so that an interrupted run leaves what it has measured."""
    result["ceilings"] = measure_ceilings(settings)
    result["host"] = measure_host(settings) if settings.device.type == "cuda" else None
    result |= {"layers": [], "recurrence": [], "streaming": []}
    for point in points:
        for training in (False, True):
            found = contestants(point, settings, training, compiled=point in compiled, backend=backend)
            entry = measure(found, point, settings, training)
            entry["product_fraction"] = _product_fraction(point, training, entry, result["ceilings"])
            result["layers"].append(entry)
            print(report.line(entry, BASE), flush=True)
            del found
            _free(settings)
        for direction in ("forward", "backward"):
            result["recurrence"].append(measure_recurrence(point, settings, direction, result["ceilings"]))
            _free(settings)
        save(result)
    for B, d in streaming:
        few = settings._replace(seconds=settings.seconds / 4)
        with torch.no_grad():
            result["streaming"].append({"B": B, "d": d} | compare(streaming_calls(B, d, few), few, "numsru.SRUCell"))
    save(result)


def measure_recurrence(point: Point, settings: Settings, direction: str, ceilings: dict[str, Any]) -> dict[str, Any]:
    """`numsru.sru_recurrence` alone, "forward" or "backward"; on a GPU in a CUDA graph, without the host's time."""
    size = recurrence_bytes(point, settings.element_size, direction)
    copies = settings.copies(size)
    prepared = recurrence_calls(point, settings, direction, copies)
    calls = {}
    for name, prepare in prepared.items():
        if settings.device.type == "cuda":
            calls[name] = _captured_when_called(prepare)
        else:
            (calls[name],) = prepare()
    entry = {"point": point.name, "pass": direction, "bytes": size} | compare(calls, settings, "copy")
    for times in entry["times"].values():
        times |= {key: times[key] / copies for key in ("median", "low", "high")}
        times["bytes_per_second"] = size / times["median"]
        times["fraction_of_ceiling"] = times["bytes_per_second"] / ceilings["copy_bytes_per_second"]
    return entry


def measure_host(settings: Settings) -> dict[str, float]:
    """Seconds of the host for a call on a GPU, which has next to nothing to compute: the median of many."""
    samples: dict[str, list[float]] = collections.defaultdict(list)
    repeats = 2 if settings.small else 100
    for training, calls in zip((False, True), host_calls(settings), strict=True):
        with torch.set_grad_enabled(training):  # here and not in each call, where it would count
            for _ in range(ROUNDS[0] if settings.small else 30):
                for name, call in calls.items():
                    torch.cuda.synchronize()
                    samples[name].append(timing.seconds(call, repeats, torch.device("cpu")))  # by the host's clock
    return {name: statistics.median(s) for name, s in samples.items()}


def _captured_when_called(prepare: Callable[[], list[Callable[[], Any]]]) -> Callable[[], None]:
    """So that what cannot be captured is reported as unavailable."""
    replay: list[Callable[[], Any]] = []

    def call() -> None:
        if not replay:
            replay.append(capture(prepare))
        replay[0]()

    return call


def _product_fraction(point: Point, training: bool, entry: dict[str, Any], ceilings: dict[str, Any]) -> float:
    """The rate of numsru.SRU's multiplications as a fraction of the large matrix product's."""
    rate = product_flops(point, training) / entry["times"][BASE]["median"]
    return rate / max(ceilings["product_flops_per_second"].values())


def _free(settings: Settings) -> None:
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()


def layer_tables(result: dict[str, Any]) -> str:
    """Time of every contestant at every point, a table for each pass."""
    parts = []
    for name in PASSES:
        entries = [e for e in result["layers"] if e["pass"] == name]
        parts.append(f"{name.capitalize()}: ms (ratio to numsru.SRU)\n\n{report.times_table(entries, 'point', 1e3)}")
    return "\n".join(parts)


def tables(result: dict[str, Any]) -> str:
    """The result as text."""
    ceilings = result["ceilings"]
    rates = ", ".join(f"{n} {r / 1e12:.3g} TFLOP/s" for n, r in ceilings["product_flops_per_second"].items())
    size = "x".join(map(str, ceilings["product_size"]))
    parts = [
        "## Ceilings\n",
        report.table(
            ["copy, MB", "GB/s"],
            [[f"{c['bytes'] / 2**20:.3g}", report.number(c["bytes_per_second"] / 1e9)] for c in ceilings["copy"]],
        ),
        f"Matrix product of {size}: {rates}.\n",
    ]
    parts += ["## Layers\n", layer_tables(result)]
    rows = []
    for e in result["recurrence"]:
        times = e["times"]
        if "numsru" not in times:
            continue
        best = times["numsru"]
        other = times.get("sequential kernel")
        rows.append([
            e["point"], e["pass"], report.number(e["bytes"] / 1e6), report.number(best["median"] * 1e3),
            report.number(best["bytes_per_second"] / 1e9), f"{1 / e['ratios']['numsru']:.2f}",
            f"{best['fraction_of_ceiling']:.2f}", report.number(other["median"] * 1e3) if other else "",
        ])  # fmt: skip
    header = ["point", "pass", "MB", "ms", "GB/s", "of an equal copy", "of the fastest copy", "sequential kernel, ms"]
    parts += ["## The recurrence alone\n", report.table(header, rows)]
    rows = [
        [e["point"], e["pass"], f"{e['product_fraction']:.2f}", f"{e['errors'][BASE]:.1e}"] for e in result["layers"]
    ]
    header = ["point", "pass", "rate of products, of the ceiling", "error against float64"]
    parts += ["## numsru.SRU\n", report.table(header, rows)]
    if result["host"]:
        rows = [[name, report.number(seconds * 1e6)] for name, seconds in result["host"].items()]
        parts += ["## The host's time for a call\n", report.table(["call", "µs"], rows)]
    if result["streaming"]:
        entries = [{"B x d": f"{e['B']}x{e['d']}"} | e for e in result["streaming"]]
        parts += ["## One step: µs (ratio to numsru.SRUCell)\n", report.times_table(entries, "B x d", 1e6)]
    compiled = [
        [e["point"], e["pass"], name, f"{seconds:.1f}"]
        for e in result["layers"] for name, seconds in e["first_call"].items() if name.startswith("compiled")
    ]  # fmt: skip
    if compiled:
        parts += ["## torch.compile\n", report.table(["point", "pass", "form", "seconds to compile"], compiled)]
    everything = result["layers"] + result["recurrence"] + result["streaming"]
    if reasons := report.could_not_run(everything):
        parts += ["## Could not run\n", reasons]
    return "\n".join(parts)
