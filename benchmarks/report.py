"""Results as text, files and plots."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from .contestants import GRAPHED
from .points import parse

DPI = 120
COLOURS = {
    "numsru.SRU": "black",
    "nn.LSTM": "tab:blue",
    "nn.GRU": "tab:cyan",
    "Conv1d k=2": "tab:olive",
    "Conv1d k=3": "tab:green",
    "F.linear": "tab:orange",
    "conv 1x1": "tab:brown",
    "torch loop": "tab:red",
    "compiled loop": "tab:pink",
    "compiled scan": "tab:purple",
    "sequential kernel": "tab:gray",
}


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that is also aligned: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    ruler = ["-" * max(3, widths[0]), *("-" * max(2, w - 1) + ":" for w in widths[1:])]

    def line(cells: list[str]) -> str:
        padded = [cell.rjust(len(dashes)) for cell, dashes in zip(cells, ruler, strict=True)]
        return "| " + " | ".join([cells[0].ljust(len(ruler[0])), *padded[1:]]) + " |"

    return "\n".join(map(line, [header, ruler, *rows])) + "\n"


def times_table(entries: list[dict[str, Any]], key: str, unit: float) -> str:
    """A row for each entry, named by `key`; medians, multiplied by `unit`, and ratios of all contestants."""
    names = list(dict.fromkeys(name for e in entries for name in e["times"]))

    def cell(e: dict[str, Any], name: str) -> str:
        if name not in e["times"]:
            return ""
        return f"{number(e['times'][name]['median'] * unit)} ({e['ratios'][name]:.2f})"

    return table([key, *names], [[e[key], *(cell(e, name) for name in names)] for e in entries])


def line(entry: dict[str, Any], base: str) -> str:
    """One entry while the measurement runs."""
    median = entry["times"][base]["median"]
    others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in entry["ratios"].items() if name != base)
    return f"{entry['point']}, {entry['pass']}: {base} {number(median * 1e3)} ms; ratios: {others}"


def could_not_run(entries: list[dict[str, Any]]) -> str:
    """Who could not run and why, as a list; empty if all could."""
    return "".join(sorted({f"- {name}: {reason}\n" for e in entries for name, reason in e["unavailable"].items()}))


def provenance(result: dict[str, Any]) -> str:
    """What was measured on and with, how long and how often, as a list."""
    machine, settings = result["machine"], result["settings"]
    where = [f"{machine['processor']}, {machine['cores']} cores, {machine['instructions']}"]
    if "gpu" in machine:
        where.insert(0, f"{machine['gpu']['name']}, driver {machine['gpu']['driver']}")
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    threads = ", ".join(f"{name} {value}" for name, value in settings["threads"].items())
    entries = [e for key in ("layers", "recurrence", "streaming", "entries") for e in result.get(key, [])]
    fewest = min(times["samples"] for e in entries for times in e["times"].values())
    how_long = "a trial (--small)" if settings["small"] else f"{settings['seconds']:g} seconds for each comparison"
    lines = [
        "; ".join(where),
        packages,
        f"{result['date']}; {settings['dtype']}; threads: {threads}",
        f"{how_long}; each time is the median of at least {fewest} samples",
    ]
    return "".join(f"- {line}\n" for line in lines)


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a file beside `path` and put it there when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    save(part)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    write(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, result: dict[str, Any]) -> None:
    write_text(path, json.dumps(result, indent=1) + "\n")


def write_plot(path: Path, plot: Figure) -> None:
    write(path, lambda part: plot.savefig(part, format="png", dpi=DPI))


def around(path: Path, command: str) -> tuple[str, str]:
    """What stands before and after the results of a command on a page, with the comments that mark them.

    Raises:
        ValueError: If the page lacks `<!-- measured by COMMAND -->` or `<!-- end of COMMAND -->`.
    """
    start, end = f"<!-- measured by {command} -->\n", f"<!-- end of {command} -->"
    before, found_start, rest = path.read_text(encoding="utf-8").partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise ValueError(f"{path} must hold {start.strip()!r} and {end!r}")
    return before + start, end + after


def replace_on_page(path: Path, command: str, text: str) -> None:
    """Put the results of a command in place of those that a page holds."""
    before, after = around(path, command)
    write_text(path, before + text + after)


def plot_ratios(result: dict[str, Any]) -> Figure:
    """Time of each contestant over that of numsru.SRU, at every point."""
    number_of_points = len({e["point"] for e in result["layers"]})
    if number_of_points <= 10:
        figure = Figure(figsize=(6 + 1.1 * number_of_points, 5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
    else:
        figure = Figure(figsize=(4 + 0.5 * number_of_points, 10), layout="constrained")
        panels = figure.subplots(2, 1, sharey=True)
    for panel, name in zip(panels, ("forward", "forward+backward"), strict=True):
        entries = [e for e in result["layers"] if e["pass"] == name]
        contestants = list(dict.fromkeys(c for e in entries for c in e["ratios"]))
        for k, contestant in enumerate(contestants):
            shift = 0.6 * ((k + 0.5) / len(contestants) - 0.5)  # side by side, as many are about as fast
            found = [(i + shift, e["ratios"][contestant]) for i, e in enumerate(entries) if contestant in e["ratios"]]
            colour, marker = COLOURS[contestant.removesuffix(GRAPHED)], "x" if contestant.endswith(GRAPHED) else "o"
            panel.plot(*zip(*found, strict=True), marker, color=colour, label=contestant, markersize=5)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xticks(range(len(entries)), [e["point"] for e in entries], rotation=60, ha="right")
        panel.set(title=name, yscale="log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(axis="y", alpha=0.3)
        panel.set_ylabel("time ÷ time of numsru.SRU")
    panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.suptitle(_title(result))
    return figure


def plot_times(result: dict[str, Any]) -> Figure | None:
    """Time against L: a column for each d, a row for each batch size and pass, where there are several L; or None."""
    groups: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for entry in sorted(result["layers"], key=lambda e: parse(e["point"])):
        point = parse(entry["point"])
        if point.num_layers == 1 and point.input_size == point.output_size:
            groups.setdefault((point.B, entry["pass"], point.input_size), []).append(entry)
    groups = {key: entries for key, entries in groups.items() if len(entries) > 1}
    if not groups:
        return None
    rows, columns = sorted({(B, name) for B, name, _ in groups}), sorted({d for _, _, d in groups})
    figure = Figure(figsize=(3.4 * len(columns) + 2, 3.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, (B, name) in enumerate(rows):
        for column, d in enumerate(columns):
            panel = panels[row, column]
            if (B, name, d) in groups:
                _plot_times(panel, groups[B, name, d])
                panel.set(title=f"B = {B}, d = {d}, {name}", xlabel="L", ylabel="ms")
            else:
                panel.set_axis_off()
    lines = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize="small")
    figure.suptitle(_title(result))
    return figure


def _plot_times(panel: Axes, entries: list[dict[str, Any]]) -> None:
    for contestant in dict.fromkeys(c for e in entries for c in e["times"]):
        found = [e for e in entries if contestant in e["times"]]
        panel.plot(
            [parse(e["point"]).L for e in found],
            [e["times"][contestant]["median"] * 1e3 for e in found],
            "--" if contestant.endswith(GRAPHED) else "-",
            marker=".",
            color=COLOURS[contestant.removesuffix(GRAPHED)],
            label=contestant,
        )
    panel.set(xscale="log", yscale="log")
    lengths = [parse(e["point"]).L for e in entries]
    panel.set_xticks(lengths, list(map(str, lengths)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)


def plot_ceiling(result: dict[str, Any]) -> Figure:
    """The recurrence alone: bytes per second beside those of copies, and as a fraction of an equal copy's."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    rates, fractions = figure.subplots(1, 2, sharex=True)
    copies = result["ceilings"]["copy"]
    rates.plot(
        [c["bytes"] for c in copies], [c["bytes_per_second"] / 1e9 for c in copies], color="tab:gray", label="copy"
    )
    for direction, marker in (("forward", "o"), ("backward", "s")):
        for contestant, colour in (("numsru", "black"), ("sequential kernel", "tab:red")):
            found = [e for e in result["recurrence"] if e["pass"] == direction and contestant in e["times"]]
            size = [e["bytes"] for e in found]
            rate = [e["times"][contestant]["bytes_per_second"] / 1e9 for e in found]
            label = f"{contestant}, {direction}"
            rates.plot(size, rate, marker, color=colour, label=label, markerfacecolor="none")
            fraction = [1 / e["ratios"][contestant] for e in found]
            fractions.plot(size, fraction, marker, color=colour, label=label, markerfacecolor="none")
    fractions.axhline(1, color="tab:gray", linewidth=0.8)
    for panel in (rates, fractions):
        panel.set(xscale="log", xlabel="bytes that must be moved")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    rates.set_ylabel("GB/s")
    fractions.set_ylabel("fraction of an equal copy's rate")
    rates.legend(fontsize="small")
    figure.suptitle(_title(result))
    return figure


