"""Figures as pictures: one evaluation as bars, methods against the number of facts, a training curve.

Every function returns the bytes of a whole file, so that the caller can put it in place in one step. matplotlib is an
extra of the package and imported where something is drawn, without pyplot: no window, no state between two pictures.
The same figures give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malmen_cli.exceptions import OutputError
from malmen_cli.scoring.judge import PROTOCOLS
from malmen_cli.scoring.metrics import Interval, harmonic_mean
from malmen_cli.scoring.report import SCORED, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
# Okabe and Ito's palette, told apart with every common colour blindness; its yellow is too light for a line.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#8C8C8C"
PANELS = {"es": "ES: edit success", "gs": "GS: generalisation", "ls": "LS: locality", "score": "score"}
_DPI = 150
_LABEL_WIDTH = 0.16  # of "7,499" at 8 points, as a share of a panel's width
_DASHES: dict[str, Any] = {"teacher_forced": "-", "greedy": "--"}
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.hashsalt": "malmen",  # else the ids in an SVG are random
}
# What would name the day or the program's version is left out.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@dataclass(frozen=True)
class Point:
    """Figures by dotted name (`es.greedy`, `score`) at one place of the x axis: a number of facts, or a step."""

    x: int
    figures: Mapping[str, float | None]
    ci95: Mapping[str, Interval | None] = field(default_factory=dict)


def plot_format(path: Path) -> str:
    """What to draw for a file of this name. Raises OutputError for other endings and where matplotlib is missing."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise OutputError(f"{path}: a picture ends in .png, .svg or .pdf")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise OutputError(f"{path}: drawing needs matplotlib; run: pip install 'malmen-cli[plot]'") from None
    return kind


