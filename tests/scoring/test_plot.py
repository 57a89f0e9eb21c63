"""Pictures: whole files of the right kind, the same for the same figures, and refused before anything is drawn."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.exceptions import OutputError
from malmen_cli.scoring.metrics import harmonic_mean
from malmen_cli.scoring.plot import FORMATS, PALETTE, Point, _labels, curve_plot, eval_plot, plot_format, sizes_plot
from malmen_cli.scoring.report import SCORED, Report, Row

PNG = b"\x89PNG\r\n\x1a\n"
MAGIC = {"png": PNG, "svg": b"<?xml", "pdf": b"%PDF-"}
SMALLEST = 5_000  # bytes: an empty picture of these sizes is below, one with axes and text above


def row(*shares: float | None) -> Row:
    figures: dict[str, float | None] = dict(zip(SCORED, shares, strict=True))
    figures["score"] = harmonic_mean(list(figures.values()))
    intervals = {
        name: None if share is None else (max(share - 0.05, 0.0), share + 0.05) for name, share in figures.items()
    }
    return Row(figures, intervals)


REPORT = Report(1024, row(0.2, 0.0, 0.1, 0.0, 1.0, 1.0), row(0.9, 0.8, 0.6, 0.5, 0.7, 0.4), (), ())


def points(*sizes: int) -> list[Point]:
    one = row(0.9, 0.8, 0.6, 0.5, 0.7, 0.4)
    return [Point(size, one.figures, one.ci95) for size in sizes]


def description(*steps: int) -> dict[str, Any]:
    validation = {name.replace(".", "_"): 0.5 for name in SCORED}
    at = [{"step": step, "learned": 1.0, "validation": validation} for step in steps]
    return {"scores": {"score": 0.5, "at": at}, "best_step": 100, "validation_facts": {"count": 256}}


def texts(svg: bytes) -> str:
    """What an SVG says: matplotlib notes every text it draws as outlines in a comment."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", svg.decode()))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_picture_is_a_whole_file_and_the_same_twice(kind: str) -> None:
    blocks = {"facts": {"malmen": points(1, 64), "finetune": points(1, 64)}}
    for draw, content in ((eval_plot, REPORT), (sizes_plot, blocks), (curve_plot, description(50, 100))):
        first, second = (draw(content, kind) for _ in range(2))  # type: ignore[operator]
        assert first == second
        assert first.startswith(MAGIC[kind])
        assert len(first) > SMALLEST


def test_an_evaluation_names_every_figure_and_writes_its_value() -> None:
    said = texts(eval_plot(REPORT, "svg")).splitlines()
    for name in ("ES", "GS", "LS"):
        assert {f"{name} teacher_forced", f"{name} greedy"} <= set(said)
    assert {"score", "base", "edited", "0.90", "0.20", "share of 1,024 facts, with 95% intervals"} <= set(said)
    assert not any("PS" in text for text in said)


def test_what_was_not_measured_is_left_out() -> None:
    """--no-greedy."""
    forced = row(0.9, None, 0.6, None, 0.7, None)
    said = texts(eval_plot(Report(4, forced, forced, (), ()), "svg"))
    assert "ES teacher_forced" in said
    assert "greedy" not in said


def test_an_evaluation_without_any_figure_is_still_a_picture() -> None:
    nothing = row(None, None, None, None, None, None)
    assert eval_plot(Report(0, nothing, nothing, (), ()), "png").startswith(PNG)


def test_portability_is_drawn_where_there_is_some() -> None:
    more = {"ps.teacher_forced": 0.3, "ps.greedy": 0.2}
    with_it = Row({**REPORT.after.figures, **more}, {**REPORT.after.ci95, **dict.fromkeys(more, (0.1, 0.4))})
    assert "PS greedy" in texts(eval_plot(Report(4, with_it, with_it, (), ()), "svg"))


def test_sizes_have_a_line_a_method_and_a_row_of_panels_a_facts_file() -> None:
    blocks = {"counterfact": {"malmen": points(64, 1, 1024), "mend": points(64)}, "zsre": {"malmen": points(1, 200)}}
    svg = sizes_plot(blocks, "svg")
    said = texts(svg)
    for text in ("malmen", "mend", "counterfact", "zsre", "1,024", "200", "score, with 95% interval"):
        assert text in said
    assert said.count("ES: edit success") == said.count("score, with 95% interval") == 2
    assert PALETTE[0].lower() in svg.decode().lower()
    assert PALETTE[1].lower() in svg.decode().lower()


def test_a_method_without_intervals_has_no_band() -> None:
    bare = [Point(size, point.figures) for size, point in zip((1, 64), points(1, 64), strict=True)]
    assert "interval" not in texts(sizes_plot({"facts": {"malmen": bare}}, "svg"))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([64], ["64"]),
        ([1, 64, 1024, 7499], ["1", "64", "1,024", "7,499"]),
        ([1, 64, 6000, 7499], ["1", "64", "", "7,499"]),
    ],
)
def test_labels_that_would_touch_are_left_out(sizes: list[int], expected: list[str]) -> None:
    assert _labels(sizes) == expected


def test_a_curve_marks_the_step_that_was_kept() -> None:
    said = texts(curve_plot(description(50, 100, 150), "svg"))
    assert "kept: step 100, score 0.500" in said
    assert "256 validation facts" in said


def test_figures_a_validation_had_nothing_for_are_left_out() -> None:
    content = description(50, 100)
    for item in content["scores"]["at"]:
        item["validation"] |= {"gs_teacher_forced": None, "gs_greedy": None}
    assert curve_plot(content, "png").startswith(PNG)


@pytest.mark.parametrize("content", [{}, {"scores": {"at": []}}, {"scores": {"at": [{"step": 1, "validation": None}]}}])
def test_without_a_validation_there_is_no_curve(content: dict[str, Any]) -> None:
    with pytest.raises(OutputError, match="no validation"):
        curve_plot(content, "png")


@pytest.mark.parametrize(("name", "kind"), [("a.png", "png"), ("a.SVG", "svg"), ("b/a.tar.pdf", "pdf")])
def test_the_ending_decides_the_format(name: str, kind: str) -> None:
    assert plot_format(Path(name)) == kind


@pytest.mark.parametrize("name", ["a.jpg", "a", "png", ".png"])
def test_other_endings_are_refused(name: str) -> None:
    with pytest.raises(OutputError, match=r"\.png, \.svg or \.pdf"):
        plot_format(Path(name))


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(OutputError, match=re.escape("pip install 'malmen-cli[plot]'")):
        plot_format(Path("a.png"))


def test_the_user_s_own_style_is_neither_taken_nor_changed() -> None:
    import matplotlib

    plain = eval_plot(REPORT, "png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert eval_plot(REPORT, "png") == plain
        assert matplotlib.rcParams["font.size"] == 30