def plot_bars(result: dict[str, Any]) -> Figure:
    """A panel for each point; bars of all contestants, forward and forward+backward."""
    points = list(dict.fromkeys(e["point"] for e in result["entries"]))
    figure = Figure(figsize=(6.5 * len(points), 4.5), layout="constrained")
    for panel, point in zip(figure.subplots(1, len(points), squeeze=False)[0], points, strict=True):
        entries = [e for e in result["entries"] if e["point"] == point]
        names = list(dict.fromkeys(name for e in entries for name in e["times"]))
        for i, entry in enumerate(entries):
            found = [
                (j, entry["times"][name]["median"] * 1e3) for j, name in enumerate(names) if name in entry["times"]
            ]
            medians = [m for _, m in found]
            bars = panel.barh([j + 0.4 * (i - 0.5) for j, _ in found], medians, height=0.38, label=entry["pass"])
            panel.bar_label(bars, [number(m) for m in medians], padding=2, fontsize="small")
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.set(title=point, xlabel="ms")
        panel.margins(x=0.12)
        panel.legend(fontsize="small")
    figure.suptitle(_title(result))
    return figure


def _title(result: dict[str, Any]) -> str:
    machine = result["machine"]
    name = machine["gpu"]["name"] if "gpu" in machine else f"{machine['processor']}, {machine['cores']} cores"
    return f"{name}; {result['settings']['dtype']}; torch {result['versions']['torch']}"
