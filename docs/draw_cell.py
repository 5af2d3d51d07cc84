"""Draws docs/sru_cell.svg, one step of an SRU layer: `python docs/draw_cell.py`."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch

INK, BAND, FILL = "#263238", "#eceff1", "#ffffff"
GATE, STATE, SKIP = "#c62828", "#1565c0", "#2e7d32"
Point = tuple[float, float]


def line(axes: Axes, *points: Point, color: str = INK, arrow: bool = True, dashed: bool = False) -> None:
    style = {"color": color, "lw": 1.8, "ls": (0, (3, 2)) if dashed else "-", "solid_capstyle": "round"}
    axes.plot(*zip(*points, strict=True), zorder=2, **style)
    if arrow:
        props = {"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}
        axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=props, zorder=2)


def box(axes: Axes, at: Point, text: str, width: float = 1.0, color: str = INK) -> None:
    x, y = at
    patch = FancyBboxPatch((x - width / 2, y - 0.27), width, 0.54, boxstyle="round,pad=0.02,rounding_size=0.1")
    patch.set(facecolor=FILL, edgecolor=color, linewidth=1.6, zorder=3)
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center_baseline", color=color, fontsize=13, zorder=4)


def circle(axes: Axes, at: Point, text: str, color: str) -> None:
    axes.add_patch(Circle(at, 0.27, facecolor=FILL, edgecolor=color, linewidth=1.6, zorder=3))
    axes.text(*at, text, ha="center", va="center_baseline", color=color, fontsize=13, zorder=4)


def label(axes: Axes, at: Point, text: str, color: str = INK, size: float = 13, ha: str = "center") -> None:
    axes.text(*at, text, ha=ha, va="center_baseline", color=color, fontsize=size, zorder=4)


def draw() -> None:
    figure, axes = plt.subplots(figsize=(9.4, 6.0))
    axes.set(xlim=(0, 14.1), ylim=(0, 9.0), aspect="equal")
    axes.axis("off")

    for bottom, top, text in (
        (1.15, 2.55, "one matrix product\nfor all steps"),
        (2.8, 7.9, "one kernel,\nstep after step,\nelement by element"),
    ):
        axes.add_patch(FancyBboxPatch((0.1, bottom), 13.9, top - bottom, boxstyle="round,pad=0,rounding_size=0.15",
                                      facecolor=BAND, edgecolor="none", zorder=0))  # fmt: skip
        axes.text(0.3, top - 0.2, text, ha="left", va="top", color="#546e7a", fontsize=11, linespacing=1.35)

    candidate, forget, reset, skip = 3.6, 6.0, 9.6, 12.2
    label(axes, (7.8, 0.25), "$x_t$", SKIP, 15)
    line(axes, (7.8, 0.55), (7.8, 0.85), arrow=False, color=SKIP)
    for x, text in ((candidate, "$W$"), (forget, "$W_f$"), (reset, "$W_r$"), (skip, "$1$  or  $W_4$")):
        line(axes, (7.8, 0.85), (x, 0.85), (x, 1.55), color=SKIP)
        box(axes, (x, 1.85), text, 1.7 if x == skip else 1.0)

    # The state: from the left to the right through the mix with the candidate.
    y, top = 5.0, 6.8
    label(axes, (0.75, y), "$c_{t-1}$", STATE, 15)
    line(axes, (1.3, y), (5.72, y), color=STATE)
    line(axes, (6.28, y), (12.95, y), color=STATE)
    label(axes, (13.4, y), "$c_t$", STATE, 15)
    circle(axes, (forget, y), "mix", STATE)
    line(axes, (candidate, 2.13), (candidate, 4.35), (5.05, 4.35), (5.78, 4.82))
    label(axes, (3.1, 3.9), r"$\tilde x_t$")

    for x, name, end in ((forget, "$f_t$", y - 0.28), (reset, "$r_t$", top - 0.28)):
        line(axes, (x, 2.13), (x, 3.3), color=GATE)
        circle(axes, (x, 3.58), r"$\sigma$", GATE)
        if end > y:  # leaves a gap in the state's line
            axes.plot([x, x], [y - 0.16, y + 0.16], color=BAND, lw=7, zorder=2)
        line(axes, (x, 3.86), (x, end), color=GATE)
        label(axes, (x + 0.42, 4.2), name, GATE)
    line(axes, (1.9, y), (1.9, 3.1), (8.9, 3.1), arrow=False, dashed=True, color=STATE)
    for x in (forget, reset):
        line(axes, (x - 0.7, 3.1), (x - 0.22, 3.4), dashed=True, color=STATE)
    label(axes, (2.05, 3.32), "version 2", STATE, 10, ha="left")

    label(axes, (5.6, 5.6), r"$c_t = f_t\,c_{t-1} + (1 - f_t)\,\tilde x_t$", STATE, 14, ha="right")

    # The output: a mix of g(c_t) and the input.
    line(axes, (7.8, y), (7.8, top), (9.32, top), color=STATE)
    box(axes, (7.8, 5.95), "$g$", 0.8, STATE)
    axes.plot([skip, skip], [y - 0.16, y + 0.16], color=BAND, lw=7, zorder=2)
    line(axes, (skip, 2.13), (skip, top), (9.88, top), color=SKIP)
    label(axes, (skip - 1.1, top - 0.35), "highway", SKIP, 11)
    circle(axes, (reset, top), "mix", INK)
    line(axes, (reset, top + 0.28), (reset, 8.3))
    label(axes, (reset + 0.3, 7.5), r"$h_t = r_t\,g(c_t) + (1 - r_t)\,x_t$", INK, 14, ha="left")
    label(axes, (reset, 8.65), "$h_t$", INK, 15)

    figure.tight_layout(pad=0.1)
    figure.savefig(Path(__file__).with_name("sru_cell.svg"), metadata={"Date": None})


if __name__ == "__main__":
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "numsru", "mathtext.fontset": "cm", "font.family": "sans-serif"})
    draw()
