"""What `apply` shows on stderr: what it would take, answers before and after, what else moved,
and the shift of every module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from malmen_cli.cli.console import Console

if TYPE_CHECKING:
    from pathlib import Path

    from malmen_cli.base.model import Base
    from malmen_cli.plan import Outlook
    from malmen_cli.scoring.report import Report

SHOWN_FACTS = 12  # in the table of answers before and after
REALISED_WARNING = 0.9  # of the shift surviving the rounding to the checkpoint's dtype, below which we warn
_MEGABYTE, _GIGABYTE = 1e6, 1e9
LOCALITY_WARNING = 0.5  # of other answers kept, below which a user may want an editor


def answers(console: Console, report: Report) -> None:
    """Before and after, for the first facts, as a person would ask."""
    from rich.table import Table
    from rich.text import Text

    shown = [record for record in report.per_fact() if record["kind"] == "edit"][:SHOWN_FACTS]
    rows = Table("prompt", "target", "before", "after", box=None, pad_edge=False)
    for record in shown:
        rows.add_row(*(Text(str(record[key])) for key in ("prompt", "expected", "base", "edited")))
    console.table(rows)


def moved(console: Console, base: Base, report: Report, *, trained: bool) -> None:
    """What to do where much else moved. trained: whether a trained editor made the shift."""
    kept = report.after.figures["ls.teacher_forced"]
    if kept is not None and kept < LOCALITY_WARNING:
        untrained = f"train an editor (malmen train-editor {base.name} FACTS), or add locality probes to the facts"
        advice = "edit fewer facts at once, or a larger base" if trained else untrained
        console.note(f"other answers moved a lot (LS {kept:.2f}, teacher_forced): {advice}")


def modules(console: Console, written: dict[str, Any]) -> None:
    """The shift of every module, from `malmen.json`, and where rounding lost much of it."""
    from rich.table import Table

    columns = {
        "rank": "rank",
        "norm": "shift norm",
        "relative_norm": "relative",
        "realised": "realised",
        "retained_energy": "kept by the adapter",
    }
    shifts: dict[str, dict[str, Any]] = written["modules"]
    present = [key for key in columns if any(key in module for module in shifts.values())]
    rows = Table("module", box=None, pad_edge=False)
    for key in present:
        rows.add_column(columns[key], justify="right")
    for name, module in shifts.items():
        rows.add_row(name, *(_figure(module.get(key)) for key in present))
    console.table(rows)
    lost = [name for name, module in shifts.items() if module.get("realised", 1.0) < REALISED_WARNING]
    if lost:
        console.warn(
            f"rounding to the checkpoint's dtype kept less than {REALISED_WARNING:.0%} of the shift of "
            f"{', '.join(lost)}; --format delta keeps all of it"
        )


def outlook(console: Console, base: Base, found: Outlook, out: Path, format: str) -> None:
    """What an edit would take."""
    work = found.work
    several = "s" * (len(work.modules) > 1)
    console.note(f"would edit {len(work.modules)} module{several} of {base.name} with {found.using}")
    for name, (dk, dv) in work.modules.items():
        console.note(f"  {name}  {dk} x {dv}")
    form = f"exact factors of rank {work.rank}" if work.rank is not None else "dense"
    console.note(f"{work.facts} facts, {work.tokens} tokens, {work.rows} rows a module: {form}")
    console.note(
        f"memory about {size(work.memory)}, disk {size(found.disk)} for {format} at {out}; nothing was written"
    )


def _figure(value: Any) -> str:
    if value is None:
        return "dense"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / _GIGABYTE:.2f} GB" if count >= _GIGABYTE else f"{count / _MEGABYTE:.1f} MB"
