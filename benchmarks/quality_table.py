"""Rows of quality.py: kept as JSON lines, printed as a Markdown table, drawn as lines against the number of facts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from malmen_cli.artifact.atomic import write_file
from malmen_cli.scoring.plot import Point, plot_format, sizes_plot

Row = dict[str, Any]

BASE = "base (no edit)"
COLUMNS = (
    "facts",
    "method",
    "ES tf / greedy",
    "GS tf / greedy",
    "LS tf / greedy",
    "PS tf / greedy",
    "score (95%)",
    "shift s",
    "training s",
    "relative norm",
    "perplexity",
)
HEAD = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"


def key(row: Mapping[str, Any]) -> str:
    """What makes two rows the same measurement: base, facts, method, editor, settings and seed, as canonical JSON."""
    base, facts = row["base"], row["facts"]
    parts = {
        "base": (base["fingerprint"], base["dtype"]),
        "facts": (facts["sha256"], facts["edited"], facts["scored"]),
        "method": _variant(row),
        "seed": row["seed"],
    }
    return json.dumps(parts, sort_keys=True)


def read_rows(file: Path) -> list[Row]:
    """The rows of a file, none where there is no file. Of the same measurement the last one counts.

    A line that a killed run left unfinished is passed over.
    """
    rows: dict[str, Row] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[key(row)] = row
    return list(rows.values())


def append_row(file: Path, row: Row) -> None:
    """Add one line and have it on the disk before anything else is measured."""
    with file.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":  # a killed run's
                stream.write(b"\n")
        stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def line(row: Row, label: str) -> str:
    """One row of the table."""
    cells = [_facts_cell(row["facts"]), label]
    if "error" in row:
        return "| " + " | ".join([*cells, f"failed: {row['error']}", *[""] * (len(COLUMNS) - 3)]) + " |"
    figures, perplexity = row["figures"], row["perplexity"]
    cells += [
        f"{_share(figures, f'{p}.teacher_forced')} / {_share(figures, f'{p}.greedy')}" for p in ("es", "gs", "ls")
    ]
    forced, greedy = (_share(figures, f"ps.{protocol}") for protocol in ("teacher_forced", "greedy"))
    cells.append("-" if forced == greedy == "-" else f"{forced} / {greedy}")
    low, high = row["ci95"].get("score") or (0.0, 0.0)
    cells.append(f"{figures['score'] or 0:.3f} ({low:.3f}-{high:.3f})")
    cells += ["-" if row[name] is None else f"{row[name]:.1f}" for name in ("seconds", "training_seconds")]
    cells.append("-" if row["relative_norm"] is None else f"{row['relative_norm']:.3f}")
    cells.append(f"{_shown(perplexity['before'])} -> {_shown(perplexity['after'])}")
    return "| " + " | ".join(cells) + " |"


def heading(row: Row) -> str:
    """What one table is of: the facts, the base and how it was run."""
    base, facts = row["base"], row["facts"]
    return f"\n{facts['name']} ({facts['sha256'][:12]}), {base['name']}, {base['dtype']}, {row['device']}\n"


def table(rows: Sequence[Row]) -> str:
    """Every row, a table for each base and facts file: by size, the base's own row first."""
    named = labels(rows)
    lines = []
    for block in _blocks(rows):
        lines += [heading(block[0]), HEAD]
        lines += [line(row, named[_variant(row)]) for row in block]
    return "\n".join(lines)


def labels(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What to call each method: its name, with the editor's folder or the spec where the name alone is not enough."""
    found: dict[str, tuple[str, str]] = {}
    for row in rows:
        method = row["method"]
        found[_variant(row)] = (method["name"], method["source"] or "default")
    names = [name for name, _ in found.values()]
    full = {variant: f"{name} ({source})" for variant, (name, source) in found.items()}
    said = list(full.values())
    return {
        variant: name if names.count(name) == 1 else full[variant] + _digest(variant) * (said.count(full[variant]) > 1)
        for variant, (name, _) in found.items()
    }


def label_of(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The label of one row among others."""
    return labels([*rows, row])[_variant(row)]


def draw(rows: Sequence[Row], file: Path) -> None:
    """Lines against the number of facts, a row of panels for each facts file of more than one size."""
    named = labels(rows)
    blocks: dict[str, dict[str, list[Point]]] = {}
    edited = [row for row in rows if "error" not in row and row["method"]["name"] != BASE]
    several = len({row["base"]["fingerprint"] for row in edited}) > 1
    for block in _blocks(edited):
        facts, base = block[0]["facts"], block[0]["base"]
        name = Path(facts["name"]).stem + (f"\n{base['name']}" if several else "")
        lines = blocks.setdefault(name, {})
        for row in block:
            point = Point(row["facts"]["edited"], row["figures"], row["ci95"])
            lines.setdefault(named[_variant(row)], []).append(point)
    wide = {name: lines for name, lines in blocks.items() if len({p.x for ps in lines.values() for p in ps}) > 1}
    write_file(file, sizes_plot(wide or blocks, plot_format(file)))


def _blocks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    places: dict[tuple[str, str, str], int] = {}

    def place(row: Row) -> int:
        base = row["base"]
        return places.setdefault((base["fingerprint"], base["dtype"], row["facts"]["sha256"]), len(places))

    ordered = sorted(rows, key=lambda row: (place(row), row["facts"]["edited"], row["method"]["name"] != BASE))
    for _, block in groupby(ordered, key=place):
        yield list(block)


def _variant(row: Mapping[str, Any]) -> str:
    """A method with its settings and the editor's bytes, whatever folder they lie in."""
    method = row["method"]
    editor = method["editor"]["sha256"] if method["editor"] else None
    return json.dumps([method["name"], method["settings"], editor], sort_keys=True)


def _digest(variant: str) -> str:
    return f" {json.loads(variant)[2][:8]}" if json.loads(variant)[2] else ""


def _facts_cell(facts: Mapping[str, Any]) -> str:
    edited, scored = facts["edited"], facts["scored"]
    if facts["one_by_one"]:
        return f"1 ({scored:,} one by one)"
    return f"{edited:,}" + (f" ({scored:,} scored)" if scored < edited else "")


def _share(figures: Mapping[str, float | None], name: str) -> str:
    value = figures.get(name)
    return "-" if value is None else f"{value:.3f}"


def _shown(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 10_000 else f"{perplexity:.1e}"