def eval_plot(report: Report, kind: str) -> bytes:
    """One evaluation: every figure of the score under its protocols, base beside edited, with 95% intervals.

    kind: one of FORMATS. Figures that were not measured are left out.
    """
    portability = tuple(f"ps.{protocol}" for protocol in PROTOCOLS)
    names = [name for name in (*SCORED, *portability, "score") if report.after.figures.get(name) is not None]
    with _drawing((7.2, 0.8 + 0.42 * max(len(names), 1))) as figure:
        axes = figure.subplots()
        for offset, label, colour, row in (
            (-0.2, "base", GREY, report.before),
            (0.2, "edited", PALETTE[0], report.after),
        ):
            values = [row.figures[name] or 0.0 for name in names]
            intervals = [row.ci95[name] or (value, value) for name, value in zip(names, values, strict=True)]
            places = [place + offset for place in range(len(names))]
            axes.barh(places, values, 0.38, color=colour, label=label)
            for place, value, (low, high) in zip(places, values, intervals, strict=True):
                axes.plot([low, high], [place, place], color="black", linewidth=0.9, solid_capstyle="butt")
                axes.plot([low, high], [place, place], "|", color="black", markersize=4, markeredgewidth=0.9)
                axes.text(max(value, high) + 0.012, place, f"{value:.2f}", va="center", fontsize=8)
        axes.set_yticks(range(len(names)), [_shown(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.08)
        axes.set_xticks([tick / 5 for tick in range(6)])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"share of {report.facts:,} facts, with 95% intervals")
        figure.legend(loc="outside upper right", ncols=2)
        return _bytes(figure, kind)


def sizes_plot(blocks: Mapping[str, Mapping[str, Sequence[Point]]], kind: str) -> bytes:
    """Edit quality against the number of facts edited at once, a line a method.

    blocks: name of the facts -> method -> points with x in facts; a row of four panels for each. Drawn solid under
    teacher_forced, dashed under greedy, and the score with its 95% interval as a band. kind: one of FORMATS.
    """
    methods = list(dict.fromkeys(method for lines in blocks.values() for method in lines))
    with _drawing((11.0, 0.6 + 2.7 * max(len(blocks), 1))) as figure:
        grid = figure.subplots(max(len(blocks), 1), 4, squeeze=False, sharey=True)
        for row, (name, lines) in zip(grid, blocks.items(), strict=False):
            for place, method in enumerate(methods):
                _lines(row, sorted(lines.get(method, ()), key=lambda point: point.x), place)
            sizes = sorted({point.x for points in lines.values() for point in points})
            for axes in row:
                axes.set_xscale("log")
                axes.set_xticks(sizes, _labels(sizes), fontsize=8)
                axes.minorticks_off()
                axes.set_xlabel("facts edited at once")
            row[0].set_ylabel(name)
        _legend(figure, methods)
        return _bytes(figure, kind)


def curve_plot(description: Mapping[str, Any], kind: str) -> bytes:
    """The training curve of an editor from its `editor.json`: every validation, the step that was kept marked.

    kind: one of FORMATS. Raises OutputError when the description holds no validation.
    """
    points = [_validated(item) for item in description.get("scores", {}).get("at", ()) if item.get("validation")]
    if not points:
        raise OutputError("this editor's description holds no validation, so there is no curve to draw")
    best = description["best_step"]
    with _drawing((11.0, 3.3)) as figure:
        row = figure.subplots(1, 4, sharey=True)
        _lines(row, points, 0)
        for axes in row:
            axes.set_xlim(left=0)
            axes.set_xlabel("training step")
            axes.axvline(best, color=GREY, linewidth=1, linestyle=":")
        kept = next((point.figures["score"] for point in points if point.x == best), None)
        if kept is not None:
            row[3].plot([best], [kept], "o", color=PALETTE[1], markersize=8, zorder=3)
        row[0].set_ylabel(f"{description['validation_facts']['count']:,} validation facts")
        _legend(figure, [], best=f"kept: step {best}" + (f", score {kept:.3f}" if kept is not None else ""))
        return _bytes(figure, kind)


def scale_plot(rows: Sequence[tuple[int, float, int]], kind: str) -> bytes:
    """Seconds and peak bytes against the number of facts, (facts, seconds, bytes) each, on logarithmic axes."""
    rows = sorted(rows)
    sizes = [row[0] for row in rows]
    with _drawing((7.2, 3.0)) as figure:
        seconds, memory = figure.subplots(1, 2)
        for axes, values, title in (
            (seconds, [row[1] for row in rows], "seconds"),
            (memory, [row[2] / 1e9 for row in rows], "peak memory beyond the facts, GB"),
        ):
            axes.plot(sizes, values, color=PALETTE[0], marker=MARKERS[0])
            axes.set(title=title, xlabel="facts", xscale="log")
            axes.set_xticks(sizes, _labels(sizes))
            axes.minorticks_off()
        seconds.set_yscale("log")
        memory.set_ylim(0, 1.2 * max(row[2] for row in rows) / 1e9)
        return _bytes(figure, kind)


def _validated(item: Mapping[str, Any]) -> Point:
    """One validation of `editor.json` (`es_teacher_forced`, ...) under the names of a report."""
    shares: dict[str, float | None] = {name: item["validation"].get(name.replace(".", "_", 1)) for name in SCORED}
    return Point(int(item["step"]), shares | {"score": harmonic_mean(list(shares.values())) or 0.0})


def _lines(row: Iterable[Axes], points: Sequence[Point], place: int) -> None:
    """One method's line in each of the four panels; `place` decides its colour and marker."""
    style: dict[str, Any] = {"color": PALETTE[place % len(PALETTE)], "marker": MARKERS[place % len(MARKERS)]}
    for axes, (part, title) in zip(row, PANELS.items(), strict=True):
        axes.set_title(axes.get_title("left") or title, loc="left")
        axes.set_ylim(-0.03, 1.03)
        if part == "score":
            there = [(p.x, p.figures["score"], p.ci95.get("score")) for p in points if p.figures["score"] is not None]
            axes.plot([x for x, _, _ in there], [score for _, score, _ in there], **style)
            bands = [(x, *interval) for x, _, interval in there if interval is not None]
            axes.fill_between(*_columns(bands), color=style["color"], alpha=0.15, linewidth=0)
            if bands:
                axes.set_title(f"{title}, with 95% interval", loc="left")
            continue
        for protocol, dashes in _DASHES.items():
            shares = [(p.x, p.figures[f"{part}.{protocol}"]) for p in points]
            xs, ys = [x for x, y in shares if y is not None], [y for _, y in shares if y is not None]
            hollow: dict[str, Any] = {"markerfacecolor": "white"} if protocol == "greedy" else {}
            axes.plot(xs, ys, linestyle=dashes, **style, **hollow)


def _columns(rows: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float], list[float]]:
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _legend(figure: Figure, methods: Sequence[str], *, best: str | None = None) -> None:
    """One for the whole figure: colours are methods, dashes are protocols."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=PALETTE[place % len(PALETTE)], marker=MARKERS[place % len(MARKERS)], label=method)
        for place, method in enumerate(methods)
    ]
    colour = GREY if methods else PALETTE[0]
    handles += [Line2D([], [], color=colour, linestyle=dash, label=protocol) for protocol, dash in _DASHES.items()]
    if best is not None:
        handles.append(Line2D([], [], color=PALETTE[1], marker="o", markersize=8, linestyle="none", label=best))
    widest = 0.55 + 0.065 * max(len(str(handle.get_label())) for handle in handles)  # inches: the sample, the text
    columns = max(1, min(len(handles), int(figure.get_figwidth() / widest)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)


def _shown(name: str) -> str:
    part, _, protocol = name.partition(".")
    return f"{part.upper()} {protocol}" if protocol else part


def _labels(sizes: Sequence[int]) -> list[str]:
    """Tick labels for ascending sizes on a logarithmic axis; one that would touch the next larger one is empty."""
    if not sizes:
        return []
    labels, labelled = [f"{sizes[-1]:,}"], sizes[-1]
    for size in reversed(sizes[:-1]):
        clear = math.log(labelled / size) >= _LABEL_WIDTH * math.log(sizes[-1] / sizes[0])
        labels.append(f"{size:,}" if clear else "")
        labelled = size if clear else labelled
    return labels[::-1]


@contextmanager
def _drawing(size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of `size` inches under our own style, whatever the user's matplotlibrc says."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield Figure(figsize=size, layout="constrained")


def _bytes(figure: Figure, kind: str) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, dpi=_DPI, metadata=_METADATA[kind])
    return buffer.getvalue()
